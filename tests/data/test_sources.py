"""Sources: rows and gathers, copies in memory, padding, in every kind of batch."""

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from refusal import refused

from ig_jax.data import sources
from ig_jax.data.formats import tfds
from ig_jax.data.spec import BatchSpec
from ig_jax.models.latents import from_factor


def _all(source):
    """Every image and label of a source."""
    batch = source.gather(np.arange(len(source)))
    return batch["image"], batch["label"]


@pytest.fixture(scope="module")
def digits():
    return {split: tfds.open_tfds(toy.data_config(), split) for split in ("train", "test")}


def rows_of(spec, length=20):
    """A source of any kind whose numbers all say their row."""

    def read(rows):
        return {
            name: np.broadcast_to(rows.reshape(-1, *(1,) * (len(form.shape) - 1)), form.shape).astype(form.dtype)
            for name, form in spec.abstract(len(rows)).items()
        }

    return sources.Source(spec, length, read)


def test_import_of_the_package_is_light():
    code = "import sys, ig_jax.data; print({'tensorflow', 'tensorflow_datasets', 'grain'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_in_memory_is_the_same_data_and_reads_no_file():
    part = tfds.open_tfds(toy.data_config(), "train[:70%]")
    copy = sources.in_memory(part)
    assert (repr(copy), len(copy), copy.spec) == (repr(part), 1006, part.spec)
    for want, got in zip(_all(part), _all(copy), strict=True):
        np.testing.assert_array_equal(want, got)
    batch = copy.gather(rows := np.asarray([5]))
    batch["image"][:] = 99  # a caller that writes into its batch must not change the data
    np.testing.assert_array_equal(copy.gather(rows)["image"], part.gather(rows)["image"])


def test_pad_adds_zeros_on_each_side(digits):
    padded = sources.pad(digits["test"], 2)
    assert padded.spec.latent_shape == (12, 12, 1) and repr(padded) == repr(digits["test"]) + ":pad2"
    images, labels = _all(padded)
    np.testing.assert_array_equal(images[:, 2:10, 2:10], _all(digits["test"])[0])
    assert images[:, [0, 1, 10, 11]].max() == images[:, :, [0, 1, 10, 11]].max() == 0
    np.testing.assert_array_equal(labels, _all(digits["test"])[1])
    assert sources.pad(digits["test"], 0) is digits["test"]
    with refused("pad", -1):
        sources.pad(digits["test"], -1)


def test_moments_with_both_mirrors_are_gathered_by_row_and_kept_in_memory():
    scaling = from_factor("toy", 2.0, 3, "half")
    spec = BatchSpec("moments", (4, 4, 3), "bfloat16", True, scaling, tuple(map(str, range(20))))
    for source in (rows_of(spec), sources.in_memory(rows_of(spec))):
        batch = source.gather(np.asarray([5, 2]))
        assert {name: values.shape for name, values in batch.items()} == {
            "moments": (2, 4, 4, 6),
            "moments_flip": (2, 4, 4, 6),
            "label": (2,),
        }
        assert batch["moments"].dtype == batch["moments_flip"].dtype == jnp.bfloat16
        assert (batch["moments_flip"][:, 1, 2, 3] == batch["label"]).all() and batch["label"].tolist() == [5, 2]
    with refused("pad", 2, expected="0 for moments"):
        sources.pad(rows_of(spec), 2)


def test_labels_that_are_known_are_checked_and_classes_without_images_counted():
    spec = BatchSpec("latents", (2, 2, 1), "float32", False, from_factor("toy", 1.0, 1, "half"), ("a", "b", "c"))
    source = dataclasses.replace(rows_of(spec, 4), labels=np.asarray([0, 2, 2, 0]), place=lambda row: f"file {row}")
    source.check_labels()
    assert source.empty_classes() == ["b"]
    with refused("label", 3, expected="in 0..2", says="label=3 of file 2, row 2"):
        dataclasses.replace(source, labels=np.asarray([0, 2, 3, 7])).check_labels()
    with refused("label", -1, says="of file 1, row 1"):
        dataclasses.replace(source, labels=np.asarray([0, -1, 2, 0])).check_labels()
    assert rows_of(spec).empty_classes() == []  # not known
    copy = sources.in_memory(dataclasses.replace(rows_of(spec, 2), place=source.place))
    assert copy.empty_classes() == ["c"]
