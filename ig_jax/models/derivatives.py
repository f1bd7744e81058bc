"""Linear maps with a transpose of their own, so that a function with its own backward pass has a forward mode too.

jax.custom_vjp refuses forward mode, which MeanFlow, consistency training and exact divergences need, and
jax.custom_jvp leaves the backward pass to transposition. A primitive joins them: autodiff runs it forward as the
derivative of a plain function, and transposes it by a given one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

Arrays = tuple[jax.Array, ...]


def both_modes(function: Callable[..., jax.Array], plain: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function`, a jax.custom_vjp, with the forward mode of `plain`, the same function of the same arrays.

    A gradient of what jax.jvp returns, the value included, is that of `plain`.
    """
    either = jax.custom_jvp(function)

    def rule(primals, tangents):
        out, pull = jax.vjp(function, *primals)
        saved, tree = jax.tree.flatten(pull)
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

        def forward(*arrays):
            arrays, along = arrays[: len(primals)], arrays[len(primals) + len(saved) :]
            chosen = lambda *some: plain(*(dict(enumerate(arrays)) | dict(zip(moving, some))).values())
            return (jax.jvp(chosen, tuple(arrays[i] for i in moving), along)[1],)

        def backward(*arrays):
            gradients = jax.tree.unflatten(tree, arrays[len(primals) : -1])(arrays[-1])
            return tuple(gradients[i] for i in moving)

        return out, linear(forward, backward, (*primals, *saved), tuple(tangents[i] for i in moving))[0]

    either.defjvp(rule, symbolic_zeros=True)
    return either


def linear(forward: Callable[..., Arrays], backward: Callable[..., Arrays], fixed: Arrays, moving: Arrays) -> Arrays:
    """forward(*fixed, *moving), linear in `moving`, whose transpose is backward(*fixed, *cotangents)."""
    jaxpr = jax.make_jaxpr(forward)(*fixed, *moving)  # here, where the mesh is known
    return tuple(_linear.bind(*fixed, *moving, jaxpr=jaxpr, backward=backward, count=len(fixed)))


_linear = Primitive("linear")
_linear.multiple_results = True


@_linear.def_impl
def _run(*arrays, jaxpr, backward, count):
    return jaxpr_as_fun(jaxpr)(*arrays)


@_linear.def_abstract_eval
def _shapes(*arrays, jaxpr, backward, count):
    return jaxpr.out_avals


def _derivative(primals, tangents, *, jaxpr, backward, count):
    """Linear in what moves; by autodiff where what is fixed moves as well, as in a second derivative."""
    bind = lambda moving: _linear.bind(*primals[:count], *moving, jaxpr=jaxpr, backward=backward, count=count)
    zero = lambda tangent: type(tangent) is ad.Zero
    out, total = bind(primals[count:]), None
    if not all(map(zero, tangents[count:])):
        total = bind(map(ad.instantiate_zeros, tangents[count:]))
    if not all(map(zero, tangents[:count])):
        along = lambda *fixed: jaxpr_as_fun(jaxpr)(*fixed, *primals[count:])
        second = jax.jvp(along, primals[:count], tuple(map(ad.instantiate_zeros, tangents[:count])))[1]
        total = second if total is None else [a + b for a, b in zip(total, second)]
    return out, total


def _transpose(cotangents, *arrays, jaxpr, backward, count):
    gradients = backward(*arrays[:count], *map(ad.instantiate_zeros, cotangents))
    wanted = map(ad.is_undefined_primal, arrays[count:])
    return [None] * count + [gradient if want else None for gradient, want in zip(gradients, wanted)]


def _batch(arrays, axes, *, jaxpr, backward, count):
    size = next(array.shape[axis] for array, axis in zip(arrays, axes) if axis is not None)

    def spread(array, axis):
        return jnp.broadcast_to(array, (size, *jnp.shape(array))) if axis is None else jnp.moveaxis(array, axis, 0)

    fixed, moving = arrays[:count], tuple(map(spread, arrays[count:], axes[count:]))
    forward = jax.vmap(jaxpr_as_fun(jaxpr), (*axes[:count], *(0,) * len(moving)))
    pulled = jax.vmap(backward, (*axes[:count], *(0,) * len(jaxpr.out_avals)))
    outs = linear(forward, pulled, fixed, moving)
    return outs, [0] * len(outs)


ad.primitive_jvps[_linear] = _derivative
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
mlir.register_lowering(_linear, mlir.lower_fun(_run, multiple_results=True))
