"""The train step and the sampler of this project as a worker runs them: compiled, timed, taken apart."""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.benchmarking import device, loader
from ig_jax.benchmarking.cases import Case
from ig_jax.errors import check
from ig_jax.generation import generate
from ig_jax.models import cost, dit
from ig_jax.parallel.chips import chip_of
from ig_jax.parallel.mesh import check_batch, make_mesh
from ig_jax.parallel.sharding import batch_sharding, on_mesh, tree_shardings
from ig_jax.training.optimizer import make_optimizer
from ig_jax.training.program import TrainProgram
from ig_jax.training.state import born_sharded, partition
from ig_jax.training.step import updated


def mesh_of(case: Case):
    """The mesh of a case over the first of this machine's devices.  Raises: UserError where they do not fit."""
    there = jax.devices()
    check(case.devices <= len(there), "--devices", case.devices, f"at most the {len(there)} of this machine")
    mesh = make_mesh(*case.mesh, devices=there[: case.devices or len(there)])
    check_batch(case.batch, mesh, pieces=case.optimizer.pieces, name="--batch")
    return mesh


def nowhere_zero(model: dit.DiTConfig) -> dict[str, jax.Array]:
    """Weights with a standard deviation of 0.02: fresh heads and gates are zero, and zeros can be quicker.

    Hashes of the position: normal draws for each of hundreds of arrays take long to compile.
    """
    return {name: _noise(number, leaf.shape) for number, (name, leaf) in enumerate(dit.shapes(model).items())}


def _noise(number: int, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 from the finaliser of MurmurHash3."""
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(0x9E3779B1) + jnp.uint32(number)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    unit = (bits >> 8).astype(jnp.float32) / 2**24 - 0.5
    return (0.02 * math.sqrt(12) * unit).reshape(shape)


def staged(function, *arguments) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """The executable of a jitted function for arguments or their shapes, and the seconds of each stage."""
    marks = [time.perf_counter()]
    done = function.trace(*arguments)
    for stage in ("lower", "compile"):
        marks.append(time.perf_counter())
        done = getattr(done, stage)()
    marks.append(time.perf_counter())
    return done, {stage: b - a for stage, a, b in zip(("trace", "lower", "compile"), marks, marks[1:])}


class Train:
    """The step that `train` runs, on one batch that stays on the devices."""

    def __init__(self, case: Case):
        self.case, self.mesh = case, mesh_of(case)
        self.program = TrainProgram.of(case, self.mesh, case.batch)
        self.batch = synthetic_batch(case, self.mesh)
        self.executable, seconds = staged(self.program.step, self.program.layout, self.batch)
        self.state = born_sharded(lambda: self.program.new(nowhere_zero(case.model)), self.program.layout)
        self.report = {**described(case, self.mesh), "seconds": seconds, "flops": train_flops(case),
                       "fit": dataclasses.asdict(self.program.fit)}

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.state, self.metrics = self.executable(self.state, self.batch)
        jax.block_until_ready(self.metrics)

    def finish(self) -> dict:
        """Memory, the last loss, what the device can do, and the optimizer's pass by itself."""
        memory = device.memory_use(self.executable)  # before anything else needs some
        loss = float(self.metrics["loss/total"])
        return {"memory": memory, "loss": loss, **limits(self.case), "optimizer": self._optimizer_pass(),
                "data": loader.rate_if_any(self.case)}

    def _optimizer_pass(self) -> dict:
        """Seconds, parameters and the compiler's count of bytes of the update that follows the gradients."""
        case, layout = self.case, self.program.layout
        transformation = make_optimizer(case.optimizer, case.run.steps, case.model)

        def update(state, gradients):
            with on_mesh(self.mesh):
                return updated(state, gradients, optimizer=transformation, trains=case.optimizer.trains, ema=case.ema)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
        trained = partition(layout.params, case.optimizer.trains)[0]
        places = {name: leaf.sharding for name, leaf in trained.items()}
        make = lambda: {name: jnp.full(leaf.shape, 1e-3) for name, leaf in trained.items()}  # noqa: E731
        gradients = jax.jit(make, out_shardings=places)()
        jitted = jax.jit(update, in_shardings=(shardings, places), out_shardings=shardings, donate_argnums=0)
        executable, _ = staged(jitted, layout, gradients)

        def once():
            self.state = executable(self.state, gradients)
            return self.state

        count = sum(int(np.prod(leaf.shape)) for leaf in trained.values())
        return {"seconds": device.best_seconds(once), "parameters": count,
                "compiled_bytes": (executable.cost_analysis() or {}).get("bytes accessed")}


class Sample:
    """The sampler that `sample` runs, on labels that stay on the devices."""

    def __init__(self, case: Case):
        self.case, self.mesh = case, mesh_of(case)
        model = case.model
        case.sample.check_model(model)
        program = generate.Program.of(case.sample, model, case.process)
        place = tree_shardings(dit.shapes(model), self.mesh)
        params = jax.jit(functools.partial(nowhere_zero, model), out_shardings=place)()
        rows, count = batch_sharding(self.mesh), np.arange(case.batch)
        self.arguments = (
            params, {}, np.uint32(case.seed), generate.on_devices(count, rows),
            generate.on_devices(count % model.num_classes, rows), case.sample.scales,
        )
        self.executable, seconds = staged(generate.make_sampler(self.mesh, program), *self.arguments)
        evaluations = case.sample.evaluations_per_image(case.process.kind, model)
        flops = None if evaluations is None else cost.sample_flops(model, case.batch, evaluations)
        self.report = {**described(case, self.mesh), "seconds": seconds, "evaluations": evaluations, "flops": flops}

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.latents, _ = self.executable(*self.arguments)
        jax.block_until_ready(self.latents)

    def finish(self) -> dict:
        """Memory, whether all latents are finite, and what the device can do."""
        memory = device.memory_use(self.executable)
        return {"memory": memory, "finite": bool(jnp.isfinite(self.latents).all()), **limits(self.case)}


def synthetic_batch(case: Case, mesh) -> dict[str, jax.Array]:
    """A batch of the shape and dtype that the case's data have: images uint8, or normalised latents float32."""
    model, rows = case.model, batch_sharding(mesh)
    shape = (case.batch, model.input_size, model.input_size, model.channels)
    images = jax.random.normal(jax.random.key(case.seed), shape, jnp.float32)
    if case.experiment is not None and case.experiment.latents.name == "pixels":
        images = (128 + 40 * images).astype(jnp.uint8)
    labels = jnp.arange(case.batch, dtype=jnp.int32) % model.num_classes
    return {"image": jax.device_put(images, rows), "label": jax.device_put(labels, rows)}


def train_flops(case: Case) -> int:
    """Of one step, by our own count."""
    return cost.train_step_flops(case.model, case.batch, ema_forward=case.loss.ema_forward)


def described(case: Case, mesh) -> dict:
    """What a report of either kind begins with."""
    return {"hardware": device.hardware(), "parameters": cost.parameter_count(case.model),
            "mesh": dict(mesh.shape), "used_devices": mesh.size}


def limits(case: Case) -> dict:
    """What one device can do, measured and by its datasheet: FLOP/s in the dtype of the case, bytes/s."""
    chip = chip_of(jax.devices()[0].device_kind)
    return {
        "peak": device.matmul_rate(case.model.dtype), "bandwidth": device.memory_rate(),
        "datasheet": getattr(chip, case.model.dtype) if chip else None,
    }


class Memory(Train):
    """The step once, for what it needs."""

    def finish(self) -> dict:
        return {"memory": device.memory_use(self.executable)}
