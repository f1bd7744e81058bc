"""What defines a DiT, SiT or LightningDiT, and the parameters that follow from it; without JAX.

Separate from the network in dit.py, so that a published file is checked in a moment: importing JAX and Flax
takes longer than the check.
"""

import dataclasses

from ig_jax.errors import check

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Everything that defines the network. Sizes in latent pixels, tokens or channels."""

    input_size: int  # latent height = width
    channels: int
    patch_size: int
    depth: int  # blocks
    width: int
    num_heads: int
    mlp_ratio: float
    num_classes: int  # the null label is num_classes
    inter_depth: tuple[int, ...]  # blocks run before each intermediate head; () for none
    norm: str  # "layernorm" (DiT, SiT) | "rmsnorm" (LightningDiT)
    mlp: str  # "gelu" | "swiglu"
    rope: bool
    qk_norm: str  # "none" | "layernorm" | "rmsnorm"
    adaln_shift: bool  # False: blocks modulate by scale and gate alone
    sigma_channels: str  # "none" | "unused" (original SiT drops them) | "variance" (DiT returns 2C channels)
    clock: str  # "noise_at_1" (ours) | "noise_at_0": the weights were trained on 1 - t and minus velocity
    inter_head_init: str  # "zero" (SiT release) | "xavier" (LightningDiT release)
    dtype: str  # of the matrix products: "float32" | "bfloat16"
    scan_blocks: bool  # one compiled block looped over: quicker to compile, slower to run
    remat: str  # what the backward pass recomputes: "none" | "dots" (all but products) | "full" | "auto" (what fits)
    attention: str = "auto"  # "auto" (by platform) | "xla" | "cudnn": models.kernels.attention_kernel

    def __post_init__(self):
        object.__setattr__(self, "inter_depth", tuple(self.inter_depth))
        for name in ("input_size", "channels", "patch_size", "depth", "width", "num_heads", "num_classes"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.mlp_ratio > 0, "mlp_ratio", self.mlp_ratio, "greater than 0")
        check(self.input_size % self.patch_size == 0, "input_size", self.input_size,
              f"a multiple of patch_size={self.patch_size}")
        check(self.width % self.num_heads == 0, "width", self.width,
              f"a multiple of num_heads={self.num_heads}")
        check(self.width % 4 == 0, "width", self.width, "a multiple of 4 (sine and cosine of row and column)")
        check(not self.rope or self.width // self.num_heads % 4 == 0, "width", self.width,
              f"a multiple of 4 x num_heads={4 * self.num_heads} for rotary embedding")
        for depth in self.inter_depth:
            check(1 <= depth <= self.depth, "inter_depth", depth, f"in 1..{self.depth} (the depth)",
                  "it counts the blocks run before the intermediate head")
        check(list(self.inter_depth) == sorted(set(self.inter_depth)), "inter_depth", self.inter_depth,
              "in increasing order without repeats")
        for name, choices in CHOICES.items():
            check(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")

    @property
    def side(self) -> int:
        """Tokens along one edge."""
        return self.input_size // self.patch_size

    @property
    def out_channels(self) -> int:
        """Channels the heads emit, learned sigma included."""
        return self.channels * (1 if self.sigma_channels == "none" else 2)

    @property
    def mlp_hidden(self) -> int:
        """Hidden units of the MLP; SwiGLU keeps the parameters of a GELU MLP by taking two thirds."""
        hidden = self.width * self.mlp_ratio
        return int(hidden if self.mlp == "gelu" else 2 / 3 * hidden)


CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "mlp": ("gelu", "swiglu"),
    "qk_norm": ("none", "layernorm", "rmsnorm"),
    "sigma_channels": ("none", "unused", "variance"),
    "clock": ("noise_at_1", "noise_at_0"),
    "inter_head_init": ("zero", "xavier"),
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "full", "auto"),
    "attention": ("auto", "xla", "cudnn"),
}


def parameter_shapes(config: DiTConfig) -> Shapes:
    """Name and shape of every parameter, all float32, of the network that models.dit builds from `config`.

    The network itself says the same through dit.shapes, after it was traced; the tests hold the two together.
    """
    c = config
    head = _norm("norm", c) | _linear("linear", c.width, c.patch_size**2 * c.out_channels)
    head |= _linear("modulation.linear", c.width, 2 * c.width)
    modules = {
        "patch_embed": {"kernel": (c.patch_size**2 * c.channels, c.width), "bias": (c.width,)},
        "time_embed": _linear("fc1", 256, c.width) | _linear("fc2", c.width, c.width),  # 256 features of the time
        "label_embed": {"table": (c.num_classes + 1, c.width)},
        **dict.fromkeys([f"blocks.{i}" for i in range(c.depth)], _block(c)),
        "final_head": head,
        **dict.fromkeys([f"inter_heads.{i}" for i in range(len(c.inter_depth))], head),
    }
    shapes = {f"{module}.{name}": shape for module, inside in modules.items() for name, shape in inside.items()}
    return {"pos_embed": (c.side**2, c.width)} | shapes


def _block(c: DiTConfig) -> Shapes:
    qk = {"none": (), "layernorm": ("scale", "bias"), "rmsnorm": ("scale",)}[c.qk_norm]
    return {
        **_norm("norm1", c), **_norm("norm2", c),
        **_linear("attn.qkv", c.width, 3 * c.width), **_linear("attn.proj", c.width, c.width),
        **{f"attn.{norm}.{kind}": (c.width // c.num_heads,) for norm in ("q_norm", "k_norm") for kind in qk},
        **_linear("mlp.fc1", c.width, c.mlp_hidden * (2 if c.mlp == "swiglu" else 1)),  # gate and value side by side
        **_linear("mlp.fc2", c.mlp_hidden, c.width),
        **_linear("modulation.linear", c.width, (6 if c.adaln_shift else 4) * c.width),
    }


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.kernel": (inputs, outputs), f"{name}.bias": (outputs,)}


def _norm(name: str, c: DiTConfig) -> Shapes:
    return {f"{name}.scale": (c.width,)} if c.norm == "rmsnorm" else {}  # a LayerNorm here has no parameters
