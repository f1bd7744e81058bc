"""What internal guidance rests on, measured on every training batch at no cost that can be measured: by noise level,
and by depth of the network.

With r = target - D_i, what the intermediate head lacks, and g = D_f - D_i, the gap that guidance extends, both in what
the network predicts: `cosine` is <g, r> / (|g| |r|), and `scale` is <g, r> / <g, g>, the guidance scale at which
D_i + w g is nearest to the target. Both are pooled over the examples of a bin, and the same for velocity, noise and
data, which are affine in one another at a given x_t.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

BINS = 10  # of equal width in sigma-time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Curve:
    """Values float32 (n,), or (k, n), over points that have names."""

    values: jax.Array
    points: tuple[str, ...] = dataclasses.field(metadata={"static": True})


def by_sigma(t: jax.Array, target: jax.Array, heads: Sequence[jax.Array]) -> Curve:
    """Sums over the examples of each bin of t (B,) in [0, 1], divided by B, so that they average over batches.

    target, and the predictions of the final and of the intermediate heads: (B, H, W, C). Rows: 1, |target - final|^2,
    and with an intermediate head, of the first, |r|^2, <g, g> and <g, r>, all means over the pixels of an example.
    """
    pixels = lambda product: jnp.mean(product, axis=tuple(range(1, product.ndim)))
    lacks = target - heads[0]
    rows = [jnp.ones_like(t), pixels(lacks * lacks)]
    if heads[1:]:
        lacks, gap = target - heads[1], heads[0] - heads[1]
        rows += [pixels(lacks * lacks), pixels(gap * gap), pixels(gap * lacks)]
    place = jnp.minimum(t * BINS, BINS - 1).astype(jnp.int32)
    member = (place[:, None] == jnp.arange(BINS)).astype(jnp.float32)
    sums = jnp.sum(jax.lax.stop_gradient(jnp.stack(rows))[:, :, None] * member, axis=1)
    return Curve(sums / len(t), tuple(f"{(i + 0.5) / BINS:.2f}" for i in range(BINS)))


def by_depth(squares: dict[str, jax.Array]) -> Curve:
    """The norm of arrays in each part of the network, from the squared norm of each array by parameter name."""
    parts: dict[str, list[jax.Array]] = {}
    for name, square in squares.items():
        parts.setdefault(_part(name), []).append(square)
    points = sorted(parts, key=_order)
    return Curve(jnp.sqrt(jnp.stack([sum(parts[point], start=jnp.float32(0)) for point in points])), tuple(points))


def _part(name: str) -> str:
    """ "blocks.3.attn.qkv.kernel" -> "3"; outside of the blocks the first word of a name."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "blocks" else first


def _order(part: str) -> tuple:
    """In the order of the forward pass: what embeds, the blocks, the heads."""
    return (1, int(part), "") if part.isdigit() else (2 * ("head" in part), 0, part)


def plain(name: str, curve: Curve) -> dict[str, dict]:
    """A curve of a step, or the mean of those of several, as JSON by name: values by point, None for no example."""
    values = np.asarray(curve.values, np.float64)
    if name != "sigma":
        return {name: _by_point(curve, values)}
    with np.errstate(invalid="ignore", divide="ignore"):
        count, final, *rest = values
        found = {"final": final / count}
        if rest:
            lacks, gap, along = rest
            found |= {"intermediate": lacks / count, "gap": np.sqrt(gap / count)}
            found |= {"cosine": along / np.sqrt(gap * lacks), "scale": along / gap}
    return {f"sigma/{key}": _by_point(curve, row) for key, row in found.items()}


def _by_point(curve: Curve, values: Iterable[float]) -> dict[str, float | None]:
    return {point: float(f"{v:.6g}") if np.isfinite(v) else None for point, v in zip(curve.points, values, strict=True)}
