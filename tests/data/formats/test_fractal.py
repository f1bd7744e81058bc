"""Points on two trees: where they lie, and the numbers of the picture that judges samples by them."""

import runpy

import numpy as np
import toy

from ig_jax.data.formats import fractal

PICTURE = runpy.run_path(str(toy.ROOT / "launch" / "fractal.py"))


def distances(points, tree):
    """To the nearest branch (N,), in deviations of its width."""
    along = tree.end - tree.start
    part = np.einsum("nbd,bd->nb", points[:, None] - tree.start, along) / np.einsum("bd,bd->b", along, along)
    nearest = tree.start + np.clip(part, 0, 1)[..., None] * along
    return (np.linalg.norm(points[:, None] - nearest, axis=-1) / (0.35 * tree.width)).min(1)


def test_points_lie_on_the_branches_of_their_class():
    points, labels = fractal.samples("train")
    assert np.bincount(labels).tolist() == [fractal.POINTS // 2] * 2
    for label, tree in enumerate(fractal.trees()):
        assert len(tree.width) == 2**fractal.LEVELS - 1
        own = points[labels == label][:2000]
        assert (distances(own, tree) < 4.5).all()
        assert (distances(points[labels != label][:2000], tree) > 4.5).mean() > 0.9


def test_a_branch_has_points_as_it_has_area():
    tree = fractal.trees()[1]
    points = tree.points(40_000, np.random.default_rng(0))
    near = distances(points, fractal.Tree(tree.start[:1], tree.end[:1], tree.width[:1])) < 3
    area = np.linalg.norm(tree.end - tree.start, axis=1) * tree.width
    assert abs(near.mean() - area[0] / area.sum()) < 0.02


def test_the_splits_differ_and_are_the_same_every_time():
    train, again, test = (fractal.samples(split)[0] for split in ("train", "train", "test"))
    np.testing.assert_array_equal(train, again)
    assert (train != test).any(1).all()


def test_what_the_picture_counts():
    truth = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    samples = np.array([[0.0, 0.02], [0.0, 0.03], [1.0, 0.0]])
    assert PICTURE["counted"](samples, truth) == {"off": 1 / 3, "covered": 0.5}
