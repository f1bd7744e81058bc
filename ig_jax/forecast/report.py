"""What a run will need and cost on a machine: numbers by name, as a page and as JSON."""

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.sharding import Mesh

from ig_jax.forecast import programs
from ig_jax.forecast.collectives import Collective, collectives, moved
from ig_jax.forecast.estimate import ASSUMPTIONS, Estimate, estimate
from ig_jax.forecast.targets import Target
from ig_jax.forecast.work import attention_kernels, work
from ig_jax.generation.generate import padded
from ig_jax.models import cost, dit
from ig_jax.parallel.chips import usable_memory
from ig_jax.parallel.mesh import check_batch, make_mesh
from ig_jax.parallel.sharding import with_shardings
from ig_jax.training.memory import device_bytes
from ig_jax.training.program import TrainProgram

if TYPE_CHECKING:
    from ig_jax.config import Experiment

GIB = 2**30
UNITS = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10}


def memory_limit(target: Target) -> int:
    """Bytes that a run gets on one device; of a CPU its share of this machine's memory."""
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(target.devices)
    return usable_memory(target.devices[0]) or here


def shown(size: float) -> str:
    """Bytes for people, in units of 1024."""
    unit = next((u for u in ("GiB", "MiB") if size >= UNITS[u]), "KiB")
    return f"{size / UNITS[unit]:,.2f} {unit}"


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One compiled program on one device, unless another count is named; bytes, FLOPs, seconds."""

    name: str
    images: int  # of one run of the program, over all devices
    fits: bool
    used: int  # bytes at the moment that needs most
    limit: int
    memory: dict[str, int]  # where they are
    donated: int
    flops: float  # of one run over all devices, by our count
    device_flops: float  # as compiled, what is computed twice included
    collectives: dict[str, dict[str, int]]  # bytes of one run by kind and mesh axes
    traffic: float  # bytes to and from device memory
    attention: str
    estimate: Estimate | None  # None for a CPU, or where the compiler refused
    compile_seconds: float

    @classmethod
    def of(cls, name: str, compiled: programs.Compiled, experiment: "Experiment", target: Target, mesh: Mesh, *,
           images: int, flops: float, known: dict[str, int]) -> "ProgramReport":
        """The report of a compiled program; `known` are the bytes on a device that are known without it."""
        limit, program = memory_limit(target), compiled.program
        memory = dict(known)
        exchanges: list[Collective] = []
        parts, kernel, guess = [], "", None
        if program is not None:
            inside = known.get("gradients", 0)
            memory["activations and other temporaries"] = max(compiled.temporaries - inside, 0)
            memory["batch, padding and program"] = max(compiled.used - sum(memory.values()), 0)
            exchanges = collectives(program, mesh)
            parts = list(work(program, experiment.model.side**2))
            kernel = attention_kernels(program)
            guess = estimate(parts, exchanges, target.chip) if target.chip else None
        return cls(
            name, images, compiled.used <= limit, compiled.used, limit, memory, compiled.donated, flops,
            sum(part.flops for part in parts), moved(exchanges), sum(part.traffic for part in parts), kernel, guess,
            compiled.seconds,
        )

    def lines(self, devices: int) -> list[str]:
        """The report as a person reads it."""
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines = [f"{self.name:<12}{verdict}: {shown(self.used)} of {shown(self.limit)} a device; {self.images} images, "
                 f"compiled in {self.compile_seconds:.0f} s"]
        lines += [f"  {name:<34}{shown(size):>12}" for name, size in self.memory.items()]
        if not self.device_flops:
            return lines
        counted = "the solver decides how many"  # evaluations, as it goes
        if self.flops:
            counted = (f"{self.flops / 1e12:,.4g} TFLOP by our count, compiled "
                       f"{self.device_flops * devices / self.flops:.2f} times that")
        lines += [
            f"  donated                           {shown(self.donated):>12}",
            f"  compute     {counted}; attention {self.attention}",
            "  exchange    " + ("; ".join(
                f"{kind} {shown(size)} over {axes}" for kind, by in self.collectives.items()
                for axes, size in by.items()) or "nothing"),
        ]
        if self.estimate:
            e = self.estimate
            lines.append(
                f"  estimate    {e.seconds * 1e3:,.1f} ms: products {e.products * 1e3:,.1f}, memory {e.memory * 1e3:,.1f}, "
                f"exchange {e.exchange * 1e3:,.1f}; {self.images / e.seconds:,.0f} images/s, "
                f"{e.floor / e.seconds:.0%} of the datasheet's products")
        return lines


@dataclasses.dataclass(frozen=True)
class Report:
    """A run on a machine."""

    run: str
    target: str
    device: str
    devices: int
    mesh: dict[str, int]
    batch: int
    remat: str
    accumulate: int
    steps: int
    train: ProgramReport
    sampler: ProgramReport | None

    @property
    def hours(self) -> float | None:
        """Estimated hours of the whole run."""
        guess = self.train.estimate
        return guess and guess.seconds * self.steps / 3600

    @property
    def images_per_second(self) -> float | None:
        """Estimated, of the train step."""
        guess = self.train.estimate
        return guess and self.train.images / guess.seconds

    @property
    def fits(self) -> bool:
        """Whether everything that was compiled fits."""
        return self.train.fits and (self.sampler is None or self.sampler.fits)

    def page(self) -> str:
        """One page."""
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        lines = [
            f"run         {self.run}: batch {self.batch} in {self.accumulate} part(s), remat {self.remat}, "
            f"{self.steps:,} steps",
            f"target      {self.target}: {self.devices} x {self.device}, mesh {mesh}",
            *self.train.lines(self.devices),
        ]
        if self.hours is not None:
            lines.append(f"  whole run   {self.hours:,.0f} hours, {self.hours * self.devices:,.0f} chip-hours (estimate)")
        if self.sampler:
            lines += self.sampler.lines(self.devices)
        if self.train.estimate:
            lines.append(f"estimates   {ASSUMPTIONS}; nothing was run")
        elif self.train.device_flops:
            lines.append("estimates   none for a CPU; python -m ig_jax.benchmark measures what is here")
        else:
            lines.append("estimates   none: the compiler refused what does not fit")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Everything on the page as plain JSON types."""
        derived = {name: getattr(self, name) for name in ("fits", "hours", "images_per_second")}
        return dataclasses.asdict(self) | derived | {"assumptions": ASSUMPTIONS}


def forecast(experiment: "Experiment", target: Target, sample_batch: int) -> Report:
    """Compile an experiment's programs for a machine and report them; sample_batch 0 leaves the sampler out.

    Raises: UserError where the mesh or the batch does not divide, as in a run.
    """
    e = experiment
    mesh = make_mesh(**vars(e.mesh), devices=target.devices)
    check_batch(e.data.batch_size, mesh, pieces=e.optimizer.pieces)
    program = TrainProgram.of(e, mesh, e.data.batch_size)
    sampler = forecast_sampler(e, target, mesh, sample_batch) if sample_batch else None
    return Report(
        e.name, target.name, target.devices[0].device_kind, len(target.devices), dict(mesh.shape), e.data.batch_size,
        program.fit.remat, program.fit.accumulate, e.run.steps, forecast_train(e, program, target, mesh), sampler,
    )


def forecast_train(experiment: "Experiment", program: TrainProgram, target: Target, mesh: Mesh) -> ProgramReport:
    """Compile the train step and report it."""
    images = jnp.uint8 if experiment.latents.name == "pixels" else jnp.float32
    compiled = programs.compile_for(target, lambda: program.lower(experiment, mesh, images))
    batch = experiment.data.batch_size
    flops = cost.train_step_flops(experiment.model, batch, ema_forward=experiment.loss.ema_forward)
    return ProgramReport.of("train step", compiled, experiment, target, mesh, images=batch, flops=flops,
                            known=programs.state_bytes(program.layout, experiment.optimizer.trains))


def forecast_sampler(experiment: "Experiment", target: Target, mesh: Mesh, batch_size: int) -> ProgramReport:
    """Compile the sampler for a global batch, raised to what the mesh divides, and report it."""
    batch = padded(batch_size, mesh)
    compiled = programs.compile_for(target, lambda: programs.lower_sampler(experiment, mesh, batch))
    evaluations = experiment.sample.evaluations_per_image(experiment.process.kind, experiment.model) or 0
    flops = cost.sample_flops(experiment.model, batch, evaluations)
    shapes = with_shardings(dit.shapes(experiment.model), mesh)
    return ProgramReport.of("sampler", compiled, experiment, target, mesh, images=batch, flops=flops,
                            known={"parameters": device_bytes(shapes)})
