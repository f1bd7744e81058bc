"""The two hot spots of a transformer, each with its own derivative rule, chosen by platform.

On a CPU plain automatic differentiation loses a third of the step: the weight gradient is computed through
a strided transposed copy, bfloat16 products accumulate and leave in bfloat16, and attention with the head
axis in the middle copies both operands. The rules below say the same mathematics in an order that each
backend runs well; tests hold them against the plain form.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax

from ig_jax.errors import check
from ig_jax.parallel.sharding import constrain_batch, gather_weight, on_one_cpu, platform, scatter_gradient


def _dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """A product whose result leaves in float32: on a CPU 2.8 times faster than a bfloat16 result."""
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array, tensor_dimension: int | None = None) -> jax.Array:
    """x [..., I] @ kernel [I, O] + bias [O] in the dtype of `x`, accumulated in float32.

    `kernel` and `bias` are float32 masters; the kernel is cast before it is gathered, which halves the
    bytes in bfloat16, and its gradient is formed and returned in float32.
    """
    return _dense_forward(x, kernel, bias, tensor_dimension)[0]


def _dense_forward(x, kernel, bias, tensor_dimension):
    weight = gather_weight(kernel.astype(x.dtype), tensor_dimension)
    out = _dot(x, weight, ((x.ndim - 1,), (0,))) + bias
    return constrain_batch(out.astype(x.dtype), hidden=tensor_dimension == 1), (x, kernel)


def _dense_backward(tensor_dimension, saved, grad):
    x, kernel = saved
    weight = gather_weight(kernel.astype(x.dtype), tensor_dimension)
    grad = grad.astype(x.dtype)
    batch = tuple(range(x.ndim - 1))
    grad_x = _dot(grad, weight, ((x.ndim - 1,), (1,))).astype(x.dtype)
    grad_x = constrain_batch(grad_x, hidden=tensor_dimension == 0)
    grad_bias = jnp.sum(grad, axis=batch, dtype=jnp.float32)
    if x.dtype == jnp.float32:
        # On a CPU contracting two batch axes first copies x transposed, fused with whatever made x; one axis
        # does not (an MLP: 120 against 178 ms). In bfloat16 it is the other way round (102 against 63 ms).
        x, grad, batch = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), (0,)
    return grad_x, scatter_gradient(_dot(x, grad, (batch, batch)), tensor_dimension), grad_bias


dense.defvjp(_dense_forward, _dense_backward)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, wanted: str = "auto") -> jax.Array:
    """Softmax attention over N tokens: q, k, v [B, N, A, K] -> [B, N, A, K]; the softmax is float32.

    Raises: UserError as `attention_kernel`.
    """
    kernel = attention_kernel(wanted, platform=platform(), dtype=q.dtype, head_dim=q.shape[-1])
    if kernel == "cpu":
        return _attention_cpu(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation=kernel)


def attention_kernel(wanted: str, *, platform: str, dtype: str | jnp.dtype, head_dim: int) -> str:
    """The kernel that runs where `wanted` ("auto" | "xla" | "cudnn") is set: "cudnn", "xla" or "cpu" (ours).

    "auto" takes cuDNN's fused attention for what it can do on CUDA: without it every head writes N x N float32
    scores, twice the memory traffic of a block at 256 tokens.
    Raises: UserError for a cuDNN that is wanted by name and cannot be had.
    """
    if wanted == "auto" and platform == "cpu":
        return "cpu"
    fits = platform == "cuda" and jnp.dtype(dtype) == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128
    if wanted == "xla" or (wanted == "auto" and not fits):
        return "xla"
    check(fits, "attention", wanted, f"auto or xla for {jnp.dtype(dtype)}, heads of {head_dim} and {platform}",
          "cuDNN takes bfloat16 and heads of a multiple of 8 up to 128, on CUDA")
    missing = _cudnn_error()
    check(wanted == "auto" or not missing, "attention", wanted, f"auto or xla on this machine ({missing})",
          "pip install 'jax[cuda12]' brings cuDNN")
    if missing:
        _warn_once(f"attention='auto' takes XLA's kernel, the slower one on CUDA: {missing}")
    return "xla" if missing else "cudnn"


@functools.cache
def _cudnn_error() -> str:
    """Why this process has no cuDNN attention; "" where it has."""
    some = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), some, some, some)
    except RuntimeError as error:
        return str(error)
    return ""


@functools.cache
def _warn_once(line: str) -> None:
    logging.getLogger(__name__).warning(line)


@jax.custom_vjp
def _attention_cpu(q, k, v):
    return _attention_cpu_forward(q, k, v)[0]


def _attention_cpu_forward(q, k, v):
    dtype, scale = q.dtype, q.shape[-1] ** -0.5

    def one_head(q, k, v):  # [B, N, K]
        scores = _batched_dot(q, k, 2, 2) * scale
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _batched_dot(weights.astype(dtype), v, 2, 1) / total
        return out.astype(dtype), (highest + jnp.log(total))[..., 0]

    q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q, k, v))
    out, normaliser = _over_heads(one_head, q, k, v)
    return jnp.moveaxis(out, 0, 2), (q, k, v, normaliser)


def _attention_cpu_backward(saved, grad):
    """Of scores computed again, and transposed: only so does one of the products need a transposed operand."""
    q, k, v, normaliser = saved
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    grad = jnp.moveaxis(grad, 2, 0).astype(dtype)

    def one_head(q, k, k_transposed, v, grad, normaliser):
        p = jnp.exp(_batched_dot(k, q, 2, 2) * scale - normaliser[:, None, :])  # [B, keys, queries]
        grad_p = _batched_dot(v, grad, 2, 2)
        # Not from the output, as it could be: a bias of the keys has no gradient, so that of the scores has to
        # sum to zero as nearly as it can, or Adam follows the rounding.
        inner = jnp.sum(p * grad_p, axis=1, keepdims=True)
        grad_scores = (p * (grad_p - inner) * scale).astype(dtype)
        grad_q = _batched_dot(k_transposed, grad_scores, 2, 1)
        grad_k, grad_v = _batched_dot(grad_scores, q, 2, 1), _batched_dot(p.astype(dtype), grad, 2, 1)
        return grad_q.astype(dtype), grad_k.astype(dtype), grad_v.astype(dtype)

    grads = _over_heads(one_head, q, k, jnp.swapaxes(k, 2, 3), v, grad, normaliser)
    return jnp.transpose(grads[0], (1, 3, 0, 2)), *(jnp.moveaxis(g, 0, 2) for g in grads[1:])


def _batched_dot(a, b, a_contracts, b_contracts):
    return lax.dot_general(a, b, (((a_contracts,), (b_contracts,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _over_heads(one_head, *operands):
    """`one_head` of the first axis of every operand: on one CPU one after the other, in cache.

    A loop also keeps the transposes that bring the heads first out of the products. The compiler would fold
    them in, and a product with its batch in the middle runs in float32 whatever it is given.
    """
    if on_one_cpu():
        return lax.map(lambda operands: one_head(*operands), operands)
    return jax.vmap(one_head)(*operands)


_attention_cpu.defvjp(_attention_cpu_forward, _attention_cpu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def split_heads(qkv: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, N, 3 D] -> q, k, v, each [B, N, A, K]; their gradients are put together in one pass."""
    return tuple(jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, heads, -1), 2, 0))


def _split_heads_forward(qkv, heads):
    return split_heads(qkv, heads), None


def _split_heads_backward(heads, _, grads):
    return (jnp.stack(grads, axis=2).reshape(*grads[0].shape[:2], -1),)


split_heads.defvjp(_split_heads_forward, _split_heads_backward)
