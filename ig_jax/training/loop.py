"""The training run: restore or begin, step, log, preview, save; `train` reads from top to bottom."""

import functools
import importlib.metadata
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from ig_jax.config import Experiment, bind
from ig_jax.data import pipeline
from ig_jax.errors import Diverged, Preempted
from ig_jax.generation import decode, images
from ig_jax.generation.generate import draw
from ig_jax.generation.labels import labels_for
from ig_jax.models import cost, dit
from ig_jax.parallel.mesh import check_batch, make_mesh
from ig_jax.parallel.sharding import batch_sharding
from ig_jax.progress import Progress
from ig_jax.training import checkpoints as ckpt
from ig_jax.training import workdir as wd
from ig_jax.training.board import TensorBoard
from ig_jax.training.memory import Fit
from ig_jax.training.program import TrainProgram
from ig_jax.training.start import ARITHMETIC, check_same_network, starting_weights
from ig_jax.training.state import TrainState, born_sharded

PACKAGES = ("ig_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")


def train(experiment: Experiment, workdir: str) -> TrainState:
    """Train to config.run.steps in `workdir`, resuming whatever is there.

    Raises: UserError for bad input, Diverged for a loss that is not finite, Preempted after a signal.
    """
    directory = wd.prepare(workdir)
    with wd.Lease(directory), wd.StopSignal() as stop:
        source = experiment.open_split(experiment.data.split)
        mesh = make_mesh(**vars(experiment.mesh))
        check_batch(experiment.data.batch_size, mesh, pieces=experiment.optimizer.pieces)
        program = TrainProgram.of(experiment, mesh, experiment.data.batch_size)
        saver = ckpt.Checkpoints(directory / "checkpoints", keep=experiment.run.keep_checkpoints)
        with saver, ThreadPoolExecutor(max_workers=1) as background:
            lowered = functools.partial(program.lower, experiment, mesh, np.uint8)  # the images of a source
            compiled = functools.cache(lambda: background.submit(lambda: lowered().compile()))  # begun by the first call
            fingerprint = pipeline.fingerprint(source, experiment.seed, experiment.data.batch_size)

            def before_reading(meta):
                pipeline.check_fingerprint(meta["data"], fingerprint)
                check_same_network(experiment, bind(Experiment, meta["config"]), ARITHMETIC, "the checkpoint of this run")
                if meta["step"] < experiment.run.steps:
                    compiled()  # while the state is read: for a large network on a pod either takes a minute

            restored = ckpt.restore_state(saver, program.layout, before_reading)
            state = restored[0] if restored else born_sharded(
                program.new, program.layout, starting_weights(experiment, mesh))
            run = Run(experiment, directory, mesh, source, saver, stop, {
                "config": experiment.as_dict(), "data": fingerprint, "labels": list(source.class_names),
                "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
                "devices": jax.device_count(),
            })
            if int(state.step) >= experiment.run.steps:
                print(f"nothing to do: {directory} already holds step {int(state.step)}")
                return state
            run.describe(int(state.step), program.fit)
            return run.steps(compiled().result(), state)


class Run:
    """One process's part of a run: the loop over steps and everything written beside it."""

    def __init__(self, experiment, directory: Path, mesh, source, saver, stop, meta: dict):
        self.experiment, self.directory, self.mesh = experiment, directory, mesh
        self.source, self.saver, self.stop, self.meta = source, saver, stop, meta

    def describe(self, start: int, fit: Fit) -> None:
        """Write config.json and say what is about to happen."""
        e = self.experiment
        (self.directory / "config.json").write_text(json.dumps(e.as_dict(), indent=2) + "\n")
        flops = cost.train_step_flops(e.model, e.data.batch_size, ema_forward=e.loss.ema_forward)
        print(f"run         {e.name} in {self.directory}")
        print(f"devices     {jax.device_count()} x {jax.devices()[0].device_kind}, "
              f"{jax.process_count()} process(es), mesh {dict(self.mesh.shape)}")
        print(f"data        {self.source.identity}, {len(self.source):,} images, "
              f"{e.data.batch_size} a step ({e.run.steps * e.data.batch_size / len(self.source):.1f} epochs)")
        print(parameter_table(e.model))
        shapes = dit.shapes(e.model).items()
        trained = sum(math.prod(leaf.shape) for name, leaf in shapes if e.optimizer.trains(name))
        print(f"parameters  {trained:,} trained; the intermediate head adds "
              f"{cost.head_parameter_share(e.model):.3%}")
        print(f"compute     {flops / 1e9:,.2f} GFLOP a step, {e.model.dtype} products; head "
              f"{len(e.model.inter_depth) * cost.head_macs(e.model) / cost.forward_macs(e.model):.3%} of a forward")
        print(f"memory      remat {fit.remat}, a batch in {fit.accumulate} part(s)")
        print(f"steps       {start} -> {e.run.steps}, checkpoint every {e.run.checkpoint_every}", flush=True)

    def steps(self, train_step, state: TrainState) -> TrainState:
        """Step until the end or a signal; the state given is donated."""
        e, start = self.experiment, int(state.step)
        written = wd.MetricsFile(self.directory, start)
        feed = pipeline.batches(
            self.source, seed=e.seed, global_batch=e.data.batch_size, start_step=start,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )
        with feed, Progress(e.run.steps, "steps", start=start) as progress, TensorBoard(self.directory) as board:
            for done, batch in enumerate(feed, start + 1):
                state, metrics = train_step(state, self._on_devices(batch))
                progress.advance()
                last = done == e.run.steps
                stopping = self.stop.name  # read once: a signal during what follows is for the next step
                logs = last or self._due(done, e.run.log_every)
                saves = last or bool(stopping) or self._due(done, e.run.checkpoint_every)
                if logs or saves:
                    values = self._finite(done, wd.as_floats(metrics))
                if logs:
                    written.write(done, values)  # before it is saved: a step that is resumed from has its line
                if saves:
                    self.saver.save(state, self.meta)
                if logs:
                    board.scalars(done, {**values, "steps_per_second": progress.rate()})
                    progress.show(self._line(values, progress.rate()))
                if stopping and not last:
                    self.saver.wait()
                    raise Preempted(f"{stopping} at step {done}; saved, the same command goes on from there")
                if e.run.preview_images and (last or self._due(done, e.run.preview_every)):
                    board.image(done, self._preview(state, done))
                if last:
                    break
        self.saver.wait()
        return state

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _on_devices(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        sharding = batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(sharding, part) for name, part in batch.items()}

    def _finite(self, step: int, values: dict[str, float]) -> dict[str, float]:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(f"{bad[0]}={values[bad[0]]} at step {step}, within the {self.experiment.run.log_every} "
                           "steps before it; nothing was saved since, lower optimizer.learning_rate and give the command again")
        return values

    def _line(self, values: dict[str, float], rate: float) -> str:
        losses = "  ".join(f"{name.removeprefix('loss/')} {v:.4f}" for name, v in values.items() if "loss/" in name)
        return f"{losses}  {rate:.2f} steps/s  {rate * self.experiment.data.batch_size:,.0f} images/s"

    def _preview(self, state: TrainState, step: int) -> np.ndarray:
        """A grid drawn with the config's recipe from the first EMA, also written as a picture."""
        e = self.experiment
        indices = np.arange(e.run.preview_images)
        batches = draw(
            state.ema[e.ema.names[0]], e.sample, model=e.model, process=e.process, mesh=self.mesh, seed=e.seed,
            indices=indices, labels=labels_for(indices, "balanced", e.model.num_classes, e.seed), batch_size=len(indices),
        )
        to_uint8 = decode.make_decoder(self.mesh, e.latents, None)  # a preview is of pixels
        drawn = np.concatenate([np.asarray(to_uint8(batch.latents)) for batch in batches])[: len(indices)]
        picture = images.grid(drawn, columns=e.model.num_classes)
        (self.directory / "previews").mkdir(exist_ok=True)
        images.write_png(self.directory / "previews" / f"step_{step:07d}.png", picture)
        return picture


def parameter_table(model) -> str:
    """Parameters by part of the network."""
    groups: dict[str, int] = {}
    for name, leaf in dit.shapes(model).items():
        group = name.split(".")[0]
        groups[group] = groups.get(group, 0) + math.prod(leaf.shape)
    return "\n".join(f"  {name:<14}{count:>14,}" for name, count in groups.items())
