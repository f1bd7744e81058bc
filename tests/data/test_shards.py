"""Shards of latents: what TFDS and our own layout read of them, and what a failing disk leaves."""

import dataclasses
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from refusal import refused

from ig_jax.data import shards
from ig_jax.models.latents import SD_VAE_SCALING

NAMES = ["n01440764/a.JPEG", "", "ü/" + 300 * "x", "n02447366/b.JPEG", "c"]  # sizes of one byte and of two
LABELS = [0, 127, 128, 999, 16384]


def examples(stage: str, dtype: str, mirrored: bool):
    """(layout, arrays, labels, names) of five images."""
    shape = (4, 4, 8) if stage == "moments" else (4, 4, 4)
    layout = shards.RecordLayout(stage, shape, dtype, mirrored)
    random = np.random.default_rng(0)
    arrays = [{name: random.normal(size=shape).astype(dtype) for name in layout.arrays} for _ in NAMES]
    return layout, arrays


def card(layout: shards.RecordLayout, lengths=(3, 2), **changes) -> shards.Card:
    files = {shards.shard_file("train", i, len(lengths)): "" for i in range(len(lengths))}
    return dataclasses.replace(
        shards.Card(
            autoencoder={"name": "sd_vae", "digest": "d", "factor": 8},
            input_range=(-1.0, 1.0),
            crop="centre",
            size=32,
            stage="moments" if layout.shape[-1] == 8 else "latents",
            shape=layout.shape,
            dtype=str(layout.dtype),
            compute="float32",
            flip="both" if len(layout.arrays) == 2 else "none",
            split="train",
            count=5,
            class_names=tuple(["crane"] * 16385),  # not unique, as in ImageNet
            synsets=tuple(f"n{i:08d}" for i in range(16385)),
            class_histogram=(5,),
            channel_mean=(0.0,) * 4,
            channel_std=(1.0,) * 4,
            scaling=SD_VAE_SCALING,
            shard_size=3,
            shard_lengths=lengths,
            shards=files,
            broken=("x",),
            source="photographs",
            versions={"jax": "1"},
        ),
        **changes,
    )


@pytest.mark.parametrize(
    ("stage", "dtype", "mirrored"),
    [("moments", "bfloat16", True), ("moments", "float32", False), ("latents", "float32", True)],
)
def test_tfds_and_the_layout_read_what_was_written(tmp_path, stage, dtype, mirrored):
    import tensorflow_datasets as tfds  # reads the folder of this session at its import

    layout, arrays = examples(stage, dtype, mirrored)
    records = [layout.encode(*example) for example in zip(arrays, LABELS, NAMES)]
    written = card(layout)
    for file, part in zip(written.shards, (records[:3], records[3:])):
        shards.write_shard(tmp_path / file, part)
    shards.write_card(tmp_path, written)

    assert shards.read_card(tmp_path) == written
    ours = [record for file in written.shards for record in shards.read_shard(tmp_path / file)]
    theirs = tfds.builder_from_directory(str(tmp_path)).as_data_source("train")
    assert len(ours) == len(theirs) == 5
    for record, example, values, label, name in zip(ours, theirs, arrays, LABELS, NAMES):
        found, number = layout.decode(record)
        assert (number, layout.name(record)) == (label, name) == (example["label"], example["name"].decode())
        assert found.keys() == values.keys() == example.keys() - {"label", "name"}
        for field, value in values.items():
            assert found[field].dtype == example[field].dtype == np.dtype(dtype)
            np.testing.assert_array_equal(found[field], value)
            np.testing.assert_array_equal(example[field], value)


def test_the_same_records_give_the_same_bytes(tmp_path):
    layout, arrays = examples("moments", "bfloat16", True)
    for name in "ab":
        shards.write_shard(tmp_path / name, [layout.encode(*example) for example in zip(arrays, LABELS, NAMES)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_record_of_another_layout_is_refused():
    layout, arrays = examples("moments", "float32", True)
    record = layout.encode(arrays[0], 1, "x")
    for other in (
        shards.RecordLayout("moments", (4, 4, 8), "bfloat16", True),
        shards.RecordLayout("moments", (4, 4, 8), "float32", False),
        shards.RecordLayout("moments", (4, 8, 8), "float32", True),
        shards.RecordLayout("latents", (4, 4, 8), "float32", True),
    ):
        with pytest.raises(ValueError):
            other.decode(record)
    for cut in (b"", record[:-1], record + b"x", record[:40]):
        with pytest.raises(ValueError):
            layout.decode(cut)


def test_damage_is_named(tmp_path):
    layout, arrays = examples("moments", "float32", True)
    path = tmp_path / "shard"
    shards.write_shard(path, [layout.encode(*example) for example in zip(arrays, LABELS, NAMES)])
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] + bytes(100) + whole[2100:])
    with refused(str(path), says="orrupted"):
        list(shards.read_shard(path))
    path.unlink()
    with refused(str(path), says="No such file"):
        list(shards.read_shard(path))


def test_a_card_that_is_missing_or_foreign_is_refused(tmp_path):
    with refused(str(tmp_path), says="no card.json", fix="ig_jax.encode"):
        shards.read_card(tmp_path)
    for text in ("{", "[]", '{"format": 1}'):
        (tmp_path / "card.json").write_text(text)
        with refused(str(tmp_path / "card.json"), says="cannot be read"):
            shards.read_card(tmp_path)
    (tmp_path / "card.json").write_text('{"format": 2}')
    with refused(f"{tmp_path / 'card.json'} format", 2):
        shards.read_card(tmp_path)


FULL_DISK = """
import resource, signal, sys, os
from pathlib import Path
from ig_jax.data import shards
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    shards.write_shard(Path(sys.argv[1]) / "shard", [os.urandom(50_000) for _ in range(6)])
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path):
    (tmp_path / "done").write_bytes(b"intact")
    result = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("UserError cannot write") and "File too large" in result.stdout
    assert os.listdir(tmp_path) == ["done"]
    with refused("path", says="cannot write"):
        shards.write_shard(tmp_path / "done" / "shard", [b"x"])


def test_a_failure_of_the_records_leaves_no_file(tmp_path):
    def records():
        yield b"x"
        raise KeyError("decoding")

    with pytest.raises(KeyError):
        shards.write_shard(tmp_path / "shard", records())
    assert not os.listdir(tmp_path)


def test_bfloat16_is_rounded_as_jax_rounds(tmp_path):
    layout = shards.RecordLayout("latents", (1, 1, 4), "bfloat16", False)
    values = np.asarray([[[1.00390625, 1.01171875, -3.14159, 1e-40]]], np.float32)
    found, _ = layout.decode(layout.encode({"latent": values}, 0, ""))
    np.testing.assert_array_equal(found["latent"], values.astype(ml_dtypes.bfloat16))
