"""Digests of stored arrays, since Orbax restores flipped bits silently, and Orbax failures as one error each."""

import asyncio
import contextlib
import gc
import logging
import re
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ig_jax.base.errors import UserError

_LONGEST_WAIT = 10.0  # seconds for abandoned reads and writes to end; a few milliseconds, where the heap is small


def leaf_names(tree) -> dict[str, Any]:
    """Leaves by parameter name, or by path inside the optimizer state."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@jax.jit  # one small program for each shape, shared by parameters, averages and moments
def digest(array: jax.Array) -> jax.Array:
    """A uint32 () that any flipped bit or moved element changes, the same under every sharding."""
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    index = jnp.arange(array.size, dtype=jnp.uint32).reshape(array.shape)
    # The finaliser of MurmurHash3 over element and position; a sum is independent of order and device.
    mixed = (bits ^ (index * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def describe(tree) -> dict[str, list]:
    """{leaf: [shape, dtype, digest]} as plain JSON types."""
    leaves = leaf_names(tree)
    # On CPUs one after the other: the threads of hundreds of sums over several devices can deadlock there.
    wait = jax.block_until_ready if jax.default_backend() == "cpu" else lambda value: value
    values = jax.device_get({name: wait(digest(leaf)) for name, leaf in leaves.items()})
    return {name: [list(x.shape), str(x.dtype), f"{int(values[name]):08x}"] for name, x in leaves.items()}


@contextlib.contextmanager
def one_report() -> Iterator[None]:
    """Suppress every report of a failed read or write other than its exception.

    When one array fails, Orbax closes its event loop under the others. Whether these were not begun, under way or
    failed as well, Orbax, asyncio and Python would each report them. Use it with `collect_abandoned`.
    """
    hook, loggers = sys.unraisablehook, [logging.getLogger(name) for name in ("asyncio", "absl")]

    def report(unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine that ends as it is collected
        abandoned = str(unraisable.exc_value) == "Event loop is closed" or code and "/orbax/" in code.co_filename
        if not abandoned:
            hook(unraisable)

    def wanted(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        abandoned = "exception was never retrieved" in message or "Task was destroyed" in message
        raised = record.levelno == logging.ERROR and "/orbax/" in record.pathname  # the exception reports it too
        return not abandoned and not raised

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        sys.unraisablehook = report
        for logger in loggers:
            logger.addFilter(wanted)
        try:
            yield
        finally:
            sys.unraisablehook = hook
            for logger in loggers:
                logger.removeFilter(wanted)


def collect_abandoned(error: BaseException) -> None:
    """End the reads and writes that a failure of Orbax left unfinished; called inside `one_report`.

    Tracebacks keep some of it alive, reads and writes that are under way keep the rest, and other items begin or go on
    in threads of Orbax, each with an event loop of its own.
    """
    errors = [error]
    for each in errors:
        traceback.clear_frames(each.__traceback__)
        errors += [e for e in (each.__cause__, each.__context__) if e is not None and e not in errors]
    end = time.monotonic() + _LONGEST_WAIT
    while True:
        gc.collect()
        futures = [each for each in gc.get_objects() if issubclass(type(each), asyncio.Future)]
        abandoned = [
            each
            for each in futures
            if each.get_loop().is_closed() or isinstance(each, asyncio.Task) and _is_of_orbax(each.get_coro())
        ]
        for each in abandoned:
            if each.done() and not each.cancelled():
                each.exception()  # which counts as retrieved
        unfinished = [each for each in gc.get_objects() if _is_of_orbax(each) and each.cr_frame is not None]
        over = all(each.done() for each in abandoned) and not unfinished
        if over or time.monotonic() > end:
            return
        del futures, abandoned, unfinished, each
        time.sleep(0.02)


def _is_of_orbax(thing: object) -> bool:
    return type(thing) is types.CoroutineType and "/orbax/" in thing.cr_code.co_filename


@contextlib.contextmanager
def one_error(kinds: type[Exception] | tuple[type[Exception], ...], refusal: Callable[[str], UserError]) -> Iterator:
    """Turn what Orbax raises into `refusal(its first line)`, with nothing else reported."""
    with one_report():
        try:
            yield
        except kinds as error:
            collect_abandoned(error)
            raise refusal(first_line(error)) from error


def first_line(error: Exception) -> str:
    """The first line of an Orbax exception: of one over 200 characters, its beginning and its cause."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = re.split(r" \[\w+(?:\[\d+\])?='", lines[0])[0]  # TensorStore's notes, [os_error_code='28'], follow the cause
    return line if len(line) <= 200 else f"{line[:98]} .. {line[-98:]}"
