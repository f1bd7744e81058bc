"""The text of a compiled program as instructions with their sizes and the number of times each one runs.

XLA's own cost analysis counts the body of a loop once and does not report collectives; the text has both.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAMED = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(?:(ENTRY) )?%?([\w.\-]+) \(.*\) -> .* \{$")
_BODY, _CONDITION = (rf"{name}=%?([\w.\-]+)" for name in ("body", "condition"))
_CALLED = re.compile(r"\b(?:calls|body|to_apply|(?:branch|true|false)_computations?)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result, as one device holds it."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Bytes of its elements, without the padding of tiles."""
        bits = re.search(r"\d+", self.dtype)  # the first number of a name: "bf16", "f8e4m3fn", "c64"
        item = int(bits[0]) / 8 if bits else float(self.dtype == "pred")  # "token" and "opaque" have none
        return int(math.prod(self.shape) * item)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # its result; several for a tuple
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        """Bytes of its result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def bytes_in_memory(self) -> int:
        """The same without what a TPU keeps in its vector memory (memory space 1)."""
        return sum(array.bytes for array in self.arrays if "S(1)" not in array.layout)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls."""
        return tuple(re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(self.attributes))))

    def attribute(self, pattern: str) -> str:
        """The first group of a regular expression over the attributes, "" where it is not found."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a module by name, each with its instructions in order."""

    computations: dict[str, Computation]
    entry: str

    def runs(self, name: str = "", times: int = 1) -> Iterator[tuple[Computation, Instruction, int]]:
        """Yield (computation, instruction, times it runs) of `times` calls of a computation, the entry by default.

        Fusions and reducers are not entered.
        """
        computation = self.computations[name or self.entry]
        for instruction in computation.values():
            yield computation, instruction, times
            if instruction.opcode == "while":
                yield from self.runs(instruction.attribute(_BODY), times * self.trips(instruction))
            elif instruction.opcode == "conditional":  # every branch is counted: an upper bound
                for branch in instruction.called:
                    yield from self.runs(branch, times)
            elif instruction.opcode in ("call", "async-start"):
                yield from self.runs(instruction.called[0], times)

    def trips(self, loop: Instruction) -> int:
        """Iterations of a while loop: as noted by the compiler, or from the limit and step of its counter.

        A loop whose end depends on data (an adaptive solver) counts as 1.
        """
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition, body = (self.computations[loop.attribute(part)] for part in (_CONDITION, _BODY))
        ends = list(condition.values())[-1]
        sides = [condition[name] for name in ends.operands]
        if ends.opcode != "compare" or [side.opcode for side in sides] != ["get-tuple-element", "constant"]:
            return 1
        advanced = body[list(body.values())[-1].operands[int(sides[0].attribute(r"index=(\d+)"))]]
        steps = [body[name] for name in advanced.operands if body[name].opcode == "constant"]
        limit, *step = (int(constant.attribute(r"^\((-?\d+)\)")) for constant in (sides[1], *steps))
        return -(-limit // step[0]) if step else 1

    def inner(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """Yield every instruction of the computations that `instruction` calls, at any depth."""
        for name in instruction.called:
            computation = self.computations[name]
            for inner in computation.values():
                yield computation, inner
                yield from self.inner(inner)


def parse(text: str) -> Program:
    """Parse the text of a compiled module (jax.stages.Compiled.as_text)."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (named := _NAMED.match(line)):
            current[named[1]] = _instruction(named[1], re.sub(r"/\*[^*]*\*/", "", line[named.end() :]))
    return Program(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    """Parse the text after an instruction's name: result, opcode(operands), attributes."""
    value_end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    value, rest = rest[:value_end], rest[value_end:].lstrip()
    opening = rest.index("(")
    end = _closing(rest, opening)
    operands, attributes = rest[opening + 1 : end - 1], rest[end:]
    opcode = rest[:opening]
    if opcode in ("constant", "parameter"):
        return Instruction(name, opcode, arrays_of(value), (), f"({operands}){attributes}")
    return Instruction(name, opcode, arrays_of(value), tuple(re.findall(r"%([\w.\-]+)", operands)), attributes)


def _closing(text: str, opening: int) -> int:
    """The position just after the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses in {text[:80]}")


def arrays_of(value: str) -> tuple[Array, ...]:
    """The arrays of a printed result such as f32[8,16]{1,0}, or of a tuple of them."""
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout or "")
        for dtype, shape, layout in _ARRAY.findall(value)
    )
