"""What defines an SD-VAE or VA-VAE, and the parameters that follow from it; without JAX.

Separate from the network in autoencoder.py, so that a published file is checked in a moment.
"""

import dataclasses

from ig_jax.errors import check

Path = tuple[str | int, ...]  # of a parameter in the tree of models.autoencoder
Shapes = dict[Path, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """What tells one autoencoder of the family from another.

    channels: width of each level, finest first; layers: residual blocks per level of the encoder (the decoder
    has one more); groups: of every GroupNorm; attention_levels: indices into channels whose blocks are each
    followed by attention (both middles always have it); quant_convs: 1x1 convolutions around the latent.
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
        check(len(self.channels) > 0 and all(c > 0 and c % self.groups == 0 for c in self.channels),
              "channels", self.channels, f"positive multiples of groups={self.groups}")
        check(self.layers > 0, "layers", self.layers, "positive")
        check(self.latent_channels > 0, "latent_channels", self.latent_channels, "positive")
        check(all(0 <= i < len(self.channels) for i in self.attention_levels), "attention_levels",
              self.attention_levels, f"indices of channels={self.channels}")

    @property
    def factor(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** (len(self.channels) - 1)


SD_VAE = AutoencoderConfig(channels=(128, 256, 512, 512), layers=2, latent_channels=4)
VA_VAE = AutoencoderConfig(channels=(128, 128, 256, 256, 512), layers=2, latent_channels=32,
                           attention_levels=(4,))


def parameter_shapes(config: AutoencoderConfig) -> Shapes:
    """Path and shape of every parameter, all float32, of the network that models.autoencoder builds from `config`.

    The network itself says the same once it was traced; the tests hold the two together.
    """
    latent, moments = config.latent_channels, 2 * config.latent_channels
    shapes = {("encoder", *path): shape for path, shape in _encoder(config).items()}
    shapes |= {("decoder", *path): shape for path, shape in _decoder(config).items()}
    if config.quant_convs:
        shapes |= _conv(("quant_conv",), moments, moments, 1) | _conv(("post_quant_conv",), latent, latent, 1)
    return shapes


def _encoder(config: AutoencoderConfig) -> Shapes:
    widths, last = config.channels, len(config.channels) - 1
    shapes = _conv(("conv_in",), 3, widths[0], 3)
    for i, width in enumerate(widths):
        shapes |= _level(("down", i), widths[max(i - 1, 0)], width, config.layers, i in config.attention_levels)
        if i != last:
            shapes |= _conv(("down", i, "downsample"), width, width, 3)
    return shapes | _middle(widths[-1]) | _norm(("norm_out",), widths[-1]) | _conv(
        ("conv_out",), widths[-1], 2 * config.latent_channels, 3)


def _decoder(config: AutoencoderConfig) -> Shapes:
    widths, last = config.channels, len(config.channels) - 1
    shapes = _conv(("conv_in",), config.latent_channels, widths[-1], 3) | _middle(widths[-1])
    for i, width in enumerate(widths):
        place = ("up", last - i)  # the decoder's levels run from the coarsest
        inputs = widths[min(i + 1, last)]
        shapes |= _level(place, inputs, width, config.layers + 1, i in config.attention_levels)
        if i != 0:
            shapes |= _conv((*place, "upsample"), width, width, 3)
    return shapes | _norm(("norm_out",), widths[0]) | _conv(("conv_out",), widths[0], 3, 3)


def _level(place: Path, inputs: int, outputs: int, layers: int, attention: bool) -> Shapes:
    shapes = {}
    for i in range(layers):
        shapes |= _block((*place, "blocks", i), outputs if i else inputs, outputs)
        if attention:
            shapes |= _attention((*place, "attentions", i), outputs)
    return shapes


def _middle(width: int) -> Shapes:
    ends = _block(("mid", "block1"), width, width) | _block(("mid", "block2"), width, width)
    return ends | _attention(("mid", "attention"), width)


def _block(place: Path, inputs: int, outputs: int) -> Shapes:
    shapes = _norm((*place, "norm1"), inputs) | _conv((*place, "conv1"), inputs, outputs, 3)
    shapes |= _norm((*place, "norm2"), outputs) | _conv((*place, "conv2"), outputs, outputs, 3)
    return shapes | (_conv((*place, "shortcut"), inputs, outputs, 1) if inputs != outputs else {})


def _attention(place: Path, width: int) -> Shapes:
    shapes = _norm((*place, "norm"), width)
    for name in ("q", "k", "v", "out"):
        shapes |= {(*place, name, "kernel"): (width, width), (*place, name, "bias"): (width,)}
    return shapes


def _conv(place: Path, inputs: int, outputs: int, size: int) -> Shapes:
    return {(*place, "kernel"): (size, size, inputs, outputs), (*place, "bias"): (outputs,)}


def _norm(place: Path, width: int) -> Shapes:
    return {(*place, "scale"): (width,), (*place, "bias"): (width,)}
