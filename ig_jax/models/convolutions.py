"""Convolutions as products, which a CPU computes at its full rate; those of 3x3 pixels by Winograd's F(4, 3).

A tile of 6x6 inputs and the kernel are each mapped to 36 numbers, whose products are mapped to a tile of 4x4 outputs:
a quarter of the multiplications. Each of the three maps is the product with a constant matrix.
Source: Lavin and Gray, arXiv:1509.09308, with other points of evaluation, which halve the rounding errors.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ig_jax.models.cpu import on_one_cpu

STEP = 4  # outputs of a tile along each side
TAPS = 3  # of a kernel
# Where polynomials are evaluated, besides infinity. Of a dozen tried the least errors in float32 and bfloat16.
POINTS = (0, 0.75, -0.75, 1.5, -1.5)
CHUNK = 2**17  # tiles times channels at a time: more leave the cache, fewer are multiplied by one core alone
WIDE = 64  # channels of a convolution whose time is that of its products
PIXELS = 2**16  # of images: from here on more is saved than the kernels' transformation costs

SIDE = STEP + TAPS - 1  # inputs of a tile along each side

_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices of inputs (6, 6), kernel (6, 3) and outputs (4, 6), float64, along one side.

    outputs @ ((kernel @ g) * (inputs @ d)) is the correlation of d (6,) with g (3,), by Toom and Cook.
    """
    inputs, kernel = np.zeros((SIDE, SIDE)), np.zeros((SIDE, TAPS))
    for i, point in enumerate(POINTS):
        others = np.array([other for other in POINTS if other != point])
        inputs[i, :-1] = np.polynomial.polynomial.polyfromroots(others)
        kernel[i] = point ** np.arange(TAPS) / np.prod(point - others)
    inputs[-1], kernel[-1, -1] = np.polynomial.polynomial.polyfromroots(POINTS), 1
    return inputs, kernel, np.column_stack([np.vander(POINTS, STEP, increasing=True).T, np.eye(STEP)[-1]])


# The same along both sides: (36, 36), (36, 9) and (16, 36) float32.
INPUTS, KERNEL, OUTPUTS = (np.kron(matrix, matrix).astype(np.float32) for matrix in _maps())


def transformed(kernel: jax.Array) -> jax.Array:
    """A kernel (3, 3, I, O), any float, as `winograd` multiplies it: (36, I, O) float32."""
    return _product(KERNEL, kernel.astype(jnp.float32).reshape(TAPS**2, -1)).reshape(SIDE**2, *kernel.shape[2:])


def winograd(x: jax.Array, weights: jax.Array) -> jax.Array:
    """A convolution with zeros around the image, by rows of tiles.

    x: (B, H, W, I), H and W multiples of 4; weights: (36, I, O), a transformed kernel; to (B, H, W, O); all of x's
    dtype, in which the operands of products are rounded. Sums, and the map of outputs, are float32.
    """
    (batch, height, width, channels), features = x.shape, weights.shape[-1]
    down, across = height // STEP, width // STEP
    rows = max(n for n in range(1, down + 1) if down % n == 0 and (n == 1 or n * across * channels <= CHUNK))
    parts, padded = down // rows, jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    every = lambda i, count: slice(i, i + STEP * (count - 1) + 1, STEP)
    tiles = lambda part: jnp.stack([part[every(i, rows), every(j, across)] for i in range(SIDE) for j in range(SIDE)])

    def of_rows(at: jax.Array) -> jax.Array:
        corner, size = (at // parts, at % parts * rows * STEP, 0, 0), (1, rows * STEP + TAPS - 1, *padded.shape[2:])
        pixels = _moved(tiles, jax.lax.dynamic_slice(padded, corner, size)[0]).reshape(SIDE**2, -1)
        numbers = _product(INPUTS.astype(x.dtype), pixels).reshape(SIDE**2, -1, channels)
        found = _product(OUTPUTS, _product(numbers.astype(x.dtype), weights).reshape(SIDE**2, -1))
        found = found.reshape(STEP, STEP, rows, across, features).transpose(2, 0, 3, 1, 4)
        return found.reshape(rows * STEP, width, features).astype(x.dtype)

    return jax.lax.map(of_rows, jnp.arange(batch * parts)).reshape(batch, height, width, features)


def halving(x: jax.Array, kernel: jax.Array, padding: tuple) -> jax.Array:
    """A convolution at every other pixel as one product; x: (B, H, W, I), kernel: (3, 3, I, O) -> (B, H/2, W/2, O)."""
    (_, height, width, _), features = x.shape, kernel.shape[-1]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    under = lambda x, i, j: x[:, i : i + height : 2, j : j + width : 2]
    taps = lambda x: jnp.concatenate([under(x, i, j) for i in range(TAPS) for j in range(TAPS)], axis=-1)
    return _product(_moved(taps, padded), kernel.reshape(-1, features)).astype(x.dtype)


def _moved(move: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """move(x), which copies values; bfloat16 as 16 bits, since XLA for CPUs converts it to float32 and back."""
    if x.dtype != jnp.bfloat16:
        return move(x)
    bits = jax.lax.bitcast_convert_type
    moved = jax.custom_jvp(lambda x: bits(move(bits(x, jnp.uint16)), x.dtype))
    moved.defjvp(lambda at, along: (moved(*at), move(*along)))
    return moved(x)


def prepared(module: nnx.Module, pixels: int, *smallest: int) -> nnx.Module:
    """The module, on one CPU with the kernels of its wide convolutions transformed, where that is worth it.

    pixels: of all images; smallest: height and width of the smallest arrays, which have to be whole tiles.
    """
    if not on_one_cpu() or pixels < PIXELS or any(side % STEP for side in smallest):
        return module
    module = nnx.clone(module)
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Conv) and _is_suited(node):
            node.kernel = nnx.Param(transformed(node.kernel[...]).astype(node.dtype))
    return module


def _is_suited(layer: nnx.Conv) -> bool:
    (*size, inputs, outputs), strides = layer.kernel.shape, layer.strides
    return size == [TAPS, TAPS] and strides == 1 and min(inputs, outputs) >= WIDE


def conv_general_dilated(x: jax.Array, kernel: jax.Array, strides, padding, **options) -> jax.Array:
    """JAX's function of that name, for a layer: `winograd` with a transformed kernel, otherwise as suits the device."""
    if kernel.ndim == 3:
        return winograd(x, kernel)
    if kernel.shape[:2] == strides == (1, 1):
        return jnp.matmul(x, kernel[0, 0], precision=options["precision"])
    if strides == (2, 2) and on_one_cpu():
        return halving(x, kernel, padding)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
