"""What a worker of ours runs, by the command."""

import collections
import contextlib
import time

import jax

from ig_jax.benchmarking import loader
from ig_jax.benchmarking.cases import Case
from ig_jax.benchmarking.hotspots import HotSpots
from ig_jax.benchmarking.ours import Memory, Sample, Train, described, mesh_of, staged, synthetic_batch
from ig_jax.errors import UserError
from ig_jax.parallel.sharding import batch_sharding
from ig_jax.training.program import TrainProgram
from ig_jax.training.state import born_sharded


class Data(Train):
    """The step beside its loader."""

    def finish(self) -> dict:
        return {"data": loader.rate(self.case)}


class Start:
    """A run from its beginning to its third step, as `train` does it; the compilations of the steps are counted."""

    STEPS = 3

    def __init__(self, case: Case):
        self.case = case
        mesh = mesh_of(case)
        self.program = TrainProgram.of(case, mesh, case.batch)
        state = born_sharded(self.program.new, self.program.layout, {})
        self.batch = synthetic_batch(case, mesh)
        if case.experiment is not None:
            with contextlib.suppress(UserError), loader.feed_of(case) as feed:
                place = batch_sharding(mesh)
                self.batch = jax.device_put(next(feed), place)
        jax.block_until_ready((state, self.batch))
        counted: collections.Counter = collections.Counter()
        jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: counted.update([name]))
        jax.monitoring.register_event_listener(lambda name, **_: counted.update([name]))
        for number in range(self.STEPS):
            state, metrics = self.program.step(state, self.batch)
            jax.block_until_ready(metrics)
            if number == 0:
                first = time.time(), time.process_time()
        self.report = {
            **described(case, mesh), "first_step_at": first[0], "first_step_cpu": first[1],
            "compilations": counted["/jax/core/compile/backend_compile_duration"],
            "cache_misses": counted["/jax/compilation_cache/cache_misses"],
        }

    def finish(self) -> dict:
        """Seconds of each stage by itself, nothing taken from a cache."""
        jax.config.update("jax_enable_compilation_cache", False)
        jax.clear_caches()
        return {"seconds": staged(self.program.step, self.program.layout, self.batch)[1]}


MAKERS = {"train": Train, "sample": Sample, "memory": Memory, "data": Data, "compile": Start, "kernels": HotSpots}
