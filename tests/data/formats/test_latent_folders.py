"""Latents that published code has written: the numbers of its readers, and one fault for each damaged folder."""

import hashlib
import json
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_folders import LATENTS, every, opened
from refusal import refused

from ig_jax.data.formats import mf
from ig_jax.data.formats.repa import EDM2_SCALING
from ig_jax.models.latents import SD_VAE_SCALING, LatentScaling, from_mean_std
from ig_jax.training.step import prepare
from ig_jax.weightfiles.files import LazyTensor, write_safetensors, write_torch


def expected(name):
    """(JSON, arrays) of what the published reader returned."""
    with np.load(LATENTS / "expected" / f"{name}.npz") as arrays:
        return json.loads((LATENTS / "expected" / f"{name}.json").read_text()), dict(arrays)


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def prepared(source, row, noise, monkeypatch):
    """x (h, w, C) of one row as the step makes it of this noise (h, w, C)."""
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: jnp.asarray(noise)[None])
    batch = {name: jnp.asarray(values) for name, values in source.gather(np.asarray([row])).items()}
    return np.asarray(prepare(source.spec, batch, 0, jnp.int32(0)))[0]


def channels_last(array):
    return np.moveaxis(array, 0, -1)


@pytest.mark.parametrize("folder", ["repa", "repa/vae-sd"])
def test_repa_is_read_as_its_own_reader_does(folder, monkeypatch):
    want, arrays = expected("repa")
    source = opened(LATENTS / folder, "repa")
    batch = every(source)
    assert batch["label"].tolist() == want["labels"] and batch["label"].dtype == np.int32
    assert [digest(moments) for moments in batch["moments"]] == [s["feature_sha256"] for s in want["samples"]]
    assert (source.spec.dtype, source.spec.mirrored, source.spec.scaling) == ("float32", False, SD_VAE_SCALING)
    for row in (0, 7):
        x = prepared(source, row, channels_last(arrays[f"{row}/noise"]), monkeypatch)
        np.testing.assert_allclose(x, channels_last(arrays[f"{row}/latent"]), atol=1e-6, rtol=1e-5)
    assert source.empty_classes()[:2] == ["3", "4"] and len(source.empty_classes()) == 997


@pytest.mark.parametrize("file", ["edm2", "edm2/img64-sd.zip"])
def test_edm2_is_read_as_its_own_reader_does(file, monkeypatch):
    want, arrays = expected("edm2")
    samples = next(s for s in want["sets"].values() if s["zip"] == "img64-sd.zip")["samples"]
    source = opened(LATENTS / file, "edm2")
    batch = every(source)
    assert batch["label"].tolist() == [s["raw_label"] for s in samples if not s["xflip"]]
    assert [digest(m) for m in batch["moments"]] == [s["sha256"] for s in samples if not s["xflip"]]
    for row in (2, 9):
        x = prepared(source, row, channels_last(arrays[f"{row}/noise"]), monkeypatch)
        np.testing.assert_allclose(x, channels_last(arrays[f"{row}/final"]), atol=1e-6, rtol=1e-5)


def test_lightningdit_is_read_as_its_own_reader_does():
    want, arrays = expected("lightningdit")
    for folder in ("lightningdit", "lightningdit/imagenet_train_256"):
        source = opened(LATENTS / folder, side=16, channels=8)
    assert source.spec.mirrored and source.spec.holds == "latents" and source.spec.scaling.name == "va_vae_f16d8"
    batch = every(source)
    assert batch["label"].tolist() == [s["label"] for s in want["samples"]]
    plain = np.float32(0.18215)
    for name, key in (("latent", "plain_sha256"), ("latent_flip", "plain_flip_sha256")):
        assert [digest(values * plain) for values in batch[name]] == [s[key] for s in want["samples"]]
    for row in (0, 7):
        for name, key in (("latent", "norm"), ("latent_flip", "norm_flip")):
            x = source.spec.scaling.normalise(channels_last(batch[name][row]))
            np.testing.assert_allclose(x, channels_last(arrays[f"{row}/{key}"]), atol=1e-6, rtol=2e-6)


def test_lightningdit_of_the_sd_autoencoder_takes_the_factor_of_the_config(monkeypatch):
    scaling = LatentScaling("sd_vae", (0.0,) * 8, (0.18215,) * 8, "sit")
    source = opened(LATENTS / "lightningdit", "ldit-sd", side=16, channels=8, scaling=scaling, mirrored=False)
    batch = source.gather(np.asarray([7]))
    assert "latent_flip" not in batch and source.spec.scaling == scaling
    x = prepared(source, 7, 0, monkeypatch)
    np.testing.assert_array_equal(x, channels_last(expected("lightningdit")[1]["7/plain"]))


@pytest.mark.parametrize("folder, source", [("meanflow", "auto"), ("meanflow/train", "mf")])
def test_meanflow_is_read_as_its_own_readers_do(folder, source, monkeypatch):
    want, arrays = expected("meanflow")
    plain = opened(LATENTS / folder, source, side=16)
    batch = every(plain)
    assert batch["label"].tolist() == [s["label"] for s in want["samples"]]
    assert [digest(image) for image in batch["moments"]] == [s["image_sha256"] for s in want["samples"]]
    imf = from_mean_std("sd_vae", arrays["imf_mean"], arrays["imf_std"], "sit")
    improved = opened(LATENTS / folder, source, side=16, scaling=imf)
    for row in (3, 10):
        noise = arrays[f"{row}/noise_nhwc"]
        for found, key in ((plain, "meanflow_latent_nhwc"), (improved, "imf_latent_nhwc")):
            x = prepared(found, row, noise, monkeypatch)
            np.testing.assert_allclose(x, arrays[f"{row}/{key}"], atol=1e-6, rtol=1e-5)


REPA, EDM2 = "vae-sd/00000/img-mean-std-00000001.npy", "img64-sd.zip/00000/img-mean-std-00000001.npy"
SHARD, STATS, PT = "latents_rank00_shard000.safetensors", "latents_stats.pt", "train/00000001.pt"
DAMAGED = {  # folder: (file that is named, words of the refusal); None for one that is sound
    "repa_ok": None,
    "repa_truncated": (REPA, ["row 1", "2176 bytes", "1451"]),
    "repa_empty_file": (REPA, ["row 1", "0 bytes"]),
    "repa_label_range": ("label", [REPA, "label=1000", "0..999"]),
    "repa_missing_file": (REPA, ["not there", "1 of 3"]),
    "repa_unlabelled_file": (REPA, ["not listed"]),
    "repa_duplicate": ("vae-sd/dataset.json", ["00000/img-mean-std-00000000.npy twice", "labels 0 and 1"]),
    "repa_shape": (REPA, ["(4, 8, 8)", "(8, 8, 8)"]),
    "repa_nan": (REPA, ["row 1", "not finite", "[2, 3, 4]"]),
    "repa_logvar": ("vae-sd/00000/img-mean-std-00000000.npy", ["standard deviation -", "log-variance"]),
    "repa_objects": (REPA, ["pickled objects"]),
    "repa_json_null": ("vae-sd/dataset.json", ["no labels"]),
    "repa_json_cut": ("vae-sd/dataset.json", ["char 93"]),
    "repa_json_missing": ("vae-sd/dataset.json", ["no labels"]),
    "edm2_ok": None,
    "edm2_deflated": None,
    "edm2_no_directory": ("img64-sd.zip", ["not whole"]),
    "edm2_crc": ("img64-sd.zip/00000/img-mean-std-00000000.npy", ["CRC-32 mismatch"]),
    "edm2_no_json": ("img64-sd.zip", ["no dataset.json", "no labels"]),
    "edm2_missing_member": (EDM2, ["not there"]),
    "edm2_label_range": ("label", [EDM2, "label=1000", "0..999"]),
    "ldit_ok": None,
    "ldit_labels_short": (SHARD, ["labels (3,)", "latents (4, 8, 8, 8)"]),
    "ldit_flip_shape": (SHARD, ["latents_flip (4, 8, 7, 8)", "latents (4, 8, 8, 8)"]),
    "ldit_no_flip": (SHARD, ["no latents_flip", "data.mirrored=False"]),
    "ldit_truncated": (SHARD, ["cut short"]),
    "ldit_header": (SHARD, ["1152921504606846976"]),
    "ldit_label_range": ("label", [SHARD, "index 1", "label=1000", "0..999"]),
    "ldit_no_stats": (STATS, ["missing"]),
    "ldit_stats_channels": (STATS, ["of 7", "have 8"]),
    "ldit_stats_zero": (STATS, ["std 0 of channel 2"]),
    "ldit_stats_code": (STATS, ["__builtin__.print"]),
    "meanflow_ok": None,
    "meanflow_stray": None,
    "meanflow_truncated": (PT, ["cut short"]),
    "meanflow_gap": (PT, ["missing"]),
    "meanflow_no_label": (PT, ["row 1", "no 'label'"]),
    "meanflow_label_range": ("label", [PT, "label=1000", "0..999"]),
    "meanflow_code": (PT, ["__builtin__.print"]),
    "meanflow_copy": ("train/00000000 (1).pt", ["twice"]),
}
SOURCES = {"repa": "repa", "edm2": "edm2", "ldit": "ldit", "meanflow": "mf"}


def damaged_folder(name):
    return LATENTS / "damaged" / name


def test_every_damaged_folder_is_tried():
    assert set(DAMAGED) == {path.name for path in (LATENTS / "damaged").iterdir()}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_fault_is_named_when_the_data_are_opened(name, capsys):
    """In one line, with the file; a sound folder is read."""
    source = SOURCES[name.split("_")[0]]
    open_it = lambda: every(opened(damaged_folder(name), source, side=8, channels=8 if source == "ldit" else 4))
    if DAMAGED[name] is None:
        assert len(open_it()["label"]) == (4 if source == "ldit" else 3)
    else:
        file, words = DAMAGED[name]
        with refused(file if file == "label" else str(damaged_folder(name) / file)) as caught:
            open_it()
        assert all(word in str(caught.value) for word in words), caught.value
    assert "EXECUTED" not in capsys.readouterr().out


def test_a_file_that_breaks_later_is_named_when_it_is_read(tmp_path):
    """In a source with more rows than are read at the start."""
    shutil.copytree(LATENTS / "repa", tmp_path / "repa")
    source = opened(tmp_path / "repa", "repa")
    file = tmp_path / "repa/vae-sd/00000/img-mean-std-00000005.npy"
    file.write_bytes(file.read_bytes()[:-1])
    source.gather(np.arange(5))
    with refused(str(file), says="row 5 announces 32896 bytes and has 32895"):
        source.gather(np.asarray([3, 5]))
    file.unlink()
    with refused(str(file), says="row 5 cannot be read"):
        source.gather(np.asarray([5]))


def test_torch_files_are_read_by_the_form_of_the_first_and_otherwise_one_by_one(tmp_path, monkeypatch):
    shutil.copytree(LATENTS / "meanflow", tmp_path / "mf")
    want = every(opened(LATENTS / "meanflow", "mf", side=16))
    file = tmp_path / "mf/train/00000004.pt"
    example = {"label": LazyTensor.of(np.asarray(7, np.int64)), "image": LazyTensor.of(want["moments"][4])}
    write_torch(file, example)  # contiguous, another order of keys
    source, slowly = opened(tmp_path / "mf", "mf", side=16), []
    one_by_one = mf._example
    monkeypatch.setattr(mf, "_example", lambda file, row: slowly.append(row) or one_by_one(file, row))
    batch = every(source)
    assert slowly == [4] and batch["label"].tolist() == [*want["label"][:4], 7, *want["label"][5:]]
    np.testing.assert_array_equal(batch["moments"], want["moments"])
    content = bytearray((tmp_path / "mf/train/00000005.pt").read_bytes())
    for at in (2000, len(content) // 2, 9153):  # of the image, and of the label
        changed = content.copy()
        changed[at] ^= 1
        (tmp_path / "mf/train/00000005.pt").write_bytes(changed)
        with refused(str(tmp_path / "mf/train/00000005.pt"), says="CRC-32"):
            every(source)


def test_text_labels_are_numbered_as_sorted_and_floats_must_be_whole(tmp_path):
    shutil.copytree(damaged_folder("repa_ok"), tmp_path / "repa")
    index = tmp_path / "repa/vae-sd/dataset.json"
    names = [name for name, _ in json.loads(index.read_text())["labels"]]

    def label(*labels):
        index.write_text(json.dumps({"labels": list(zip(names, labels))}))

    label("n02", "n01", "n02")
    source = opened(tmp_path / "repa", "repa", side=8, classes=2)
    assert source.spec.class_names == ("n01", "n02") and every(source)["label"].tolist() == [1, 0, 1]
    with refused("model.num_classes", 1000, expected="2, the classes of"):
        opened(tmp_path / "repa", "repa", side=8)
    label(3.0, 1.0, 999.0)
    assert every(opened(tmp_path / "repa", "repa", side=8))["label"].tolist() == [3, 1, 999]
    for bad in (None, 1.5, True, [1]):
        label(3, bad, 1)
        with refused(str(tmp_path / "repa/vae-sd" / names[1]), says=repr(bad)):
            opened(tmp_path / "repa", "repa", side=8)


def test_labels_belong_to_names_in_whatever_order_they_are_listed(tmp_path):
    shutil.copytree(LATENTS / "repa", tmp_path / "repa")
    index = tmp_path / "repa/vae-sd/dataset.json"
    listed = json.loads(index.read_text())["labels"]
    index.write_text(json.dumps({"labels": listed[5:] + listed[:5]}))
    want, found = every(opened(LATENTS / "repa", "repa")), every(opened(tmp_path / "repa", "repa"))
    assert all((found[name] == want[name]).all() for name in want)


def test_shards_that_are_missing_or_unlike_the_others_are_named(tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(LATENTS / "lightningdit/imagenet_train_256", folder)
    opened(folder, "ldit", side=16, channels=8)
    second = folder / "latents_rank01_shard000.safetensors"
    second.rename(folder / "latents_rank01_shard001.safetensors")
    with refused(str(second), says="is missing"):
        opened(folder, "ldit", side=16, channels=8)
    (folder / "latents_rank01_shard001.safetensors").rename(folder / "latents_rank02_shard000.safetensors")
    with refused(str(second), says="is missing"):
        opened(folder, "ldit", side=16, channels=8)
    (folder / "latents_rank02_shard000.safetensors").unlink()
    arrays = {"latents": np.zeros((2, 8, 8, 8), np.float32), "labels": np.zeros(2, np.int64)}
    write_safetensors(second, {name: LazyTensor.of(values) for name, values in arrays.items()})
    with refused(str(second), says="(8, 8, 8)"):
        opened(folder, "ldit", side=16, channels=8)


def test_a_split_that_is_not_there_is_refused():
    with refused("split", "validation", fix="holds train"):
        opened(LATENTS / "repa", "repa", split="validation")
    assert len(opened(LATENTS / "meanflow", "mf", side=16, split="train")) == 12


# Which autoencoder made them: statistics


def write_repa(folder, mean, std, count=48, scale=1.0, zipped=False):
    """A folder, or a zip file, of moments whose means have these statistics."""
    rng = np.random.default_rng(0)
    files = {}
    for row in range(count):
        means = (rng.normal(size=(4, 8, 8)) * np.reshape(std, (4, 1, 1)) + np.reshape(mean, (4, 1, 1))) * scale
        moments = np.concatenate([means, np.full((4, 8, 8), 0.05)]).astype(np.float32)
        name = f"00000/img-mean-std-{row:08d}.npy"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, moments)
        files[name] = row % 10
    (folder / "dataset.json").write_text(json.dumps({"labels": list(files.items())}))
    if zipped:
        with zipfile.ZipFile(folder / "set.zip", "w") as archive:
            for name in [*files, "dataset.json"]:
                archive.write(folder / name, name)
        return folder / "set.zip"
    return folder


SD_256 = ((0.86488, -0.27787, 0.21617, 0.37384), (4.85504, 5.31922, 3.93725, 3.98700))
SD_512 = ((1.560, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31))
UNIT = ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28))


@pytest.mark.parametrize("statistics", [SD_256, SD_512])
def test_latents_of_the_sd_autoencoder_are_recognised(tmp_path, statistics):
    source = opened(write_repa(tmp_path, *statistics), side=8)
    assert source.spec.identity.startswith("repa:") and source.spec.scaling == SD_VAE_SCALING
    with refused("latents", EDM2_SCALING, says="images in -1..1"):
        opened(tmp_path, "edm2", side=8)


@pytest.mark.parametrize("zipped", [False, True])
def test_edm2_s_latents_are_told_from_repa_s(tmp_path, zipped):
    folder = write_repa(tmp_path, *UNIT, zipped=zipped)
    with refused("latents", SD_VAE_SCALING, says="images in 0..1 (EDM2)"):
        opened(folder, "repa", side=8)
    with refused("latents", SD_VAE_SCALING, expected="uint8_rule='unit'", fix="data.source"):
        opened(folder, side=8)  # the config does not say that it means them
    source = opened(folder, "edm2", side=8)
    assert source.spec.scaling == EDM2_SCALING
    assert opened(folder, side=8, scaling=EDM2_SCALING).spec.identity.startswith("edm2:")


def test_scaled_latents_are_told_from_unscaled_ones(tmp_path):
    write_repa(tmp_path, *SD_256, scale=0.18215)
    with refused("latents", SD_VAE_SCALING, says="already multiplied by 0.18215"):
        opened(tmp_path, "repa", side=8)
    plain = LatentScaling("sd_vae", (0.0,) * 4, (1.0,) * 4, "sit")
    assert opened(tmp_path, "repa", side=8, scaling=plain).spec.scaling == plain


def test_unscaled_latents_are_not_taken_for_normalised_ones(tmp_path):
    write_repa(tmp_path, *SD_256)
    with refused("latents", says="images in -1..1"):
        opened(tmp_path, "repa", side=8, scaling=LatentScaling("sd_vae", (0.0,) * 4, (1.0,) * 4, "sit"))


def test_latents_that_share_the_deviations_alone_are_of_no_known_autoencoder(tmp_path):
    write_repa(tmp_path, (4.0, -4.0, 4.0, -4.0), SD_256[1])
    with refused("data.source", "auto"):
        opened(tmp_path, side=8)
    assert opened(tmp_path, "repa", side=8).spec.scaling == SD_VAE_SCALING


def test_latents_of_an_unknown_autoencoder_need_a_named_format():
    with refused("data.source", "auto", fix="repa (-1..1) or edm2 (0..1)", says="data.source='auto': nothing in"):
        opened(LATENTS / "repa")
    with refused("data image shape", (32, 32, 4), expected="(64, 64, 4)"):
        opened(LATENTS / "repa", "repa", side=64)


def test_settings_that_contradict_the_folder_are_refused():
    for setting, value in (("holds", "latents"), ("dtype", "bfloat16"), ("mirrored", True)):
        with refused(f"data.{setting}", value, expected="as in repa:"):
            opened(LATENTS / "repa", "repa", **{setting: value})
    other = LatentScaling("other", (0.0,) * 8, (1.0,) * 8, "half")
    with refused("latents", other, expected="va_vae_f16d8"):
        opened(LATENTS / "lightningdit", "ldit", side=16, channels=8, scaling=other)
