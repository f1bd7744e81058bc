"""Linear layers and attention, each with the derivative or the kernel that suits the hardware.

Automatic differentiation of a product in bfloat16 would form the gradients of its weights, and with them all sums
over the batch, in bfloat16. Tests hold each rule against the plain form.
"""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ig_jax.base.errors import check
from ig_jax.models import cpu
from ig_jax.models.derivatives import both_modes
from ig_jax.parallel.sharding import constrain_batch, gather_weight, platform, scatter_gradient


def _dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """The product of a and b over the axes `contract` of each, accumulated and returned in float32."""
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array, tensor_dimension: int | None = None) -> jax.Array:
    """x (..., I) @ kernel (I, O) + bias (O,) in the dtype of `x`, accumulated in float32.

    `kernel` and `bias` are float32; the kernel is cast before it is gathered, which halves the bytes in bfloat16, and
    its gradient is computed and returned in float32.
    """
    forward = functools.partial(_dense_forward, tensor_dimension)
    plain = lambda *arrays: forward(*arrays)[0]
    reverse = jax.custom_vjp(plain)
    reverse.defvjp(forward, functools.partial(_dense_backward, tensor_dimension))
    return both_modes(reverse, plain)(x, kernel, bias)


def _dense_forward(tensor_dimension, x, kernel, bias):
    weight = gather_weight(kernel.astype(x.dtype), tensor_dimension)
    out = _dot(x, weight, ((x.ndim - 1,), (0,))) + bias
    return constrain_batch(out.astype(x.dtype), hidden=tensor_dimension == 1), (x, kernel)


def _dense_backward(tensor_dimension, saved, grad):
    x, kernel = saved
    weight = gather_weight(kernel.astype(x.dtype), tensor_dimension)
    grad = grad.astype(x.dtype)
    grad_x = _dot(grad, weight, ((x.ndim - 1,), (1,))).astype(x.dtype)
    grad_x = constrain_batch(grad_x, hidden=tensor_dimension == 0)
    grad_bias = jnp.sum(grad, axis=tuple(range(grad.ndim - 1)), dtype=jnp.float32)
    x, grad = cpu.one_batch_axis(x, grad)
    batch = tuple(range(x.ndim - 1))
    return grad_x, scatter_gradient(_dot(x, grad, (batch, batch)), tensor_dimension), grad_bias


def attention(q: jax.Array, k: jax.Array, v: jax.Array, wanted: str = "auto") -> jax.Array:
    """Softmax attention over N tokens: q, k, v (B, N, A, K) -> (B, N, A, K); the softmax is float32.

    Raises: UserError as `attention_kernel`.
    """
    kernel = attention_kernel(wanted, platform=platform(), dtype=q.dtype, head_dim=q.shape[-1])
    if kernel == "cpu":
        return cpu.attention(q, k, v)
    by = lambda kernel: functools.partial(jax.nn.dot_product_attention, implementation=kernel)
    return by("xla")(q, k, v) if kernel == "xla" else both_modes(by(kernel), by("xla"))(q, k, v)


def attention_kernel(
    wanted: str, *, platform: str, dtype: str | jnp.dtype, head_dim: int
) -> Literal["xla", "cudnn", "cpu"]:
    """The kernel, "cudnn", "xla" or "cpu" (models/cpu.py), for the setting `wanted` ("auto" | "xla" | "cudnn").

    On CUDA "auto" takes cuDNN's fused attention wherever it supports the arrays: without it every head writes
    N x N float32 scores, twice the memory traffic of a block at 256 tokens.
    Raises: UserError if "cudnn" is set and does not support the arrays or is not installed.
    """
    if wanted == "auto" and platform == "cpu":
        return "cpu"
    fits = platform == "cuda" and jnp.dtype(dtype) == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128
    if wanted == "xla" or (wanted == "auto" and not fits):
        return "xla"
    expected = f"auto or xla for {jnp.dtype(dtype)}, heads of {head_dim} and {platform}"
    check(fits, "attention", wanted, expected, "cuDNN takes bfloat16 and heads of a multiple of 8 up to 128, on CUDA")
    missing, fix = _cudnn_error(), "pip install 'jax[cuda12]' brings cuDNN"
    check(wanted == "auto" or not missing, "attention", wanted, f"auto or xla on this machine ({missing})", fix)
    if missing:
        _warn_once(f"attention='auto' takes XLA's kernel, the slower one on CUDA: {missing}")
    return "xla" if missing else "cudnn"


@functools.cache
def _cudnn_error() -> str:
    """The reason why cuDNN attention is not available to this process; "" if it is."""
    some = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), some, some, some)
    except RuntimeError as error:
        return str(error)
    return ""


@functools.cache
def _warn_once(line: str) -> None:
    logging.getLogger(__name__).warning(line)


def split_heads(qkv: jax.Array, heads: int) -> tuple[jax.Array, ...]:
    """(B, N, 3 D) -> q, k, v, each (B, N, A, K); by a split, whose gradients are joined in one pass."""
    parts = jnp.split(qkv.reshape(*qkv.shape[:2], 3, heads, -1), 3, axis=2)
    return tuple(part.squeeze(2) for part in parts)
