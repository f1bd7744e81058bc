"""How long a run takes to its first step, from nothing and again from JAX's persistent compilation cache."""

import contextlib
import tempfile
import time
from collections.abc import Callable

from ig_jax.benchmarking.compare import Variant
from ig_jax.benchmarking.variants import start_ours
from ig_jax.benchmarking.worker import Failed
from ig_jax.errors import UserError


def start_twice(variant: Variant, said: Callable[[Variant, str], None]) -> None:
    """Start the run of a variant twice with one cache, empty at first, and fill in its report.

    `first_start_s` and `second_start_s` count from the start of the process to the end of the first step,
    `_cpu_s` the CPU time of it;
    `compilations` are those of the first three steps, `compiled_again` what the second start had to compile.
    """
    with tempfile.TemporaryDirectory() as cache:
        variables = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        for name in ("first", "second"):
            began = time.time()
            try:
                with contextlib.closing(start_ours("compile", variant.case, **variables)) as worker:
                    extras = worker.finish() if name == "first" else None
            except (Failed, UserError) as failure:
                variant.failure = failure
                return
            seconds = worker.report["first_step_at"] - began
            if name == "first":
                variant.report, variant.extras = worker.report, extras
            else:
                variant.report["compiled_again"] = worker.report["cache_misses"]
            variant.report |= {f"{name}_start_s": seconds, f"{name}_start_cpu_s": worker.report["first_step_cpu"]}
            said(variant, f"{name} start {seconds:.1f} s")


def measure_kernels(variant: Variant, said: Callable[[Variant, str], None]) -> None:
    """Time the hot spots of a variant's network and fill in its report."""
    try:
        worker = variant.start()
    except (Failed, UserError) as failure:
        variant.failure = failure
        return
    variant.report = worker.report
    worker.close()
    said(variant, "measured")
