"""BatchSpec: the arrays of each kind of batch, and opened data that are not what the config promises."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from refusal import refused

from ig_jax.base.schema import Text, bind
from ig_jax.config.experiment import Experiment
from ig_jax.data.spec import BatchSpec, pixels, unstated
from ig_jax.models.latents import LatentScaling, from_factor, identity
from ig_jax.parallel.mesh import make_mesh
from ig_jax.parallel.sharding import batch_sharding

SCALING = LatentScaling("toy", (1.0, -2.0), (0.5, 2.0), "half")
MOMENTS = BatchSpec("moments", (6, 4, 2), "bfloat16", True, SCALING, ("cat", "dog", "owl"), "toy:moments")


def test_arrays_of_each_kind():
    half = jnp.bfloat16.dtype
    label = ((), np.dtype("int32"))
    found = {
        kind: {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in spec.arrays.items()}
        for kind, spec in {
            "moments": MOMENTS,
            "plain moments": dataclasses.replace(MOMENTS, mirrored=False),
            "latents": dataclasses.replace(MOMENTS, holds="latents", dtype="float32"),
            "pixels": pixels((8, 8, 3), ("a", "b")),
            "mirrored pixels": pixels((8, 8, 3), ("a", "b"), mirrored=True),
            "moments with channels first": dataclasses.replace(MOMENTS, mirrored=False, channels_first=True),
        }.items()
    }
    latent = ((6, 4, 2), np.dtype("float32"))
    image = ((8, 8, 3), np.dtype("uint8"))
    assert found == {
        "moments": {"moments": ((6, 4, 4), half), "moments_flip": ((6, 4, 4), half), "label": label},
        "plain moments": {"moments": ((6, 4, 4), half), "label": label},
        "latents": {"latent": latent, "latent_flip": latent, "label": label},
        "pixels": {"image": image, "label": label},
        "mirrored pixels": {"image": image, "label": label},
        "moments with channels first": {"moments": ((4, 6, 4), half), "label": label},
    }


def test_an_abstract_batch_has_the_batch_axis_and_the_sharding():
    rows = batch_sharding(make_mesh())
    batch = MOMENTS.abstract(16, rows)
    assert batch["moments_flip"].shape == (16, 6, 4, 4) and batch["moments_flip"].dtype == jnp.bfloat16
    assert batch["label"].shape == (16,) and batch["label"].dtype == jnp.int32
    assert all(form.sharding == rows for form in batch.values())


def test_impossible_specifications_are_refused():
    change = lambda **changes: dataclasses.replace(MOMENTS, **changes)
    with refused("data.holds", "images", expected="pixels, moments, latents"):
        change(holds="images")
    with refused("data.dtype", "uint8", expected="bfloat16"):
        change(dtype="uint8")
    with refused("data.dtype", "bfloat16", expected="uint8 for pixels"):
        change(holds="pixels")
    with refused("spread", "variance", expected="std, logvar"):
        change(spread="variance")
    with refused("latents.scale", (0.5, 2.0), expected="each of the 4 channels"):
        change(latent_shape=(6, 4, 4))


def test_opened_data_must_be_what_the_config_promises():
    promise = dataclasses.replace(MOMENTS, class_names=("0", "1", "2"), identity="")
    opened = lambda **changes: dataclasses.replace(MOMENTS, **changes)
    MOMENTS.check_keeps(promise)
    stored_normalised = dataclasses.replace(SCALING, shift=(0.0, 0.0), scale=(1.0, 1.0))
    opened(scaling=stored_normalised).check_keeps(promise)
    with refused("data image shape", (4, 4, 2), expected="(6, 4, 2)"):
        opened(latent_shape=(4, 4, 2)).check_keeps(promise)
    with refused("model.num_classes", 3, expected="2, the classes of toy:moments"):
        opened(class_names=("cat", "dog")).check_keeps(promise)
    with refused("data.holds", "moments", expected="'latents', as in toy:moments"):
        opened(holds="latents").check_keeps(promise)
    with refused("data.dtype", "bfloat16", expected="'float32'"):
        opened(dtype="float32").check_keeps(promise)
    with refused("data.mirrored", True, expected="False"):
        opened(mirrored=False).check_keeps(promise)
    with refused("latents", SCALING, expected="sd_vae", fix="data.source"):
        opened(scaling=from_factor("sd_vae", 0.18215, 2, "sit")).check_keeps(promise)


def test_data_that_do_not_state_their_scaling_take_the_config_s():
    promise = dataclasses.replace(MOMENTS, class_names=("0", "1", "2"), identity="")
    found = dataclasses.replace(MOMENTS, scaling=unstated(2), class_names=()).completed(promise)
    assert (found.scaling, found.class_names) == (SCALING, ("0", "1", "2"))
    assert MOMENTS.completed(promise) == MOMENTS  # what the files state stands
    with refused("data image shape", (6, 4, 3), expected="(6, 4, 2)"):
        other = dataclasses.replace(MOMENTS, scaling=unstated(3), latent_shape=(6, 4, 3))
        other.completed(promise).check_keeps(promise)


def test_statistics_of_the_data_replace_those_of_the_same_autoencoder_alone():
    measured = LatentScaling("toy", (0.1, 0.2), (3.0, 4.0), "half")
    found = dataclasses.replace(MOMENTS, scaling=measured)
    plain = dataclasses.replace(MOMENTS, scaling=identity("toy", 2, "half"))
    found.check_keeps(plain)  # a config that leaves the numbers open
    found.check_keeps(MOMENTS, undecided=("scaling",))  # a config that names the format
    with refused("latents", SCALING, expected="scale=(3.0, 4.0)"):
        found.check_keeps(MOMENTS)
    for undecided in ((), ("scaling",)):
        with refused("latents", expected="name='toy'"):
            found.check_keeps(dataclasses.replace(plain, scaling=identity("other", 2, "half")), undecided)


def test_an_experiment_takes_from_its_data_what_it_leaves_open():
    changes = {"data.holds": "auto", "data.dtype": "auto", "data.mirrored": "auto", "data.source": "auto"}

    def experiment(**changes):
        """Of a dict, whose values may change their type."""
        sections = toy.load_config("digits").to_dict()
        for key, value in (toy.SMALL | changes).items():
            section, name = key.split(".")
            sections[section][name] = value
        return bind(Experiment, sections)

    zeros = {"latents.name": "toy", "latents.shift": (0.0,), "run.preview_images": 0}
    e = experiment(**changes, **zeros)
    assumed = e.batch_spec
    assert (assumed.holds, assumed.dtype, assumed.mirrored) == ("moments", "bfloat16", True)
    measured = LatentScaling("toy", (0.5,), (2.0,), "half")
    spec = dataclasses.replace(assumed, holds="latents", dtype="float32", mirrored=False, scaling=measured)
    found = e.of_data(spec)
    assert (found.data.holds, found.data.dtype, found.data.mirrored) == ("latents", "float32", False)
    assert found.latents == measured and found.batch_spec == dataclasses.replace(spec, scaling=measured)
    # Latents that are stored normalised are decoded by the config's numbers.
    normalised = dataclasses.replace(spec, scaling=identity("toy", 1, "half"))
    assert found.of_data(normalised).latents == measured
    explicit = experiment(**changes | {"data.mirrored": Text("False")}, **zeros)
    assert explicit.data.mirrored is False and explicit.data.undecided == ("holds", "dtype")
    with refused("config.data.mirrored", "both", expected="True, False or 'auto'"):
        experiment(**changes | {"data.mirrored": "both"}, **zeros)


@pytest.mark.parametrize(
    "config, arg, holds, arrays",
    [
        ("digits", "", "pixels", {"image": ((8, 8, 1), "uint8")}),
        ("sit_imagenet256", "XL", "moments", {"moments": ((32, 32, 8), "bfloat16")}),
        ("lightningdit_imagenet256", "", "moments", {"moments": ((16, 16, 64), "bfloat16")}),
    ],
)
def test_a_config_promises_its_batches_without_opening_data(config, arg, holds, arrays):
    e = bind(Experiment, toy.load_config(config, arg))
    spec = e.batch_spec
    flipped = {f"{name}_flip": form for name, form in arrays.items() if holds == "moments"}
    assert spec.holds == holds and spec.scaling == e.latents
    assert spec.arrays == {**arrays, **flipped, "label": ((), "int32")}
    assert spec.num_classes == e.model.num_classes


def test_what_a_batch_holds_must_fit_the_model():
    with refused("config.data.holds", "moments", expected="pixels for latents.name='pixels'"):
        toy.experiment(**{"data.holds": "moments", "data.dtype": "float32"})
