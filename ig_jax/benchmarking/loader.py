"""How fast the batches of a config come, by the pipeline that `train` reads."""

import time

from ig_jax.benchmarking.cases import Case
from ig_jax.errors import UserError

WARM_BATCHES = 8
SECONDS = 1.0


def rate(case: Case) -> float:
    """Images/s of the case's loader once its first batches are through, nothing else running.

    Raises: UserError for data that cannot be opened.
    """
    with feed_of(case) as feed:
        for _ in range(WARM_BATCHES):
            next(feed)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            next(feed)
            count += 1
        return count * case.batch / (time.perf_counter() - start)


def feed_of(case: Case):
    """The batches that `train` would read, from the first step on.  Raises: UserError without data of its own."""
    from ig_jax.data import pipeline  # late: only a config file has data

    e = case.experiment
    source = e.open_split(e.data.split)
    return pipeline.batches(
        source, seed=e.seed, global_batch=case.batch, start_step=0, process_index=0, process_count=1
    )


def rate_if_any(case: Case) -> float | None:
    """The rate, or None for a published name, or a config whose data are not on this machine."""
    try:
        return rate(case) if case.experiment is not None else None
    except UserError:
        return None
