"""The held-out loss: of known networks, and the same for every run."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import toy
from refusal import refused

from ig_jax.parallel.mesh import make_mesh
from ig_jax.training.held_out import held_out


def measured(params, **changed):
    e, lines = toy.experiment(**{"run.evaluate_every": 1, **changed}), []
    records = SimpleNamespace(write=lambda step, values: lines.append(values))
    moment = SimpleNamespace(step=1, state=SimpleNamespace(ema={"0.999": params}), records=records)
    held_out(e, make_mesh(), e.open_split(e.data.split), {}).action(moment)
    return lines[0]


def test_it_is_the_plain_loss_of_the_test_images_whatever_the_run():
    e = toy.experiment()
    silent = {name: jnp.zeros_like(value) for name, value in toy.params(e.model).items()}
    x = e.open_split("test").gather(range(352))["image"] / 127.5 - 1
    found = measured(silent)  # a network that predicts 0 misses eps - x
    assert found["held_out/final"] == found["held_out/intermediate"] == pytest.approx(1 + (x**2).mean(), rel=0.02)
    assert found["held_out/total"] == pytest.approx(1.5 * found["held_out/final"], rel=1e-6)
    params = toy.params(e.model)
    other = {"seed": 5, "loss.accelerate": True, "loss.gap_source": "online", "loss.label_drop": 0.9}
    assert measured(params) == measured(params, **other) != found


def test_images_that_are_trained_on_are_not_held_out():
    with refused("run.evaluate_every", 1, fix="data.test_split", says="nowhere"):
        measured({}, **{"data.test_split": "nowhere"})
    with refused("data.test_split", "train"):
        measured({}, **{"data.test_split": "train"})
