"""One backbone for DiT, SiT and LightningDiT that returns the intermediate and the final output together.

    params = init(config, key)
    out = apply(config, params, x, t, y)        # out.final, out.intermediate[0]: [B, H, W, C] float32

Parameters are a plain dict {"blocks.0.attn.qkv.kernel": float32 array, ...}: what is jitted, sharded, saved
and averaged. The families differ only in DiTConfig. Source: arXiv 2512.24176 and METHODS named there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ig_jax.models import layers
from ig_jax.models.dit_config import DiTConfig
from ig_jax.models.kernels import apart
from ig_jax.models.stacking import stacked
from ig_jax.parallel.sharding import constrain_batch, gather_weight, on_one_cpu

FROZEN = ("pos_embed",)  # parameters that no optimizer touches
CPU_CACHE = 2**24  # bytes between two products that a CPU still finds in its cache; beyond 20 MB a Xeon was twice slower


class DiTOutput(NamedTuple):
    """Both predictions of one forward pass, each [B, H, W, C] float32."""

    final: jax.Array | None  # None where the network ran only up to an intermediate head
    intermediate: tuple[jax.Array, ...]  # one for each entry of inter_depth that was reached


class Block(nnx.Module):
    """Attention and MLP, each modulated by adaLN and added through a gate: [B, N, D] float32 -> the same."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        c = config
        self.dtype = jnp.dtype(c.dtype)
        self.shifted = c.adaln_shift
        self.norm1, self.norm2 = (_norm(c) for _ in range(2))
        self.attn = layers.Attention(c.width, c.num_heads, qk_norm=c.qk_norm, kernel=c.attention, rngs=rngs)
        mlp = layers.GeluMlp if c.mlp == "gelu" else layers.SwiGluMlp
        self.mlp = mlp(c.width, c.mlp_hidden, rngs=rngs)
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
    """Norm, adaLN (always with shift), linear, both of `init`: tokens [B, N, D] -> [B, H, W, out_channels] float32."""

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

        run = _rematerialised(run, c.remat)
        # In one piece, the CPU compiler fuses the sum of all earlier blocks into every norm again: at 28
        # blocks three times the compile time, and a tenth of the step.
        return run if c.scan_blocks else apart(run)

    def _run(self, run, blocks, tokens: jax.Array, cond: jax.Array) -> jax.Array:
        """The given blocks one after the other: unrolled, or as one scan over their stacked parameters."""
        states = [nnx.state(block) for block in blocks]
        if not self.config.scan_blocks or not states:
            for state in states:
                tokens = run(tokens, state, cond)
            return tokens
        # Stacked here, inside the program, so that parameters and checkpoints look the same either way.
        return jax.lax.scan(lambda tokens, state: (run(tokens, state, cond), None), tokens, stacked(states))[0]


def _rematerialised(run, policy: str):
    if policy in ("none", "auto"):  # whoever trains has chosen by now (training/memory.py); samplers keep nothing
        return run
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(run, policy=saved)


@functools.lru_cache
def _abstract(config: DiTConfig):
    """The module's structure without its arrays, and each parameter by name: its path and its shape."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))
    flat = sorted((".".join(map(str, path)), path, param.get_value()) for path, param in nnx.to_flat_state(state))
    return graphdef, {name: path for name, path, _ in flat}, {name: shape for name, _, shape in flat}


def init(config: DiTConfig, key: jax.Array) -> dict[str, jax.Array]:
    """Fresh float32 parameters by name; jit it with out_shardings to have them born sharded."""
    state = nnx.state(DiT(config, rngs=nnx.Rngs(params=key)))
    return {".".join(map(str, path)): param[...] for path, param in nnx.to_flat_state(state)}


def shapes(config: DiTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter, nothing allocated."""
    return dict(_abstract(config)[2])


def apply(
    config: DiTConfig, params: dict[str, jax.Array], x: jax.Array, t: jax.Array, y: jax.Array,
    until_head: int | None = None,
) -> DiTOutput:
    """Both outputs for latents x [B, H, W, C], times t [B] in [0, 1] and labels y [B] in 0..num_classes.

    The velocity of the linear or cosine path in our clock (t = 1 is noise), or what the weights predict
    otherwise; with sigma_channels="variance" the last C channels are the variance output of DiT.
    `until_head` (an index into inter_depth) stops after that head: `final` is then None and the blocks
    above it cost nothing.
    """
    graphdef, paths, _ = _abstract(config)
    state = nnx.from_flat_state({path: nnx.Param(params[name]) for name, path in paths.items()})
    return nnx.merge(graphdef, state)(x, t, y, until_head)


def cast_kernels(config: DiTConfig, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same network with each kernel cast to the dtype of its products, for many calls of `apply` in one program.

    `apply` casts a float32 kernel at every call. Biases, tables and the timestep embedding stay float32.
    """
    names = [name for name in params if name.endswith(".kernel") and not name.startswith("time_embed.")]
    return params | {name: params[name].astype(config.dtype) for name in names}


def forward(
    config: DiTConfig, params: dict[str, jax.Array], x: jax.Array, t: jax.Array, y: jax.Array,
    until_head: int | None = None,
) -> DiTOutput:
    """`apply` where nothing is differentiated: the same, on one CPU a few images at a time."""
    run = functools.partial(apply, config, params, until_head=until_head)
    hidden = 4 * config.side**2 * config.mlp_hidden  # float32 bytes of an image, the largest array of a block
    fitting = max(1, CPU_CACHE // hidden)
    sizes = [size for size in range((fitting + 1) // 2, fitting + 1) if len(x) % size == 0]  # smaller would cost more
    if not on_one_cpu() or len(x) <= fitting or not sizes:
        return run(x, t, y)
    groups = jax.tree.map(lambda rows: rows.reshape(-1, sizes[-1], *rows.shape[1:]), (x, t, y))
    out = jax.lax.map(lambda rows: run(*rows), groups)
    return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), out)
