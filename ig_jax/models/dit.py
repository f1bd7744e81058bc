"""The backbone of DiT, SiT and LightningDiT, with its intermediate and its final output.

    params = init(config, key)
    out = apply(config, params, x, t, y)        # out.final, out.intermediate[0]: (B, H, W, C) float32

Parameters are a plain dict {"blocks.0.attn.qkv.kernel": float32 array, ...}, which is what is jitted, sharded, saved
and averaged. The families differ only in their DiTConfig. Source: arXiv 2512.24176 and the networks it builds on.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ig_jax.base.errors import check
from ig_jax.models import cpu, layers
from ig_jax.models.stacking import stacked
from ig_jax.parallel.sharding import constrain_batch, gather_weight

FROZEN = ("pos_embed",)  # parameters that no optimizer touches
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


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Everything that defines the network; sizes in latent pixels, tokens or channels.

    Attributes:
        input_size: height and width of the latents.
        channels: of the latents.
        patch_size: latent pixels along the edge of a token.
        depth: number of blocks.
        width: channels of a token.
        num_heads: of attention.
        mlp_ratio: hidden units of the MLP, as a multiple of the width.
        num_classes: number of labels; the null label is num_classes.
        inter_depth: blocks run before each intermediate head; () for none.
        norm: of the tokens: "layernorm" (DiT, SiT) | "rmsnorm" (LightningDiT).
        mlp: form of the MLP: "gelu" | "swiglu".
        rope: whether there is a rotary position embedding of queries and keys.
        qk_norm: of queries and keys: "none" | "layernorm" | "rmsnorm".
        adaln_shift: whether blocks shift too; otherwise they modulate by scale and gate alone.
        sigma_channels: "none" | "unused" (original SiT drops them) | "variance" (DiT returns 2C channels).
        clock: "noise_at_1" (sigma-time) | "noise_at_0": the weights were trained on 1 - t and minus velocity.
        inter_head_init: "zero" (SiT release) | "xavier" (LightningDiT release).
        dtype: of the matrix products: "float32" | "bfloat16".
        scan_blocks: one compiled block looped over: quicker to compile, slower to run.
        remat: what the backward pass recomputes: "none" | "dots" (all but products) | "full" | "auto" (what fits).
        attention: kernel: "auto" (by platform) | "xla" | "cudnn": models.kernels.attention_kernel.

    Raises: UserError for sizes that do not divide, heads out of order or an unknown choice.
    """

    input_size: int
    channels: int
    patch_size: int
    depth: int
    width: int
    num_heads: int
    mlp_ratio: float
    num_classes: int
    inter_depth: tuple[int, ...]
    norm: str
    mlp: str
    rope: bool
    qk_norm: str
    adaln_shift: bool
    sigma_channels: str
    clock: str
    inter_head_init: str
    dtype: str
    scan_blocks: bool
    remat: str
    attention: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "inter_depth", tuple(self.inter_depth))
        for name in ("input_size", "channels", "patch_size", "depth", "width", "num_heads", "num_classes"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.mlp_ratio > 0, "mlp_ratio", self.mlp_ratio, "greater than 0")
        size, patch, width, heads = self.input_size, self.patch_size, self.width, self.num_heads
        check(size % patch == 0, "input_size", size, f"a multiple of patch_size={patch}")
        check(width % heads == 0, "width", width, f"a multiple of num_heads={heads}")
        check(width % 4 == 0, "width", width, "a multiple of 4 (sine and cosine of row and column)")
        fits = not self.rope or width // heads % 4 == 0
        check(fits, "width", width, f"a multiple of 4 x num_heads={4 * heads} for rotary embedding")
        for depth in self.inter_depth:
            fix = "it counts the blocks run before the intermediate head"
            check(1 <= depth <= self.depth, "inter_depth", depth, f"in 1..{self.depth} (the depth)", fix)
        ordered = list(self.inter_depth) == sorted(set(self.inter_depth))
        check(ordered, "inter_depth", self.inter_depth, "in increasing order without repeats")
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


class DiTOutput(NamedTuple):
    """Both predictions of one forward pass, each (B, H, W, C) float32.

    Attributes:
        final: None where the network ran only up to an intermediate head.
        intermediate: one for each entry of inter_depth that was reached.
    """

    final: jax.Array | None
    intermediate: tuple[jax.Array, ...]

    @property
    def heads(self) -> tuple[jax.Array, ...]:
        """The final prediction of a network that ran to its end, then the intermediate ones."""
        assert self.final is not None
        return self.final, *self.intermediate


class Block(nnx.Module):
    """Attention and MLP, each modulated by adaLN and added through a gate: (B, N, D) float32 -> the same."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        c = config
        self.dtype = jnp.dtype(c.dtype)
        self.shifted = c.adaln_shift
        self.norm1, self.norm2 = (_norm(c) for _ in range(2))
        self.attn = layers.Attention(c.width, c.num_heads, qk_norm=c.qk_norm, kernel=c.attention, rngs=rngs)
        self.mlp = layers.Mlp(c.width, c.mlp_hidden, c.mlp, rngs=rngs)
        self.modulation = layers.Modulation(c.width, 6 if c.adaln_shift else 4, dtype=self.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, cond: jax.Array, rope) -> jax.Array:
        if self.shifted:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)
        else:
            (scale1, gate1, scale2, gate2), shift1, shift2 = self.modulation(cond), None, None
        x = constrain_batch(x)
        h = layers.modulated(self.norm1, x, shift1, scale1, self.dtype)
        x = x + gate1 * self.attn(h, rope)
        h = layers.modulated(self.norm2, x, shift2, scale2, self.dtype)
        return x + gate2 * self.mlp(h)


class Head(nnx.Module):
    """Norm, adaLN with shift, linear layer, both of `init`: (B, N, D) -> (B, H, W, out_channels) float32."""

    def __init__(self, config: DiTConfig, *, init, rngs: nnx.Rngs):
        c = config
        self.patch, self.side = c.patch_size, c.side
        self.dtype = jnp.dtype(c.dtype)
        self.norm = _norm(c)
        self.linear = layers.Linear(c.width, c.patch_size**2 * c.out_channels, init=init, rngs=rngs)
        self.modulation = layers.Modulation(c.width, 2, dtype=self.dtype, init=init, rngs=rngs)

    def __call__(self, x: jax.Array, cond: jax.Array) -> jax.Array:
        shift, scale = self.modulation(cond)
        h = layers.modulated(self.norm, x, shift, scale, self.dtype)
        return layers.unpatchify(self.linear(h).astype(jnp.float32), self.patch, self.side)


def _norm(config: DiTConfig) -> nnx.Module:
    return layers.LayerNorm(config.width) if config.norm == "layernorm" else layers.RMSNorm(config.width)


class DiT(nnx.Module):
    """The network; `apply` below is its functional form."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch_embed = layers.Linear(c.patch_size**2 * c.channels, c.width, rngs=rngs)
        self.pos_embed = nnx.Param(jnp.asarray(layers.sincos_positions(c.side, c.width)))
        self.time_embed = layers.TimeEmbedding(c.width, rngs=rngs)
        self.label_embed = layers.LabelEmbedding(c.num_classes, c.width, rngs=rngs)
        self.blocks = nnx.List([Block(c, rngs=rngs) for _ in range(c.depth)])
        self.final_head = Head(c, init=layers.zeros, rngs=rngs)
        inter_init = layers.zeros if c.inter_head_init == "zero" else layers.xavier_uniform
        self.inter_heads = nnx.List([Head(c, init=inter_init, rngs=rngs) for _ in c.inter_depth])

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array, until_head: int | None = None) -> DiTOutput:
        c = self.config
        reversed_clock = c.clock == "noise_at_0"
        cond = self.time_embed(1 - t if reversed_clock else t) + self.label_embed(y)
        tokens = self.patch_embed(layers.patchify(x, c.patch_size).astype(c.dtype))
        tokens = tokens.astype(jnp.float32) + gather_weight(jax.lax.stop_gradient(self.pos_embed[...]))
        run, intermediate, done = self._block(), [], 0
        for depth, head in zip(c.inter_depth, self.inter_heads):
            tokens = self._run(run, self.blocks[done:depth], tokens, cond)
            intermediate.append(self._read(head, tokens, cond))
            done = depth
            if len(intermediate) - 1 == until_head:
                return DiTOutput(None, tuple(intermediate))
        tokens = self._run(run, self.blocks[done:], tokens, cond)
        return DiTOutput(self._read(self.final_head, tokens, cond), tuple(intermediate))

    def _read(self, head: Head, tokens: jax.Array, cond: jax.Array) -> jax.Array:
        out = head(tokens, cond)
        if self.config.sigma_channels == "unused":
            out = out[..., : self.config.channels]
        return -out if self.config.clock == "noise_at_0" else out

    def _block(self):
        """(tokens, a block's parameters, cond) -> tokens; one function for all blocks, so that it is traced once."""
        c = self.config
        rope = layers.rope_table(c.side, c.width // c.num_heads) if c.rope else None
        graphdef = nnx.graphdef(self.blocks[0])

        def run(tokens, state, cond):
            return nnx.merge(graphdef, state)(tokens, cond, rope)

        if c.remat in ("dots", "full"):  # training replaces "auto" (training/memory.py); sampling has no backward pass
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if c.remat == "dots" else None
            run = jax.checkpoint(run, policy=policy)
        # Inlined, the CPU compiler fuses the sum of all earlier blocks into every norm again: at 28 blocks, three
        # times the compile time and a tenth more of every step.
        return run if c.scan_blocks else cpu.out_of_line(run)

    def _run(self, run, blocks, tokens: jax.Array, cond: jax.Array) -> jax.Array:
        """The given blocks one after the other: unrolled, or as one scan over their stacked parameters."""
        states = [nnx.state(block) for block in blocks]
        if not self.config.scan_blocks or not states:
            for state in states:
                tokens = run(tokens, state, cond)
            return tokens
        # Stacked inside the program, so that parameters and checkpoints are the same with and without a scan.
        return jax.lax.scan(lambda tokens, state: (run(tokens, state, cond), None), tokens, stacked(states))[0]


@functools.lru_cache
def _abstract(config: DiTConfig):
    return layers.by_name(lambda: DiT(config, rngs=nnx.Rngs(0)))


def init(config: DiTConfig, key: jax.Array) -> dict[str, jax.Array]:
    """Newly initialised float32 parameters by name; jit it with out_shardings to create them sharded."""
    state = nnx.state(DiT(config, rngs=nnx.Rngs(params=key)))
    return {".".join(map(str, path)): param[...] for path, param in nnx.to_flat_state(state)}


def shapes(config: DiTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter; nothing is allocated."""
    return dict(_abstract(config)[2])


def apply(
    config: DiTConfig,
    params: dict[str, jax.Array],
    x: jax.Array,
    t: jax.Array,
    y: jax.Array,
    until_head: int | None = None,
) -> DiTOutput:
    """Both outputs for latents x (B, H, W, C), times t (B,) in [0, 1] and labels y (B,) in 0..num_classes.

    The output is the velocity of the path in our clock (t = 1 is noise), or whatever else the network was trained to
    predict; with sigma_channels="variance" the last C channels are DiT's variance output.
    `until_head`, an index into inter_depth, stops after that head: `final` is then None and the blocks above it are
    not run.
    Raises: UserError that names x, t or y, when it is traced.
    """
    check_inputs(config, x, t, y)
    graphdef, paths, _ = _abstract(config)
    state = nnx.from_flat_state({path: nnx.Param(params[name]) for name, path in paths.items()})
    return nnx.merge(graphdef, state)(x, t, y, until_head)


def check_inputs(config: DiTConfig, x: jax.Array, t: jax.Array, y: jax.Array) -> None:
    """Raise UserError for a shape or a type that the network does not take."""
    shape, batch = (config.input_size, config.input_size, config.channels), jnp.shape(x)[:1]
    check(jnp.shape(x)[1:] == shape, "x.shape", jnp.shape(x), f"(B, {', '.join(map(str, shape))})")
    fix = "give one value for each of the batch"
    check(jnp.shape(t) == batch, "t.shape", jnp.shape(t), f"{batch}, that of the batch", fix)
    check(jnp.shape(y) == batch, "y.shape", jnp.shape(y), f"{batch}, that of the batch", fix)
    whole = jnp.issubdtype(jnp.result_type(y), jnp.integer)
    check(whole, "y.dtype", str(jnp.result_type(y)), f"whole numbers in 0..{config.num_classes}")


def cast_kernels(config: DiTConfig, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The parameters with each kernel cast to the dtype of its products, for many calls of `apply` in one program.

    `apply` casts a float32 kernel at every call. Biases, tables and the timestep embedding stay float32.
    """
    names = [name for name in params if name.endswith(".kernel") and not name.startswith("time_embed.")]
    return params | {name: params[name].astype(config.dtype) for name in names}


def forward(
    config: DiTConfig,
    params: dict[str, jax.Array],
    x: jax.Array,
    t: jax.Array,
    y: jax.Array,
    until_head: int | None = None,
) -> DiTOutput:
    """Inference-only `apply`; on a single CPU the batch is processed in chunks that fit in its cache."""
    run = functools.partial(apply, config, params, until_head=until_head)
    return cpu.in_chunks(run, x, t, y, bytes_per_image=4 * config.side**2 * config.mlp_hidden)
