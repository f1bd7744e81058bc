"""The sweep over the scales of two guidances."""

from ig_jax.diffusion.recipe import Recipe
from ig_jax.evaluation import sweep

RECIPE = Recipe.of({"solver": "heun", "steps": 4})
DISTANCES = {(1.5, 1.0): 5, (2.0, 1.0): 4, (1.0, 1.25): 7, (1.0, 1.5): 6}  # of each pair of scales


def score(recipe):
    return {"fd_cnn": DISTANCES.get((recipe.rules["ig"].scale, recipe.rules["cfg"].scale), 9)}


def test_a_sweep_crosses_the_best_of_each_kind():
    rows = sweep.sweep(score, RECIPE, (1.5, 2.0), (1.25, 1.5))
    both = {
        (row["recipe"].get("ig_scale", 1.0), row["recipe"].get("cfg_scale", 1.0))
        for row in rows
        if row["kind"] == "IG+CFG"
    }
    assert both == {(1.5, 1.5), (2.0, 1.5), (2.0, 1.25)}
    assert len(rows) == sweep.count((1.5, 2.0), (1.25, 1.5))
    assert [row["setting"] for row in rows[:3]] == ["no guidance", "IG 1.5", "IG 2"]


def test_a_guidance_may_be_left_out():
    for ig, cfg in (((), ()), ((2.0,), ()), ((), (1.25, 1.5))):
        assert len(sweep.sweep(score, RECIPE, ig, cfg)) == sweep.count(ig, cfg) == 1 + len(ig) + len(cfg)


def test_a_setting_names_every_guidance_that_is_on():
    """A scale may be a schedule, and other rules than IG and CFG may come with the checkpoint's recipe."""
    recipe = RECIPE.replace(prefix_scale="cosine:1,2", ig_interval=(0.2, 1.0))
    settings = [row["setting"] for row in sweep.sweep(score, recipe, (2.0,), ())]
    assert settings == ["PREFIX cosine:1,2", "IG 2 on (0.2, 1] + PREFIX cosine:1,2"]
