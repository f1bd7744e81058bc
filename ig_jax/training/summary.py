"""Summary of a run, printed before its first step."""

import math
from pathlib import Path

import jax
from jax.sharding import Mesh

from ig_jax.config.experiment import Experiment
from ig_jax.data.sources import Source
from ig_jax.models import cost, dit
from ig_jax.models.dit import DiTConfig
from ig_jax.training.memory import Fit


def summary(e: Experiment, directory: Path, mesh: Mesh, source: Source, start: int, fit: Fit, state_bytes: int) -> str:
    """Devices, data, parameters, FLOPs, memory and length of the run of an experiment from step `start`."""
    model, batch = e.model, e.data.batch_size
    flops = cost.train_step_flops(model, batch, ema_forward=e.loss.ema_forward)
    trained = sum(math.prod(leaf.shape) for name, leaf in dit.shapes(model).items() if e.optimizer.trains(name))
    head = len(model.inter_depth) * cost.head_macs(model) / cost.forward_macs(model)
    empty = source.empty_classes()
    without = (
        f"; {len(empty)} without images: {', '.join(empty[:8])}{', ...' if len(empty) > 8 else ''}" if empty else ""
    )
    return f"""\
run         {e.name} in {directory}
devices     {jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es), \
mesh {dict(mesh.shape)}
data        {source!r}, {len(source):,} images of {source.spec.holds}, {batch} per step \
({e.run.steps * batch / len(source):.1f} epochs)
classes     {source.spec.num_classes}{without}
{parameter_table(model)}
parameters  {trained:,} trained; the intermediate head adds {cost.head_parameter_share(model):.3%}
compute     {flops / 1e9:,.2f} GFLOP per step, {model.dtype} products; head {head:.3%} of a forward pass
memory      remat {fit.remat}, {fit.accumulate} micro-batch(es), a state of {state_bytes / 1e9:,.4g} GB on each device
steps       {start} -> {e.run.steps}, checkpoint every {e.run.checkpoint_every}"""


def parameter_table(model: DiTConfig) -> str:
    """Parameters by part of the network."""
    groups: dict[str, int] = {}
    for name, leaf in dit.shapes(model).items():
        group = name.split(".")[0]
        groups[group] = groups.get(group, 0) + math.prod(leaf.shape)
    return "\n".join(f"  {name:<14}{count:>14,}" for name, count in groups.items())
