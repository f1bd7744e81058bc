"""Data, runs, samples and weights in a bucket: what they hold is what a folder would hold."""

import shutil
import sys
from pathlib import Path

import numpy as np
import object_store
import pytest
import toy
from latent_folders import LATENTS, every, opened
from refusal import refused

from ig_jax import convert, encode, sample
from ig_jax.base import buckets, cli, files
from ig_jax.base.copies import local_copy, results_folder
from ig_jax.base.schema import bind
from ig_jax.checkpoints import autoencoder as autoencoder_checkpoint
from ig_jax.config.experiment import Experiment
from ig_jax.data import shards
from ig_jax.models import autoencoder
from ig_jax.models.autoencoder import AutoencoderConfig
from ig_jax.training.loop import train
from ig_jax.training.workdir import read_metrics

PHOTOGRAPHS = Path(__file__).parent / "golden" / "photographs"


@pytest.fixture(scope="module", params=["google", "amazon"])
def bucket(request, tmp_path_factory):
    with getattr(object_store, request.param)(tmp_path_factory.mktemp("cache")) as url:
        yield url


@pytest.fixture(scope="module")
def google(tmp_path_factory):
    with object_store.google(tmp_path_factory.mktemp("cache")) as url:
        buckets.put(LATENTS / "repa", f"{url}/repa")
        yield url


def command(module, **given):
    """One command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *(f"--{name}={value}" for name, value in given.items())])
        cli.parse(toy.fresh(module.FLAGS))
        module.main()


def contents(folder) -> dict[str, bytes]:
    """name -> bytes of all files below a folder."""
    root = local_copy(str(folder))
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_file_is_there_whole_or_not_at_all(bucket):
    path = files.user_path(f"{bucket}/whole/file")
    with pytest.raises(KeyError), files.atomic_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert not path.exists()
    with files.atomic_file(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole" and files.file_size(path) == 5
    with files.atomic_directory(files.user_path(f"{bucket}/whole/folder")) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("deep")
    assert contents(f"{bucket}/whole") == {"file": b"whole", "folder/deep/file": b"deep"}


def test_a_copy_follows_what_changes_and_fetches_nothing_twice(bucket, capsys):
    for name in ("a.txt", "b.txt", "c.bin"):
        files.user_path(f"{bucket}/copied/{name}").write_text(name)
    copy = local_copy(f"{bucket}/copied")
    assert "fetching 3 objects" in capsys.readouterr().out
    files.user_path(f"{bucket}/copied/a.txt").write_text("A.txt")
    files.user_path(f"{bucket}/copied/b.txt").unlink()
    assert local_copy(f"{bucket}/copied") == copy
    assert "fetching 1 objects" in capsys.readouterr().out
    assert contents(f"{bucket}/copied") == {"a.txt": b"A.txt", "c.bin": b"c.bin"}
    assert capsys.readouterr().out == ""
    assert [path.name for path in sorted(Path(copy).parent.glob("copied/*.txt"))] == ["a.txt"]


def test_results_in_a_bucket_grow_whatever_ends_the_work(bucket):
    place = f"{bucket}/results"
    with pytest.raises(KeyError), results_folder(place, "--out", put_back=True) as out:
        (out / "features").mkdir()
        (out / "features" / "0.npz").write_bytes(b"half")
        (out / "table.json").write_text("one")
        raise KeyError
    assert contents(place) == {"features/0.npz": b"half", "table.json": b"one"}
    for put_back in (False, True):  # of two processes that share the work
        with results_folder(place, "--out", put_back=put_back) as out:
            assert (out / "features" / "0.npz").read_bytes() == b"half"
            shutil.rmtree(out / "features")
            (out / "table.json").write_text("two")
    assert contents(place) == {"table.json": b"two"}


def test_latents_are_read_from_a_bucket(bucket):
    buckets.put(LATENTS / "repa", f"{bucket}/latents")
    here, there = (every(opened(folder, "repa")) for folder in (LATENTS / "repa", f"{bucket}/latents"))
    for name, values in here.items():
        np.testing.assert_array_equal(there[name], values)


def test_weights_come_from_a_bucket_and_go_into_one(bucket, tmp_path):
    config = AutoencoderConfig(channels=(32, 32), layers=1, latent_channels=4)
    random = np.random.default_rng(0)
    params = {n: random.normal(size=s.shape).astype(np.float32) for n, s in autoencoder.shapes(config).items()}
    autoencoder_checkpoint.save(tmp_path / "vae", config, params, "diffusers")
    command(convert, checkpoint=tmp_path / "vae", to=f"{bucket}/vae.safetensors")
    command(convert, **{"from": f"{bucket}/vae.safetensors", "out": f"{bucket}/vae"})
    given = dict(images=PHOTOGRAPHS / "train", size=16, batch_size=2, workers=1, dtype="float32", shard_size=5)
    command(encode, autoencoder=f"{bucket}/vae", out=f"{bucket}/encoded", **given)
    command(encode, autoencoder=tmp_path / "vae", out=tmp_path / "encoded", **given)
    there, here = contents(f"{bucket}/encoded"), contents(tmp_path / "encoded")
    names = [name for name in here if "array_record" in name]
    assert len(names) > 1 and all(there[name] == here[name] for name in names)
    cards = [shards.read_card(local_copy(str(folder))) for folder in (f"{bucket}/encoded", tmp_path / "encoded")]
    assert cards[0] == cards[1]


def experiment(folder, steps: int) -> Experiment:
    found = toy.load_config("sit_imagenet256")
    found.model.update(depth=2, width=32, num_heads=2, inter_depth=(1,), dtype="float32", remat="none", num_classes=5)
    found.optimizer.accumulate, found.mesh.fsdp_up_to = 1, 1
    found.data.update(folder=str(folder), source="repa", batch_size=8)
    found.run.update(steps=steps, log_every=1, checkpoint_every=1, preview_every=0, preview_images=0)
    found.sample.steps = 2
    return bind(Experiment, found)


def test_a_run_in_a_bucket_is_the_run_of_a_folder(google, tmp_path, capsys):
    run = f"{google}/run"
    train(experiment(f"{google}/repa", 2), run)
    train(experiment(f"{google}/repa", 3), run)
    train(experiment(LATENTS / "repa", 3), str(tmp_path / "run"))
    assert "cannot be locked" in capsys.readouterr().err
    lines, local = read_metrics(files.user_path(run)), read_metrics(tmp_path / "run")
    assert [line["loss/total"] for line in lines] == [line["loss/total"] for line in local]
    given = dict(num=2, batch_size=2, seed=3, steps=2, save="latents", cfg_scale=1, ig_scale=1)
    command(sample, checkpoint=run, out=f"{google}/samples", **given)
    command(sample, checkpoint=tmp_path / "run", out=tmp_path / "samples", **given)
    there, here = contents(f"{google}/samples"), contents(tmp_path / "samples")
    assert there.keys() == here.keys() and "000001.npy" in here
    assert all(there[name] == here[name] for name in here if name.endswith(".npy"))


def test_what_cannot_be_in_a_bucket_is_refused_before_anything_is_made():
    with refused("workdir", "s3://bucket/run", expected="gs://", fix="mount"):
        train(experiment(LATENTS / "repa", 1), "s3://bucket/run")
    done = toy.run("ig_jax.train", "--config=configs/digits.py", "--workdir=s3://bucket/run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Orbax" in done.stderr, done.stderr


def test_an_unknown_scheme_and_a_library_that_is_not_there_are_one_line(monkeypatch):
    with refused("--out", "ftp://host/run", expected="gs://", fix="copy"):
        files.user_path("ftp://host/run", "--out")
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    with refused("--out", "gs://bucket/run", says="gcsfs", fix="[gcs]"):
        files.user_path("gs://bucket/run", "--out")


def test_a_bucket_that_does_not_answer_is_one_line(bucket):
    path = files.user_path(f"{bucket}-of-nobody/run", "--out")
    with refused("path", str(path), fix="credentials"), files.atomic_file(path) as file:
        file.write(b"text")
