"""The kernels of a network alone, at its shapes: every attention kernel and every linear layer of a block."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ig_jax.base.errors import UserError
from ig_jax.benchmarking import programs
from ig_jax.benchmarking.cases import Case
from ig_jax.models.dit import CHOICES
from ig_jax.models.kernels import attention, dense


class Kernels:
    """Every kernel forward, and forward with backward."""

    def __init__(self, values: dict[str, Any]):
        self.case, self.report = Case.of(values), {"hardware": programs.hardware()}

    def run(self, calls: int) -> None:
        pass  # `finish` times the kernels

    def finish(self) -> dict[str, Any]:
        case, model = self.case, self.case.experiment.model
        peak = programs.matmul_rate(model.dtype)
        heads = (case.batch, model.side**2, model.num_heads, model.width // model.num_heads)
        rows = [_row(f"attention {name}", heads, peak, _attention, model.dtype, name) for name in CHOICES["attention"]]
        rows += [_row(f"dense {name}", shape, peak, _dense, model.dtype) for name, shape in block_shapes(case).items()]
        return {"rows": rows, "peak": peak}


def block_shapes(case: Case) -> dict[str, tuple[int, int, int]]:
    """(rows, inputs, outputs) of the linear layers of one block for a whole batch."""
    model = case.experiment.model
    tokens, wide = case.batch * model.side**2, model.mlp_hidden * (1 if model.mlp == "gelu" else 2)
    d, hidden = model.width, model.mlp_hidden
    return {"qkv": (tokens, d, 3 * d), "proj": (tokens, d, d), "fc1": (tokens, d, wide), "fc2": (tokens, hidden, d)}


def _row(name: str, shape: tuple[int, ...], peak: float, measure: Callable[..., dict], *arguments) -> dict:
    """The measurements of one kernel, or why it cannot run here."""
    row = {"kernel": name, "shape": "x".join(map(str, shape))}
    try:
        return row | measure(shape, peak, *arguments)
    except UserError as error:
        return row | {"failure": str(error)}


def _attention(shape: tuple[int, int, int, int], peak: float, dtype: str, kernel: str) -> dict:
    """One kernel on (B, N, A, K), and its errors against XLA's in float32 on the same numbers."""
    arrays = [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(4)]
    exact = _gradient(functools.partial(attention, wanted="xla"))(*(a.astype(jnp.float32) for a in arrays))
    forward = functools.partial(attention, wanted=kernel)
    both = [array.astype(jnp.float32) for array in _gradient(forward)(*arrays)]
    # Largest differences, as shares of the largest value.
    errors = [float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in zip(both, exact)]
    batch, tokens, heads, head_dim = shape
    found = _timed(forward, arrays, 4 * batch * tokens**2 * heads * head_dim / peak)
    return found | {"error": errors[0], "gradient_error": max(errors[1:])}


def _dense(shape: tuple[int, int, int], peak: float, dtype: str) -> dict:
    """A linear layer with its bias and, backward, the gradients of input and weight."""
    rows, inputs, outputs = shape
    shapes = ((rows, inputs), (inputs, outputs), (outputs,), (rows, outputs))
    x, kernel, bias, grad = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
    return _timed(dense, [x.astype(dtype), kernel, bias, grad.astype(dtype)], 2 * rows * inputs * outputs / peak)


def _gradient(function):
    """The jitted (*inputs, gradient of the output) -> (output, *gradients of the inputs)."""

    def both(*arrays):
        *inputs, grad = arrays
        out, pull = jax.vjp(function, *inputs)
        return out, *pull(grad)

    return jax.jit(both)


def _timed(function, arrays: list, least: float) -> dict:
    """Forward, in `least` seconds at the peak, and forward with backward, at three times its products."""
    once = programs.best_seconds(jax.jit(function), *arrays[:-1])
    both = programs.best_seconds(_gradient(function), *arrays)
    times = {"forward_ms": 1e3 * once, "both_ms": 1e3 * both}
    return times | {"forward_of_peak": least / once, "both_of_peak": 3 * least / both}
