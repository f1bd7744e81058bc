"""Published settings: configs, converted checkpoints, presets and benchmarks agree with them on every field."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import toy
from refusal import refused

from ig_jax.base.schema import bind
from ig_jax.benchmarking import cases
from ig_jax.config import published
from ig_jax.config.experiment import Experiment
from ig_jax.diffusion.presets import AUTOENCODERS, PRESETS, VA_VAE_STATS, preset
from ig_jax.interop import hub, importing
from ig_jax.interop import published as names_of_tensors
from ig_jax.models import zoo
from ig_jax.weightfiles.files import LazyTensor

CONFIGS = {  # the config of a family, its sizes there, and the patch size
    "SiT": ("sit_imagenet256", ("B", "L", "XL"), 2),
    "DiT": ("dit_imagenet256", ("B", "L", "XL"), 2),
    "LightningDiT": ("lightningdit_imagenet256", ("XL", "1p0B", "1p6B"), 1),
}
SHIPPED = [(f"{word}-{size}/{patch}", file, size) for word, (file, sizes, patch) in CONFIGS.items() for size in sizes]
# The recipe of each published name with a head, where a preset has it; DiT's scale is in no paper.
RECIPES = {
    **{f"SiT-{size}/2": "sit-b-ig" for size in ("S", "B", "L")},
    "SiT-XL/2": "sit-xl-ig-cfg",
    **{f"LightningDiT-{size}/1": "lightningdit-ig-cfg" for size in zoo.SIZES},
}


def experiment(name, **variant) -> Experiment:
    return bind(Experiment, published.settings(name, **variant))


def differences(a: dict, b: dict, prefix: str = "") -> set[str]:
    """The fields, as "section.key", that are not equal."""
    found = set()
    for key in a.keys() | b.keys():
        if isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
            found |= differences(a[key], b[key], f"{prefix}{key}.")
        elif a.get(key) != b.get(key):
            found.add(f"{prefix}{key}")
    return found


def has_release(name: str) -> bool:
    return published.FAMILIES[zoo.NAMES[name.split("-")[0]]].release is not None


def test_every_family_of_the_zoo_has_its_settings():
    assert published.FAMILIES.keys() == zoo.FAMILIES.keys()
    assert set(RECIPES) | {f"DiT-{size}/2" for size in zoo.DIT_SIZES} == set(published.names())


@pytest.mark.parametrize("name, file, size", SHIPPED)
def test_configs_are_the_published_settings(name, file, size):
    variants = {"": {}, ",release": {"release": True}} if has_release(name) else {"": {}, ",plain": {"head": False}}
    for words, variant in variants.items():
        assert bind(Experiment, toy.load_config(file, f"{size}{words}")) == experiment(name, **variant)


@pytest.mark.parametrize("name", published.names())
@pytest.mark.parametrize("head", [True, False])
def test_a_network_read_from_a_file_has_the_settings_of_its_size(name, head):
    wanted = experiment(name, head=head, release=head and has_release(name))
    model = dataclasses.replace(wanted.model, dtype="float32", remat="none")  # the arithmetic of the published numbers
    found = bind(Experiment, published.of_network(zoo.NAMES[name.split("-")[0]], model, wanted.latents))
    assert differences(found.as_dict(), wanted.as_dict()) == {"model.dtype", "model.remat"}


@pytest.mark.parametrize(
    "name, head", [*((name, True) for name in published.names()), ("SiT-XL/2", False), ("DiT-XL/2", False)]
)
def test_a_converted_checkpoint_stores_the_published_settings(monkeypatch, name, head):
    """Its file holds one average and no number of steps; it is read in float32, as the published numbers are."""
    family = zoo.NAMES[name.split("-")[0]]
    wanted = experiment(name, head=head, release=head and has_release(name))
    depth = wanted.model.inter_depth[0] if head else 0
    shapes = names_of_tensors.published_shapes(wanted.model)
    tensors = {key: LazyTensor(shape, np.dtype(np.float32), lambda: np.zeros(0)) for key, shape in shapes.items()}
    monkeypatch.setattr(importing, "channel_statistics", lambda file, channels: (np.zeros(channels), np.ones(channels)))
    statistics = "latents_stats.pt" if family == "lightningdit" else ""
    choices = importing.Choices("ema", family, 0, depth, statistics, wanted.name)
    stored = importing.prepare(Path("file.pt"), {}, tensors, choices).experiment
    fewer = {"ema.decays"} if len(wanted.ema.decays) > 1 else set()
    found = differences(stored.as_dict(), wanted.as_dict())
    assert found == {"model.dtype", "model.remat", "run.steps"} | fewer
    assert stored.ema.decays == wanted.ema.decays[:1]


def test_a_network_of_no_published_size_takes_the_settings_next_to_it():
    model = dataclasses.replace(experiment("DiT-XL/2").model, width=1792, num_heads=28, depth=3, inter_depth=(1, 2))
    found = bind(Experiment, published.of_network("dit", model, experiment("DiT-XL/2").latents))
    assert (found.model, found.loss.inter_weight) == (model, (0.5, 0.5))
    assert found.sample == experiment("DiT-XL/2").sample


@pytest.mark.parametrize("name", published.names())
def test_benchmarks_measure_the_published_settings(name):
    found = cases.published(name).experiment
    # A batch that any machine has room for, and the name as it was given.
    assert differences(found.as_dict(), experiment(name).as_dict()) == {"name", "data.batch_size"}


@pytest.mark.parametrize("name, recipe", RECIPES.items())
def test_presets_are_the_recipes_of_the_published_settings(name, recipe):
    found = experiment(name)
    assert found.sample == preset(recipe, found.model)


def test_presets_name_the_published_weights_of_every_system():
    """Of SiT-B with a head nothing was published."""
    assert [name for name, found in PRESETS.items() if not found.weights] == ["sit-b-ig"]
    places = [found.weights for found in PRESETS.values() if found.weights] + [*AUTOENCODERS.values(), VA_VAE_STATS]
    assert all(hub.PLACE.fullmatch(place) for place in places)
    assert {experiment(name).latents.name for name in published.names()} == AUTOENCODERS.keys()
    assert "weights hf:CVLUESTC/Internal-Guidance/SiT" in PRESETS["sit-xl-ig-cfg"].summary("sit-xl-ig-cfg")


def test_without_a_head_a_family_is_sampled_with_its_own_preset_and_cfg():
    for name, of in (("SiT-XL/2", "sit"), ("DiT-XL/2", "dit"), ("LightningDiT-XL/1", "lightningdit")):
        found = experiment(name, head=False)
        assert (found.model.inter_depth, found.loss.inter_weight) == ((), ())
        assert (
            found.sample.solver == preset(of, found.model).solver and found.sample.steps == PRESETS[of].recipe["steps"]
        )
        assert found.sample.rules["ig"].off and not found.sample.rules["cfg"].off


def test_settings_that_no_paper_has_are_refused():
    with refused("pixels", 512, expected="one of 256"):
        published.settings("LightningDiT-XL/1", pixels=512)
    for variant in ({}, {"head": False}):
        with refused("release", True, expected="False for DiT-XL/2"):
            published.settings("DiT-XL/2", release=True, **variant)


def test_settings_are_independent_of_each_other():
    changed = published.settings("SiT-B/2")
    changed["optimizer"]["learning_rate"] = 1.0
    changed["sample"]["steps"] = 1
    assert experiment("SiT-B/2").optimizer.learning_rate == 1e-4
    assert experiment("SiT-B/2").sample.steps == 250
