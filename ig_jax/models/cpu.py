"""What serves a CPU alone: one call site each in the network, which computes the same without it.

The XLA compiler for CPUs fuses across whole blocks, copies operands of products, and keeps nothing in cache that
it could. Each function below gives the same numbers in a form that it compiles well; the timings are from a Xeon.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from ig_jax.models.derivatives import both_modes
from ig_jax.parallel.sharding import platform

CACHE = 2**24  # bytes between two products that a CPU still finds in its cache; beyond 20 MB, twice as slow

# (..., I, J) @ (..., J, L) -> float32, which leaves a CPU 2.8 times faster than bfloat16.
_product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def on_one_cpu() -> bool:
    """Whether what is being traced is a single CPU device's: the program, or its part inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    divided = [size for name, size in mesh.shape.items() if name not in mesh.manual_axes]
    return math.prod(divided) <= 1 and platform() == "cpu"


def out_of_line(function):
    """`function` compiled as a call on one CPU, instead of being inlined and fused with its caller.

    On several devices it is left as it is, because the partitioner has to see inside.
    """
    if not on_one_cpu():
        return function
    called = jax.jit(function)

    def whole(*args):
        with set_xla_metadata(inlineable="false"):
            return called(*args)

    return whole


def in_chunks(run, *arrays: jax.Array, bytes_per_image: int):
    """run(*arrays), on one CPU in chunks of images whose largest array stays in its cache.

    arrays: (B, ...); run: to a tree of arrays (B, ...), each image by itself; bytes_per_image: of its largest array.
    """
    batch = len(arrays[0])
    fitting = max(1, CACHE // bytes_per_image)
    sizes = [size for size in range((fitting + 1) // 2, fitting + 1) if batch % size == 0]  # smaller ones cost more
    if not on_one_cpu() or batch <= fitting or not sizes:
        return run(*arrays)
    chunks = jax.tree.map(lambda rows: rows.reshape(-1, sizes[-1], *rows.shape[1:]), arrays)
    out = jax.lax.map(lambda rows: run(*rows), chunks)
    return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), out)


def unfused_positions(array: jax.Array) -> tuple[jax.Array, ...]:
    """The int32 positions 0, 1, ... of the first axis of an array, as values that a CPU does not fuse with their use.

    XLA's CPU compiler compiles equal kernels once, but a constant position makes each slice, and whatever it is
    fused with, a kernel of its own: the gradient of a scan over 28 blocks took three times as long to compile.
    Nothing is fused with the result of a conditional.
    """
    known = lambda: tuple(jnp.int32(i) for i in range(len(array)))
    return jax.lax.cond(array.ravel()[0] > 0, known, known) if platform() == "cpu" else known()


def one_batch_axis(x: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The operands (..., I) and (..., O) of a weight gradient, on a CPU with one batch axis if they are float32.

    Contracting two axes first copies x transposed, fused with whatever made x (an MLP: 178 against 120 ms). In
    bfloat16 two axes are the faster (63 against 102 ms).
    """
    if platform() != "cpu" or x.dtype != jnp.float32:
        return x, grad
    return x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention, q, k, v (B, N, A, K) -> (B, N, A, K); scores and softmax in float32.

    Out of line, which takes half the time in bfloat16; under a derivative that made the step 2 to 9 % slower.
    """
    plain = lambda q, k, v: _attend(q, k.mT, v)
    reverse = jax.custom_vjp(lambda q, k, v: out_of_line(_attend)(q, k.mT, v))
    reverse.defvjp(lambda q, k, v: (plain(q, k, v), (q, k, v)), _attention_backward)
    return _heads_last(both_modes(reverse, plain)(*map(_heads_first, (q, k, v))), q.shape[0])


def _attend(q, k_transposed, v):
    """Its only result is the output: otherwise the compiler does not keep the scores in cache."""
    weights, total = _softmax(q, k_transposed)
    return (_product(weights.astype(q.dtype), v) / total).astype(q.dtype)


def _attention_backward(saved, grad):
    """The softmax is recomputed. A product with a transposed left operand would copy it in float32, so the small
    arrays are transposed beforehand; out of line, because the compiler undoes that where it can.
    """
    q, k, v = saved
    grad_q, *others = out_of_line(_attention_gradients)(q, q.mT, k, v, grad, grad.mT)
    return grad_q, *(g.mT for g in others)


def _attention_gradients(q, q_transposed, k, v, grad, grad_transposed):
    """Gradients of the queries (..., N, K), and of the keys and values as (..., K, N)."""
    weights, total = _softmax(q, k.mT)
    p = (weights / total).astype(q.dtype)
    p32, grad_p = p.astype(jnp.float32), _product(grad, v.mT)
    # Computed from p and not, as it could be, from the output: a bias of the keys has no gradient, so the gradient
    # of the scores must sum to zero as exactly as possible, or Adam follows the rounding errors.
    inner = jnp.sum(p32 * grad_p, axis=-1, keepdims=True)
    grad_scores = (p32 * (grad_p - inner) * q.shape[-1] ** -0.5).astype(q.dtype)
    pairs = (grad_scores, k), (q_transposed, grad_scores), (grad_transposed, p)
    return [_product(a, b).astype(q.dtype) for a, b in pairs]


def _softmax(q, k_transposed):
    """Numerator (..., N, N) and denominator (..., N, 1) of the attention weights, float32."""
    scores = _product(q, k_transposed) * q.shape[-1] ** -0.5
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return weights, jnp.sum(weights, axis=-1, keepdims=True)


def _heads_first(x):
    """(B, N, A, K) -> (B * A, N, K) on one CPU, whose compiler fuses over one batch axis; otherwise (B, A, N, K)."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(-1, *x.shape[2:]) if on_one_cpu() else x


def _heads_last(x, batch):
    """The inverse of `_heads_first`: -> (B, N, A, K)."""
    return jnp.swapaxes(x.reshape(batch, -1, *x.shape[-2:]), 1, 2)
