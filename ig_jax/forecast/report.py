"""The forecast of a run on a machine: memory, FLOPs, exchanged bytes and estimated time, as a page, JSON or a table."""

import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ig_jax.config.experiment import Experiment
from ig_jax.forecast import hlo, roofline
from ig_jax.forecast.collectives import collectives, moved
from ig_jax.forecast.targets import Target
from ig_jax.generation import sampler
from ig_jax.models import cost, dit
from ig_jax.parallel.hardware import usable_memory
from ig_jax.parallel.mesh import check_batch, make_mesh
from ig_jax.parallel.sharding import batch_sharding, replicated, with_shardings
from ig_jax.training.memory import device_bytes
from ig_jax.training.program import TrainProgram

Lower = Callable[[], jax.stages.Lowered]
REMATS = ("none", "dots", "full")  # from what keeps the most to what keeps the least
UNITS = " KMGT"
IMAGENET = 1_281_167  # images of its training split


def memory_limit(target: Target) -> int:
    """Bytes that a run gets on one device; for a CPU, its share of this machine's memory."""
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(target.devices)
    return usable_memory(target.devices[0]) or here


def scaled(size: float, base: int, suffix: str) -> str:
    """A size in its unit: of base 1024 "1.50 GiB", of base 1000 "1.61 GB"."""
    power = next((power for power in (4, 3, 2) if size >= base**power), 1)
    return f"{size / base**power:,.2f} {UNITS[power]}{suffix}"


def binary(size: float) -> str:
    """Bytes of memory."""
    return scaled(size, 1024, "iB")


def exchanged(collectives: dict[str, dict[str, int]], axes: bool) -> str:
    """Bytes of each kind of collective in units of 1000, as the speeds of links are; `axes`: over which axes each."""
    whole = [(kind, sum(by.values()), "") for kind, by in collectives.items()]
    each = [(kind, size, f" over {name}") for kind, by in collectives.items() for name, size in by.items()]
    words = (f"{kind} {scaled(size, 1000, 'B')}{over}" for kind, size, over in (each if axes else whole))
    return ("; " if axes else ", ").join(words) or "nothing"


def rough(value: float) -> str:
    """A positive estimate with two significant digits."""
    digits = 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def duration(seconds: float) -> str:
    """An estimated time in the unit that suits it."""
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "s"))
    size, unit = next(((size, unit) for size, unit in units if seconds >= 2 * size), units[-1])
    return f"{rough(seconds / size)} {unit}"


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One compiled program; bytes and FLOPs are of one device unless another count is named."""

    name: str
    images: int  # of one run of the program, on all devices
    used: int  # bytes at the moment that needs the most
    limit: int  # bytes that a run gets
    memory: dict[str, int]  # bytes by what they hold
    flops: float  # of one run on all devices, counted from the config; 0 where the solver decides
    compile_seconds: float
    donated: int = 0
    device_flops: float = 0.0  # as compiled, recomputation included
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # bytes by kind and mesh axes
    attention: str = ""
    estimate: roofline.Estimate | None = None  # None for a CPU, or where the compiler ran out of memory

    @property
    def fits(self) -> bool:
        """Whether a device has room for the program."""
        return self.used <= self.limit

    def lines(self, devices: int) -> list[str]:
        """The report as lines of text."""
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines = [
            f"{self.name:<12}{verdict}: {binary(self.used)} of {binary(self.limit)} a device; {self.images} images, "
            f"compiled in {self.compile_seconds:.0f} s"
        ]
        lines += [f"  {name:<34}{binary(size):>12}" for name, size in self.memory.items()]
        if not self.device_flops:
            return lines
        counted = "FLOPs depend on the adaptive solver"
        if self.flops:
            times = self.device_flops * devices / self.flops
            counted = f"{self.flops / 1e12:,.4g} TFLOP from the config, {times:.2f} times that as compiled"
        if self.donated:
            lines.append(f"  in place    {binary(self.donated)} of these are donated: written over, and counted once")
        lines.append(f"  compute     {counted}; attention {self.attention}")
        lines.append(f"  exchange    {exchanged(self.collectives, axes=True)}")
        if e := self.estimate:
            products, memory, exchange = (rough(1e3 * part) for part in (e.products, e.memory, e.exchange))
            lines.append(
                f"  estimate    {rough(1e3 * e.seconds)} ms: products {products}, memory {memory}, exchange {exchange};"
                f" {rough(self.images / e.seconds)} images/s, {e.floor / e.seconds:.0%} of the datasheet's products"
            )
        return lines


@dataclasses.dataclass(frozen=True)
class Report:
    """The forecast of a run on a target."""

    run: str
    target: str
    device: str
    devices: int
    mesh: dict[str, int]
    batch: int
    remat: str
    accumulate: int
    steps: int
    epochs: float  # of ImageNet; 0 for other data, whose size is not known
    train: ProgramReport
    sampler: ProgramReport | None

    @property
    def fits(self) -> bool:
        """Whether everything that was compiled fits."""
        return self.train.fits and (self.sampler is None or self.sampler.fits)

    def page(self) -> str:
        """The forecast as one page of text."""
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        pieces = f" in {self.accumulate} micro-batches" if self.accumulate > 1 else ""
        lines = [
            f"run         {self.run}: batch {self.batch}{pieces}, remat {self.remat}",
            f"target      {self.target}: {self.devices} x {self.device}, mesh {mesh}",
            *self.train.lines(self.devices),
        ]
        length = f"{self.steps:,} steps, {self.steps * self.batch:,} images"
        length += f", {rough(self.epochs)} epochs of ImageNet" if self.epochs else ""
        if guess := self.train.estimate:
            seconds = guess.seconds * self.steps
            length += f"; {duration(seconds)}, {rough(seconds * self.devices / 3600)} device hours (estimate)"
        lines.append(f"  whole run   {length}")
        lines += self.sampler.lines(self.devices) if self.sampler else []
        none = "none; python -m ig_jax.benchmark measures a machine that is present"
        lines.append(f"estimates   {f'{roofline.ASSUMPTIONS}; nothing was run' if guess else none}")
        return "\n".join(lines + ([] if self.train.fits else [self.advice()]))

    def advice(self) -> str:
        """How much is missing, and settings that need less memory, from cheap to expensive."""
        over, fsdp, rest = self.train.used - self.train.limit, self.mesh["fsdp"], self.devices // self.mesh["tensor"]
        wider = [n for n in range(2 * fsdp, rest + 1) if rest % n == 0]
        flags = [f"--config.mesh.data=-1 --config.mesh.fsdp={n}" for n in wider[:1]]
        kept = REMATS[REMATS.index(self.remat) :]
        for remat, count in itertools.product(kept, (self.accumulate, 2 * self.accumulate, 4 * self.accumulate)):
            if (remat, count) != (self.remat, self.accumulate):
                flags.append(f"--config.model.remat={remat} --config.optimizer.accumulate={count}")
        return "\n  ".join([f"{binary(over)} too many on each device; these settings need less:", *flags])


def forecast(experiment: Experiment, target: Target, sample_batch: int) -> Report:
    """Compile an experiment's programs for a target and report on them; sample_batch 0 leaves the sampler out.

    Raises: UserError where the mesh or the batch does not divide, as in a run.
    """
    e = experiment
    mesh = make_mesh(**vars(e.mesh), devices=target.devices)
    check_batch(e.data.batch_size, mesh, pieces=e.optimizer.pieces)
    program = TrainProgram.of(e, mesh, e.batch_spec, e.data.batch_size)
    return Report(
        run=e.name,
        target=target.name,
        device=target.devices[0].device_kind,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        batch=e.data.batch_size,
        **dataclasses.asdict(program.fit),
        steps=e.run.steps,
        epochs=e.run.steps * e.data.batch_size / IMAGENET if e.model.num_classes == 1000 else 0,
        train=forecast_train(e, program, target, mesh),
        sampler=forecast_sampler(e, target, mesh, sample_batch) if sample_batch else None,
    )


def forecast_train(experiment: Experiment, program: TrainProgram, target: Target, mesh: Mesh) -> ProgramReport:
    """Compile the train step and report on it."""
    batch, layout = experiment.data.batch_size, program.layout
    trained = {name: leaf for name, leaf in layout.params.items() if experiment.optimizer.trains(name)}
    parts = {"parameters": layout.params, "ema": layout.ema, "optimizer": layout.opt_state, "gradients": trained}
    known = {name: device_bytes(part) for name, part in parts.items()}
    flops = cost.train_step_flops(experiment.model, batch, ema_forward=experiment.loss.ema_forward)
    return _compiled("train step", program.lower, experiment.model.side**2, target, mesh, batch, flops, known)


def forecast_sampler(experiment: Experiment, target: Target, mesh: Mesh, batch_size: int) -> ProgramReport:
    """Compile the sampler for a global batch, rounded up to what the mesh divides, and report on it."""
    e, batch = experiment, sampler.padded(batch_size, mesh)
    params = with_shardings(dit.shapes(e.model), mesh)

    def lower() -> jax.stages.Lowered:
        rows = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=batch_sharding(mesh))
        seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated(mesh))
        jitted: Any = sampler.make_sampler(mesh, sampler.Program.of(e.sample, e.model, e.process))
        return jitted.lower(params, {}, seed, rows, rows, e.sample.scales)

    flops = cost.sample_flops(e.model, batch, e.sample.evaluations_per_image(e.process.kind, e.model) or 0)
    known = {"parameters": device_bytes(params)}
    return _compiled("sampler", lower, e.model.side**2, target, mesh, batch, flops, known)


def _compiled(
    name: str, lower: Lower, tokens: int, target: Target, mesh: Mesh, images: int, flops: float, known: dict[str, int]
) -> ProgramReport:
    """Compile the result of lower() and report on it; `known` are the bytes on a device that are known without that."""
    began, limit = time.monotonic(), memory_limit(target)
    lowered = lower()
    try:
        compiled = lowered.compile(target.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        # A TPU's compiler plans the memory itself and refuses with the bytes it would need, of everything ("Used
        # 20.51G of 15.75G hbm") or of temporaries alone ("HLO temporaries (26.82G) exceeds available HBM (15.75G)").
        sizes = re.findall(r"([\d.]+)([KMGT])\b", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
            raise
        used = max(int(float(size) * 1024 ** UNITS.index(unit)) for size, unit in sizes)
        return ProgramReport(name, images, used, limit, known, flops, time.monotonic() - began)
    seconds, plan, text = time.monotonic() - began, compiled.memory_analysis(), compiled.as_text()
    assert plan is not None and text is not None  # every compiler here reports both
    arrays = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    used = arrays + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes
    other = max(plan.temp_size_in_bytes - known.get("gradients", 0), 0)
    memory = known | {"activations and other temporaries": other}
    memory["batch, padding and program"] = max(used - sum(memory.values()), 0)
    program = hlo.parse(text)
    exchanges, costs = collectives(program, mesh), list(roofline.costs(program, tokens))
    return ProgramReport(
        *(name, images, used, limit, memory, flops, seconds),
        donated=plan.alias_size_in_bytes,
        device_flops=sum(cost.flops for cost in costs),
        collectives=moved(exchanges),
        attention=roofline.attention_kernel(program),
        estimate=roofline.estimate(costs, exchanges, target.chip) if target.chip else None,
    )
