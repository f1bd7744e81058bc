"""Hooks of the training loop: what happens every so many steps."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ig_jax.base.errors import Diverged, Preempted
from ig_jax.base.progress import Progress
from ig_jax.base.signals import AGAIN
from ig_jax.checkpoints.steps import Checkpoints
from ig_jax.config.experiment import Experiment
from ig_jax.generation import captions, decode
from ig_jax.generation.labels import labels_for
from ig_jax.generation.sampler import Program, sample_latents
from ig_jax.parallel import processes
from ig_jax.pictures import images
from ig_jax.training.goodput import Goodput
from ig_jax.training.records import Records, Window
from ig_jax.training.saving import SaveClock
from ig_jax.training.state import TrainState

SAVE = "save"  # what a process asks for when a checkpoint is due by the clock


@dataclasses.dataclass(frozen=True)
class Moment:
    """The run after one step."""

    step: int  # updates done
    state: TrainState
    metrics: dict[str, Any]  # scalars and curves of this step, on the devices
    last: bool  # whether this was the last step
    stopping: str  # the signal that asked the run to stop, or ""
    progress: Progress
    records: Records
    saving: bool = False  # whether the last checkpoint is so old that this step is saved

    @functools.cached_property
    def values(self) -> dict[str, float]:
        """The metrics on the host; those that are not finite, as in a skipped step, are left out."""
        scalars = {name: value for name, value in self.metrics.items() if isinstance(value, jax.Array)}
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        return {name: value for name, value in values.items() if math.isfinite(value)}


@dataclasses.dataclass(frozen=True)
class Hook:
    """An action of the loop every `every` steps (0 for never) and after the last one."""

    every: int
    action: Callable[[Moment], None]
    when_stopping: bool = False  # also when the run is asked to stop, or a checkpoint is due by the clock
    patience: float = 1  # the time that it may take, in steps' deadlines
    spends: str = "productive"  # the kind of its time, see goodput.KINDS: most hooks wait for a step

    @property
    def name(self) -> str:
        """What it does, for a report."""
        return self.action.__qualname__.partition(".")[0]

    def is_due(self, moment: Moment) -> bool:
        """Whether it is time to act."""
        asked = self.when_stopping and bool(moment.stopping or moment.saving)
        return self.every > 0 and (moment.last or moment.step % self.every == 0 or asked)


def watch(every: int, limit: int, trained: Sequence[str]) -> Hook:
    """Report the steps that were skipped; `trained` are the names of the parameters that have gradients.

    Raises: Diverged once `limit` of them came in a row.
    """
    reported, names = 0, sorted(trained)

    def action(moment: Moment) -> None:
        nonlocal reported
        guard = jax.device_get(moment.state.guard)
        if guard.total == reported:
            return
        what = "loss" if guard.tensor < 0 else f"gradient of {names[guard.tensor]}"
        line = f"{what} at step {guard.step} not finite, or far off; {guard.total - reported} steps skipped"
        reported = int(guard.total)
        if guard.longest >= limit:
            raise Diverged(f"{line}, {guard.longest} in a row; lower optimizer.learning_rate and rerun the command")
        if processes.is_first():
            print(f"ig_jax: warning: {line}", file=sys.stderr, flush=True)

    return Hook(every, action)


def log(every: int, window: Window) -> Hook:
    """A line of the window's means and speed, in the records and on the terminal.

    Before a save, so that a step that is resumed from has its line.
    """

    def action(moment: Moment) -> None:
        values = window.close()
        moment.records.write(moment.step, values)
        if processes.is_first():
            losses = {name.removeprefix("loss/"): v for name, v in values.items() if name.startswith("loss/")}
            shown = [f"{name} {losses[name]:.4f}" for name in sorted(losses, key=lambda name: name != "total")]
            shown.append(f"data_wait {values['data_wait']:.1%}")
            moment.progress.show(*shown, rate=values["steps_per_second"])

    return Hook(every, action)


def save(every: int, saver: Checkpoints, meta: dict, clock: SaveClock, goodput: Goodput) -> Hook:
    """A checkpoint; a run that was asked to stop leaves here.  Raises: Preempted."""

    def action(moment: Moment) -> None:
        clock.begin()
        saver.save(moment.step, moment.state.items(), meta | {"goodput": goodput.carried()})
        if moment.stopping and not moment.last:
            saver.wait()
            processes.wait_for_all("the last step is saved")
            raise Preempted(f"{moment.stopping} at step {moment.step}; saved, {AGAIN}", agreed=True)

    return Hook(every, action, when_stopping=True, spends="checkpoint")


def preview(experiment: Experiment, mesh: jax.sharding.Mesh, directory: Path) -> Hook:
    """A sheet of images sampled by the config's recipe from the first EMA, as a PNG file and in TensorBoard.

    Latents are decoded by the autoencoder of config.run. Every process samples its part; the first one writes.
    """
    e, count, ema = experiment, experiment.run.preview_images, experiment.ema.names[0]
    autoencoder = decode.load_autoencoder(e.run.autoencoder, e.latents) if count and e.run.autoencoder else None
    if count and autoencoder is None:
        decode.check_drawable(e.model.channels, "previews", "set run.preview_images=0")

    def action(moment: Moment) -> None:
        indices = np.arange(count)
        labels = labels_for(indices, "balanced", e.model.num_classes, e.seed)
        batches = sample_latents(
            Program.of(e.sample, e.model, e.process),
            moment.state.ema[ema],
            {},
            e.sample.scales,
            mesh=mesh,
            seed=e.seed,
            indices=indices,
            labels=labels,
            batch_size=count,
        )
        to_uint8 = decode.make_decoder(mesh, e.latents, autoencoder)
        sampled = np.concatenate([processes.whole(to_uint8(batch.latents)) for batch in batches])[:count]
        if processes.is_first():
            from ig_jax.pictures import plots  # late: matplotlib takes half a second

            order, each = np.argsort(labels, kind="stable"), np.bincount(labels).max()
            # Near square, with the images of a class next to each other.
            columns = int(each * max(1, round(math.sqrt(count) / each)))
            caption = captions.caption(e.name, moment.step, ema, "", e.sample, e.seed)
            picture = plots.sheet(sampled[order], columns=columns, caption=caption)
            (directory / "previews").mkdir(exist_ok=True)
            images.write_png(directory / "previews" / f"step_{moment.step:07d}.png", picture)
            moment.records.image(moment.step, "preview", picture)

    every = e.run.preview_every or e.run.steps  # 0: only after the last step
    return Hook(every if count else 0, action, patience=10, spends="evaluation")
