"""Steps that are not finite, or whose loss leaps, are skipped bit for bit; a run that skips too many goes back once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from ig_jax.base.errors import Diverged
from ig_jax.training import guard, hooks, step
from ig_jax.training.guard import Guard
from ig_jax.training.loop import train
from ig_jax.training.workdir import read_metrics

FINITE = {"a": 1.0, "b": 2.0}


def judged(losses, squares=FINITE, leap=0.0):
    """(which steps are taken, the guard after them) of these losses."""
    judge = jax.jit(lambda state, n, loss: state.judged(n, loss, jax.tree.map(jnp.float32, squares), leap))
    state, taken = Guard.new(), []
    for n, loss in enumerate(losses):
        one, state = judge(state, jnp.int32(n), jnp.float32(loss))
        taken.append(bool(one))
    return taken, jax.device_get(state)


def test_the_first_bad_step_of_a_row_and_its_tensor_are_kept():
    taken, state = judged([1.0, np.nan, np.inf, 1.0])
    assert taken == [True, False, False, True]
    assert (state.row, state.longest, state.total, state.step, state.tensor) == (0, 2, 2, 2, -1)
    taken, state = judged([1.0], {"a": 1.0, "c": np.nan, "b": 2.0, "d": np.inf})
    assert taken == [False] and (state.step, state.tensor) == (1, 2)


def test_a_leap_is_skipped_and_one_nan_blinds_nothing():
    calm = list(1 + 0.1 * np.sin(np.arange(40)))
    assert all(judged([*calm, 100.0])[0])  # off by default
    losses = [*calm, np.nan, 100.0, 1.0, *calm]
    skipped = [index for index, one in enumerate(judged(losses, leap=6.0)[0]) if not one]
    assert skipped == [40, 41]


def test_a_new_level_of_the_loss_is_not_skipped_for_ever():
    taken, _ = judged([*(1 + 0.1 * np.sin(np.arange(40))), *[5.0] * 20], leap=6.0)
    assert taken[40:] == [False] * guard.MOST_LEAPS + [True] * (20 - guard.MOST_LEAPS)


@pytest.fixture
def poison(monkeypatch):
    """Makes the inputs of the steps that are added to it (0-based) NaN."""
    steps, sound = [], step.prepare
    bad = lambda now: jnp.isin(now, jnp.asarray(steps or [-1]))
    monkeypatch.setattr(step, "prepare", lambda *a: jnp.where(bad(a[-1]), jnp.nan, sound(*a)))
    return steps


def run(workdir, seen=None, **changed):
    look = lambda moment: seen.append(jax.device_get((moment.state.params, moment.state.ema, moment.state.opt_state)))
    hook = hooks.Hook(1, look)
    small = {"run.steps": 5, "run.checkpoint_every": 2, "mesh.data": 1, "mesh.fsdp": 8, "model.width": 128}
    return train(toy.experiment(**small | changed), str(workdir), [] if seen is None else [hook])


def test_a_bad_step_changes_nothing_but_its_number(tmp_path, poison, capsys):
    poison.append(2)
    seen: list = []
    state = run(tmp_path, seen)
    jax.tree.map(np.testing.assert_array_equal, seen[1], seen[2])
    assert not np.array_equal(seen[2][0]["final_head.linear.kernel"], seen[3][0]["final_head.linear.kernel"])
    assert int(state.step) == 5 and int(state.opt_state[1][0].count) == 4
    assert "at step 3 not finite" in capsys.readouterr().err
    lines = read_metrics(tmp_path)
    assert ["loss/total" in line for line in lines] == [True, True, False, True, True]


def test_too_many_in_a_row_go_back_once_and_end(tmp_path, poison, capsys):
    poison += range(3, 10)
    with pytest.raises(Diverged, match="3 in a row; lower"):
        run(tmp_path, **{"run.steps": 9, "run.skip_limit": 3})
    assert "going back to step 4, once" in capsys.readouterr().err
    poison.clear()
    assert int(run(tmp_path, **{"run.steps": 9}).step) == 9
