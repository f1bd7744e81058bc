"""The share of waiting for data: counted where the devices are idle, and only there."""

import pytest

from ig_jax.training import waiting


class Clock:
    """In place of the module `time`: seconds pass where a test says so."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Step:
    """Metrics of a step that is done at `end`."""

    def __init__(self, clock, end):
        self._clock, self._end = clock, end

    def is_ready(self):
        return self._clock.now >= self._end


def share(monkeypatch, read_seconds, step_seconds, steps=6):
    """Of a run whose host waits for each batch, and at the end for all steps."""
    clock, end = Clock(), 0.0
    monkeypatch.setattr(waiting, "time", clock)

    def feed():
        for number in range(steps):
            clock.now += read_seconds
            yield {"label": number}

    waits, seen = waiting.Waiting(), []
    for batch in waits.batches(feed()):
        seen.append(batch["label"])
        end = max(end, clock.now) + step_seconds  # steps run one after another
        waits.step({"loss": Step(clock, end)})
    clock.now = max(clock.now, end)
    assert seen == list(range(steps))
    return waits.share(), waits.share()


def test_steps_that_take_longer_than_reading_wait_for_nothing(monkeypatch):
    assert share(monkeypatch, read_seconds=0.005, step_seconds=0.1) == (0.0, 0.0)


def test_steps_that_take_no_time_wait_for_every_batch_but_the_first(monkeypatch):
    found, again = share(monkeypatch, read_seconds=0.05, step_seconds=0.0)
    assert found == pytest.approx(5 / 6) and again == 0.0  # the second call asks of a time of its own
