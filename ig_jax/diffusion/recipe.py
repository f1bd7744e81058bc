"""A sampling recipe: solver, steps, and the scale and interval of each guidance."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from ig_jax.base.errors import UserError, check
from ig_jax.base.schema import typed
from ig_jax.diffusion.guidance import RULES, WHOLE, Guidance, Interval, Rule, Scale, Scales, scale_array
from ig_jax.diffusion.integration import FixedGrid, Solver
from ig_jax.diffusion.solvers import SOLVERS
from ig_jax.models.dit import DiTConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to sample; every rule of guidance.RULES has its entry in `rules`.

    Its flat form, in configs, presets, flags and JSON, has the keys solver, steps, <rule>_scale and <rule>_interval for
    each rule, ig_head, cfg_channels, and the options of the solver. What is left out is off, or the solver's default.

    Attributes:
        solver: the numerical method, with its options.
        steps: of the grid; for dopri5 the most that it may take between two interval ends.
        rules: scale and interval of each guidance, by its name.
        ig_head: the weak output: index of a head, or weights that blend them.
        cfg_channels: that classifier-free guidance moves: "all" | "first_three" (DiT's release).
    """

    solver: Solver
    steps: int
    rules: Mapping[str, Rule] = dataclasses.field(default_factory=dict, hash=False)
    ig_head: int | tuple[float, ...] = 0
    cfg_channels: str = "all"

    def __post_init__(self):
        object.__setattr__(self, "rules", {name: self.rules.get(name, Rule()) for name in RULES})
        least = self.solver.least_steps
        check(self.steps >= least, "steps", self.steps, f"at least {least} for the solver {self.solver.name}")
        cfg, prefix = self.rules["cfg"], self.rules["prefix"]
        both, fix = (cfg.scale, prefix.scale), "both guide against the null label"
        check(cfg.off or prefix.off, "(cfg_scale, prefix_scale)", both, "1 for one of the two", fix)
        self.guidance  # noqa: B018 (its construction checks head and channels)

    @classmethod
    def of(cls, flat: Mapping[str, Any]) -> Self:
        """The recipe of a flat mapping.

        Raises: UserError that names the key, for one that is unknown, missing, of another solver, or has a bad value.
        """
        name = flat.get("solver", "")
        check(name in list(SOLVERS), "solver", name, f"one of {', '.join(SOLVERS)}")
        options = solver_options(name)
        for key, value in flat.items():
            readers = [other for other in SOLVERS if key in solver_options(other)]
            expected = f"left out with solver={name!r}, which does not read it"
            check(not readers or name in readers, key, value, expected, f"it belongs to {', '.join(readers)}")
        hints: dict[str, Any] = {"solver": str, "steps": int, "ig_head": int | tuple[float, ...], "cfg_channels": str}
        for rule in RULES:
            hints |= {f"{rule}_scale": Scale, f"{rule}_interval": Interval}
        given = typed(hints | options, dict(flat.items()), ["steps"])
        solver = SOLVERS[name](**{key: given[key] for key in options if key in given})
        rules = {rule: _rule(rule, given) for rule in RULES}
        return cls(solver, given["steps"], rules, given.get("ig_head", 0), given.get("cfg_channels", "all"))

    def flat(self) -> dict[str, Any]:
        """The flat form, of plain JSON types; Recipe.of(recipe.flat()) == recipe."""
        flat: dict[str, Any] = {"solver": self.solver.name, "steps": self.steps}
        flat |= {key: getattr(self.solver, key) for key in solver_options(self.solver.name)}
        for name, rule in self.rules.items():
            if rule != Rule():
                flat |= {f"{name}_scale": rule.scale, f"{name}_interval": rule.interval}
        return flat | {"ig_head": self.ig_head, "cfg_channels": self.cfg_channels}

    def replace(self, **changes: Any) -> "Recipe":
        """The recipe with other values of flat keys; another solver takes its own defaults."""
        flat = self.flat()
        if changes.get("solver", self.solver.name) != self.solver.name:
            flat = {key: value for key, value in flat.items() if key not in solver_options(self.solver.name)}
        return Recipe.of(flat | changes)

    @property
    def guidance(self) -> Guidance:
        """The static part: a rule that is off is left out of the program.

        IG costs nothing and stays, so that a sweep over w which includes 1 compiles once.
        """
        used = tuple((name, rule.interval) for name, rule in self.rules.items() if name == "ig" or not rule.off)
        return Guidance(used, self.ig_head, self.cfg_channels)

    @property
    def scales(self) -> Scales:
        """The traced part: the scale of each rule in `guidance`."""
        return {name: scale_array(self.rules[name].scale) for name, _ in self.guidance.intervals}

    def check_model(self, model: DiTConfig, second: DiTConfig | None = None) -> None:
        """Raise UserError when the model, or the second one of autoguidance, cannot be sampled this way."""
        chain = model.sigma_channels == "variance"
        fitting = [name for name, solver in SOLVERS.items() if solver.chain == chain]
        expected = f"one of {', '.join(fitting)} for model.sigma_channels={model.sigma_channels!r}"
        check(self.solver.name in fitting, "solver", self.solver.name, expected)
        heads = len(model.inter_depth)
        for name, rule in self.rules.items():
            scale, needs = f"{name}_scale", RULES[name]
            has_head, has_second = heads > 0 or not needs.needs_head, second is not None or not needs.needs_second
            check(rule.off or has_head, scale, rule.scale, "1 for a model without an intermediate head")
            fix = "give --auto_checkpoint"
            check(rule.off or has_second, scale, rule.scale, "1 without a second checkpoint", fix)
        if isinstance(self.ig_head, int):
            last = max(heads, 1) - 1
            check(0 <= self.ig_head <= last, "ig_head", self.ig_head, f"in 0..{last}, the heads of this model")
        else:
            check(len(self.ig_head) == heads, "ig_head", self.ig_head, f"{heads} weights, one for each head")
        fits = self.cfg_channels == "all" or model.channels > 3
        check(fits, "cfg_channels", self.cfg_channels, f"all for a model of {model.channels} channels")
        if second is not None:
            shape, other = ((m.input_size, m.input_size, m.channels) for m in (model, second))
            check(shape == other, "auto_checkpoint latent shape", other, f"that of the checkpoint, {shape}")
            classes, others = model.num_classes, second.num_classes
            check(classes == others, "auto_checkpoint num_classes", others, f"that of the checkpoint, {classes}")

    def grid(self, path: str) -> list[float] | None:
        """Sigma-times of the network's evaluations; an adaptive solver chooses them as it goes."""
        if not isinstance(self.solver, FixedGrid):
            return None
        return [t for row in self.solver.rows(path, self.steps) for t in row.guided_at]

    def evaluations_per_image(self, path: str, model: DiTConfig, second: DiTConfig | None = None) -> float | None:
        """Forward passes of the model for one image; None for an adaptive solver."""
        guidance, grid = self.guidance, self.grid(path)
        return None if grid is None else float(sum(guidance.passes(guidance.region(t), model, second) for t in grid))


def solver_options(name: str) -> dict[str, type]:
    """The options of a solver and their types, by name."""
    return {field.name: type(field.default) for field in dataclasses.fields(SOLVERS[name])}


def _rule(name: str, given: Mapping[str, Any]) -> Rule:
    """The rule of the keys <name>_scale and <name>_interval."""
    scale = given.get(f"{name}_scale", 1.0)
    with contextlib.suppress(ValueError):  # of a table or a schedule
        scale = float(scale)
    try:
        return Rule(scale, given.get(f"{name}_interval", WHOLE))
    except UserError as error:
        key = f"{name}_{error.name}"
        raise UserError(name=key, value=error.value, expected=error.expected, fix=error.fix) from error
