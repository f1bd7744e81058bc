"""The two hot spots alone, at the shapes of a network: each attention kernel, each linear layer of a block."""

import functools

import jax
import jax.numpy as jnp

from ig_jax.benchmarking import device
from ig_jax.benchmarking.cases import Case
from ig_jax.errors import UserError
from ig_jax.models.dit_config import CHOICES
from ig_jax.models.kernels import attention, dense


class HotSpots:
    """Forward, and forward with backward, of each; `report["rows"]` has seconds, FLOPs and errors."""

    def __init__(self, case: Case):
        self.case = case
        model = case.model
        heads = (case.batch, model.side**2, model.num_heads, model.width // model.num_heads)
        rows = [_row(f"attention {kernel}", heads, _attention_row, model.dtype, kernel)
                for kernel in CHOICES["attention"]]
        rows += [_row(f"dense {name}", shape, _dense_row, model.dtype) for name, shape in block_shapes(case).items()]
        self.report = {"hardware": device.hardware(), "rows": rows, "used_devices": 1,
                       "peak": device.matmul_rate(model.dtype)}


def block_shapes(case: Case) -> dict[str, tuple[int, int, int]]:
    """(rows, inputs, outputs) of the linear layers of one block on a whole batch."""
    model = case.model
    tokens, wide = case.batch * model.side**2, model.mlp_hidden * (1 if model.mlp == "gelu" else 2)
    d, hidden = model.width, model.mlp_hidden
    return {"qkv": (tokens, d, 3 * d), "proj": (tokens, d, d), "fc1": (tokens, d, wide), "fc2": (tokens, hidden, d)}


def _row(name: str, shape: tuple[int, ...], measure, *arguments) -> dict:
    """What measure(shape, *arguments) says of one kernel, or why it cannot run here."""
    row = {"kernel": name, "shape": "x".join(map(str, shape))}
    try:
        return row | measure(shape, *arguments)
    except UserError as error:
        return row | {"failure": str(error)}


def _attention_row(shape: tuple[int, int, int, int], dtype: str, kernel: str) -> dict:
    """One kernel on [B, N, A, K], and its errors against XLA's in float32 on the same numbers."""
    arrays = [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(4)]
    exact = _gradient(functools.partial(attention, wanted="xla"))(*(a.astype(jnp.float32) for a in arrays))
    forward = functools.partial(attention, wanted=kernel)
    both = _gradient(forward)
    errors = list(map(_error, both(*arrays), exact))
    batch, tokens, heads, head_dim = shape
    flops = 4 * batch * tokens**2 * heads * head_dim
    return {
        **_timed(jax.jit(forward), both, arrays, flops, 3.0),
        "error": errors[0], "gradient_error": max(errors[1:]),
    }


def _dense_row(shape: tuple[int, int, int], dtype: str) -> dict:
    """A linear layer with its bias and, backward, the gradients of input and weight."""
    rows, inputs, outputs = shape
    shapes = ((rows, inputs), (inputs, outputs), (outputs,), (rows, outputs))
    x, kernel, bias, grad = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
    arrays = [x.astype(dtype), kernel, bias, grad.astype(dtype)]
    return _timed(jax.jit(dense), _gradient(dense), arrays, 2 * rows * inputs * outputs, 3.0)


def _gradient(function):
    """The jitted (*inputs, gradient of the output) -> (output, gradients of the inputs)."""

    def both(*arrays):
        *inputs, grad = arrays
        out, pull = jax.vjp(function, *inputs)
        return out, *pull(grad)

    return jax.jit(both)


def _timed(forward, both, arrays: list, flops: float, factor: float) -> dict:
    """Forward, and forward with backward at `factor` times its products."""
    calls = 1 if device.on_cpu() else 10
    once = device.best_seconds(forward, *arrays[:-1], calls=calls)
    twice = device.best_seconds(both, *arrays, calls=calls)
    return {"forward_ms": 1e3 * once, "forward_tflops": flops / once / 1e12,
            "both_ms": 1e3 * twice, "both_tflops": factor * flops / twice / 1e12}


def _error(value: jax.Array, reference: jax.Array) -> float:
    """Largest difference, as a share of the largest value."""
    return float(jnp.max(jnp.abs(value.astype(jnp.float32) - reference)) / jnp.max(jnp.abs(reference)))
