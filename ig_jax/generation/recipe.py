"""How samples are drawn, as people write it down: solver, steps, guidance scales and intervals."""

import dataclasses
import math

from ig_jax.diffusion.gaussian_samplers import SOLVERS as CHAIN_SOLVERS
from ig_jax.diffusion.guidance import Guidance, Scales
from ig_jax.diffusion.solvers import SOLVERS
from ig_jax.errors import check
from ig_jax.models.dit import DiTConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Scale 1 means off; intervals are (lo, hi] in sigma-time, t = 0 data and t = 1 noise."""

    solver: str
    steps: int
    ig_scale: float
    cfg_scale: float
    ig_interval: tuple[float, float]
    cfg_interval: tuple[float, float]

    def __post_init__(self):
        check(self.solver in SOLVERS, "solver", self.solver, f"one of {', '.join(SOLVERS)}")
        check(self.steps >= 1, "steps", self.steps, "at least 1")
        check(not SOLVERS[self.solver].stochastic or self.steps >= 2, "steps", self.steps,
              f"at least 2 for the solver {self.solver}")
        for name in ("ig_scale", "cfg_scale"):
            value = getattr(self, name)
            check(math.isfinite(value) and value >= 0, name, value, "a finite number, at least 0 (1 is off)")
        self.guidance  # its intervals are checked as it is made

    @property
    def guidance(self) -> Guidance:
        """The static part; a CFG scale of 1 leaves the doubled batch out of the program."""
        return Guidance(tuple(self.ig_interval), tuple(self.cfg_interval), self.cfg_scale != 1)

    @property
    def scales(self) -> Scales:
        """The traced part."""
        return Scales(self.ig_scale, self.cfg_scale)

    def check_model(self, model: DiTConfig) -> None:
        """Raise UserError when the model cannot be sampled this way."""
        check(self.ig_scale == 1 or model.inter_depth, "ig_scale", self.ig_scale,
              "1 for a model without an intermediate head")
        fitting = CHAIN_SOLVERS if model.sigma_channels == "variance" else SOLVERS.keys() - CHAIN_SOLVERS.keys()
        check(self.solver in fitting, "solver", self.solver,
              f"one of {', '.join(sorted(fitting))} for model.sigma_channels={model.sigma_channels!r}")

    def evaluations_per_image(self, path: str) -> int:
        """Network evaluations of one image; inside the CFG interval an evaluation counts twice."""
        rows = SOLVERS[self.solver].rows(path, self.steps)
        return sum(1 + self.guidance.region(t).cfg for row in rows for t in row.lookup)
