"""The curves of a training batch: known answers by noise level and by depth."""

import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.diffusion import curves


def images(*rows):
    return jnp.asarray(rows, jnp.float32).reshape(len(rows), 1, -1, 1)


def test_errors_gap_and_its_direction_are_pooled_over_the_examples_of_a_bin():
    t = jnp.array([0.05, 0.09, 1.0, 0.31])
    target, intermediate = images([4, 0], [0, 2], [1, 1], [3, 3]), images([0, 0], [0, 0], [0, 0], [3, 3])
    final = images([2, 0], [1, 1], [-1, -1], [3, 3])
    found = curves.by_sigma(t, target, [final, intermediate])
    got = curves.plain("sigma", found)
    # Bin 0: g = (2, 0), (1, 1) and r = (4, 0), (0, 2), so <g, r> = 10, <g, g> = 6 and <r, r> = 20.
    assert got["sigma/final"]["0.05"] == pytest.approx(6 / 4) and got["sigma/intermediate"]["0.05"] == 5
    assert got["sigma/cosine"]["0.05"] == pytest.approx(10 / np.sqrt(6 * 20), rel=1e-5)
    assert got["sigma/scale"]["0.05"] == pytest.approx(10 / 6, rel=1e-5)
    assert got["sigma/gap"]["0.95"] == 1 and got["sigma/cosine"]["0.95"] == -1  # noise itself has a bin
    assert got["sigma/gap"]["0.35"] == 0 and got["sigma/scale"]["0.35"] is None  # no gap, no direction
    assert got["sigma/final"]["0.55"] is None
    halves = [curves.by_sigma(t[s], target[s], [final[s], intermediate[s]]).values for s in (slice(2), slice(2, 4))]
    np.testing.assert_allclose(sum(halves) / 2, found.values, rtol=1e-6)
    assert set(curves.plain("sigma", curves.by_sigma(t, target, [final]))) == {"sigma/final"}


def test_norms_by_depth_follow_the_forward_pass():
    squares = {"final_head.a": 1.0, "blocks.10.a": 9.0, "blocks.2.a": 16.0, "blocks.2.b": 9.0, "time_embed.a": 4.0}
    assert curves.plain("gradient", curves.by_depth(squares)) == {
        "gradient": {"time_embed": 2.0, "2": 5.0, "10": 3.0, "final_head": 1.0}
    }
