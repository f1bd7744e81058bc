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
from jax.experimental.xla_metadata import set_xla_metadata

from ig_jax.errors import check
from ig_jax.parallel.sharding import constrain_batch, gather_weight, on_one_cpu, platform, scatter_gradient


def _dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """A product whose result leaves in float32: on a CPU 2.8 times faster than a bfloat16 result."""
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


# [..., I, J] @ [..., J, L], float32 as `_dot`.
_product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def apart(function):
    """`function` as one that XLA calls on a CPU, where it would otherwise copy it into its caller and fuse across.

    Several devices need the partitioner to see inside.
    """
    if not on_one_cpu():
        return function
    called = jax.jit(function)

    def whole(*args):
        with set_xla_metadata(inlineable="false"):
            return called(*args)

    return whole


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
    """Apart, which takes half the time in bfloat16; under a derivative it made the whole step 2 to 9 % slower."""
    batch, (q, k, v) = q.shape[0], map(_heads_first, (q, k, v))
    return _heads_last(apart(_attend)(q, k.mT, v), batch)


def _attention_cpu_forward(q, k, v):
    batch, (q, k, v) = q.shape[0], map(_heads_first, (q, k, v))
    return _heads_last(_attend(q, k.mT, v), batch), (q, k, v)


def _attend(q, k_transposed, v):
    """With nothing but the output as its result: only so does the CPU compiler keep the scores in its cache."""
    weights, total = _softmax(q, k_transposed)
    return (_product(weights.astype(q.dtype), v) / total).astype(q.dtype)


def _attention_cpu_backward(saved, grad):
    """Of a softmax computed again. No product may need a transposed left operand, which would be copied in
    float32, so what is transposed is the small arrays; apart, because the compiler undoes that where it can.
    """
    q, k, v = saved
    batch, grad = grad.shape[0], _heads_first(grad.astype(q.dtype))
    grad_q, *others = apart(_attention_gradients)(q, q.mT, k, v, grad, grad.mT)
    return _heads_last(grad_q, batch), *(_heads_last(g.mT, batch) for g in others)


_attention_cpu.defvjp(_attention_cpu_forward, _attention_cpu_backward)


def _attention_gradients(q, q_transposed, k, v, grad, grad_transposed):
    """Of the queries [..., N, K], and of the keys and the values [..., K, N]."""
    weights, total = _softmax(q, k.mT)
    p = (weights / total).astype(q.dtype)
    p32, grad_p = p.astype(jnp.float32), _product(grad, v.mT)
    # Not from the output, as it could be: a bias of the keys has no gradient, so that of the scores has to
    # sum to zero as nearly as it can, or Adam follows the rounding.
    inner = jnp.sum(p32 * grad_p, axis=-1, keepdims=True)
    grad_scores = (p32 * (grad_p - inner) * q.shape[-1] ** -0.5).astype(q.dtype)
    pairs = (grad_scores, k), (q_transposed, grad_scores), (grad_transposed, p)
    return [_product(a, b).astype(q.dtype) for a, b in pairs]


def _softmax(q, k_transposed):
    """Numerator [..., N, N] and denominator [..., N, 1] of the attention weights, float32."""
    scores = _product(q, k_transposed) * q.shape[-1] ** -0.5
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return weights, jnp.sum(weights, axis=-1, keepdims=True)


def _heads_first(x):
    """[B, N, A, K] -> [B A, N, K] on one CPU, whose compiler fuses over one batch axis; else [B, A, N, K]."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(-1, *x.shape[2:]) if on_one_cpu() else x


def _heads_last(x, batch):
    """What `_heads_first` made of [B, N, A, K], back."""
    return jnp.swapaxes(x.reshape(batch, -1, *x.shape[-2:]), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def split_heads(qkv: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, N, 3 D] -> q, k, v, each [B, N, A, K]; their gradients are put together in one pass."""
    return tuple(jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, heads, -1), 2, 0))


def _split_heads_forward(qkv, heads):
    return split_heads(qkv, heads), None


def _split_heads_backward(heads, _, grads):
    return (jnp.stack(grads, axis=2).reshape(*grads[0].shape[:2], -1),)


split_heads.defvjp(_split_heads_forward, _split_heads_backward)
