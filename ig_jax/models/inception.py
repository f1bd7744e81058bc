"""The InceptionV3 of FID, with the resize of ADM's evaluator inside.

It is the network of inception-2015-12-05, not torchvision's: other weights, averages that divide by the pixels inside
the image, a maximum in the last block, 1008 classes. Names of parameters are those of the PyTorch port with `kernel`
(HWIO), `scale`, `bias`, `mean` and `var`. Products run in `dtype`, with full precision in float32.
Source: mseitzer/pytorch-fid, openai/guided-diffusion evaluations/evaluator.py (layout and formulas only).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from ig_jax.base.errors import check
from ig_jax.models import layers

SIZE = 299  # pixels, to which the network resizes
FEATURES = 2048
CLASSES = 1008
SPATIAL = 7  # channels of the features of sFID, at 17 x 17 positions
EPS = 0.001  # of every batch norm


class Features(NamedTuple):
    """What the metrics read of B images, float32."""

    pool: jax.Array  # (B, 2048): FID, KID, precision, recall, MIND
    spatial: jax.Array  # (B, 2023), by row, column, channel: sFID
    logits: jax.Array  # (B, 1008), without bias: Inception Score


class Convolution(nnx.Module):
    """Convolution, batch norm and ReLU, (B, H, W, inputs) -> (B, h, w, outputs); a stride brings no padding."""

    def __init__(self, inputs: int, outputs: int, size: int | tuple[int, int] = 1, stride: int = 1, pad: bool = True):
        height, width = (size, size) if isinstance(size, int) else size
        self.kernel = nnx.Param(jnp.zeros((height, width, inputs, outputs)))
        self.scale, self.bias, self.mean, self.var = (nnx.Param(jnp.zeros(outputs)) for _ in range(4))
        self.stride, self.padding = stride, "SAME" if pad and stride == 1 else "VALID"

    def folded(self) -> tuple[jax.Array, jax.Array]:
        """Kernel and bias of the convolution that does the batch norm too."""
        factor = self.scale[...] / jnp.sqrt(self.var[...] + EPS)
        return self.kernel[...] * factor, self.bias[...] - self.mean[...] * factor

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.folded()
        return nnx.relu(_convolve(x, kernel, self.stride, self.padding) + bias.astype(x.dtype))


def _convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "VALID") -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), strides, padding, dimension_numbers=dims, precision=precision
    )


def _entries(x: jax.Array, *convolutions: Convolution) -> list[jax.Array]:
    """Several 1x1 convolutions of x as one product; the last is averaged over 3x3 pixels.

    The published order averages first, which is the same (the average of a constant is itself) and reads more channels.
    """
    kernels, biases = zip(*(layer.folded() for layer in convolutions))
    y = _convolve(x, jnp.concatenate(kernels, -1)) + jnp.concatenate(biases).astype(x.dtype)
    *parts, pooled = jnp.split(y, np.cumsum([len(bias) for bias in biases])[:-1].tolist(), -1)
    return [nnx.relu(part) for part in (*parts, _average(pooled))]


def _average(x: jax.Array) -> jax.Array:
    """Mean over the 3x3 pixels around each that lie inside the image."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inside = [3 - (np.arange(n) == 0) - (np.arange(n) == n - 1) for n in (height, width)]
    return total / jnp.asarray(np.multiply.outer(*inside)[..., None], x.dtype)


def _maximum(x: jax.Array, stride: int = 2) -> jax.Array:
    """Maximum over 3x3 pixels; with stride 1 the image keeps its size."""
    padding = "SAME" if stride == 1 else "VALID"
    return nnx.max_pool(x, (3, 3), (stride, stride), padding)


class MixedA(nnx.Module):
    """Mixed_5b, 5c and 5d."""

    def __init__(self, inputs: int, pooled: int):
        self.branch1x1 = Convolution(inputs, 64)
        self.branch5x5_1, self.branch5x5_2 = Convolution(inputs, 48), Convolution(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inputs, 64), Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)
        self.branch_pool = Convolution(inputs, pooled)

    def __call__(self, x: jax.Array) -> jax.Array:
        one, five, three, pooled = _entries(x, self.branch1x1, self.branch5x5_1, self.branch3x3dbl_1, self.branch_pool)
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(three))
        return jnp.concatenate([one, self.branch5x5_2(five), three, pooled], -1)


class MixedB(nnx.Module):
    """Mixed_6a, 35 x 35 -> 17 x 17."""

    def __init__(self):
        self.branch3x3 = Convolution(288, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(288, 64), Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch3x3(x), three, _maximum(x)], -1)


class MixedC(nnx.Module):
    """Mixed_6b to 6e."""

    def __init__(self, width: int):
        across, down = (1, 7), (7, 1)
        self.branch1x1 = Convolution(768, 192)
        self.branch7x7_1, self.branch7x7_2 = Convolution(768, width), Convolution(width, width, across)
        self.branch7x7_3 = Convolution(width, 192, down)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Convolution(768, width), Convolution(width, width, down)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Convolution(width, width, across), Convolution(width, width, down)
        self.branch7x7dbl_5 = Convolution(width, 192, across)
        self.branch_pool = Convolution(768, 192)

    def __call__(self, x: jax.Array) -> jax.Array:
        one, seven, twice, pooled = _entries(x, self.branch1x1, self.branch7x7_1, self.branch7x7dbl_1, self.branch_pool)
        seven = self.branch7x7_3(self.branch7x7_2(seven))
        for layer in (self.branch7x7dbl_2, self.branch7x7dbl_3, self.branch7x7dbl_4, self.branch7x7dbl_5):
            twice = layer(twice)
        return jnp.concatenate([one, seven, twice, pooled], -1)


class MixedD(nnx.Module):
    """Mixed_7a, 17 x 17 -> 8 x 8."""

    def __init__(self):
        self.branch3x3_1, self.branch3x3_2 = Convolution(768, 192), Convolution(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Convolution(768, 192), Convolution(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Convolution(192, 192, (7, 1)), Convolution(192, 192, 3, 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return jnp.concatenate([self.branch3x3_2(self.branch3x3_1(x)), seven, _maximum(x)], -1)


class MixedE(nnx.Module):
    """Mixed_7b, and 7c whose pool is a maximum."""

    def __init__(self, inputs: int, average: bool):
        across, down = (1, 3), (3, 1)
        self.average = average
        self.branch1x1 = Convolution(inputs, 320)
        self.branch3x3_1 = Convolution(inputs, 384)
        self.branch3x3_2a, self.branch3x3_2b = Convolution(384, 384, across), Convolution(384, 384, down)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inputs, 448), Convolution(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Convolution(384, 384, across), Convolution(384, 384, down)
        self.branch_pool = Convolution(inputs, 192)

    def __call__(self, x: jax.Array) -> jax.Array:
        first = self.branch1x1, self.branch3x3_1, self.branch3x3dbl_1
        if self.average:
            one, three, twice, pooled = _entries(x, *first, self.branch_pool)
        else:
            one, three, twice = (layer(x) for layer in first)
            pooled = self.branch_pool(_maximum(x, stride=1))
        twice = self.branch3x3dbl_2(twice)
        forked = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        forked += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return jnp.concatenate([one, *forked, pooled], -1)


class Classes(nnx.Module):
    """The last layer; its bias is stored and not used."""

    def __init__(self):
        self.kernel, self.bias = nnx.Param(jnp.zeros((FEATURES, CLASSES))), nnx.Param(jnp.zeros(CLASSES))


class Inception(nnx.Module):
    """Images (B, H, W, 3 or 1), numbers in 0..255, -> Features."""

    def __init__(self):
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Convolution(32, 32, 3, pad=False), Convolution(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Convolution(64, 80), Convolution(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = MixedA(192, 32), MixedA(256, 64), MixedA(288, 64)
        self.Mixed_6a = MixedB()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(MixedC, (128, 160, 160, 192))
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = MixedD(), MixedE(1280, True), MixedE(2048, False)
        self.fc = Classes()

    def __call__(self, images: jax.Array, dtype: DTypeLike = jnp.float32) -> Features:
        x = ((resize(images) - 128) / 128).astype(dtype)
        x = _maximum(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _maximum(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        # The first channels of Mixed_6d are those of its branch1x1, TensorFlow's mixed_6/conv.
        x = mixed = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.astype(jnp.float32).mean((1, 2))
        logits = jnp.matmul(pool, self.fc.kernel[...], precision=jax.lax.Precision.HIGHEST)
        return Features(pool, rearrange(mixed[..., :SPATIAL], "b h w c -> b (h w c)").astype(jnp.float32), logits)


def resize(images: jax.Array) -> jax.Array:
    """Images (B, H, W, C) in 0..255 -> (B, 299, 299, 3) float32, grey as three equal channels.

    The bilinear rule of TensorFlow 1: pixel i reads position i H / 299, without half pixels or antialiasing.
    Raises: UserError for another shape.
    """
    fits = images.ndim == 4 and images.shape[-1] in (1, 3) and min(images.shape[1:3]) > 0
    check(fits, "images.shape", images.shape, "(B, H, W, 3), or (B, H, W, 1) for grey images")
    x = images.astype(jnp.float32)
    for axis in (2, 1):  # along the rows first
        size = x.shape[axis]
        position = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
        low = position.astype(np.int32)
        part = np.expand_dims(position - low, [i for i in range(4) if i != axis])
        a, b = (jnp.take(x, index, axis) for index in (low, np.minimum(low + 1, size - 1)))
        x = a + (b - a) * part
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


@functools.cache
def _abstract():
    return layers.by_name(Inception)


def shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter; nothing is allocated."""
    return dict(_abstract()[2])


def forward(params: dict[str, jax.Array], images: jax.Array, dtype: DTypeLike = jnp.float32) -> Features:
    """Features of images (B, H, W, 3 or 1), numbers in 0..255, by the parameters of `shapes`."""
    graphdef, paths, _ = _abstract()
    state = nnx.from_flat_state({path: nnx.Param(params[name]) for name, path in paths.items()})
    return nnx.merge(graphdef, state)(images, dtype)
