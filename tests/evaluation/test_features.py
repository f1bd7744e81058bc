"""The classifier learns real digits, is reproducible, survives a file; scores tell good samples from bad."""

import dataclasses
import hashlib
import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.errors import UserError
from ig_jax.evaluation import features, scores


@pytest.fixture(scope="module")
def digits():
    """Real digits in 0..255, 36 test images a class: train images, train labels, test images, test labels."""
    with np.load(importlib.resources.files("ig_jax.data") / "digits.npz") as stored:
        images, labels = np.round(stored["images"] * (255 / 16)).astype(np.uint8)[..., None], stored["labels"]
    rng = np.random.default_rng(0)
    test = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:36] for c in range(10)])
    train = np.setdiff1d(np.arange(len(labels)), test)
    return images[train], labels[train], images[test], labels[test]


@pytest.fixture(scope="module")
def classifier(digits):
    """A third of the usual training: enough for the assertions below."""
    return features.train_classifier(*digits, num_classes=10, seed=0, steps=500)


@pytest.fixture(scope="module")
def reference(classifier, digits):
    return scores.reference_stats(classifier, digits[0])


def test_learns_the_digits(classifier, digits):
    assert classifier.test_accuracy >= 0.97
    predictions = features.features_and_predictions(classifier, digits[2])[1]
    assert classifier.test_accuracy == (predictions == digits[3]).mean()
    assert (classifier.image_shape, classifier.num_classes, classifier.train_steps) == ((8, 8, 1), 10, 500)


def test_same_seed_same_bits_and_reports_progress(digits):
    seen = []
    first = features.train_classifier(*digits, num_classes=10, seed=3, steps=130,
                                      progress=lambda step, loss: seen.append((step, loss)))
    again = features.train_classifier(*digits, num_classes=10, seed=3, steps=130)
    other = features.train_classifier(*digits, num_classes=10, seed=4, steps=130)
    assert first.checksum == again.checksum != other.checksum
    assert [step for step, _ in seen] == [100, 130] and all(0 < loss < 2 for _, loss in seen)


def test_checksum_is_the_sha256_of_the_parameters(classifier):
    joined = b"".join(classifier.params[path].tobytes() for path in sorted(classifier.params))
    assert classifier.checksum == hashlib.sha256(joined).hexdigest()
    assert all(array.dtype == np.float32 for array in classifier.params.values())
    assert sum("convolutions" in path and "kernel" in path for path in classifier.params) == 4


def test_features_are_the_input_of_the_last_layer(classifier, digits):
    found, predictions = features.features_and_predictions(classifier, digits[2])
    assert found.shape == (360, 64) and found.dtype == np.float32 and predictions.dtype == np.int32
    logits = found @ classifier.params["head/kernel"] + classifier.params["head/bias"]
    np.testing.assert_array_equal(logits.argmax(-1), predictions)


def test_batch_size_changes_nothing_and_compiles_once(classifier, digits):
    before = features._forward._cache_size()
    whole = features.features_and_predictions(classifier, digits[2], batch=90)
    for count in (1, 89, 91, 200):
        part = features.features_and_predictions(classifier, digits[2][:count], batch=90)
        np.testing.assert_array_equal(part[1], whole[1][:count])
        np.testing.assert_array_equal(part[0], whole[0][:count])
    assert features._forward._cache_size() == before + 1
    other = features.features_and_predictions(classifier, digits[2], batch=37)
    np.testing.assert_allclose(other[0], whole[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [7, 8])
def test_patches_times_weights_is_a_convolution(stride, side):
    x = jax.random.normal(jax.random.key(0), (2, side, side, 3))
    weights = jax.random.normal(jax.random.key(1), (3, 3, 3, 5))
    expected = jax.lax.conv_general_dilated(x, weights, (stride, stride), ((1, 1), (1, 1)),
                                            dimension_numbers=("NHWC", "HWIO", "NHWC"))
    found = features._patches(x, stride) @ weights.reshape(27, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_shifts_move_by_at_most_one_pixel_in_every_direction():
    image = np.arange(1, 26, dtype=np.uint8).reshape(5, 5, 1)
    shifted = np.asarray(features._shift(jax.random.key(0), jnp.asarray(np.repeat(image[None], 200, 0))))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    expected = {padded[i:i + 5, j:j + 5].tobytes() for i in range(3) for j in range(3)}
    assert {one.tobytes() for one in shifted} == expected


@pytest.mark.parametrize("side, last", [(4, 1), (8, 2), (16, 2), (28, 4), (32, 4), (64, 4)])
def test_pooling_follows_the_image_size(side, last):
    size = side
    for stride in features._strides(side):
        size = -(-size // stride)
    assert size == last


def test_learns_larger_colour_images():
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = rng.integers(0, 60, (120, 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[label * 10:label * 10 + 10] += 150  # a bar whose height is the class
    data = images[:90], labels[:90], images[90:], labels[90:]
    trained = features.train_classifier(*data, num_classes=3, steps=20)
    assert trained.test_accuracy == 1.0
    assert features.features_and_predictions(trained, images, batch=64)[0].shape == (120, 64)


def test_file_gives_the_same_classifier_back(classifier, digits, tmp_path):
    features.save(classifier, tmp_path / "cnn.npz")
    loaded = features.load(tmp_path / "cnn.npz")
    assert dataclasses.replace(loaded, params={}) == dataclasses.replace(classifier, params={})
    for one, two in zip(features.features_and_predictions(loaded, digits[2]),
                        features.features_and_predictions(classifier, digits[2])):
        np.testing.assert_array_equal(one, two)


def damage(path, kind, classifier):
    """Spoil the file in one way; afterwards it must not be used."""
    whole = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(whole[:len(whole) // 2])
    elif kind == "flipped":
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    elif kind == "text":
        path.write_text("not an archive")
    elif kind == "other archive":
        np.savez(path, arr_0=np.zeros(3))
    elif kind == "other weight":
        params = {**classifier.params, "head/bias": classifier.params["head/bias"] + 1e-6}
        features.save(dataclasses.replace(classifier, params=params), path)
    elif kind == "other shape":
        features.save(dataclasses.replace(classifier, image_shape=(8, 8, 3)), path)


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "flipped", "text", "other archive",
                                  "other weight", "other shape"])
def test_damaged_file_is_refused_in_one_line(classifier, tmp_path, kind):
    path = tmp_path / "cnn.npz"
    features.save(classifier, path)
    damage(path, kind, classifier)
    with pytest.raises(UserError) as caught:
        features.load(path)
    assert str(path) in str(caught.value) and "train" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change, name", [
    (dict(train_images=np.zeros((4, 8, 8, 1), np.float32)), "train_images.dtype"),
    (dict(test_images=np.zeros((4, 9, 8, 1), np.uint8)), "test_images.shape"),
    (dict(train_labels=np.array([0, 1, 2, 10])), "train_labels"),
    (dict(test_labels=np.array([0, 1, 2])), "test_labels.shape"),
    (dict(steps=0), "steps"),
])
def test_bad_training_data_is_refused(change, name):
    images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4)
    good = dict(train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    with pytest.raises(UserError, match=name):
        features.train_classifier(**{**good, **change}, num_classes=10)


def test_images_of_another_size_are_refused(classifier):
    with pytest.raises(UserError, match="images.shape"):
        features.features_and_predictions(classifier, np.zeros((2, 16, 16, 1), np.uint8))


def test_score_orders_real_images_dirt_and_collapse(classifier, reference, digits):
    train_images, _, test_images, test_labels = digits
    floor = scores.real_floor(classifier, reference, test_images, test_labels)
    dirt = np.random.default_rng(0).normal(0, 1, test_images.shape)
    noisy = [np.clip(test_images + level * dirt, 0, 255).astype(np.uint8) for level in (30, 60, 120)]
    soiled = [scores.score(classifier, reference, images, test_labels)["fd_cnn"] for images in noisy]
    assert 0 < floor["fd_cnn"] < soiled[0] < soiled[1] < soiled[2]
    assert soiled[2] > 10 * floor["fd_cnn"]
    itself = scores.score(classifier, reference, train_images, digits[1])
    assert itself["fd_cnn"] < 1e-9
    one_class = scores.score(classifier, reference, test_images[:36], test_labels[:36])
    assert one_class["fd_cnn"] > 5 * floor["fd_cnn"]  # a collapse onto one class is punished
    assert (floor["count"], floor["reference_count"], itself["count"]) == (360, 1437, 1437)
    assert floor["setting"] == "real test images" and floor["classifier"] == classifier.checksum


def test_agreement_is_the_fraction_with_the_asked_label(classifier, reference, digits):
    _, _, images, labels = digits
    right = scores.score(classifier, reference, images, labels)
    assert right["agreement"] == classifier.test_accuracy == right["classifier_accuracy"]
    half = np.where(np.arange(360) % 2, labels, (labels + 1) % 10)
    assert abs(scores.score(classifier, reference, images, half)["agreement"] - 0.5) < 0.03


def test_score_refuses_what_it_cannot_measure(classifier, reference, digits):
    with pytest.raises(UserError, match="labels.shape"):
        scores.score(classifier, reference, digits[2], digits[3][:-1])
    with pytest.raises(UserError, match="at least 2 images"):
        scores.score(classifier, reference, digits[2][:1], digits[3][:1])


def row(setting, **changes):
    return {"setting": setting, "fd_cnn": 4.321, "agreement": 0.9875, "count": 2000, "reference_count": 1437,
            "fd_cnn_at_floor_n": 6.789,
            "classifier": "ab" * 32, "classifier_accuracy": 0.9917, **changes}


def test_table_is_narrow_and_says_how_to_read_it():
    rows = [row("none"), row("IG w=2 on (0.3, 1]" * 8, fd_cnn=12345.678), row("real test images", count=360)]
    text = scores.table(rows)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["setting", "FD-CNN", "at", "n=360", "agreement", "%", "n"]
    assert lines[2].split() == ["none", "4.32", "6.79", "98.8", "2,000"]
    assert lines[4].split() == ["real", "test", "images", "4.32", "4.32", "98.8", "360"]
    assert len({len(line) for line in lines[:5]}) == 1  # columns line up
    for words in ("1,437 real training images", "not FID", "99.2 %", "(sha256 abababab)", "n differs"):
        assert words in text
    assert "n differs" not in scores.table(rows[:2])


def test_table_refuses_rows_that_cannot_be_compared():
    with pytest.raises(UserError, match="classifier"):
        scores.table([row("none"), row("IG", classifier="cd" * 32)])
    with pytest.raises(UserError, match="reference_count"):
        scores.table([row("none"), row("IG", reference_count=360)])
    with pytest.raises(UserError, match="rows"):
        scores.table([])
