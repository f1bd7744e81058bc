"""The adaptive solver: Dormand-Prince 5(4) of diffrax, with its own steps for each image.

The integration is split where a guidance interval begins or ends, so that the field is smooth within every span and no
span needs a branch. diffrax is imported when the solver runs.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from ig_jax.base.errors import UserError, check
from ig_jax.diffusion import paths
from ig_jax.diffusion.integration import Integrated, Solver, nowhere, one_pass, option, register
from ig_jax.parallel.sharding import no_mesh

FIRST_STEP = 0.01  # of the length of a span; the error estimate takes over from there
EVALUATIONS_PER_STEP = 6  # in addition to the first slope of a span: the last slope of a step is the first of the next


@register("dopri5")
@dataclasses.dataclass(frozen=True)
class DormandPrince(Solver):
    """Fifth order with a fourth-order error estimate, to rtol |x| + atol; `steps` is the limit for each span.

    Source: the tolerances are those of willisma/SiT.
    """

    order: ClassVar[int] = 5
    adaptive: ClassVar[bool] = True
    reversible: ClassVar[bool] = True

    rtol: float = option(1e-3, "Relative tolerance.")
    atol: float = option(1e-6, "Absolute tolerance.")

    def __post_init__(self):
        for name in ("rtol", "atol"):
            check(0 < getattr(self, name) < 1, name, getattr(self, name), "in (0, 1)")
        try:
            import diffrax  # noqa: F401
        except ImportError as error:
            fix = "pip install diffrax, or use another solver"
            raise UserError(name="solver", value="dopri5", expected="used with diffrax", fix=fix) from error

    def spans(self, path: str, edges: Sequence[float], reverse: bool = False) -> list[tuple[float, float]]:
        """(t, t_next) of the spans between 1, the edges and 0, in the order of integration."""
        end = paths.data_end(path)
        inner = sorted((t for t in edges if end < t < 1), reverse=True)
        times = [1.0, *inner, end]
        return list(itertools.pairwise(times[::-1] if reverse else times))

    def integrate(
        self, field, x, labels, *, path, steps, region=nowhere, edges=(), noise=None, cost=one_pass, reverse=False
    ) -> Integrated:
        """As Solver.integrate; latents are NaN where a span needs more than `steps` steps."""

        def one_image(x, label):
            x, label, passes = x[None], label[None], jnp.float32(0)
            for t, end in self.spans(path, edges, reverse):
                here = region((t + end) / 2)
                velocity = lambda t, x, args, here=here: field(x, t, label, here)
                x, evaluations = self._over_span(velocity, x, t, end, steps)
                passes += cost(here) * evaluations
            return Integrated(x[0], passes)

        # Every image chooses its own steps: with steps shared by a batch an image would depend on its neighbours.
        with no_mesh():  # the constraints inside the network are for whole batches
            return jax.vmap(one_image)(x, labels)

    def _over_span(self, velocity, x: jax.Array, t: float, end: float, steps: int) -> tuple[jax.Array, jax.Array]:
        """(latents (1, H, W, C), evaluations) of one image over one span."""
        import diffrax

        term, control = diffrax.ODETerm(velocity), diffrax.PIDController(rtol=self.rtol, atol=self.atol)
        options = dict(max_steps=steps, throw=False, stepsize_controller=control)
        solution = diffrax.diffeqsolve(term, diffrax.Dopri5(), t, end, FIRST_STEP * (end - t), x, **options)
        reached = solution.result == diffrax.RESULTS.successful
        x = jnp.where(reached, solution.ys[0], jnp.nan)
        return x, 1 + EVALUATIONS_PER_STEP * solution.stats["num_steps"]
