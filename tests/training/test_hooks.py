"""Hooks of the loop: when they act, and hooks added by a caller."""

import signal
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import toy

from ig_jax.base.errors import Preempted
from ig_jax.diffusion import curves
from ig_jax.evaluation import classifier, while_training
from ig_jax.training import hooks, records
from ig_jax.training.loop import train
from ig_jax.training.workdir import read_metrics


def moment(step, last=False, stopping="", loss=1.0):
    return hooks.Moment(step, None, {"loss/total": jnp.float32(loss)}, last, stopping, None, None)


def acted(hook_of, moments):
    """The steps at which a hook acts."""
    steps = []
    hook = hook_of(lambda moment: steps.append(moment.step))
    for one in filter(hook.is_due, moments):
        hook.action(one)
    return steps


def test_a_hook_acts_every_so_many_steps_and_after_the_last():
    moments = [moment(step, last=step == 8) for step in range(1, 9)]
    assert acted(lambda action: hooks.Hook(3, action), moments) == [3, 6, 8]
    assert acted(lambda action: hooks.Hook(0, action), moments) == []


def test_only_some_hooks_act_when_the_run_is_asked_to_stop():
    moments = [moment(step, stopping="SIGTERM" if step == 2 else "") for step in (1, 2, 3)]
    assert acted(lambda action: hooks.Hook(3, action), moments) == [3]
    assert acted(lambda action: hooks.Hook(3, action, when_stopping=True), moments) == [2, 3]


def test_a_window_is_the_mean_of_its_finite_steps_and_its_own_speed(monkeypatch):
    now = iter([0.0, 10.0, 16.0])
    monkeypatch.setattr(records.time, "perf_counter", lambda: next(now))
    evaluation = iter([0.0, 0.0, 5.0])  # seconds in all
    goodput = SimpleNamespace(metrics=lambda: {"seconds/evaluation": next(evaluation)})
    window = records.Window(SimpleNamespace(share=lambda: 0.25), goodput)
    for loss in (9.0, 9.0):
        window.add({"loss/total": jnp.float32(loss)})
    assert window.close()["loss/total"] == 9.0
    for loss in (1.0, float("nan"), 3.0):
        curve = curves.Curve(jnp.array([loss, float("nan")]), ("embed", "0"))
        more = {"gradient": curve, "norm": jnp.float32("inf"), "learning_rate": jnp.float32(loss)}
        window.add({"loss/total": jnp.float32(loss)} | more)
    assert window.close() == {
        "loss/total": 2.0,
        "gradient": {"embed": 2.0, "0": None},
        "learning_rate": 3.0,
        "steps_per_second": 3.0,
        "data_wait": 0.25,
    }
    assert moment(4, loss=float("nan")).values == {}


def test_a_hook_handed_to_a_run_sees_every_state_and_a_stopped_run_leaves_after_its_save(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 5)
    measured = {"run.evaluate_every": 2, "run.evaluate_samples": 16, "sample.solver": "euler", "sample.steps": 1}
    seen = []
    record = hooks.Hook(1, lambda moment: seen.append((int(moment.state.step), moment.values["loss/total"])))
    experiment = toy.experiment(**{"run.steps": 2, "run.log_every": 2, **measured})
    train(experiment, str(tmp_path), [record], while_training.hooks)
    (step, first), (_, second) = seen
    line, *more = read_metrics(tmp_path)
    assert {"held_out/final", "held_out/intermediate"} < more[0].keys() and more[0]["step"] == 2
    assert {"fd_cnn_16", "agreement_16", "seconds/evaluation"} < more[1].keys() and len(more) == 2
    assert (step, line["step"], line["loss/total"]) == (1, 2, pytest.approx((first + second) / 2, rel=1e-6))
    stop = hooks.Hook(1, lambda moment: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Preempted, match="SIGTERM at step 4; saved"):
        train(toy.experiment(**{"run.steps": 6}), str(tmp_path), [record, stop])
    assert [step for step, _ in seen] == [1, 2, 3]  # step 4 was saved and left before this hook
    assert (tmp_path / "checkpoints" / "4").is_dir()
