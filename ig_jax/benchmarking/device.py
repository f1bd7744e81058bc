"""What this machine can do and what it is: matrix products and memory by measurement, hardware, memory in use."""

import functools
import os
import platform
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from ig_jax.benchmarking.timing import cores
from ig_jax.parallel.chips import chip_of

REPEATS = 5
# What changes the speed of the same program from outside.
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "GLIBC_TUNABLES", "LD_PRELOAD")


def best_seconds(function, *arguments, calls: int = 1) -> float:
    """Least seconds a call of a jitted function, over REPEATS turns of `calls` calls after a first one."""
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def on_cpu() -> bool:
    """Whether the programs of this process run on the host."""
    return jax.default_backend() == "cpu"


@functools.partial(jax.jit, static_argnames="leaves")
def product(a: jax.Array, b: jax.Array, leaves) -> jax.Array:
    """a [n, n] @ b [n, n], accumulated in float32, leaving in the dtype `leaves`."""
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32).astype(leaves)


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a large square matrix product on one device.

    On a CPU the product leaves in float32, the faster way there; on an accelerator in its own dtype.
    """
    n = 2048 if on_cpu() else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n)).astype(dtype) for i in range(2))
    leaves = jnp.float32 if on_cpu() else jnp.dtype(dtype)
    return 2 * n**3 / best_seconds(lambda: product(a, b, leaves), calls=1 if on_cpu() else 10)


def memory_rate() -> float:
    """Bytes/s of reading and writing one large float32 array in place on one device."""
    size = 2**26 if on_cpu() else 2**28
    held = jnp.zeros(size, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # donated: a new array would be paid for in page faults

    def once():
        nonlocal held
        held = add(held)
        return held

    return 2 * 4 * size / best_seconds(once)


def memory_use(executable) -> dict:
    """Peak bytes by name: `device` as the device counts them or null, `program` as the compiler planned them
    for one device, `process` the largest resident size of this process.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    plan = executable.memory_analysis()
    program = None
    if plan is not None:
        program = (plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
                   - plan.alias_size_in_bytes)
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"device": stats.get("peak_bytes_in_use"), "program": program, "process": resident}


def hardware() -> dict:
    """Devices and host as JAX and the system name them, as JSON."""
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)
    return {
        "platform": device.platform, "device": device.device_kind, "devices": jax.device_count(),
        "datasheet": chip.name if chip else None, "cpu": _cpu_name(), "cores": cores(),
        "system": platform.platform(), "environment": {n: os.environ[n] for n in ENVIRONMENT if n in os.environ},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
