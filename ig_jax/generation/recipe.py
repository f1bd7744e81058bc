"""How samples are drawn, as people write it down: solver, steps, guidance scales and intervals."""

import dataclasses
import inspect

from ig_jax.diffusion import gaussian_samplers, samplers
from ig_jax.diffusion.guidance import (
    WHOLE,
    Guidance,
    Interval,
    Scales,
    is_off,
    scale_array,
)
from ig_jax.diffusion.solvers import SOLVERS
from ig_jax.errors import check
from ig_jax.models import cost
from ig_jax.models.dit import DiTConfig

GUIDANCES = ("ig", "cfg", "prefix", "auto")
Scale = float | str  # a number, a table "0:1,0.3:2,1:1.5" or a schedule "cosine:1,2": guidance.scale_array


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Scale 1 means off; intervals are (lo, hi] in sigma-time, t = 0 data and t = 1 noise.

    What follows cfg_interval may be left out: guidance that is off, and options of solvers, which have
    their own defaults (see the fields of each class in solvers.SOLVERS).
    """

    solver: str
    steps: int  # of the grid; for dopri5 the most that it may take between two interval ends
    ig_scale: Scale
    cfg_scale: Scale
    ig_interval: Interval
    cfg_interval: Interval
    ig_head: int | tuple[float, ...] = 0  # the weak output: index of a head, or weights that blend them
    cfg_channels: str = "all"
    prefix_scale: Scale = 1.0
    prefix_interval: Interval = WHOLE
    auto_scale: Scale = 1.0
    auto_interval: Interval = WHOLE
    shift: float | None = None
    diffusion_form: str | None = None
    diffusion_norm: float | None = None
    last_step: str | None = None
    last_step_size: float | None = None
    rtol: float | None = None
    atol: float | None = None
    eta: float | None = None
    clip: bool | None = None
    spacing: str | None = None

    def __post_init__(self):
        check(self.solver in SOLVERS, "solver", self.solver, f"one of {', '.join(SOLVERS)}")
        check(self.steps >= 1, "steps", self.steps, "at least 1")
        check(not SOLVERS[self.solver].stochastic or self.steps >= 2, "steps", self.steps,
              f"at least 2 for the solver {self.solver}")
        for name in GUIDANCES:
            scale_array(getattr(self, f"{name}_scale"), f"{name}_scale")
        check(is_off(self.cfg_scale) or is_off(self.prefix_scale), "(cfg_scale, prefix_scale)",
              (self.cfg_scale, self.prefix_scale), "1 for one of the two",
              "both guide against the null label")
        self.guidance, self.method  # both are checked as they are made

    @property
    def method(self) -> samplers.Solver:
        """The solver with the options that were given.  Raises: UserError for one that it does not read."""
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        for name, value in given.items():
            readers = [solver for solver, cls in SOLVERS.items() if name in _options_of(cls)]
            check(self.solver in readers, name, value,
                  f"left out with solver={self.solver!r}, which does not read it",
                  f"it belongs to {', '.join(readers)}")
        return SOLVERS[self.solver](**given)

    @property
    def guidance(self) -> Guidance:
        """The static part; a scale of 1 leaves what it would cost out of the program."""
        head = self.ig_head if isinstance(self.ig_head, int) else tuple(self.ig_head)
        return Guidance(
            **{f"{name}_interval": tuple(getattr(self, f"{name}_interval")) for name in GUIDANCES},
            use_cfg=not is_off(self.cfg_scale), use_prefix=not is_off(self.prefix_scale),
            use_auto=not is_off(self.auto_scale),
            head=head, cfg_channels=self.cfg_channels,
        )

    @property
    def scales(self) -> Scales:
        """The traced part."""
        return Scales(*(scale_array(getattr(self, f"{name}_scale")) for name in GUIDANCES))

    def check_model(self, model: DiTConfig, weak: DiTConfig | None = None) -> None:
        """Raise UserError when the model, or the second one of autoguidance, cannot be sampled this way."""
        chain = model.sigma_channels == "variance"
        fitting = [name for name in SOLVERS if (name in gaussian_samplers.SOLVERS) == chain]
        check(self.solver in fitting, "solver", self.solver,
              f"one of {', '.join(fitting)} for model.sigma_channels={model.sigma_channels!r}")
        heads = len(model.inter_depth)
        for name in ("ig_scale", "prefix_scale"):
            check(is_off(getattr(self, name)) or heads, name, getattr(self, name),
                  "1 for a model without an intermediate head")
        if isinstance(self.ig_head, int):
            check(0 <= self.ig_head < max(heads, 1), "ig_head", self.ig_head,
                  f"in 0..{heads - 1}, the intermediate heads of this model")
        else:
            check(len(self.ig_head) == heads, "ig_head", self.ig_head, f"{heads} weights, one for each head")
        check(self.cfg_channels == "all" or model.channels > 3, "cfg_channels", self.cfg_channels,
              f"all for a model of {model.channels} channels")
        check(is_off(self.auto_scale) or weak is not None, "auto_scale", self.auto_scale,
              "1 without a second checkpoint", "give --auto_checkpoint")
        if weak is not None:
            shape, other = ((m.input_size, m.input_size, m.channels) for m in (model, weak))
            check(shape == other, "auto_checkpoint latent shape", other, f"that of the checkpoint, {shape}")
            check(model.num_classes == weak.num_classes, "auto_checkpoint num_classes", weak.num_classes,
                  f"that of the checkpoint, {model.num_classes}")

    def weight(self, t: float, model: DiTConfig, weak: DiTConfig | None = None) -> float:
        """What one guided evaluation at sigma-time t costs, in forward passes of the model."""
        region = self.guidance.region(t)
        total = 1.0 + region.cfg
        if region.prefix:
            total += cost.prefix_macs(model, self.guidance.deepest_head) / cost.forward_macs(model)
        if region.auto:
            total += cost.forward_macs(weak) / cost.forward_macs(model)
        return total

    def evaluations_per_image(
        self, path: str, model: DiTConfig, weak: DiTConfig | None = None
    ) -> float | None:
        """Forward passes of the model for one image; None where the solver decides as it goes."""
        if not hasattr(self.method, "rows"):
            return None
        rows = self.method.rows(path, self.steps)
        return float(sum(self.weight(t, model, weak) for row in rows for t in row.lookup))


def _options_of(solver: type) -> tuple[str, ...]:
    return tuple(inspect.signature(solver).parameters)


OPTIONS = tuple(field.name for field in dataclasses.fields(Recipe) if field.default is None)  # of the solvers
