"""Steps that are skipped: those that are not finite and, where it is asked for, those whose loss leaps.

A skipped step leaves parameters, averages and optimizer as they were, bit for bit, and the next step takes the next
batch. What was skipped is counted on the devices, and read by the host with the metrics.
"""

import dataclasses

import jax
import jax.numpy as jnp

WARM_UP = 20  # losses before one is called a leap
MEMORY = 0.95  # of the running mean and variance of the losses
MOST_LEAPS = 5  # skipped in a row: then the level of the loss has changed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """The steps skipped since this process began, and the recent losses; every field is a scalar."""

    row: jax.Array  # int32, skipped in a row up to now
    longest: jax.Array  # int32, the longest row
    total: jax.Array  # int32
    step: jax.Array  # int32, the first of the last row
    tensor: jax.Array  # int32, whose gradient was not finite there, by sorted name; -1 for the loss alone
    seen: jax.Array  # int32, losses of steps that were not skipped
    mean: jax.Array  # float32, of those losses
    variance: jax.Array  # float32

    @classmethod
    def new(cls) -> "Guard":
        """Nothing skipped, no loss seen."""
        zeros = {field.name: jnp.int32(0) for field in dataclasses.fields(cls)}
        return cls(**zeros | {"mean": jnp.float32(0), "variance": jnp.float32(0)})

    def judged(
        self, step: jax.Array, loss: jax.Array, squares: dict[str, jax.Array], leap: float
    ) -> tuple[jax.Array, "Guard"]:
        """(whether the step is taken, what is known after it).

        step: updates before it; squares: the squared norm of each gradient by name; leap: standard deviations above
        the mean at which a loss is one, 0 for never.
        """
        bad = ~jnp.isfinite(jnp.stack([squares[name] for name in sorted(squares)]))
        finite = jnp.isfinite(loss) & ~bad.any()
        taken = finite
        if leap:
            far = loss > self.mean + leap * jnp.sqrt(self.variance)
            taken &= ~(far & (self.seen >= WARM_UP) & (self.row < MOST_LEAPS))
        first = ~taken & (self.row == 0)
        row = jnp.where(taken, 0, self.row + 1)
        # Only losses that were taken are remembered: one that is not finite would blind the rule for ever.
        rate = jnp.maximum(1 - MEMORY, 1 / (self.seen + 1))
        change = jnp.where(taken, loss - self.mean, 0.0)
        return taken, Guard(
            row=row,
            longest=jnp.maximum(self.longest, row),
            total=self.total + ~taken,
            step=jnp.where(first, step + 1, self.step),
            tensor=jnp.where(first, jnp.where(bad.any(), jnp.argmax(bad).astype(jnp.int32), -1), self.tensor),
            seen=self.seen + taken,
            mean=self.mean + rate * change,
            variance=jnp.where(taken, (1 - rate) * (self.variance + rate * change**2), self.variance),
        )
