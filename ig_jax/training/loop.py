"""The training run, in numbered stages; `train` reads from top to bottom."""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
from jax.sharding import Mesh

from ig_jax.base import cli
from ig_jax.base.errors import Diverged
from ig_jax.base.files import write_text
from ig_jax.base.progress import Progress, duration
from ig_jax.base.signals import StopRequest
from ig_jax.base.versions import versions
from ig_jax.checkpoints import steps as checkpoints
from ig_jax.config import stored
from ig_jax.config.experiment import Experiment
from ig_jax.data import pipeline
from ig_jax.data.sources import Source
from ig_jax.parallel import processes
from ig_jax.parallel.mesh import check_batch, make_mesh
from ig_jax.parallel.peers import Agreement
from ig_jax.parallel.sharding import from_local_rows, local_row_numbers
from ig_jax.training import hooks, resume, workdir
from ig_jax.training.goodput import Goodput
from ig_jax.training.held_out import held_out
from ig_jax.training.initialise import encoder_weights, starting_weights
from ig_jax.training.memory import device_bytes
from ig_jax.training.program import TrainProgram
from ig_jax.training.records import Records, Window
from ig_jax.training.saving import SaveClock
from ig_jax.training.startup import Startup
from ig_jax.training.state import TrainState, born_sharded, restored
from ig_jax.training.summary import summary
from ig_jax.training.tensorboard import TensorBoard
from ig_jax.training.waiting import Waiting
from ig_jax.training.watchdog import Watchdog

Evaluation = Callable[[Experiment, Mesh, Path], Sequence[hooks.Hook]]  # of a run in a work directory


def train(
    experiment: Experiment,
    directory: str,
    more_hooks: Sequence[hooks.Hook] = (),
    evaluation: Evaluation = lambda *run: (),
) -> TrainState:
    """Train to config.run.steps in the work directory, resuming whatever is there.

    more_hooks: called after those of the loop itself; `evaluation`: makes more of them, once the data are opened.
    Raises: UserError for bad input, Diverged for a loss that is not finite, Preempted after a signal.
    """
    e, path, goodput, began = experiment, workdir.prepare(directory), Goodput(), time.monotonic()
    with contextlib.ExitStack() as stack:
        processes.first_alone(lambda: stack.enter_context(workdir.Lease(path)) if processes.is_first() else None)

        # 1. Open the data: they say what a batch is.
        source = processes.first_alone(lambda: e.open_split(e.data.split))
        e = e.of_data(source.spec)
        fingerprint = pipeline.fingerprint(source, e.seed, e.data.batch_size)

        # 2. Lay the state and the step out on the mesh; nothing is allocated.
        mesh = make_mesh(**vars(e.mesh))
        check_batch(e.data.batch_size, mesh, pieces=e.optimizer.pieces)
        program = TrainProgram.of(e, mesh, source.spec, e.data.batch_size)

        # 3. Restore the newest checkpoint, or initialise; compile meanwhile. For a large network either takes a minute.
        saver = stack.enter_context(checkpoints.Checkpoints(path / "checkpoints", keep=e.run.keep_checkpoints))
        startup = stack.enter_context(Startup())
        compilation = stack.enter_context(Compilation(program.lower, startup))
        found: dict[int, Experiment] = {}
        before_reading = functools.partial(_check_resumable, e, fingerprint, compilation, found, goodput, path)
        with startup.timed("state"):
            state = restored(saver, program.layout, before_reading)
            if state is None:
                weights = starting_weights(e, mesh)
                compilation.begin()
                state = born_sharded(program.new, program.layout, weights)
            start = int(state.step)
        goodput.resume(start, *workdir.last_sign_of_life(path))
        if start >= e.run.steps:
            print(f"nothing to do: {path} already holds step {start}")
            return state

        # 4. Describe the run, on the terminal, in config.json and in metrics.jsonl.
        metrics = workdir.MetricsFile(path)
        if processes.is_first():
            print(summary(e, path, mesh, source, start, program.fit, device_bytes(program.layout)), flush=True)
            _begin(e, found.get(start, e), path, metrics, start, startup)

        # 5. Step to the end, or to a stop; after too many bad steps once more, from the last checkpoint.
        with goodput.during("compile"):
            train_step = compilation.result()
        run = Run(e, path, metrics, mesh, source, saver, train_step, fingerprint, goodput, startup, stack)
        more_hooks = [*more_hooks, *evaluation(e, mesh, path)]
        with processes.sharing_fate():
            try:
                state = run.steps(state, more_hooks)
            except Diverged as error:
                state = run.steps(run.gone_back(error, program.layout), more_hooks)

            # 6. Wait until everything is on disk.
            saver.wait()
    if processes.is_first():
        took, sample = duration(time.monotonic() - began), f"--checkpoint={directory} --out={directory}/samples"
        print(f"saved step {int(state.step)} in {path} after {took}; next: python -m ig_jax.sample {sample}")
    return state


class Run:
    """A prepared run, and what goes with its steps; closed by the stack it is given."""

    def __init__(
        self,
        experiment: Experiment,
        path: Path,
        metrics: workdir.MetricsFile,
        mesh: Mesh,
        source: Source,
        saver: checkpoints.Checkpoints,
        train_step: jax.stages.Compiled,
        fingerprint: dict,
        goodput: Goodput,
        startup: Startup,
        stack: contextlib.ExitStack,
    ):
        self.experiment, self.path, self.metrics, self.mesh, self.source = experiment, path, metrics, mesh, source
        self.saver, self.train_step, self.goodput, self.startup = saver, train_step, goodput, startup
        self.encoder = encoder_weights(experiment, mesh)
        self.meta = {
            "config": experiment.as_dict(),
            "data": fingerprint,
            "labels": list(source.spec.class_names),
            "versions": versions(),
            "devices": jax.device_count(),
        }
        self.waiting, self.clock = Waiting(goodput.waited), SaveClock(experiment.run.checkpoint_minutes)
        self.window = Window(self.waiting, goodput)
        self.held_out = [held_out(experiment, mesh, source, self.encoder)] if experiment.run.evaluate_every else []
        self.progress = stack.enter_context(Progress(experiment.run.steps, "steps"))
        self.tensorboard = stack.enter_context(TensorBoard(path))
        self.agreement, self.stop = stack.enter_context(Agreement()), stack.enter_context(StopRequest())
        self.watchdog = stack.enter_context(Watchdog(experiment.run.step_deadline))

    def own_hooks(self, state: TrainState) -> list[hooks.Hook]:
        """Those of every run: the first step, bad steps, log, held-out loss, checkpoint, preview."""
        e = self.experiment
        trained = [name for name in state.params if e.optimizer.trains(name)]
        return [
            hooks.Hook(1, self.startup.ready),
            hooks.watch(e.run.log_every, e.run.skip_limit, trained),
            hooks.log(e.run.log_every, self.window),
            *self.held_out,
            hooks.save(e.run.checkpoint_every, self.saver, self.meta, self.clock, self.goodput),
            hooks.preview(e, self.mesh, self.path),
        ]

    def steps(self, state: TrainState, more_hooks: Sequence[hooks.Hook]) -> TrainState:
        """The state after the last step.  Raises: Diverged after too many bad steps, Preempted after a signal."""
        size, last, start = self.experiment.data.batch_size, self.experiment.run.steps, int(state.step)
        actions = [*self.own_hooks(state), *more_hooks]
        records = Records(self.experiment, self.metrics, self.tensorboard, self.goodput, start)
        self.progress.restart(start)
        self.startup.stepping()
        self.window.close()
        with _batches(self.experiment, self.source, start, self.mesh) as feed:
            for step, batch in enumerate(self.watchdog.timed(self.waiting.batches(feed), start), start + 1):
                placed = {name: from_local_rows(part, self.mesh, size) for name, part in batch.items()}
                state, metrics = self.train_step(state, placed | self.encoder)
                self.goodput.enter("productive")
                self.waiting.step(metrics)
                self.window.add(metrics)
                self.progress.advance()
                asked = self._asked(step)
                saving, stopping = asked == hooks.SAVE, asked.replace(hooks.SAVE, "")
                moment = hooks.Moment(step, state, metrics, step == last, stopping, self.progress, records, saving)
                for hook in (each for each in actions if each.is_due(moment)):
                    self.watchdog.expect(f"{hook.name} after step {step}", hook.patience)
                    with self.goodput.during(hook.spends):
                        self._act(hook, moment)
                if moment.last:
                    break
        return state

    def gone_back(self, error: Diverged, layout: TrainState) -> TrainState:
        """The state of the last checkpoint, from which the run goes on.  Raises: `error` where there is none."""
        self.saver.wait()
        state = restored(self.saver, layout, self.goodput.note)
        if state is None:
            raise error
        step = int(state.step)
        self.goodput.go_back(step)
        if processes.is_first():
            self.metrics.cut(step)
            print(f"ig_jax: warning: {error}; going back to step {step}, once", file=sys.stderr)
        return state

    def _act(self, hook: hooks.Hook, moment: hooks.Moment) -> None:
        """Call a hook; where nobody reads what it prints, the run stops as after a signal."""
        try:
            hook.action(moment)
        except BrokenPipeError:
            if not cli.drop_dead_streams():
                raise
            self.stop.name = "no reader of the output"

    def _asked(self, step: int) -> str:
        """What all processes do after this step: the name of a signal, hooks.SAVE, or "" for nothing."""
        if self.stop.name:
            self.agreement.ask(self.stop.name)
        elif processes.is_first() and self.clock.is_due():
            self.agreement.ask(hooks.SAVE)
        return self.agreement.after(step)


class Compilation:
    """A program compiled in the background; leaving the context waits for it."""

    def __init__(self, lower: Callable[[], jax.stages.Lowered], startup: Startup):
        self._lower, self._startup = lower, startup
        self._future: Future | None = None

    def __enter__(self) -> "Compilation":
        self._thread = ThreadPoolExecutor(max_workers=1)
        return self

    def __exit__(self, *exception) -> None:
        self._thread.shutdown()

    def begin(self) -> None:
        """Start compiling, once."""
        self._future = self._future or self._thread.submit(self._compiled)

    def _compiled(self) -> jax.stages.Compiled:
        with self._startup.timed("compile"):
            return self._lower().compile()

    def result(self) -> jax.stages.Compiled:
        """The executable, waited for."""
        self.begin()
        assert self._future is not None
        return self._future.result()


def _begin(
    e: Experiment, old: Experiment, path: Path, metrics: workdir.MetricsFile, start: int, startup: Startup
) -> None:
    """Write the settings, tell what changed since the experiment `old`, and go on with metrics.jsonl after `start`."""
    write_text(path / stored.FILE, json.dumps(e.as_dict(), indent=2))
    for line in resume.changes(old, e, start):
        print(f"changed     {line}", flush=True)
    metrics.cut(start)
    startup.begin(metrics, start, resume.differences(old, e))


def _check_resumable(
    e: Experiment,
    fingerprint: dict,
    compilation: Compilation,
    found: dict[int, Experiment],
    goodput: Goodput,
    path: Path,
    meta: dict,
) -> None:
    """Refuse the checkpoint of other data or another network; compile while it is read if there are steps left.

    found: gets the experiment of the checkpoint by its step.
    """
    goodput.note(meta)
    pipeline.check_fingerprint(meta["data"], fingerprint)
    found[meta["step"]] = stored.experiment(meta, path)
    resume.changes(found[meta["step"]], e, meta["step"])
    if meta["step"] < e.run.steps:
        compilation.begin()


def _batches(e: Experiment, source: Source, start: int, mesh: Mesh) -> pipeline.Batches:
    """This process's rows of the batches from step `start` on."""
    size = e.data.batch_size
    rows = local_row_numbers(mesh, size)
    return pipeline.batches(source, seed=e.seed, global_batch=size, start_step=start, rows=rows)
