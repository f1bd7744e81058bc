"""The train step and the sampler of a case, as `train` and `sample` compile them, and the limits of this machine."""

import dataclasses
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ig_jax.base.errors import check
from ig_jax.benchmarking.cases import Case
from ig_jax.data.spec import ENCODER
from ig_jax.generation import sampler
from ig_jax.models import cost, dit
from ig_jax.parallel.hardware import chip_of
from ig_jax.parallel.mesh import check_batch, make_mesh
from ig_jax.parallel.sharding import batch_sharding, tree_shardings
from ig_jax.training.program import TrainProgram
from ig_jax.training.state import born_sharded

REPEATS = 5
# Environment variables that change the speed of the same program.
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "GLIBC_TUNABLES", "LD_PRELOAD")


def mesh_of(case: Case) -> Mesh:
    """The mesh of a case over the first devices of this machine.  Raises: UserError where it does not divide."""
    there, e = jax.devices(), case.experiment
    check(case.devices <= len(there), "--devices", case.devices, f"at most the {len(there)} of this machine")
    mesh = make_mesh(**vars(e.mesh), devices=there[: case.devices or len(there)])
    check_batch(case.batch, mesh, pieces=e.optimizer.pieces, name="--batch")
    return mesh


def nonzero_weights(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Weights with a standard deviation of 0.02: new heads and gates are zero, and zeros can be faster."""
    keys = (jax.random.key(number, impl="rbg") for number in range(len(shapes)))  # rbg and uniform compile fastest
    most = 0.02 * 3**0.5
    return {name: jax.random.uniform(key, shapes[name].shape, float, -most, most) for key, name in zip(keys, shapes)}


def synthetic_batch(program: TrainProgram, case: Case) -> dict[str, Any]:
    """A batch of the arrays that the case's data promise, with numbers about as large as theirs."""

    def one(path: tuple, form: jax.ShapeDtypeStruct) -> jax.Array:
        values = jax.random.normal(jax.random.key(case.experiment.seed), form.shape, jnp.float32)
        if path[0].key == "label":
            values = jnp.arange(case.batch) % case.experiment.model.num_classes
        elif path[0].key == ENCODER:
            values = 0.02 * values
        elif case.experiment.batch_spec.holds == "pixels":
            values = 128 + 40 * values
        return jax.device_put(values.astype(form.dtype), form.sharding)

    return jax.tree.map_with_path(one, program.batch)


class _Program:
    """A compiled function of a case, with what its report begins with."""

    def __init__(self, values: dict[str, Any]):
        self.case = Case.of(values)
        self.mesh = mesh_of(self.case)

    def compile(self, function: Any, *arguments: Any, **report: Any) -> None:
        """Compile a jitted function for arguments or their shapes."""
        began = time.perf_counter()
        self.executable: jax.stages.Compiled = function.lower(*arguments).compile()
        self.report = {
            "hardware": hardware(),
            "parameters": cost.parameter_count(self.case.experiment.model),
            "mesh": dict(self.mesh.shape),
            "used_devices": self.mesh.size,
            "compile_s": time.perf_counter() - began,
            **report,
        }

    def finished(self) -> dict[str, Any]:
        """Peak bytes of a device, or of the process on a CPU; FLOP/s of a device, measured and by its datasheet."""
        device, dtype = jax.local_devices()[0], self.case.experiment.model.dtype
        chip, memory = chip_of(device.device_kind), (device.memory_stats() or {}).get("peak_bytes_in_use")
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "peak_bytes": memory or resident,  # before anything else needs memory
            "peak": matmul_rate(dtype),
            "datasheet": getattr(chip, dtype) if chip else None,
        }


class Train(_Program):
    """The step of `train`, on one synthetic batch that stays on the devices."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        e = self.case.experiment
        self.program = TrainProgram.of(e, self.mesh, e.batch_spec, self.case.batch)
        self.batch = synthetic_batch(self.program, self.case)
        flops = cost.train_step_flops(e.model, self.case.batch, ema_forward=e.loss.ema_forward)
        fit = dataclasses.asdict(self.program.fit)
        self.compile(self.program.step, self.program.layout, self.batch, flops=flops, fit=fit)
        self.state = born_sharded(lambda: self.program.new(nonzero_weights(dit.shapes(e.model))), self.program.layout)

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.state, self.metrics = self.executable(self.state, self.batch)
        jax.block_until_ready(self.metrics)

    def finish(self) -> dict[str, Any]:
        return {"loss": float(self.metrics["loss/total"]), **self.finished()}


class Sample(_Program):
    """The sampler of `sample`, on labels that stay on the devices."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        e, batch = self.case.experiment, self.case.batch
        model, recipe, shapes = e.model, e.sample, dit.shapes(e.model)
        params = jax.jit(lambda: nonzero_weights(shapes), out_shardings=tree_shardings(shapes, self.mesh))()
        count = np.arange(batch)
        indices, labels = (sampler.on_devices(n, batch_sharding(self.mesh)) for n in (count, count % model.num_classes))
        self.arguments: tuple[Any, ...] = (params, {}, np.uint32(e.seed), indices, labels, recipe.scales)
        evaluations = recipe.evaluations_per_image(e.process.kind, model)
        flops = None if evaluations is None else cost.sample_flops(model, batch, evaluations)
        jitted = sampler.make_sampler(self.mesh, sampler.Program.of(recipe, model, e.process))
        self.compile(jitted, *self.arguments, evaluations=evaluations, flops=flops)

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.latents, _ = self.executable(*self.arguments)
        jax.block_until_ready(self.latents)

    def finish(self) -> dict[str, Any]:
        return {"finite": bool(jnp.isfinite(self.latents).all()), **self.finished()}


def best_seconds(function: Callable, *arguments) -> float:
    """The least seconds per call of a jitted function over REPEATS turns, after a first call."""
    jax.block_until_ready(function(*arguments))
    best, calls = float("inf"), 1 if jax.default_backend() == "cpu" else 10
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - began) / calls)
    return best


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a large square matrix product on one device, accumulated in float32.

    On a CPU the result stays in float32, which is faster there; on an accelerator it has the operands' dtype.
    """
    n, result = (2048, "float32") if jax.default_backend() == "cpu" else (8192, dtype)
    a, b = (jax.random.normal(jax.random.key(i), (n, n)).astype(dtype) for i in range(2))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(result))
    return 2 * n**3 / best_seconds(product, a, b)


def hardware() -> dict[str, Any]:
    """Devices and host by name, as JSON."""
    device, cpu = jax.devices()[0], Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "cpu": name[1] if name else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],  # processes that ran or waited in the last minute, those of others included
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }
