"""The share of waiting for data: counted where the devices are idle, and only there."""

import time

import pytest

from ig_jax.training.waiting import Waiting


class Step:
    """Metrics of a step that is done `seconds` after it was begun."""

    def __init__(self, seconds):
        self._done = time.perf_counter() + seconds

    def is_ready(self):
        return time.perf_counter() >= self._done


def share(read_seconds, step_seconds, steps=6):
    """Of a run whose host waits for each batch, and at the end for all steps."""

    def feed():
        for number in range(steps):
            time.sleep(read_seconds)
            yield {"label": number}

    waiting, seen, end = Waiting(), [], 0.0
    for batch in waiting.batches(feed()):
        seen.append(batch["label"])
        end = max(end, time.perf_counter()) + step_seconds  # steps run one after another
        waiting.step({"loss": Step(end - time.perf_counter())})
    time.sleep(max(0.0, end - time.perf_counter()))
    assert seen == list(range(steps))
    return waiting.share(), waiting.share()


def test_steps_that_take_longer_than_reading_wait_for_nothing():
    found, again = share(read_seconds=0.005, step_seconds=0.1)
    assert found == 0.0 and again == 0.0


def test_steps_that_take_no_time_wait_for_every_batch_but_the_first():
    found, again = share(read_seconds=0.05, step_seconds=0.0)
    assert found == pytest.approx(5 / 6, abs=0.1) and again == 0.0  # the second call asks of a time of its own
