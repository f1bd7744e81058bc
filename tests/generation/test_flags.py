"""Recipe flags made from the registries of solvers and guidance rules."""

import dataclasses
from types import SimpleNamespace

import pytest
import tiny_checkpoint as tiny
from absl import flags
from refusal import refused

from ig_jax.diffusion import guidance, integration
from ig_jax.diffusion.recipe import Recipe
from ig_jax.generation.flags import define_recipe, recipe_from

MODEL = SimpleNamespace(experiment=tiny.experiment(), recipe=Recipe.of(dict(solver="euler", steps=4, shift=0.5)))


def recipe(*args):
    values = flags.FlagValues()
    define_recipe(values)
    values(["sample", *args])
    return recipe_from(values, MODEL)


def test_flags_change_the_recipe_of_the_checkpoint_or_of_a_preset():
    assert recipe() == MODEL.recipe
    assert recipe("--ig_scale=2", "--ig_interval=0.3,1") == MODEL.recipe.replace(ig_scale=2.0, ig_interval=(0.3, 1.0))
    assert recipe("--solver=heun").solver.shift == 1.0  # another solver has its own defaults
    assert recipe("--preset=sit-xl-ig", "--steps=9") == Recipe.of(dict(solver="sde", steps=9, ig_scale=1.4))
    assert (recipe("--ig_head=1").ig_head, recipe("--ig_head=0.5,0.5").ig_head) == (1, (0.5, 0.5))
    with refused("--cfg_interval", "low,high"):
        recipe("--cfg_interval=low,high")


@pytest.fixture
def registered():
    """A solver with an option and a guidance rule, as an extension outside the package would register them."""

    @integration.register("damped")
    @dataclasses.dataclass(frozen=True)
    class Damped(integration.FixedGrid):
        damping: float = integration.option(1.0, "Factor of the slope.")

    guidance.RULES["next"] = guidance.Definition("Scale of guidance against the next label", lambda call: call.x)
    yield Damped
    del integration.SOLVERS["damped"], guidance.RULES["next"]


def test_what_is_registered_has_its_flags(registered):
    found = recipe("--solver=damped", "--damping=0.25", "--next_scale=1.5", "--next_interval=0,0.5")
    assert found.solver == registered(damping=0.25)
    assert found.rules["next"] == guidance.Rule(1.5, (0.0, 0.5))
