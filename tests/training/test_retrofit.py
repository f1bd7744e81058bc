"""Runs initialised from the EMA of another run, and training of an added head alone."""

import copy
import dataclasses
import gzip
import json
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from refusal import refused

from ig_jax.base.errors import UserError
from ig_jax.base.schema import bind
from ig_jax.config.experiment import Experiment
from ig_jax.diffusion.loss import NoisyBatch, Objective
from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.generation import pretrained
from ig_jax.models import dit
from ig_jax.parallel.mesh import make_mesh
from ig_jax.training.initialise import ARITHMETIC, FREE, check_same_network, renamed_heads, starting_weights
from ig_jax.training.loop import train
from ig_jax.training.state import partition
from ig_jax.training.step import accumulated_gradients

CONFIGS = Path(__file__).parents[2] / "configs"
HEAD = "inter_heads."


def get_config(name, arg=""):
    return runpy.run_path(CONFIGS / f"{name}.py")["get_config"](arg)


def small(config, steps=3):
    """The same config as plain values, cut to a network that trains in seconds."""
    values = json.loads(config.to_json())
    values["model"] |= dict(depth=2, width=16)
    values["data"]["batch_size"] = 16
    values["ema"] |= dict(decays=[0.9, 0.5], warmup=False)
    values["optimizer"]["warmup_steps"] = 0
    values["run"] |= dict(steps=steps, log_every=1, checkpoint_every=100, preview_every=0, preview_images=0)
    return values


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(workdir, config) of a trained network without a head."""
    workdir = tmp_path_factory.mktemp("plain")
    config = small(get_config("digits", "plain"))
    train(bind(Experiment, config), str(workdir))
    return str(workdir), config


@pytest.fixture(scope="module")
def head_alone(plain, tmp_path_factory):
    """(workdir, state at the end) after configs/retrofit.py trained the head alone."""
    workdir = str(tmp_path_factory.mktemp("head"))
    config = small(get_config("retrofit", f"{plain[0]},runlocal"))
    return workdir, jax.device_get(train(bind(Experiment, config), workdir))


def with_init(config, checkpoint, **changes):
    """The config of a run that starts from `checkpoint`, with a head after each depth of `inter_depth`."""
    config = copy.deepcopy(config)
    config["init"] = dict(checkpoint=checkpoint, ema="")
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    config["loss"]["inter_weight"] = [0.5] * len(config["model"]["inter_depth"])
    return config


def test_both_averages_can_be_chosen_by_name(plain):
    default, other = (pretrained.load(plain[0], ema=name) for name in ("", "0.5"))
    assert (default.ema, other.ema) == ("0.9", "0.5")
    assert any((default.params[name] != other.params[name]).any() for name in default.params)
    with refused("ema", "0.7", expected="one of 0.9, 0.5"):
        pretrained.load(plain[0], ema="0.7")


def test_the_head_alone_changes_nothing_else(plain, head_alone):
    given, state = pretrained.load(plain[0]).params, head_alone[1]
    for tree in (state.params, *state.ema.values()):
        assert tree.keys() - given.keys() == {name for name in tree if name.startswith(HEAD)}
        for name in given:
            assert (tree[name] == given[name]).all(), name
        assert all(tree[name].any() for name in tree if name.startswith(HEAD))  # every tensor of it was zero
    moments = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    assert not any("blocks" in name or "final_head" in name for name in moments)


def test_sampling_without_guidance_is_unchanged_to_the_bit(plain, head_alone):
    before, after = pretrained.load(plain[0]), pretrained.load(head_alone[0])
    recipe = before.recipe.replace(steps=5, ig_scale=1.0)
    one, two = (model.images(recipe, np.arange(8), batch_size=8) for model in (before, after))
    assert (next(one)[1] == next(two)[1]).all()
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    t, y = jnp.linspace(0, 1, 8), jnp.arange(8)
    plain_out, headed = (
        jax.jit(dit.apply, static_argnums=0)(m.experiment.model, m.params, x, t, y) for m in (before, after)
    )
    assert (plain_out.final == headed.final).all() and headed.intermediate[0].any()


def test_no_gradient_of_the_fixed_part_is_computed(plain):
    experiment = bind(Experiment, get_config("retrofit", plain[0]))
    model = dataclasses.replace(experiment.model, depth=6, width=64, num_heads=2)
    trained, fixed = partition(dit.shapes(model), experiment.optimizer.trains)
    assert trained and all(name.startswith(HEAD) for name in trained)
    array = jax.ShapeDtypeStruct
    x, t, y = array((16, 8, 8, 1), "float32"), array((16,), "float32"), array((16,), "int32")

    def gradients(trained, fixed, *batch):
        objective = Objective(model, experiment.process, experiment.loss)
        loss = lambda trained, batch: objective(trained | fixed, None, batch, 0)
        return accumulated_gradients(loss, trained, NoisyBatch(*batch), 1)

    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    forward = flops(lambda params, *args: dit.apply(model, params, *args), dit.shapes(model), x, t, y)
    assert flops(gradients, trained, fixed, x, x, t, y) < 1.05 * forward


def test_everything_trains_on_and_resumes_from_itself(plain, tmp_path):
    origin = shutil.copytree(plain[0], tmp_path / "origin")
    config = small(get_config("retrofit", f"{origin},everything,runlocal"), steps=1)
    first = jax.device_get(train(bind(Experiment, config), str(tmp_path / "run")))
    given = pretrained.load(origin).params
    assert {n for n in given if (first.params[n] == given[n]).all()} <= {"pos_embed"}
    shutil.rmtree(origin)
    config["run"]["steps"] = 2
    assert int(train(bind(Experiment, config), str(tmp_path / "run")).step) == 2


def test_a_checkpoint_with_a_head_is_trained_on_from_every_weight(head_alone, tmp_path):
    """configs/finetune.py keeps the settings of the checkpoint, its latent statistics among them."""
    config = small(get_config("finetune", f"{head_alone[0]},runlocal"), steps=1)
    config["optimizer"]["learning_rate"] = 1e-9  # so the weights after one step are those it began with
    e, before = bind(Experiment, config), pretrained.load(head_alone[0])
    assert (e.model, e.latents) == (before.experiment.model, before.experiment.latents)
    assert e.as_dict()["loss"] == before.config["loss"] | {"inter_weight": e.loss.inter_weight}
    params = train(e, str(tmp_path)).params
    assert params.keys() == before.params.keys()
    for name, value in before.params.items():
        np.testing.assert_allclose(params[name], value, atol=1e-7)


def test_heads_keep_their_weights_by_depth():
    model = bind(Experiment, get_config("digits")).model
    old, new = (dataclasses.replace(model, inter_depth=depths) for depths in ((2, 4), (1, 4, 5)))
    kept = renamed_heads({name: name for name in dit.shapes(old)}, old, new)
    assert kept["inter_heads.1.linear.bias"] == "inter_heads.1.linear.bias"  # after block 4 in both
    assert not any(name.startswith(("inter_heads.0", "inter_heads.2")) for name in kept)
    assert kept["blocks.3.mlp.fc1.bias"] == "blocks.3.mlp.fc1.bias"


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(model__width=32), "config.model.width=32 must be 16, as in config.init.checkpoint"),
        (dict(model__num_heads=4), "config.model.num_heads=4 must be 2, as in config.init.checkpoint"),
        (dict(model__norm="rmsnorm"), "config.model.norm='rmsnorm' must be 'layernorm'"),
        (dict(latents__scale=[2.0]), "latent scaling mismatch"),
        (dict(init__ema="0.7"), "ema='0.7' must be one of 0.9, 0.5"),
        (dict(init__checkpoint="/nowhere"), "checkpoint='/nowhere' must be an existing directory"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(plain, tmp_path, change, words):
    config = with_init(plain[1], plain[0], **change)
    with pytest.raises(UserError) as error:
        train(bind(Experiment, config), str(tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_average_without_a_checkpoint_is_refused(plain):
    config = with_init(plain[1], "", init__ema="0.9")
    with refused("config.init.ema", "0.9", expected="empty without a checkpoint"):
        bind(Experiment, config)


def test_retrofit_config_says_what_it_needs(plain, head_alone):
    for arg, words in (
        ("", "must begin with a checkpoint"),
        (f"{plain[0]},all", "head or everything"),
        (head_alone[0], "without an intermediate head; it has one after block 1"),
        ("/nowhere", "must be an existing directory"),
    ):
        with pytest.raises(ValueError, match=words):
            get_config("retrofit", arg)


def test_a_run_may_draw_other_times_than_the_one_it_starts_from():
    old = toy.experiment()
    check_same_network(toy.experiment(**{"process.time": "logit_normal"}), old, FREE, "config.init.checkpoint")
    check_same_network(toy.experiment(**{"model.inter_depth": (2,)}), old, FREE, "config.init.checkpoint")


@pytest.mark.parametrize(
    "change, name, expected",
    [
        ({"process.prediction": "data"}, "config.process.prediction", "'velocity', as in the checkpoint of this run"),
        ({"process.kind": "cosine"}, "config.process.kind", "'linear', as in"),
        ({"model.inter_depth": (2,)}, "config.model.inter_depth", "(1,), as in"),
        ({"latents.scale": (2.0,)}, "latents", "scale=(1.0,)"),
    ],
)
def test_what_gives_the_same_arrays_another_meaning_is_refused(change, name, expected):
    with refused(name, expected=expected):
        check_same_network(toy.experiment(**change), toy.experiment(), ARITHMETIC, "the checkpoint of this run")


def idx_folder(folder, labels):
    """MNIST-style files of 8x8 images with these labels."""
    header = lambda *shape: bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    for split in ("train", "t10k"):
        pixels = np.arange(len(labels) * 64, dtype=np.uint8).tobytes()
        for kind, data in (
            ("images-idx3", header(len(labels), 8, 8) + pixels),
            ("labels-idx1", header(len(labels)) + bytes(labels)),
        ):
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))
    return str(folder)


@pytest.mark.parametrize("classes", [3, 12, pytest.param(1, marks=toy.SLOW)])
def test_other_classes_start_with_a_new_label_table(plain, tmp_path, capsys, classes):
    config = with_init(plain[1], plain[0], model__num_classes=classes)
    config["data"] |= dict(source="idx", folder=idx_folder(tmp_path, [i % classes for i in range(32)]))
    config["run"]["steps"] = 1
    config["optimizer"] |= dict(learning_rate=1e-30, weight_decay=0.0)
    e = bind(Experiment, config)
    state = jax.device_get(train(e, str(tmp_path / "run")))
    line = f"new label table for {classes} instead of 10 classes, null row kept"
    assert line in next(text for text in capsys.readouterr().out.splitlines() if text.startswith("start"))
    given, fresh = pretrained.load(plain[0]).params, dit.init(e.model, address(e.seed, Purpose.INIT))
    table = state.params["label_embed.table"]
    assert table.shape == (classes + 1, 16)
    np.testing.assert_array_equal(table[-1], given["label_embed.table"][-1])
    np.testing.assert_allclose(table[:-1], fresh["label_embed.table"][:-1], rtol=1e-6)  # initialised by another program
    for name in given.keys() - {"label_embed.table"}:
        np.testing.assert_array_equal(state.params[name], given[name])


@pytest.mark.parametrize("change", [{"model__input_size": 16}, {"model__patch_size": 4}, {"model__channels": 3}])
def test_another_latent_shape_or_patch_is_no_fine_tuning(plain, change):
    config = with_init(plain[1], plain[0], model__num_classes=3, **change)
    config["latents"] = dict(
        name="pixels",
        shift=[0.0] * config["model"]["channels"],
        scale=[1.0] * config["model"]["channels"],
        uint8_rule="half",
    )
    (name,) = (key.split("__")[1] for key in change)
    with refused(f"config.model.{name}", expected="as in config.init.checkpoint"):
        starting_weights(bind(Experiment, config), make_mesh())
