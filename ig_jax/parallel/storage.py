"""What stored arrays need besides Orbax: a digest, because it restores a flipped bit without a word.

Used by the checkpoints of a run and of an autoencoder alike.
"""

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp


def leaf_names(tree) -> dict[str, object]:
    """Leaves by a readable name: the parameter name, or the path inside the optimizer state."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@jax.jit  # one small program for each shape, shared by parameters, averages and moments
def digest(array: jax.Array) -> jax.Array:
    """A uint32 that any flipped bit or moved element changes, the same under every sharding."""
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    index = jnp.arange(array.size, dtype=jnp.uint32).reshape(array.shape)
    # The finaliser of MurmurHash3 over element and position; a sum is independent of order and device.
    mixed = (bits ^ (index * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def describe(tree) -> dict[str, list]:
    """{leaf: [shape, dtype, digest]} as JSON."""
    leaves = leaf_names(tree)
    values = jax.device_get({name: _alone_on_cpus(digest(leaf)) for name, leaf in leaves.items()})
    return {name: [list(x.shape), str(x.dtype), f"{int(values[name]):08x}"] for name, x in leaves.items()}


def _alone_on_cpus(value: jax.Array) -> jax.Array:
    """`value`, on a CPU once it is there: with hundreds of sums over several of its devices in flight their threads
    can wait for each other, until the runtime aborts the process.
    """
    return jax.block_until_ready(value) if jax.default_backend() == "cpu" else value


@contextlib.contextmanager
def abandoned_unheard() -> Iterator[None]:
    """Keep quiet the reads and writes that Orbax abandons when one array fails.

    It closes its event loop under them. Whether one was not begun, under way, or failed beside the first, Orbax and
    Python would report it, up to the end of the process, beside the one line that says what is wrong.
    """
    before, warned = sys.unraisablehook, warnings.catch_warnings()
    loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]

    def hook(unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine that ends as it is collected
        abandoned = str(unraisable.exc_value) == "Event loop is closed" or code and "/orbax/" in code.co_filename
        if not abandoned:
            before(unraisable)

    def heard(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        abandoned = "exception was never retrieved" in message or "Task was destroyed" in message
        raised = record.levelno == logging.ERROR and "/orbax/" in record.pathname  # and comes to us as well
        return not abandoned and not raised

    sys.unraisablehook = hook
    for logger in loggers:
        logger.addFilter(heard)
    warned.__enter__()
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    yield
    sys.unraisablehook = before  # all three are left in place by an exception
    for logger in loggers:
        logger.removeFilter(heard)
    warned.__exit__(None, None, None)


def first_line(error: Exception) -> str:
    """What an exception of Orbax says first, at most 200 characters of it: of a longer one the beginning and the cause."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = re.split(r" \[\w+(?:\[\d+\])?='", lines[0])[0]  # TensorStore's notes, [os_error_code='28'], follow the cause
    return line if len(line) <= 200 else f"{line[:98]} .. {line[-98:]}"
