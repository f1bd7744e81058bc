"""What would make a run fit: settings to change, and what they do when they are compiled."""

import dataclasses
import itertools
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from ig_jax.errors import UserError
from ig_jax.forecast import programs
from ig_jax.forecast.report import GIB, Report, forecast
from ig_jax.forecast.targets import Target
from ig_jax.parallel.mesh import batch_shards, make_mesh
from ig_jax.progress import waiting
from ig_jax.training.program import TrainProgram

if TYPE_CHECKING:
    from ig_jax.config import Experiment

REMATS = ("none", "dots", "full")  # from what keeps most to what keeps least
PARTS = (1, 2, 4, 8, 16)


def changed(experiment: "Experiment", section: str, **values) -> "Experiment":
    """The experiment with other values in one section."""
    return dataclasses.replace(experiment, **{section: dataclasses.replace(getattr(experiment, section), **values)})


def knobs(experiment: "Experiment", target: Target, found: Report) -> list[str]:
    """What each setting could still give, line by line, from sizes alone."""
    mesh, devices = make_mesh(**vars(experiment.mesh), devices=target.devices), len(target.devices)
    over = found.train.used - found.train.limit
    lines = [f"it is {over / GIB:.2f} GiB over on each device"]
    state = _state(experiment, mesh)
    groups = [n for n in range(2 * mesh.shape["fsdp"], devices + 1) if devices % (n * mesh.shape["tensor"]) == 0]
    for group in groups[:1]:
        wider = make_mesh(data=-1, fsdp=group, tensor=mesh.shape["tensor"], devices=target.devices)
        saved = state - _state(experiment, wider)
        lines.append(f"--config.mesh.data=-1 --config.mesh.fsdp={group}   frees {saved / GIB:.2f} GiB of state")
    for remat in REMATS[REMATS.index(found.remat) + 1 :]:
        lines.append(f"--config.model.remat={remat}   computes more again in the backward pass and keeps less")
    local = experiment.data.batch_size // batch_shards(mesh)
    for parts in (n for n in PARTS if n > found.accumulate and local % n == 0):
        lines.append(f"--config.optimizer.accumulate={parts}   has activations of {local // parts} images at a time "
                     f"rather than {local // found.accumulate}")
        break
    if local > 1:
        lines.append(f"--config.data.batch_size={experiment.data.batch_size // 2}   has half the activations, and is "
                     "another experiment")
    return lines


def _state(experiment: "Experiment", mesh: Mesh) -> int:
    layout = TrainProgram.of(experiment, mesh, experiment.data.batch_size).layout
    return sum(programs.state_bytes(layout, experiment.optimizer.trains).values())


def tried(experiment: "Experiment", target: Target) -> str:
    """Compile one change after the other, from cheap to dear, up to the first two that fit: a table."""
    rows, fitting = [f"{'setting':<58}{'fits':<6}{'GiB':>8}{'ms (estimate)':>16}"], 0
    for remat, parts in itertools.product(REMATS[1:], PARTS):
        setting = f"--config.model.remat={remat} --config.optimizer.accumulate={parts}"
        candidate = changed(changed(experiment, "model", remat=remat), "optimizer", accumulate=parts)
        try:
            with waiting(f"compiling with {setting}"):
                found = forecast(candidate, target, sample_batch=0).train
        except UserError:  # the batch does not divide into so many parts
            continue
        time = f"{found.estimate.seconds * 1e3:,.1f}" if found.estimate else "-"
        rows.append(f"{setting:<58}{'yes' if found.fits else 'no':<6}{found.used / GIB:8.2f}{time:>16}")
        fitting += found.fits
        if fitting == 2:
            break
    return "\n".join(rows)
