"""Hooks of the loop: when they act, in which process, and hooks added by a caller."""

import signal

import jax.numpy as jnp
import pytest
import toy

from ig_jax.base.errors import Preempted
from ig_jax.training import hooks
from ig_jax.training.loop import train


def moment(step, last=False, stopping="", loss=1.0):
    return hooks.Moment(step, None, {"loss/total": jnp.float32(loss)}, last, stopping, None)


def acted(hook_of, moments):
    """The steps at which a hook acts."""
    steps = []
    hook = hook_of(lambda moment: steps.append(moment.step))
    for one in moments:
        hook(one)
    return steps


def test_a_hook_acts_every_so_many_steps_and_after_the_last():
    moments = [moment(step, last=step == 8) for step in range(1, 9)]
    assert acted(lambda action: hooks.Hook(3, action), moments) == [3, 6, 8]
    assert acted(lambda action: hooks.Hook(0, action), moments) == []


def test_only_some_hooks_act_when_the_run_is_asked_to_stop():
    moments = [moment(step, stopping="SIGTERM" if step == 2 else "") for step in (1, 2, 3)]
    assert acted(lambda action: hooks.Hook(3, action), moments) == [3]
    assert acted(lambda action: hooks.Hook(3, action, when_stopping=True), moments) == [2, 3]


def test_a_hook_of_the_first_process_acts_there_alone(monkeypatch):
    monkeypatch.setattr(hooks.processes, "is_first", lambda: False)
    assert acted(lambda action: hooks.Hook(1, action), [moment(1)]) == []
    assert acted(lambda action: hooks.Hook(1, action, first_process_only=False), [moment(1)]) == [1]


def test_metrics_that_are_not_finite_are_left_out():
    assert moment(4, loss=float("nan")).values == {}


def test_a_hook_handed_to_a_run_sees_every_state_and_a_stopped_run_leaves_after_its_save(tmp_path):
    seen = []
    record = hooks.Hook(1, lambda moment: seen.append((int(moment.state.step), moment.values["loss/total"])))
    train(toy.experiment(**{"run.steps": 2}), str(tmp_path), [record])
    assert [step for step, _ in seen] == [1, 2]
    stop = hooks.Hook(1, lambda moment: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Preempted, match="SIGTERM at step 4; saved"):
        train(toy.experiment(**{"run.steps": 6}), str(tmp_path), [record, stop])
    assert [step for step, _ in seen] == [1, 2, 3]  # step 4 was saved and left before this hook
    assert (tmp_path / "checkpoints" / "4").is_dir()
