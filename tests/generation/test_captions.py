"""Captions: run, weights, solver and guidance with its intervals."""

from ig_jax.diffusion.recipe import Recipe
from ig_jax.generation import captions

RECIPE = Recipe.of(dict(solver="heun", steps=25, ig_scale=2.0, cfg_scale=1.25, cfg_interval=(0.0, 0.7)))


def test_a_guidance_has_its_interval_unless_it_is_on_everywhere():
    assert captions.guidance(RECIPE) == "IG 2 + CFG 1.25 on (0, 0.7]"
    assert captions.guidance(RECIPE.replace(ig_scale=1.0, ig_interval=(0.2, 1.0))) == "CFG 1.25 on (0, 0.7]"
    assert captions.guidance(RECIPE.replace(ig_scale="cosine:1,2"), without=["cfg"]) == "IG cosine:1,2"
    assert captions.guidance(RECIPE.replace(ig_scale=1.0, cfg_scale=1.0)) == "no guidance"


def test_a_caption_names_run_weights_solver_and_guidance():
    given = "digits", 1100, "0.999", "05c2e9e4" * 8, RECIPE, 3
    weights = "digits, step 1100, EMA 0.999, sha256 05c2e9e4; heun, 25 steps, seed 3"
    assert captions.caption(*given) == f"{weights}; IG 2 + CFG 1.25 on (0, 0.7]"
    assert captions.caption(*given, guided="") == weights
    assert captions.caption("digits", 5, "0.9", "", RECIPE, 0).startswith("digits, step 5, EMA 0.9; heun")


def test_metadata_give_the_same_caption():
    checkpoint = {"experiment": "digits", "step": 7, "ema": "0.99", "digest": "ab" * 32}
    metadata = {"checkpoint": checkpoint, "recipe": RECIPE.flat(), "seed": 1}
    assert captions.of_metadata(metadata) == captions.caption("digits", 7, "0.99", "ab" * 32, RECIPE, 1)
