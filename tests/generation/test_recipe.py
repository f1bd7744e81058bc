"""A recipe says what it costs, refuses what no one reads, and presets are the published loops to the last
point.
"""

import dataclasses

import numpy as np
import pytest
import tiny_checkpoint as tiny

from ig_jax.config import Experiment, bind
from ig_jax.diffusion import gaussian_samplers, samplers
from ig_jax.diffusion.solvers import SOLVERS
from ig_jax.errors import UserError
from ig_jax.generation.presets import PRESETS, family_of, preset
from ig_jax.generation.recipe import OPTIONS, Recipe
from ig_jax.models import zoo
from ig_jax.models.dit import DiTConfig

PLAIN = dict(ig_scale=1.0, cfg_scale=1.0, ig_interval=(0.0, 1.0), cfg_interval=(0.0, 1.0))


def xl(family, **changed):
    shape = dict(input_size=32, channels=4, patch_size=2) if family != "lightningdit" else dict(
        input_size=16, channels=32, patch_size=1)
    rest = dict(num_classes=1000, dtype="bfloat16", scan_blocks=False, remat="none")
    return DiTConfig(**(zoo.settings(family, "XL") | shape | rest | changed))


def guided_at(recipe):
    """[(sigma, IG on, CFG on)] of every evaluation."""
    rows = recipe.method.rows("linear", recipe.steps)
    return [(t, *recipe.guidance.region(t)[:2]) for row in rows for t in row.lookup]


def test_sit_presets_are_the_release_loop():
    times = np.append(np.linspace(1.0, 0.04, 250), 0.0)[:-1]  # each evaluated once
    for name, high in (("sit-xl-ig", None), ("sit-xl-ig-cfg", 0.7)):
        ours = guided_at(preset(name, xl("sit")))
        np.testing.assert_allclose([t for t, *_ in ours], times, rtol=0, atol=1e-15)
        assert [ig for _, ig, _ in ours] == [0.0 <= t <= 1.0 for t in times]
        assert [cfg for *_, cfg in ours] == [high is not None and 0.0 <= t <= high for t in times]
    assert preset("sit-xl-ig-cfg", xl("sit")).evaluations_per_image("linear", xl("sit")) == 250 + 172


def test_lightningdit_presets_are_the_release_loop():
    points = np.linspace(0, 1, 125)
    points = 0.3 * points / (1 + (0.3 - 1) * points)
    evaluated = [t for pair in zip(points[:-1], points[1:]) for t in pair]
    for name, start in (("lightningdit-ig", None), ("lightningdit-ig-cfg", 0.19)):
        ours = guided_at(preset(name, xl("lightningdit")))
        np.testing.assert_allclose([1 - t for t, *_ in ours], evaluated, rtol=0, atol=1e-15)
        assert all(ig for _, ig, _ in ours)
        assert [cfg for *_, cfg in ours] == [start is not None and not t < start for t in evaluated]
        assert len(ours) == 248


@pytest.mark.parametrize("name, method, w, s", [
    ("sit", samplers.EulerMaruyama(diffusion_form="sigma"), 1.0, 1.0),
    ("sit-xl-ig", samplers.EulerMaruyama(), 1.4, 1.0),
    ("sit-xl-ig-cfg", samplers.EulerMaruyama(), 1.4, 1.35),
    ("lightningdit", samplers.Euler(shift=0.3), 1.0, 1.0),
    ("lightningdit-ig", samplers.Trapezoid(shift=0.3), 1.7, 1.0),
    ("lightningdit-ig-cfg", samplers.Trapezoid(shift=0.3), 1.4, 1.45),
    ("dit", gaussian_samplers.Ddpm(), 1.0, 1.0),
])
def test_presets_have_the_published_numbers(name, method, w, s):
    recipe = preset(name, xl(name.split("-")[0]))
    assert (recipe.method, recipe.ig_scale, recipe.cfg_scale) == (method, w, s)


def test_original_sit_and_lightningdit_without_guidance():
    sit = preset("sit", xl("sit", sigma_channels="unused", clock="noise_at_0", inter_depth=()))
    assert sit.method.diffusion_form == "sigma" and sit.guidance.use_cfg is False
    plain = preset("lightningdit", xl("lightningdit", inter_depth=()))
    grid = np.linspace(0, 1, 250)
    np.testing.assert_allclose([1 - t for t, *_ in guided_at(plain)], (0.3 * grid / (1 - 0.7 * grid))[:-1], atol=1e-15)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_made_for_its_family_and_refused_for_others(name):
    if PRESETS[name].recipe["solver"] not in SOLVERS:
        pytest.skip("this solver is not registered")
    for family in zoo.FAMILIES:
        if family == PRESETS[name].family:
            preset(name, xl(family)).check_model(xl(family))
        else:
            with pytest.raises(UserError, match=f"preset='{name}'"):
                preset(name, xl(family))


def test_families_are_told_apart():
    assert [family_of(xl(family)) for family in zoo.FAMILIES] == list(zoo.FAMILIES)


def test_every_option_belongs_to_a_solver_and_is_refused_by_the_others():
    values = dict(shift=0.5, diffusion_form="sigma", diffusion_norm=0.5, last_step="mean", last_step_size=0.1, rtol=1e-2,
                  atol=1e-4)
    for option in OPTIONS:
        readers = [name for name, cls in SOLVERS.items() if option in {f.name for f in dataclasses.fields(cls)}]
        assert readers, option
        if option not in values:
            continue
        for solver in SOLVERS:
            if solver in readers:
                assert getattr(Recipe(solver, 10, **PLAIN, **{option: values[option]}).method, option) == values[option]
            else:
                with pytest.raises(UserError, match=f"{option}=.*{solver}"):
                    Recipe(solver, 10, **PLAIN, **{option: values[option]})


def test_configs_take_every_way_to_write_a_scale_and_read_it_back_from_json():
    e = tiny.experiment()
    changed = dataclasses.replace(e.sample, ig_scale="0:1,0.3:2,1:1.5", cfg_scale="cosine:1,2", ig_head=(0.5, 0.5),
                                  shift=0.3)
    e = dataclasses.replace(e, sample=changed)
    assert bind(Experiment, e.as_dict()) == e
    assert changed.guidance.use_cfg and changed.scales.ig.shape == (2, 3)


@pytest.mark.parametrize("changed, name", [
    (dict(ig_scale=2.0), "ig_scale"), (dict(prefix_scale=2.0), "prefix_scale"), (dict(auto_scale=2.0), "auto_scale")])
def test_what_a_model_lacks_is_named(changed, name):
    model = tiny.experiment(inter_depth=()).model
    with pytest.raises(UserError, match=name):
        Recipe("euler", 4, **(PLAIN | changed)).check_model(model)


def test_autoguidance_weights_of_another_latent_shape_are_refused():
    recipe = Recipe("euler", 4, **PLAIN, auto_scale=2.0)
    with pytest.raises(UserError, match="latent shape"):
        recipe.check_model(tiny.experiment().model, tiny.experiment(input_size=4).model)
    with pytest.raises(UserError, match="num_classes"):
        recipe.check_model(tiny.experiment().model, tiny.experiment(num_classes=5).model)
