"""A sweep crosses the best of each guidance, and real and drawn images are counted alike."""

import dataclasses

import numpy as np

from ig_jax.evaluation import sweep
from ig_jax.generation.recipe import Recipe

RECIPE = Recipe("heun", 4, ig_scale=1.0, cfg_scale=1.0, ig_interval=(0.0, 1.0), cfg_interval=(0.0, 1.0))


class Known:
    """A ruler on which each pair of scales has a distance that is known beforehand."""

    distances = {(1.5, 1.0): 5, (2.0, 1.0): 4, (1.0, 1.25): 7, (1.0, 1.5): 6}

    def row(self, kind, recipe, images, labels):
        distance = self.distances.get((recipe.ig_scale, recipe.cfg_scale), 9)
        return {"kind": kind, "recipe": dataclasses.asdict(recipe), "fd_cnn": distance}


def test_a_sweep_crosses_the_best_of_each_kind():
    rows = sweep.sweep(lambda recipe: None, None, Known(), RECIPE, (1.5, 2.0), (1.25, 1.5))
    both = {(row["recipe"]["ig_scale"], row["recipe"]["cfg_scale"]) for row in rows if row["kind"] == "IG+CFG"}
    assert both == {(1.5, 1.5), (2.0, 1.5), (2.0, 1.25)}
    assert len(rows) == sweep.count((1.5, 2.0), (1.25, 1.5))


def test_samples_and_real_images_are_compared_in_equal_counts(monkeypatch):
    monkeypatch.setattr(sweep.scores, "score", lambda classifier, reference, images, labels: {"fd_cnn": len(images)})
    ruler = sweep.Ruler(None, None, np.zeros(36), np.zeros(36))
    for count, equal in ((100, 36), (20, 20)):
        assert ruler.row("IG", RECIPE, np.zeros(count), np.zeros(count))["fd_cnn_at_floor_n"] == equal
    assert (ruler.floor(20)["fd_cnn"], ruler.floor(20)["fd_cnn_at_floor_n"]) == (36, 20)
