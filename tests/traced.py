"""Inspection of traced programs."""


def inside(equation) -> list:
    """The jaxprs that an equation runs: the body of a loop, a called function, the rule of a custom derivative."""
    programs = (getattr(value, "jaxpr", value) for value in equation.params.values())
    return [program for program in programs if hasattr(program, "eqns")]
