"""The autoencoders of latent diffusion transformers, SD-VAE and VA-VAE: one network, two frozen configs.

The encoder has residual blocks at each level and halves the image between levels; the decoder has one more block at
each level and doubles it. Parameters, norms and softmax are float32; convolutions run in `dtype`. With float32 products
have full precision (an accelerator would by default round them to bfloat16 or TF32); bfloat16 is the fast choice.
Source: CompVis/latent-diffusion ldm/modules/diffusionmodules/model.py; huggingface/diffusers AutoencoderKL.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat
from flax import nnx
from jax.typing import DTypeLike

from ig_jax.base.errors import check
from ig_jax.models import convolutions, cpu, layers
from ig_jax.models.latents import from_uint8


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Everything that defines an autoencoder of the family.

    Attributes:
        channels: width of each level, finest first.
        layers: residual blocks per level of the encoder; the decoder has one more.
        latent_channels: of the latents.
        groups: of every GroupNorm.
        attention_levels: indices of channels whose blocks are each followed by attention; both middles always have it.
        quant_convs: 1x1 convolutions around the latent.

    Raises: UserError for widths the groups do not divide, no layers, or a level that does not exist.
    """

    channels: tuple[int, ...]
    layers: int
    latent_channels: int
    groups: int = 32
    attention_levels: tuple[int, ...] = ()
    quant_convs: bool = True

    def __post_init__(self):
        for field in ("channels", "attention_levels"):  # lists from JSON would not hash
            object.__setattr__(self, field, tuple(getattr(self, field)))
        check(self.groups > 0, "groups", self.groups, "positive")
        divided = len(self.channels) > 0 and all(c > 0 and c % self.groups == 0 for c in self.channels)
        check(divided, "channels", self.channels, f"positive multiples of groups={self.groups}")
        check(self.layers > 0, "layers", self.layers, "positive")
        check(self.latent_channels > 0, "latent_channels", self.latent_channels, "positive")
        exist = all(0 <= i < len(self.channels) for i in self.attention_levels)
        check(exist, "attention_levels", self.attention_levels, f"indices of channels={self.channels}")

    @property
    def factor(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** (len(self.channels) - 1)


SD_VAE = AutoencoderConfig(channels=(128, 256, 512, 512), layers=2, latent_channels=4)
VA_VAE = AutoencoderConfig(channels=(128, 128, 256, 256, 512), layers=2, latent_channels=32, attention_levels=(4,))


class Posterior(NamedTuple):
    """The encoder's Gaussian: mean and std, each (B, h, w, C) float32, not normalised."""

    mean: jax.Array
    std: jax.Array


@dataclasses.dataclass(frozen=True)
class _Build:
    """Makes the layers of one autoencoder with its groups, compute dtype and initialiser keys."""

    groups: int
    dtype: DTypeLike
    rngs: nnx.Rngs

    @property
    def precision(self) -> jax.lax.Precision | None:
        return jax.lax.Precision.HIGHEST if jnp.dtype(self.dtype) == jnp.float32 else None

    def conv(self, inputs: int, outputs: int, size: int, strides: int = 1, padding="SAME") -> nnx.Conv:
        shared: dict[str, Any] = dict(dtype=self.dtype, precision=self.precision, rngs=self.rngs)
        shared |= dict(conv_general_dilated=convolutions.conv_general_dilated)
        return nnx.Conv(inputs, outputs, (size, size), strides, padding=padding, **shared)

    def linear(self, inputs: int, outputs: int) -> nnx.Linear:
        return nnx.Linear(inputs, outputs, dtype=self.dtype, precision=self.precision, rngs=self.rngs)

    def norm(self, channels: int) -> "GroupNorm":
        return GroupNorm(channels, self.groups)


class GroupNorm(nnx.Module):
    """Norm of groups of channels over all positions, (B, H, W, C) -> (B, H, W, C) float32.

    Each channel is summed by itself first, as a CPU adds rows of memory. The variance is that of the differences: of
    E[x^2] - E[x]^2 little is left where a group's mean is large against its spread.
    """

    def __init__(self, channels: int, groups: int):
        self.each = channels // groups
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        centred = x - self._of_groups(x)
        scale = jax.lax.rsqrt(self._of_groups(jnp.square(centred)) + 1e-6) * self.scale[...]
        return centred * scale + self.bias[...]

    def _of_groups(self, x: jax.Array) -> jax.Array:
        """The mean of each group, repeated for its channels: (B, 1, 1, C)."""
        means = reduce(x, "b h w d -> b d", "mean")
        return repeat(reduce(means, "b (g c) -> b g", "mean", c=self.each), "b g -> b 1 1 (g c)", c=self.each)


class ResBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, H, W, inputs) -> (B, H, W, outputs)."""

    def __init__(self, inputs: int, outputs: int, build: _Build):
        self.norm1 = build.norm(inputs)
        self.conv1 = build.conv(inputs, outputs, 3)
        self.norm2 = build.norm(outputs)
        self.conv2 = build.conv(outputs, outputs, 3)
        self.shortcut = build.conv(inputs, outputs, 1) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """One-head self-attention over all positions of (B, H, W, D), with its residual."""

    def __init__(self, channels: int, build: _Build):
        self.norm = build.norm(channels)
        self.q, self.k, self.v, self.out = (build.linear(channels, channels) for _ in range(4))
        self.precision = build.precision

    def __call__(self, x: jax.Array) -> jax.Array:
        h = rearrange(self.norm(x), "b h w d -> b (h w) d")
        q, k, v = self.q(h), self.k(h), self.v(h)
        logits = jnp.einsum("bqd,bkd->bqk", q, k, precision=self.precision, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * x.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
        h = self.out(jnp.einsum("bqk,bkd->bqd", weights, v, precision=self.precision))
        return x + h.reshape(x.shape)


class Stage(nnx.Module):
    """The blocks of one level, each followed by attention where the config asks for it."""

    def __init__(self, inputs: int, outputs: int, layers: int, attention: bool, build: _Build):
        self.blocks = nnx.List([ResBlock(outputs if i else inputs, outputs, build) for i in range(layers)])
        self.attentions = nnx.List([Attention(outputs, build) for _ in range(layers)] if attention else [])

    def run_blocks(self, x: jax.Array) -> jax.Array:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return x


class DownStage(Stage):
    """A level of the encoder; halves height and width at its end unless it is the last."""

    def __init__(self, inputs: int, outputs: int, layers: int, attention: bool, last: bool, build: _Build):
        super().__init__(inputs, outputs, layers, attention, build)
        # one row below and one column right, none above or left; "SAME" or a symmetric 1 shifts every feature
        padding = ((0, 1), (0, 1))
        self.downsample = None if last else build.conv(outputs, outputs, 3, strides=2, padding=padding)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.run_blocks(x)
        return x if self.downsample is None else self.downsample(x)


class UpStage(Stage):
    """A level of the decoder; doubles height and width at its end unless it is the last."""

    def __init__(self, inputs: int, outputs: int, layers: int, attention: bool, last: bool, build: _Build):
        super().__init__(inputs, outputs, layers, attention, build)
        self.upsample = None if last else build.conv(outputs, outputs, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.run_blocks(x)
        return x if self.upsample is None else self.upsample(repeat(x, "b h w d -> b (h 2) (w 2) d"))


class Middle(nnx.Module):
    """Block, attention, block at the coarsest level."""

    def __init__(self, channels: int, build: _Build):
        self.block1 = ResBlock(channels, channels, build)
        self.attention = Attention(channels, build)
        self.block2 = ResBlock(channels, channels, build)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block2(self.attention(self.block1(x)))


class Encoder(nnx.Module):
    """images (B, H, W, 3) -> moments (B, h, w, 2C), before the quant convolution."""

    def __init__(self, config: AutoencoderConfig, build: _Build):
        widths = config.channels
        self.conv_in = build.conv(3, widths[0], 3)
        self.down: nnx.List[DownStage] = nnx.List()
        for i, width in enumerate(widths):
            attention, last = i in config.attention_levels, i == len(widths) - 1
            self.down.append(DownStage(widths[max(i - 1, 0)], width, config.layers, attention, last, build))
        self.mid = Middle(widths[-1], build)
        self.norm_out = build.norm(widths[-1])
        self.conv_out = build.conv(widths[-1], 2 * config.latent_channels, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv_out(nnx.silu(self.norm_out(self.mid(_in_turn(self.down, self.conv_in(x))))))


class Decoder(nnx.Module):
    """latents (B, h, w, C), after the post-quant convolution -> images (B, H, W, 3)."""

    def __init__(self, config: AutoencoderConfig, build: _Build):
        widths = config.channels
        self.conv_in = build.conv(config.latent_channels, widths[-1], 3)
        self.mid = Middle(widths[-1], build)
        self.up: nnx.List[UpStage] = nnx.List()
        for i in reversed(range(len(widths))):
            inputs, attention = widths[min(i + 1, len(widths) - 1)], i in config.attention_levels
            self.up.append(UpStage(inputs, widths[i], config.layers + 1, attention, i == 0, build))
        self.norm_out = build.norm(widths[0])
        self.conv_out = build.conv(widths[0], 3, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv_out(nnx.silu(self.norm_out(_in_turn(self.up, self.mid(self.conv_in(x))))))


class Autoencoder(nnx.Module):
    """A KL autoencoder: images -> Gaussian over latents -> images.

    config: SD_VAE, VA_VAE or a variant; dtype: of the convolutions, float32 or bfloat16.
    """

    def __init__(self, config: AutoencoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        build = _Build(config.groups, dtype, rngs)
        self.config, self.dtype = config, dtype
        self.encoder, self.decoder = Encoder(config, build), Decoder(config, build)
        channels = config.latent_channels
        self.quant_conv = build.conv(2 * channels, 2 * channels, 1) if config.quant_convs else None
        self.post_quant_conv = build.conv(channels, channels, 1) if config.quant_convs else None

    def encode(self, images: jax.Array) -> Posterior:
        """images (B, H, W, 3) float in [-1, 1], H and W multiples of config.factor -> Posterior (mean, std).

        Raises: UserError for another shape.
        """
        factor = self.config.factor
        _, height, width, channels = images.shape if images.ndim == 4 else (0, 0, 0, 0)
        fits = channels == 3 and height % factor == width % factor == 0
        check(fits, "images.shape", images.shape, f"(B, H, W, 3) with H and W multiples of {factor}")
        moments = self._on_images(self.encoder, images.astype(self.dtype), height // factor, width // factor)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)))

    def decode(self, latents: jax.Array) -> jax.Array:
        """latents (B, h, w, C), not normalised -> images (B, H, W, 3) float32 in about [-1, 1].

        Raises: UserError for another shape.
        """
        channels = self.config.latent_channels
        fits = latents.ndim == 4 and latents.shape[3] == channels
        check(fits, "latents.shape", latents.shape, f"(B, h, w, {channels})")
        x = latents.astype(self.dtype)
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        return self._on_images(self.decoder, x, *x.shape[1:3]).astype(jnp.float32)

    def _on_images(self, network: nnx.Module, x: jax.Array, height: int, width: int) -> jax.Array:
        """network(x), on one CPU with transformed kernels and few images at a time; height, width: of the latents."""
        pixels, bytes_per_value = height * width * self.config.factor**2, jnp.dtype(self.dtype).itemsize
        run = convolutions.prepared(network, len(x) * pixels, height, width)
        return cpu.in_chunks(run, x, bytes_per_image=pixels * self.config.channels[0] * bytes_per_value)


@functools.lru_cache
def _abstract(config: AutoencoderConfig, dtype: np.dtype):
    return layers.by_name(lambda: Autoencoder(config, dtype=dtype, rngs=nnx.Rngs(0)))


def shapes(config: AutoencoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter; nothing is allocated."""
    return dict(_abstract(config, jnp.dtype("float32"))[2])


def from_params(
    config: AutoencoderConfig, params: dict[str, jax.Array], *, dtype: DTypeLike = jnp.float32
) -> Autoencoder:
    """The autoencoder with these weights, by the names of `shapes`; no random initialisation is run."""
    graphdef, paths, _ = _abstract(config, jnp.dtype(dtype))
    state = nnx.from_flat_state({path: nnx.Param(params.get(name)) for name, path in paths.items()})
    return nnx.merge(graphdef, state)


def of_encoder(tree: dict[str, Any]) -> dict[str, Any]:
    """The part of parameters, or of their shapes, by name, that encoding needs."""
    return {name: leaf for name, leaf in tree.items() if name.startswith(("encoder.", "quant_conv."))}


def moments(config: AutoencoderConfig, params: dict[str, jax.Array], images: jax.Array, dtype: DTypeLike) -> jax.Array:
    """images uint8 (B, H, W, 3) -> (B, h, w, 2C) float32: mean, then standard deviation."""
    model = from_params(config, params, dtype=dtype)
    return jnp.concatenate(model.encode(from_uint8(images)), axis=-1)


def by_chunks(run: Callable[[jax.Array], jax.Array], rows: jax.Array, chunk: int) -> jax.Array:
    """run(rows), encoding or decoding, with at most `chunk` images (over all devices) in flight; call it inside jit.

    run: (b, ...) -> (b, ...), each image by itself; rows: (B, ...), B any number.
    A batch sharded over n devices stays where it is when chunk is a multiple of n and divides B.
    Raises: UserError if chunk is not positive.
    """
    check(chunk > 0, "chunk", chunk, "positive (images)")
    batch = rows.shape[0]
    if batch <= chunk:
        return run(rows)
    rounds = -(-batch // chunk)
    padded = jnp.pad(rows, [(0, rounds * chunk - batch)] + [(0, 0)] * (rows.ndim - 1))
    # round i takes images i, i + rounds, ...: with the chunk axis outermost each device feeds its own images
    images = jax.lax.map(run, rearrange(padded, "(c r) ... -> r c ...", r=rounds))
    return rearrange(images, "r c ... -> (c r) ...")[:batch]


CHUNK = 8  # images per device at a time, to bound the memory of the finest level


def _in_turn(stages: Sequence[Callable[[jax.Array], jax.Array]], x: jax.Array) -> jax.Array:
    for stage in stages:
        x = stage(x)
    return x
