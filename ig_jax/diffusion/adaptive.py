"""The adaptive solver: Dormand-Prince 5(4) of diffrax, its steps chosen for each image by itself.

The integration is split where a guidance interval begins or ends, so that the field is smooth inside every
piece and no piece needs a branch. diffrax is imported when the solver runs.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from ig_jax.diffusion import paths
from ig_jax.errors import UserError, check

FIRST_STEP = 0.01  # of a piece's length; the error estimate takes over from there
EVALUATIONS_A_STEP = 6  # beside the first slope of a piece: the last slope of a step is the next one's first


@dataclasses.dataclass(frozen=True)
class DormandPrince:
    """Fifth order with a fourth-order error estimate, to rtol |x| + atol; `steps` of a recipe is the most a
    piece takes.

    The defaults are those of the original SiT.
    """

    stochastic: ClassVar[bool] = False

    rtol: float = 1e-3
    atol: float = 1e-6
    reverse: bool = False

    def __post_init__(self):
        for name in ("rtol", "atol"):
            check(0 < getattr(self, name) < 1, name, getattr(self, name), "in (0, 1)")
        try:
            import diffrax  # noqa: F401
        except ImportError as error:
            raise UserError("solver='dopri5' must have diffrax; pip install diffrax, or use another solver"
                            ) from error

    def pieces(self, path: str, edges: Sequence[float]) -> list[tuple[float, float]]:
        """(t, t_next) of the pieces between 1, the edges and 0, in the order of integration."""
        end = paths.data_end(path)
        inner = sorted((t for t in edges if end < t < 1), reverse=True)
        times = [1.0, *inner, end]
        return list(itertools.pairwise(times[::-1] if self.reverse else times))

    def integrate(
        self, velocity: Callable[[jax.Array, jax.Array, Hashable], jax.Array], x: jax.Array, *, path: str,
        steps: int, edges: Sequence[float], region: Callable[[float], Hashable],
    ) -> tuple[jax.Array, list[jax.Array]]:
        """(latents at the end, evaluations of each piece) of one image x [1, H, W, C] float32.

        The latents are NaN where a piece needs more than `steps` steps.
        """
        import diffrax

        evaluations = []
        for t, end in self.pieces(path, edges):
            regime = region((t + end) / 2)
            term = diffrax.ODETerm(lambda t, x, args, regime=regime: velocity(x, t, regime))
            solution = diffrax.diffeqsolve(
                term, diffrax.Dopri5(), t, end, FIRST_STEP * (end - t), x, max_steps=steps, throw=False,
                stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
            )
            reached = solution.result == diffrax.RESULTS.successful
            x = jnp.where(reached, solution.ys[0], jnp.nan)
            evaluations.append(1 + EVALUATIONS_A_STEP * solution.stats["num_steps"])
        return x, evaluations
