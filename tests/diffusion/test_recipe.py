"""Recipes: their cost and refusals, and presets against the published loops at every grid point."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_checkpoint as tiny
from refusal import refused

from ig_jax.base.schema import bind
from ig_jax.config.experiment import Experiment
from ig_jax.diffusion import gaussian_samplers, integration, samplers
from ig_jax.diffusion.guidance import Rule
from ig_jax.diffusion.presets import PRESETS, family_of, preset
from ig_jax.diffusion.recipe import Recipe, solver_options
from ig_jax.diffusion.solvers import SOLVERS
from ig_jax.models import zoo
from ig_jax.models.dit import DiTConfig


def xl(family, **changed):
    shape = (
        dict(input_size=32, channels=4, patch_size=2)
        if family != "lightningdit"
        else dict(input_size=16, channels=32, patch_size=1)
    )
    rest = dict(num_classes=1000, dtype="bfloat16", scan_blocks=False, remat="none")
    return DiTConfig(**(zoo.settings(family, "XL") | shape | rest | changed))


def guided_at(recipe):
    """[(sigma, IG on, CFG on)] of every evaluation."""
    rows, region = recipe.solver.rows("linear", recipe.steps), recipe.guidance.region
    return [(t, "ig" in region(t), "cfg" in region(t)) for row in rows for t in row.guided_at]


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


@pytest.mark.parametrize(
    "name, method, w, s",
    [
        ("sit", samplers.EulerMaruyama(diffusion_form="sigma"), 1.0, 1.0),
        ("sit-xl-ig", samplers.EulerMaruyama(), 1.4, 1.0),
        ("sit-xl-ig-cfg", samplers.EulerMaruyama(), 1.4, 1.35),
        ("lightningdit", samplers.Euler(shift=0.3), 1.0, 1.0),
        ("lightningdit-ig", samplers.Trapezoid(shift=0.3), 1.7, 1.0),
        ("lightningdit-ig-cfg", samplers.Trapezoid(shift=0.3), 1.4, 1.45),
        ("dit", gaussian_samplers.Ddpm(), 1.0, 1.0),
    ],
)
def test_presets_have_the_published_numbers(name, method, w, s):
    recipe = preset(name, xl(name.split("-")[0]))
    assert (recipe.solver, recipe.rules["ig"].scale, recipe.rules["cfg"].scale) == (method, w, s)


def test_original_sit_and_lightningdit_without_guidance():
    sit = preset("sit", xl("sit", sigma_channels="unused", clock="noise_at_0", inter_depth=()))
    assert sit.solver.diffusion_form == "sigma" and sit.rules["cfg"].off
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
            with refused("preset", name, expected=f"one for {family}"):
                preset(name, xl(family))


def test_families_are_told_apart():
    assert [family_of(xl(family)) for family in zoo.FAMILIES] == list(zoo.FAMILIES)


VALUES = dict(
    shift=0.5,
    diffusion_form="sigma",
    diffusion_norm=0.5,
    last_step="euler",
    last_step_size=0.1,
    rtol=1e-2,
    atol=1e-4,
    eta=0.5,
    clip=True,
    spacing="ddim",
)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_option_reaches_its_solver_and_is_refused_by_the_others(solver):
    assert {name for known in SOLVERS for name in solver_options(known)} == set(VALUES)
    for option, value in VALUES.items():
        given = {"solver": solver, "steps": 10, option: value}
        if option in solver_options(solver):
            assert getattr(Recipe.of(given).solver, option) == value
        else:
            with refused(option, value, expected=f"solver='{solver}'", fix="it belongs to"):
                Recipe.of(given)


RECIPES = [
    dict(solver="heun", steps=25),
    dict(solver="sde", steps=250, ig_scale=1.4, cfg_scale=1.35, cfg_interval=(0.0, 0.7), last_step="tweedie"),
    dict(
        solver="ddim",
        steps=5,
        eta=0.5,
        clip=True,
        ig_head=(0.5, 0.5),
        cfg_scale="cosine:1,2",
        cfg_channels="first_three",
    ),
    dict(solver="euler", steps=1, shift=0.3, ig_scale=1.0, ig_interval=(0.3, 1.0), prefix_scale="0:1,1:2"),
]


@pytest.mark.parametrize("flat", RECIPES, ids=lambda flat: flat["solver"])
def test_the_flat_form_is_the_recipe(flat):
    recipe = Recipe.of(flat)
    assert all(recipe.flat()[key] == value for key, value in flat.items())
    assert Recipe.of(recipe.flat()) == recipe and hash(Recipe.of(recipe.flat())) == hash(recipe)
    assert Recipe.of(json.loads(json.dumps(recipe.flat()))) == recipe


def test_what_is_left_out_is_off_or_the_default_of_the_solver():
    recipe = Recipe.of(dict(solver="sde", steps=10))
    assert recipe.solver == samplers.EulerMaruyama() and all(rule.off for rule in recipe.rules.values())
    assert recipe == Recipe.of(dict(solver="sde", steps=10, ig_scale=1, cfg_interval=(0, 1), diffusion_norm=1))


def test_replace_takes_flat_keys_and_another_solver_has_its_own_options():
    recipe = Recipe.of(dict(solver="euler", steps=10, shift=0.3, ig_interval=(0.3, 1.0)))
    guided = recipe.replace(ig_scale="2", steps=4)
    assert (guided.rules["ig"], guided.steps, guided.solver.shift) == (Rule(2.0, (0.3, 1.0)), 4, 0.3)
    assert recipe.replace(solver="heun").solver.shift == 1.0
    assert recipe.replace(solver="sde", last_step_size=0.1).solver == samplers.EulerMaruyama(last_step_size=0.1)


@pytest.mark.parametrize(
    "changed, name",
    [
        (dict(solver="rk9"), "solver"),
        (dict(steps=0), "steps"),
        (dict(steps=2.5), "steps"),
        (dict(steps=True), "steps"),
        (dict(solver="sde", steps=1), "steps"),
        (dict(shift="0.3"), "shift"),
        (dict(shift=float("inf")), "shift"),
        (dict(solver="ddpm", clip=1), "clip"),
        (dict(solver="sde", last_step=3), "last_step"),
        (dict(ig_scale="fast"), "ig_scale"),
        (dict(cfg_scale=float("nan")), "cfg_scale"),
        (dict(auto_scale=None), "auto_scale"),
        (dict(prefix_interval=(0.5, 0.3)), "prefix_interval"),
        (dict(ig_interval=(0.5,)), "ig_interval"),
        (dict(ig_interval=0.5), "ig_interval"),
        (dict(ig_head=(0.5, 0.6)), "ig_head"),
        (dict(ig_head="all"), "ig_head"),
        (dict(cfg_channels="some"), "cfg_channels"),
        (dict(cfg_scale=2, prefix_scale=2), "(cfg_scale, prefix_scale)"),
    ],
    ids=str,
)
def test_bad_values_name_their_key(changed, name):
    with refused(name):
        Recipe.of(dict(solver="euler", steps=4) | changed)


def test_unknown_keys_are_named_with_the_nearest_known_one():
    with refused("ig_scala", 2.0, fix="did you mean ig_scale?"):
        Recipe.of(dict(solver="euler", steps=4, ig_scala=2.0))
    with refused("steps", says="steps"):
        Recipe.of(dict(solver="euler"))


def test_a_solver_of_ones_own_is_its_class_alone(own_solver):
    """One class, registered from outside the package, with an option."""
    recipe = Recipe.of(dict(solver="damped", steps=4, damping=0.5))
    assert recipe.solver == own_solver(damping=0.5) and recipe.flat()["damping"] == 0.5
    x = recipe.solver.integrate(lambda x, t, y, region: x, np.ones(3, np.float32), np.arange(3), path="linear", steps=4)
    np.testing.assert_allclose(x.latents, 0.875**4)
    np.testing.assert_array_equal(x.evaluations, 4)
    with refused("damping", fix="it belongs to damped"):
        Recipe.of(dict(solver="heun", steps=4, damping=0.5))


@pytest.fixture
def own_solver():
    @integration.register("damped")
    @dataclasses.dataclass(frozen=True)
    class Damped(integration.FixedGrid):
        order = 1
        damping: float = integration.option(1.0, "Factor of the slope.")

        def rows(self, path, steps):
            update = lambda x, v, c, noise: x - c.dt * v[0](x, c.t)
            return [
                integration.Row(update, (1 - i / steps,), {"t": 1 - i / steps, "dt": self.damping / steps})
                for i in range(steps)
            ]

    yield Damped
    del SOLVERS["damped"]


def test_configs_take_every_way_to_write_a_scale_and_read_it_back_from_json():
    e = tiny.experiment()
    changed = e.sample.replace(ig_scale="0:1,0.3:2,1:1.5", cfg_scale="cosine:1,2", ig_head=(0.5, 0.5), shift=0.3)
    e = dataclasses.replace(e, sample=changed)
    assert bind(Experiment, json.loads(json.dumps(e.as_dict()))) == e
    assert not changed.rules["cfg"].off and changed.scales["ig"].shape == (2, 3)


@pytest.mark.parametrize("name", ["ig_scale", "prefix_scale", "auto_scale"])
def test_what_a_model_lacks_is_named(name):
    model = tiny.experiment(inter_depth=()).model
    with refused(name, 2.0, expected="1 "):
        Recipe.of({"solver": "euler", "steps": 4, name: 2.0}).check_model(model)


def test_autoguidance_weights_of_another_latent_shape_are_refused():
    recipe = Recipe.of(dict(solver="euler", steps=4, auto_scale=2.0))
    with refused("auto_checkpoint latent shape"):
        recipe.check_model(tiny.experiment().model, tiny.experiment(input_size=4).model)
    with refused("auto_checkpoint num_classes", 5):
        recipe.check_model(tiny.experiment().model, tiny.experiment(num_classes=5).model)
