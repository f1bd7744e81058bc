"""Every shipped config under every argument; the published networks by name; the run-local forms train."""

import itertools
import json
import math
import runpy
from pathlib import Path

import pytest
from refusal import refused

from ig_jax.base.schema import bind
from ig_jax.config import files as config_files
from ig_jax.config.experiment import Experiment
from ig_jax.diffusion.guidance import Rule
from ig_jax.models import dit, zoo
from ig_jax.training.loop import train

CONFIGS = Path(__file__).parents[1] / "configs"
FORMS = ("full", "runlocal")
ARGUMENTS = {  # the groups of words each config takes
    "digits": [("head", "plain"), FORMS],
    "fashion_mnist": [("full", "small", "runlocal")],
    "fractal": [FORMS],
    "sit_imagenet256": [("XL", "L", "B"), ("paper", "release"), ("256", "512"), FORMS],
    "dit_imagenet256": [("XL", "L", "B"), ("paper", "plain"), ("256", "512"), FORMS],
    "lightningdit_imagenet256": [("XL", "1p0B", "1p6B"), ("paper", "release"), FORMS],
}
EVERY = [(name, ",".join(words)) for name in ARGUMENTS for words in itertools.product(*ARGUMENTS[name])]
# Parameters of the published checkpoints, fixed positions included; DiT's without a head.
PUBLISHED = {
    ("sit_imagenet256", "B"): 131_693_600,
    ("sit_imagenet256", "L"): 460_202_016,
    ("sit_imagenet256", "XL"): 677_786_144,
    ("dit_imagenet256", "XL,plain"): 675_129_632,
    ("lightningdit_imagenet256", "XL"): 677_951_296,
}


def get_config(name, arg=""):
    return runpy.run_path(CONFIGS / f"{name}.py")["get_config"](arg)


def experiment(name, arg=""):
    return bind(Experiment, get_config(name, arg))


def test_all_configs_are_here():
    # These two take a checkpoint: tests/training/test_retrofit.py
    assert {path.stem for path in CONFIGS.glob("*.py")} == ARGUMENTS.keys() | {"retrofit", "finetune"}


@pytest.mark.parametrize("name,arg", EVERY)
def test_every_config_binds_and_comes_back_from_json(name, arg):
    bound = experiment(name, arg)
    assert bind(Experiment, json.loads(json.dumps(bound.as_dict()))) == bound


@pytest.mark.parametrize("name", ARGUMENTS)
def test_headers_say_how_to_run(name):
    header = runpy.run_path(CONFIGS / f"{name}.py")["__doc__"]
    assert f"python -m ig_jax.train --config=configs/{name}.py" in header
    assert all(word in header for word in ("hardware", "time", ":runlocal"))
    assert "expect" in header or "target" in header


@pytest.mark.parametrize("name,arg", PUBLISHED)
def test_networks_have_the_published_parameters(name, arg):
    shapes = dit.shapes(experiment(name, arg).model)
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == PUBLISHED[name, arg]


def test_the_release_differs_where_it_should():
    assert experiment("sit_imagenet256", "B").model.inter_depth == (4,)
    assert experiment("sit_imagenet256", "B,release").model.inter_depth == (8,)
    paper, release = (experiment("lightningdit_imagenet256", arg) for arg in ("paper", "release"))
    assert (paper.optimizer.muon_routing, release.optimizer.muon_routing) == ("hidden", "release")
    assert (paper.ema.names[0], release.ema.names[0]) == ("0.9995", "0.9999")
    assert experiment("sit_imagenet256", "512").model.side == 32


# Of the paper (arXiv 2512.24176), but for the scale of L, which it does not name: that is B's.
@pytest.mark.parametrize(
    "size,learning_rate,b2,inter_weight,decay,w,s,ig_interval,cfg_interval",
    [
        ("B", 1e-4, 0.999, 0.5, 0.9999, 2.3, 1.0, (0.3, 1.0), (0.0, 1.0)),
        ("L", 1e-4, 0.999, 0.5, 0.9999, 2.3, 1.0, (0.3, 1.0), (0.0, 1.0)),
        ("XL", 1e-4, 0.999, 0.5, 0.9999, 1.4, 1.35, (0.0, 1.0), (0.0, 0.7)),
    ],
)
def test_sit_has_the_numbers_of_the_paper(
    size, learning_rate, b2, inter_weight, decay, w, s, ig_interval, cfg_interval
):
    bound = experiment("sit_imagenet256", size)
    assert (bound.optimizer.learning_rate, bound.optimizer.b2) == (learning_rate, b2)
    assert (bound.loss.inter_weight, bound.ema.decays) == ((inter_weight,), (decay,))
    assert bound.sample.rules["ig"] == Rule(w, ig_interval)
    assert bound.sample.rules["cfg"] == Rule(s, cfg_interval)


@pytest.mark.parametrize(
    "name,millions",
    [
        ("SiT-S/2", 33.0),
        ("SiT-B/4", 130.6),
        ("SiT-L/8", 459.9),
        ("DiT-XL/1", 677.5),
        ("LightningDiT-B/1", 131.5),
        ("LightningDiT-1p0B/1", 1028.0),
        ("LightningDiT-1p6B/2", 1630.0),
    ],
)
def test_networks_by_name(name, millions):
    side, channels = (16, 32) if name.startswith("Lightning") else (32, 4)
    config = dit.DiTConfig(
        **zoo.named(name),
        input_size=side,
        channels=channels,
        num_classes=1000,
        dtype="float32",
        scan_blocks=False,
        remat="none",
    )
    assert config.patch_size == int(name[-1])
    trainable = sum(math.prod(s.shape) for n, s in dit.shapes(config).items() if n not in dit.FROZEN)
    assert trainable / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("name", ["SiT-XL", "SiT-XXL/2", "UNet-B/2", "SiT-B/3"])
def test_unknown_names_are_refused(name):
    with refused("model name", name, expected="family-size/patch"):
        zoo.named(name)


@pytest.mark.parametrize("arg", ["XXL", "B,L", "B,B", "b"])
def test_bad_arguments_are_refused(arg):
    with pytest.raises(ValueError, match="at most one word of each: XL or L or B; paper or release"):
        get_config("sit_imagenet256", arg)


def test_words_come_in_any_order_and_the_first_is_the_default():
    groups = (("a", "b"), ("c", "d"))
    assert config_files.words("", *groups) == ("a", "c")
    assert config_files.words("d", *groups) == config_files.words("d,a", *groups) == ("a", "d")


# DiT learns a variance, which takes the discrete Gaussian process; digits are trained in test_retrofit.
@pytest.mark.parametrize("name", sorted(ARGUMENTS.keys() - {"digits"}))
def test_run_local_forms_train(name, tmp_path):
    config = get_config(name, "runlocal")
    config.run.update(steps=3, log_every=1, checkpoint_every=2, preview_every=0, preview_images=0)
    config.data.batch_size = 16
    config.model.update(depth=2, width=32)
    state = train(bind(Experiment, config), str(tmp_path))
    assert int(state.step) == 3
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"2", "3"}
