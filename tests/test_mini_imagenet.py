"""From photographs to pictures: encode, train and sample, from every form of the images and from REPA's form."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy
from PIL import Image

from ig_jax.training.workdir import read_metrics

spec = importlib.util.spec_from_file_location("mini_imagenet", toy.ROOT / "launch" / "mini_imagenet.py")
mini = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mini)

PHOTOGRAPHS = toy.ROOT / "tests" / "golden" / "photographs" / "train"
CLASSES = 3
SMALL = {
    "model.input_size": 8,
    "model.depth": 2,
    "model.width": 32,
    "model.num_heads": 2,
    "model.inter_depth": "1,",
    "model.num_classes": CLASSES,
    "model.dtype": "float32",
    "run.preview_every": 0,
    "data.batch_size": 6,
    "run.log_every": 1,
    "run.steps": 10,
    "optimizer.learning_rate": 1e-3,
}


def command(module: str, **given) -> None:
    arguments = [f"--{name}={value}" for name, value in given.items()]
    result = subprocess.run(
        [sys.executable, "-m", f"ig_jax.{module}", *arguments],
        env=toy.environment(),
        cwd=toy.ROOT,
        capture_output=True,
        text=True,
        timeout=toy.HANGS,
    )
    assert result.returncode == 0, result.stderr


def losses(workdir: Path) -> list[float]:
    found = read_metrics(workdir)
    return [entry["loss/total"] for entry in found if "loss/total" in entry]


def train(workdir: Path, folder: Path, source: str = "auto") -> None:
    config = toy.ROOT / "configs" / "sit_imagenet256.py"
    settings = {f"config.{name}": value for name, value in SMALL.items()}
    data = {"config.data.folder": folder, "config.data.source": source}
    command("train", config=f"{config}:B", workdir=workdir, **settings, **data)


def test_every_form_gives_the_same_latents_losses_and_pictures(tmp_path):
    pytest.importorskip("pyarrow")
    files = {str(path.relative_to(PHOTOGRAPHS)): path.read_bytes() for path in sorted(PHOTOGRAPHS.glob("*/*"))}
    mini.write_tars(tmp_path / "tars" / "ILSVRC2012_img_train.tar", files)
    mini.write_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet", files)
    mini.write_autoencoder(tmp_path / "autoencoder_by_hand")
    published = tmp_path / "published" / "autoencoder.safetensors"  # with the config.json of diffusers next to it
    command("convert", checkpoint=tmp_path / "autoencoder_by_hand", to=published)
    command("convert", **{"from": published}, out=tmp_path / "autoencoder")
    forms = {"folders": PHOTOGRAPHS, "tars": tmp_path / "tars", "parquet": tmp_path / "parquet"}
    for form, images in forms.items():
        numbers = dict(size=32, dtype="float32", flip="none", shard_size=5, batch_size=4, workers=1)
        command(
            "encode", images=images, autoencoder=tmp_path / "autoencoder", out=tmp_path / form / "latents", **numbers
        )
        train(tmp_path / form / "run", tmp_path / form / "latents")
    mini.repa(tmp_path / "folders" / "latents", tmp_path / "repa")
    train(tmp_path / "repa" / "run", tmp_path / "repa", "repa")

    expected = mini.records(tmp_path / "folders" / "latents")
    assert len(expected) == 12
    for form in ("tars", "parquet"):
        found = mini.records(tmp_path / form / "latents")
        for (arrays, label), (others, other) in zip(expected, found, strict=True):
            assert label == other
            np.testing.assert_array_equal(arrays["moments"], others["moments"])
    first = losses(tmp_path / "folders" / "run")
    assert len(first) == 10 and first[-1] < first[0]
    assert [losses(tmp_path / form / "run") for form in ("tars", "parquet", "repa")] == [first] * 3

    out = tmp_path / "samples"
    command(
        "sample", checkpoint=tmp_path / "folders" / "run", autoencoder=tmp_path / "autoencoder", out=out, num=4, steps=4
    )
    with Image.open(out / "000003.png") as picture:
        assert picture.size == (32, 32) and np.asarray(picture).std() > 1
    with Image.open(tmp_path / "folders" / "latents" / "check.png") as picture:
        pairs = np.asarray(picture.convert("RGB"))
    assert pairs.std() > 1


def test_the_autoencoder_by_hand_gives_back_what_it_encodes(tmp_path):
    """Up to the contrast of each image: blocks of 4x4 pixels keep their colours."""
    from ig_jax.checkpoints import autoencoder as autoencoder_checkpoint
    from ig_jax.models import autoencoder

    mini.write_autoencoder(tmp_path / "autoencoder_by_hand")
    model = autoencoder.from_params(*autoencoder_checkpoint.load(tmp_path / "autoencoder_by_hand")[:2])
    blocks = np.random.default_rng(0).uniform(-1, 1, (1, 4, 4, 3)).astype(np.float32)
    images = blocks.repeat(4, 1).repeat(4, 2)
    decoded = np.asarray(model.decode(model.encode(images).mean))
    assert np.corrcoef(decoded.reshape(-1), images.reshape(-1))[0, 1] > 0.99
