"""What `import ig_jax` gives: loading, sampling, both heads, trajectories, networks without a config."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import tomllib
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from refusal import refused

import ig_jax
from ig_jax.checkpoints import steps as checkpoints
from ig_jax.config.experiment import Experiment
from ig_jax.diffusion import paths
from ig_jax.diffusion.solvers import SOLVERS
from ig_jax.models import dit

LABELS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def experiment():
    return toy.experiment(**{"sample.steps": 4, "sample.solver": "heun"})


@pytest.fixture(scope="module")
def checkpoint(experiment, tmp_path_factory):
    """A checkpoint whose raw weights differ from its average, nowhere zero."""
    directory, params = tmp_path_factory.mktemp("run"), toy.params(experiment.model)
    items = {f"ema_{experiment.ema.names[0]}": params, "params": jax.tree.map(lambda p: 1.01 * p, params)}
    labels = [str(label) for label in range(experiment.model.num_classes)]
    checkpoints.write_step(directory / "checkpoints", 7, items, {"config": experiment.as_dict(), "labels": labels})
    return directory


@pytest.fixture(scope="module")
def model(checkpoint):
    return ig_jax.load(checkpoint)


@pytest.fixture(scope="module")
def x(model):
    return jax.random.normal(jax.random.key(0), (2, *model.image_shape))


def test_a_grid_of_scales(model):
    grid = {w: model.sample(LABELS, ig_scale=w) for w in (1, 2)}
    assert grid[1].shape == (4, *model.image_shape) and (grid[1] != grid[2]).any()
    np.testing.assert_array_equal(grid[2], model.sample(LABELS, model.recipe.replace(ig_scale=2.0)))


def test_both_heads_at_one_time_and_label(model, x):
    out = model(x, t=0.5, y=3)
    wanted = dit.apply(model.experiment.model, model.params, x, jnp.full(2, 0.5), jnp.full(2, 3))
    np.testing.assert_allclose(out.final, wanted.final, atol=1e-5)
    np.testing.assert_allclose(out.intermediate[0], wanted.intermediate[0], atol=1e-5)


def test_forward_mode_is_the_difference_of_two_calls(model, x):
    t, step = jnp.array([0.4, 0.6]), 1e-2
    _, derivative = jax.jvp(lambda t: model(x, t, 3).final, (t,), (jnp.ones(2),))
    difference = (model(x, t + step, 3).final - model(x, t - step, 3).final) / (2 * step)
    np.testing.assert_allclose(derivative, difference, atol=2e-2 * float(jnp.abs(derivative).max()))


def test_predictions_are_of_one_path(model, x):
    """x = alpha data + sigma noise, and the velocity is its derivative."""
    t = jnp.array([0.3, 0.8])
    velocity, data, noise = (model(x, t, 3, predict=name).final for name in ("velocity", "data", "noise"))
    c = paths.coefficients("linear", paths.over_latents(t))
    np.testing.assert_allclose(c.alpha * data + c.sigma * noise, x, atol=1e-5)
    np.testing.assert_allclose(noise - data, velocity, atol=1e-5)


def test_a_trajectory_ends_where_sampling_does(model):
    found = model.trajectory(LABELS, solver="euler", ig_scale=2.0)
    shape = (4, 4, *model.image_shape)
    assert [array.shape for array in found] == [(4,), shape, shape, shape]
    np.testing.assert_allclose(found.sigma, [1, 0.75, 0.5, 0.25])
    guided = found.intermediate[-1] + 2 * found.difference[-1]  # the last Euler step ends at the guided data
    np.testing.assert_allclose(guided, model.latents(LABELS, solver="euler", ig_scale=2.0), atol=1e-4)
    again = model.latents(LABELS, noise=found.latents[0], solver="euler", ig_scale=2.0)
    np.testing.assert_allclose(again, guided, atol=1e-4)


def test_likelihoods_are_exact_or_close_to_it_in_the_mean(model, x):
    exact = model.log_likelihood(x, 3, probes=0, solver="euler", steps=2)
    np.testing.assert_allclose(
        exact.noise,
        model.to_noise(model.recipe.replace(solver="euler", steps=2, ig_scale=1.0, cfg_scale=1.0), x, [3, 3]),
        atol=1e-5,
    )
    np.testing.assert_allclose(exact.bits_per_dim, 6.994353 - exact.nats / (64 * np.log(2)), rtol=1e-5)
    estimate = lambda seed: model.log_likelihood(x, [3, 3], probes=64, solver="euler", steps=2, seed=seed).nats
    found = np.stack([estimate(seed) for seed in range(4)])
    spread = found.std(axis=0)
    assert (spread > 0).all() and (abs(found.mean(axis=0) - exact.nats) < 3 * spread).all()
    with refused("solver", "sde", expected="an ODE on a fixed grid"):
        model.log_likelihood(x, 3, solver="sde")


def test_noise_of_the_caller(model):
    noise = np.random.default_rng(0).normal(size=(3, *model.image_shape)).astype(np.float32)
    found = model.latents([1, 2, 3], noise=noise)
    assert found.shape == noise.shape
    np.testing.assert_allclose(model.latents([2], noise=noise[1:2]), found[1:2], atol=1e-5)
    with refused("noise", (3, *model.image_shape)):
        model.latents([1], noise=noise)


def test_raw_weights_and_a_saved_copy(model, checkpoint, x, tmp_path):
    raw = ig_jax.load(checkpoint, weights="raw")
    np.testing.assert_array_equal(raw.params["patch_embed.kernel"], 1.01 * model.params["patch_embed.kernel"])
    assert raw.ema == "raw" and "EMA raw" in repr(raw)
    raw.save(tmp_path)
    np.testing.assert_array_equal(ig_jax.load(tmp_path)(x, 0.5, 1).final, raw(x, 0.5, 1).final)
    with refused("weights", "best"):
        ig_jax.load(checkpoint, weights="best")


def test_a_network_without_a_config(tmp_path):
    net = ig_jax.build("SiT-S/2", key=jax.random.key(0), depth=2, inter_depth=(1,), width=48, dtype="float32")
    assert net.image_shape == (32, 32, 4) and net.experiment.model.num_classes == 1000
    assert (
        repr(net)
        == f"Pretrained(sit_s_imagenet256, step 0, EMA 0.9999, {sum(p.size for p in net.params.values()):,} parameters)"
    )
    net.save(tmp_path)
    copy = ig_jax.load(tmp_path)
    assert copy.experiment.model == net.experiment.model
    jax.tree.map(np.testing.assert_array_equal, copy.params, net.params)
    with refused("config.model.width", 50):
        ig_jax.build("SiT-S/2", key=jax.random.key(0), width=50)


def test_wrong_inputs_are_named(model, x):
    with refused("x.shape", (2, 8, 8, 0)):
        model(x[..., :0], 0.5, 3)
    with refused("t.shape", (3,)):
        model(x, jnp.zeros(3), 3)
    with refused("y.shape", (2, 1)):
        model(x, 0.5, jnp.zeros((2, 1), jnp.int32))
    with refused("y", [99, 99]):
        model(x, 0.5, 99)
    with refused("y.dtype", "float32"):
        model(x, 0.5, 1.5)
    with refused("predict", "x0"):
        model(x, 0.5, 1, predict="x0")
    config, params = model.experiment.model, model.params
    with refused("t.shape", ()):
        jax.eval_shape(lambda: dit.apply(config, params, x, 0.5, jnp.zeros(2, int)))


def test_shipped_configs_by_name():
    assert ig_jax.configs.get("digits:runlocal").run.steps == 200
    assert ig_jax.configs.get("digits").run.steps == 1100
    with refused("config", "digit"):
        ig_jax.configs.get("digit")


def test_a_config_by_its_name_from_anywhere(tmp_path):
    command = [sys.executable, "-m", "ig_jax", "train", "--config=digits:nonsense", f"--workdir={tmp_path}/run"]
    environment = os.environ | {"PYTHONPATH": str(toy.ROOT)}
    found = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=toy.HANGS)
    assert found.returncode == 2 and "config argument 'nonsense'" in found.stderr


def records(hint) -> list[type]:
    """The dataclasses and named tuples of this package in a type hint."""
    mine = isinstance(hint, type) and hint.__module__.startswith("ig_jax")
    fields = mine and (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"))
    return [hint] * bool(fields) + [record for part in typing.get_args(hint) for record in records(part)]


def test_every_field_that_a_user_can_reach_has_words():
    """From what `import ig_jax` gives, and a config, over the types of fields and the results of methods."""
    todo, found = [*(getattr(ig_jax, name) for name in ig_jax.__all__), *SOLVERS.values(), Experiment], {}
    while todo:
        for cls in records(todo.pop()):
            if cls not in found:
                hints = {name: hint for name, hint in typing.get_type_hints(cls).items() if "ClassVar" not in str(hint)}
                members = (getattr(m, "fget", None) or getattr(m, "func", m) for m in vars(cls).values())
                results = [typing.get_type_hints(m).get("return") for m in members if inspect.isfunction(m)]
                todo += [*hints.values(), *results]
                documented = "".join(base.__doc__ or "" for base in cls.__mro__)
                found[cls] = [name for name in hints if not re.search(rf"\n +{name}: .{{5,}}", documented)]
    names = {cls.__name__ for cls in found}
    assert names >= {"Experiment", "LossConfig", "BatchSpec", "Batch", "Trajectory", "Likelihood", "Heun"}
    assert not {cls: missing for cls, missing in found.items() if missing}


def test_the_surface_is_lazy_and_complete():
    code = (
        "import sys, ig_jax; dir(ig_jax); assert 'jax' not in sys.modules; [getattr(ig_jax, n) for n in ig_jax.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(toy.ROOT)})
    with pytest.raises(AttributeError, match="lod"):
        ig_jax.lod  # noqa: B018
    assert (toy.ROOT / "ig_jax" / "py.typed").exists()


def test_every_command_has_its_script():
    from ig_jax import __main__ as entry

    scripts = tomllib.loads((toy.ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {f"ig-{name}": f"ig_jax.__main__:{name}" for name in entry.COMMANDS}
    assert all(callable(getattr(entry, name)) for name in entry.COMMANDS)
    assert {path.stem for path in (toy.ROOT / "ig_jax").glob("*.py")} - {
        "__init__",
        "__main__",
    } == entry.COMMANDS.keys()
