"""The layers of DiT, SiT and LightningDiT.

Dims: B batch, N tokens, D width, A heads, K head dim, P patch, H W C latent. Parameters are float32; matrix
products run in the dtype of their input, norms, softmax, rotary embedding and modulation in float32.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from ig_jax.models import cpu
from ig_jax.models.kernels import attention, dense, split_heads
from ig_jax.parallel.sharding import TENSOR_DIMENSION, constrain_batch, gather_weight

LAYER_NORM_EPS = 1e-6  # SiT and DiT blocks; also the RMSNorm of LightningDiT
QK_LAYER_NORM_EPS = 1e-5  # timm's Attention builds its qk norms with torch's default
FREQUENCIES = 256  # features of the timestep embedding


def xavier_uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)), the initialisation of every linear layer."""
    limit = math.sqrt(6 / (shape[0] + shape[1]))
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit)


def normal_002(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Normal with standard deviation 0.02: label table and timestep MLP."""
    return 0.02 * jax.random.normal(key, shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros, the initialisation of adaLN modulations and output heads: a new block is the identity."""
    del key
    return jnp.zeros(shape, jnp.float32)


def by_name(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, dict[str, tuple], dict[str, jax.ShapeDtypeStruct]]:
    """(graphdef, path of each parameter, its shape) of the module that `make` builds, by name; nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    flat = sorted((".".join(map(str, path)), path, param.get_value()) for path, param in nnx.to_flat_state(state))
    return graphdef, {name: path for name, path, _ in flat}, {name: shape for name, _, shape in flat}


class Linear(nnx.Module):
    """x (..., I) -> (..., O) in the dtype of x, with bias."""

    def __init__(
        self, inputs: int, outputs: int, *, rngs: nnx.Rngs, init=xavier_uniform, tensor_dimension: int | None = None
    ):
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))
        self.tensor_dimension = tensor_dimension

    def __call__(self, x: jax.Array) -> jax.Array:
        return dense(x, self.kernel[...], self.bias[...], self.tensor_dimension)


class LayerNorm(nnx.Module):
    """Normalisation over the last axis in float32, with scale and bias where `affine`."""

    def __init__(self, width: int, *, eps: float = LAYER_NORM_EPS, affine: bool = False):
        self.eps = eps
        self.affine = affine
        if affine:
            self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
            self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        x = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return x * self.scale[...] + self.bias[...] if self.affine else x


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis in float32."""

    def __init__(self, width: int, *, eps: float = LAYER_NORM_EPS):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.scale[...]


# The three functions below keep only their arguments for the backward pass and recompute the rest: writing the
# intermediates to memory and reading them back takes longer, and they would be most of what a block keeps.


def modulated(norm, x: jax.Array, shift: jax.Array | None, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """norm(x (B, N, D)) * (1 + scale (B, 1, D)) + shift, computed in float32.

    Out of line on a CPU: fused into the matrix product that follows it is 2.5 times slower from 16 images on.
    """

    def compute(x, shift, scale):
        x = norm(x) * (1 + scale)
        return (x if shift is None else x + shift).astype(dtype)

    return cpu.out_of_line(jax.checkpoint(compute))(x, shift, scale)


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """GELU (tanh form), computed in float32; in bfloat16 a CPU rounds after every operation, four times slower."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@jax.checkpoint
def swiglu(x: jax.Array) -> jax.Array:
    """silu(first half) * second half over the last axis, computed in float32."""
    gate, value = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * value).astype(x.dtype)


class Modulation(nnx.Module):
    """adaLN: conditioning (B, D) -> `chunks` arrays (B, 1, D) in float32."""

    def __init__(self, width: int, chunks: int, *, dtype: jnp.dtype, init=zeros, rngs: nnx.Rngs):
        self.linear = Linear(width, chunks * width, rngs=rngs, init=init)
        self.chunks = chunks
        self.dtype = dtype

    def __call__(self, cond: jax.Array) -> list[jax.Array]:
        out = self.linear(jax.nn.silu(cond).astype(self.dtype)).astype(jnp.float32)
        return jnp.split(out[:, None, :], self.chunks, axis=-1)


class Attention(nnx.Module):
    """Multi-head self-attention (B, N, D) -> (B, N, D), with optional per-head norms and rotary embedding."""

    def __init__(self, width: int, heads: int, *, qk_norm: str, kernel: str, rngs: nnx.Rngs):
        head_dim = width // heads
        self.heads = heads
        self.kernel = kernel
        self.qkv = Linear(width, 3 * width, rngs=rngs, tensor_dimension=TENSOR_DIMENSION["qkv"])
        self.proj = Linear(width, width, rngs=rngs, tensor_dimension=TENSOR_DIMENSION["proj"])
        self.q_norm, self.k_norm = (_qk_norm(qk_norm, head_dim) for _ in range(2))

    def __call__(self, x: jax.Array, rope: tuple[np.ndarray, np.ndarray] | None) -> jax.Array:
        q, k, v = split_heads(self.qkv(x), self.heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = attention(q.astype(x.dtype), k.astype(x.dtype), v, self.kernel)
        return self.proj(rearrange(out, "b n a k -> b n (a k)"))


def _qk_norm(kind: str, head_dim: int) -> nnx.Module | None:
    if kind == "layernorm":
        return LayerNorm(head_dim, eps=QK_LAYER_NORM_EPS, affine=True)
    return RMSNorm(head_dim) if kind == "rmsnorm" else None


def rope_table(side: int, head_dim: int, theta: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each (N, K) float32: the first half of K rotates with the row, the second with the column.

    Source: hustvl/LightningDiT models/pos_embed.py (interleaved pairs).
    """
    half = head_dim // 2
    frequencies = theta ** (-np.arange(0, half, 2, dtype=np.float64) / half)
    angles = np.repeat(np.arange(side)[:, None] * frequencies, 2, axis=-1)
    rows, columns = np.repeat(angles, side, axis=0), np.tile(angles, (side, 1))
    table = np.concatenate([rows, columns], axis=-1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def rotate(x: jax.Array, cos: np.ndarray, sin: np.ndarray) -> jax.Array:
    """x (B, N, A, K) with each pair (x_2i, x_2i+1) turned by its angle, in float32."""
    x = x.astype(jnp.float32)
    pairs = rearrange(x, "... (k two) -> ... k two", two=2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return x * cos[:, None, :] + turned * sin[:, None, :]


class Mlp(nnx.Module):
    """Linear, "gelu" or "swiglu", linear; the gate of SwiGLU doubles the outputs of the first layer."""

    def __init__(self, width: int, hidden: int, kind: str, *, rngs: nnx.Rngs):
        inner = hidden if kind == "gelu" else 2 * hidden
        self.fc1 = Linear(width, inner, rngs=rngs, tensor_dimension=TENSOR_DIMENSION["fc1"])
        self.fc2 = Linear(hidden, width, rngs=rngs, tensor_dimension=TENSOR_DIMENSION["fc2"])
        self.activation = gelu if kind == "gelu" else swiglu

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


class TimeEmbedding(nnx.Module):
    """t (B,) float32, taken raw (no x1000) -> (B, D) float32."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(FREQUENCIES, width, rngs=rngs, init=normal_002)
        self.fc2 = Linear(width, width, rngs=rngs, init=normal_002)

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.silu(self.fc1(time_features(t))))


def time_features(t: jax.Array) -> jax.Array:
    """[cos(t f), sin(t f)] with f_i = 10000^(-i/128): t (B,) -> (B, 256) float32."""
    half = FREQUENCIES // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class LabelEmbedding(nnx.Module):
    """y (B,) int32 in 0..num_classes (the last row is the null label) -> (B, D) float32."""

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(normal_002(rngs.params(), (num_classes + 1, width)))

    def __call__(self, y: jax.Array) -> jax.Array:
        return constrain_batch(jnp.take(gather_weight(self.table[...]), y, axis=0))


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """(B, H, W, C) -> tokens (B, N, P*P*C), row-major, each in (p, q, c) order."""
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: jax.Array, patch: int, side: int) -> jax.Array:
    """Tokens (B, N, P*P*C) -> (B, H, W, C) with H = W = side * patch."""
    return rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=side, w=side, p=patch, q=patch)


def sincos_positions(side: int, width: int) -> np.ndarray:
    """Fixed positions (N, D) float32: half the channels for the column, half for the row, each [sin, cos]."""
    quarter = width // 4
    omega = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = [index[:, None] * omega for index in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)
