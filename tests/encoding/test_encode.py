"""`ig_jax.encode`: the numbers of a published encoder, bytes that do not depend on how the run went, and refusals."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from PIL import Image
from refusal import refused

from ig_jax import encode
from ig_jax.base import cli
from ig_jax.base.errors import UserError
from ig_jax.base.schema import bind
from ig_jax.benchmarking.cases import Case
from ig_jax.benchmarking.programs import mesh_of, synthetic_batch
from ig_jax.checkpoints import autoencoder as autoencoder_checkpoint
from ig_jax.checkpoints.steps import stored_meta
from ig_jax.config.experiment import Experiment
from ig_jax.data import crop, shards
from ig_jax.data.spec import ENCODER
from ig_jax.encoding import encoder
from ig_jax.generation import pretrained
from ig_jax.models import autoencoder, convolutions, latents
from ig_jax.models.autoencoder import AutoencoderConfig
from ig_jax.parallel.mesh import make_mesh
from ig_jax.training.initialise import encoder_weights
from ig_jax.training.loop import train
from ig_jax.training.program import TrainProgram
from ig_jax.training.step import prepare

PHOTOGRAPHS = Path(__file__).parents[1] / "golden" / "photographs"
SMALL = dict(size=16, shard_size=5, batch_size=2, workers=2, dtype="float32")


def weights(config: AutoencoderConfig) -> dict[str, np.ndarray]:
    """Random parameters, none of them zero."""
    random = np.random.default_rng(0)
    scale = lambda leaf: 0.3 if len(leaf.shape) == 1 else leaf.shape[-2] ** -0.5
    return {
        name: (random.normal(size=leaf.shape) * scale(leaf)).astype(np.float32)
        for name, leaf in autoencoder.shapes(config).items()
    }


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Autoencoders of four channels, as the SD autoencoder has, and of six."""
    root = tmp_path_factory.mktemp("autoencoders")
    for name, channels in (("sd", 4), ("va", 6)):
        config = AutoencoderConfig(channels=(8, 16), layers=1, latent_channels=channels, groups=4)
        autoencoder_checkpoint.save(root / name, config, weights(config), "diffusers")
    return root


def run(out: Path, autoencoder: Path, images: Path | str = PHOTOGRAPHS / "train", **given) -> shards.Card:
    """One command in this process, with its eight devices."""
    values = SMALL | dict(out=out, autoencoder=autoencoder, images=images) | given
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["encode", *(f"--{name}={value}" for name, value in values.items())])
        cli.parse(toy.fresh(encode.FLAGS))
        encode.main()
    return shards.read_card(out)


@pytest.fixture(scope="module")
def whole(directories, tmp_path_factory):
    """An uninterrupted run in one process with one device, as a command."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    subprocess.run(command(out, directories / "sd"), env=toy.environment(), check=True, timeout=toy.HANGS)
    return out


def command(out: Path, autoencoder: Path, **given) -> list[str]:
    values = SMALL | dict(out=out, autoencoder=autoencoder, images=PHOTOGRAPHS / "train") | given
    return [sys.executable, "-m", "ig_jax.encode", *(f"--{name}={value}" for name, value in values.items())]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records(folder: Path) -> dict[str, tuple[dict[str, np.ndarray], int]]:
    """name -> (arrays, label) of all records, in order."""
    layout = shards.read_card(folder).layout
    files = sorted(folder.glob("*.array_record-*"))
    return {layout.name(record): layout.decode(record) for file in files for record in shards.read_shard(file)}


def expected_moments(directory: Path, name: str, size: int, mirrored: bool) -> np.ndarray:
    """Mean and std of one photograph, encoded by itself."""
    config, params, _ = autoencoder_checkpoint.load(directory)
    pixels = crop.decode((PHOTOGRAPHS / "train" / name).read_bytes(), size)[None]
    images = latents.from_uint8(jax.numpy.asarray(pixels[:, :, ::-1] if mirrored else pixels))
    mean, std = autoencoder.from_params(config, params).encode(images)
    return np.concatenate([mean[0], std[0]], axis=-1)


def test_the_shards_hold_the_moments_of_both_mirrors(whole, directories):
    found = records(whole)
    assert list(found) == sorted(found) and len(found) == 12
    for name, (arrays, label) in found.items():
        assert label == ["n01440764", "n02105855", "n02447366"].index(name.split("/")[0])
        for field, mirrored in (("moments", False), ("moments_flip", True)):
            np.testing.assert_allclose(
                arrays[field], expected_moments(directories / "sd", name, 16, mirrored), rtol=1e-5, atol=1e-5
            )


def test_the_card_describes_what_is_there(whole, directories):
    card = shards.read_card(whole)
    assert (card.count, card.class_histogram, card.broken) == (12, (4, 4, 4), ())
    assert (card.shard_lengths, card.stage, card.flip, card.dtype) == ((5, 5, 2), "moments", "both", "float32")
    assert card.autoencoder["digest"] == autoencoder_checkpoint.digest(directories / "sd")
    assert card.autoencoder["factor"] == 2 and card.scaling == latents.SD_VAE_SCALING
    sums = {file: hashlib.sha256((whole / file).read_bytes()).hexdigest() for file in card.shards}
    assert sums == card.shards
    moments = np.stack([arrays["moments"] for arrays, _ in records(whole).values()]).astype(np.float64)
    mean, std = moments[..., :4], moments[..., 4:]
    np.testing.assert_allclose(card.channel_mean, mean.mean((0, 1, 2)), rtol=1e-9)
    # of a sampled latent: the variance of the means and the mean of the variances
    np.testing.assert_allclose(card.channel_std, np.sqrt(mean.var((0, 1, 2)) + (std**2).mean((0, 1, 2))), rtol=1e-9)
    with Image.open(whole / "check.png") as picture:
        assert picture.mode == "RGB" and picture.width > picture.height


def test_eight_devices_write_the_bytes_of_one(whole, directories, tmp_path):
    run(tmp_path / "latents", directories / "sd")
    assert contents(tmp_path / "latents") == contents(whole)


def test_a_device_among_others_computes_as_one_alone(directories, monkeypatch):
    monkeypatch.setattr(convolutions, "WIDE", 8)
    monkeypatch.setattr(convolutions, "PIXELS", 1)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    devices, found = jax.local_devices(), {}
    for count in (1, 8):
        monkeypatch.setattr(jax, "local_devices", lambda count=count: devices[:count])
        program = encoder.make_encode(encoder.load(directories / "sd"), "moments", "float32", False, "bfloat16")
        at = range(0, 8, count)
        found[count] = np.concatenate([program(pixels[i : i + count], np.arange(count))["moments"] for i in at])
    np.testing.assert_array_equal(found[8], found[1])


def test_a_killed_run_finishes_in_two_processes_with_the_same_bytes(whole, directories, tmp_path):
    out = tmp_path / "latents"
    first = out / "latents-train.array_record-00000-of-00003"
    running = subprocess.Popen(command(out, directories / "sd"), env=toy.environment(), start_new_session=True)
    deadline = time.monotonic() + toy.HANGS
    while not first.exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.005)
    running.kill()
    running.wait()
    assert first.exists() and not (out / "card.json").exists()
    before = first.stat().st_mtime_ns
    for _ in range(100):  # the decoding processes see that their parent is gone
        if not subprocess.run(["pgrep", "-s", str(running.pid)], capture_output=True).stdout:
            break
        time.sleep(0.1)
    else:
        pytest.fail("decoding processes outlive a killed run")
    launch = ["bash", str(toy.ROOT / "launch" / "local.sh"), "2"]
    again = [*launch, *command(out, directories / "sd")]
    subprocess.run(again, env=toy.environment(), check=True, timeout=toy.HANGS, cwd=toy.ROOT)
    assert contents(out) == contents(whole) and first.stat().st_mtime_ns == before


def test_any_shards_may_be_missing_and_leftovers_are_removed(whole, directories, tmp_path, capsys):
    out = tmp_path / "latents"
    shutil.copytree(whole, out)
    (out / "latents-train.array_record-00001-of-00003").unlink()
    (out / ".card.json.0123abcd.tmp").write_bytes(b"{")
    (out / "card.json").unlink()
    run(out, directories / "sd")
    assert contents(out) == contents(whole)
    capsys.readouterr()
    run(out, directories / "sd")
    assert "nothing to do" in capsys.readouterr().out


def test_webdataset_and_parquet_give_the_same_latents(whole, directories, tmp_path):
    expected = {Path(name).stem: arrays for name, (arrays, _) in records(whole).items()}
    for source, count in (("archives/imagenet1k-train-0000.tar", 5), ("archives/hf", 6)):
        out = tmp_path / source.replace("/", "_")
        run(out, directories / "sd", PHOTOGRAPHS / source)
        found = records(out)
        assert len(found) == count
        for name, (arrays, _) in found.items():
            stem = "_".join(Path(name).stem.split("_")[:2])  # Hugging Face repeats the synset
            for field, array in arrays.items():
                np.testing.assert_allclose(array, expected[stem][field], rtol=1e-5, atol=1e-5)


def test_sampled_latents_are_of_the_posterior_and_of_their_row(directories, tmp_path):
    out = tmp_path / "latents"
    card = run(out, directories / "va", stage="latents")
    assert card.layout.arrays == ("latent", "latent_flip") and card.shape == (8, 8, 6)
    assert card.scaling.name == "va_vae_f2d6" and card.scaling.uint8_rule == "half"
    np.testing.assert_allclose(card.scaling.shift, card.channel_mean)
    np.testing.assert_allclose(1 / np.asarray(card.scaling.scale), card.channel_std)
    noises = []
    for name, (arrays, _) in records(out).items():
        for field, mirrored in (("latent", False), ("latent_flip", True)):
            moments = expected_moments(directories / "va", name, 16, mirrored)
            noises.append((arrays[field] - moments[..., :6]) / moments[..., 6:])
    noise = np.stack(noises)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03  # 9,216 numbers
    assert np.abs(np.corrcoef(noise.reshape(len(noise), -1)) - np.eye(len(noise))).max() < 0.25


def test_bfloat16_is_the_rounded_float32(whole, directories, tmp_path):
    card = run(tmp_path / "latents", directories / "sd", dtype="bfloat16", flip="none")
    assert card.layout.arrays == ("moments",) and card.dtype == "bfloat16"
    for name, (arrays, _) in records(tmp_path / "latents").items():
        np.testing.assert_array_equal(arrays["moments"], records(whole)[name][0]["moments"].astype("bfloat16"))


def test_a_broken_image_ends_the_run_or_is_listed(directories, tmp_path):
    out = tmp_path / "latents"
    with refused("n01440764/n01440764_1.JPEG", says="truncated", fix="--skip_broken"):
        run(out, directories / "sd", PHOTOGRAPHS / "broken")
    card = run(out, directories / "sd", PHOTOGRAPHS / "broken", skip_broken=True)
    assert [entry.split(":")[0] for entry in card.broken] == [
        *("n01440764/n01440764_1.JPEG", "n01440764/n01440764_2.JPEG", "n02447366/n02447366_3.JPEG")
    ]
    assert "truncated" in card.broken[0] and (card.count, card.class_histogram) == (1, (0, 1))
    assert list(records(out)) == ["n02447366/n02447366_4.JPEG"]


def test_another_run_into_the_same_folder_is_refused(whole, directories, tmp_path):
    before = contents(whole)
    for given in (
        dict(flip="none"),
        dict(size=32),
        dict(num=6),
        dict(shard_size=4),
        dict(autoencoder=directories / "va"),
    ):
        values = dict(autoencoder=directories / "sd") | given
        with refused("--out", str(whole), says="another"):
            run(whole, **values)
    assert contents(whole) == before
    (tmp_path / "card.json").write_text("{}")
    with refused("--out", str(tmp_path), expected="plan.json"):
        run(tmp_path, directories / "sd")


def damage(path: Path, layout: shards.RecordLayout, change) -> None:
    found = [(*layout.decode(record), layout.name(record)) for record in shards.read_shard(path)]
    shards.write_shard(path, [layout.encode(*example) for example in change(found)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found[:-1], "lacks"),
        (lambda found: [found[1], found[0], *found[2:]], "not the next"),
        (lambda found: [found[0], *found], "not the next"),
        (lambda found: [(found[0][0], 1, found[0][2]), *found[1:]], "not the next"),
        (lambda found: [({k: v * np.nan for k, v in found[0][0].items()}, *found[0][1:]), *found[1:]], "not finite"),
    ],
    ids=["missing", "swapped", "twice", "label", "nan"],
)
def test_the_check_at_the_end_finds_what_is_wrong(whole, directories, tmp_path, change, says):
    out = tmp_path / "latents"
    shutil.copytree(whole, out)
    card = shards.read_card(out)
    (out / "card.json").unlink()
    damage(out / next(iter(card.shards)), card.layout, change)
    with refused(str(out / next(iter(card.shards))), says=says, fix="remove this file"):
        run(out, directories / "sd")
    assert not (out / "card.json").exists()


def test_what_does_not_fit_is_refused(directories, tmp_path, monkeypatch):
    out = tmp_path / "latents"
    with refused("--size", 17):
        run(out, directories / "sd", size=17)
    with refused("--num", 13):
        run(out, directories / "sd", num=13)
    with refused("(--images, --from)", fix=""):
        run(out, directories / "sd", **{"from": "x"})
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1000))
    with refused("--out", str(out), says="GB free"):
        run(out, directories / "sd")


def test_a_disk_that_fills_up_leaves_the_finished_shards(whole, directories, tmp_path, monkeypatch):
    out = tmp_path / "latents"
    write, written = shards.write_shard, []

    def full(path, content):
        if written:
            raise UserError("cannot write: no space", name="path", value=str(path))
        written.append(path)
        write(path, content)

    monkeypatch.setattr(shards, "write_shard", full)
    with refused("path", says="no space"):
        run(out, directories / "sd")
    monkeypatch.setattr(shards, "write_shard", write)
    assert [path.name for path in out.glob("*-of-*")] == [written[0].name]
    run(out, directories / "sd")
    assert contents(out) == contents(whole)


def test_fewer_images_and_their_order(directories, tmp_path):
    card = run(tmp_path / "latents", directories / "sd", num=3)
    assert (
        card.class_histogram == (1, 1, 1) and json.loads((tmp_path / "latents" / "plan.json").read_text())["count"] == 3
    )


def test_sigterm_says_how_to_go_on(directories, tmp_path):
    out = tmp_path / "latents"
    running = subprocess.Popen(
        command(out, directories / "sd"), env=toy.environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + toy.HANGS
    while not out.exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.005)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=toy.HANGS)
    assert running.returncode == 75 and "rerun the same command" in errors.splitlines()[-1]
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]


# Images encoded in the step of a run, instead of on disk


def online(vae: Path, folder: Path = PHOTOGRAPHS / "train", source: str = "images", **changes) -> Experiment:
    """configs/sit_imagenet256.py made small, on images of 16x16 pixels or their latents."""
    found = toy.load_config("sit_imagenet256")
    small = dict(depth=1, width=16, num_heads=1, inter_depth=(), dtype="float32", input_size=8, num_classes=3)
    found.model.update(**small)
    found.loss.inter_weight = ()
    found.data.update(folder=str(folder), source=source, batch_size=8)
    found.run.update(steps=1, log_every=1, checkpoint_every=1, autoencoder=str(vae))
    found.update_from_flattened_dict(
        {"optimizer.accumulate": 1, "mesh.fsdp_up_to": 1, "sample.ig_scale": 1.0} | changes
    )
    return bind(Experiment, found)


def test_images_encoded_in_the_step_are_the_latents_of_the_shards(whole, directories):
    prepared = []
    for e in (online(directories / "sd", whole, "auto"), online(directories / "sd")):
        source = e.open_split("train")
        batch = source.gather(np.arange(8)) | encoder_weights(e, make_mesh())
        prepared.append((prepare(source.spec, batch, 0, jax.numpy.int32(1)), batch["label"]))
    (stored, labels), (encoded, same) = prepared
    assert labels.tolist() == same.tolist() and set(batch) == {"image", "label", ENCODER}
    np.testing.assert_allclose(encoded, stored, rtol=1e-4, atol=1e-4)


def test_a_run_that_encodes_stores_whose_latents_they_are_and_samples_with_it(directories, tmp_path):
    train(online(directories / "sd"), str(tmp_path))
    meta, digest = stored_meta(tmp_path), autoencoder_checkpoint.digest(directories / "sd")
    assert meta["data"]["encoder"] == f"{digest} in float32" and meta["config"]["latents"]["scale"] == [0.18215] * 4
    assert not any("conv" in name for arrays in meta["arrays"].values() for name in arrays)
    assert pretrained.load(tmp_path).autoencoder.digest == digest
    config, params, _ = autoencoder_checkpoint.load(directories / "sd")
    autoencoder_checkpoint.save(tmp_path / "other", config, {n: 2 * value for n, value in params.items()}, "diffusers")
    with refused("autoencoder", str(tmp_path / "other"), expected=digest[:12]):
        pretrained.load(tmp_path, autoencoder=tmp_path / "other")
    with refused("source", says="the checkpoint was trained with"):
        train(online(tmp_path / "other", **{"run.steps": 2}), str(tmp_path))


def test_a_benchmark_of_the_step_encodes_too(directories):
    case = Case(online(directories / "sd", **{"data.compute": "bfloat16"}), devices=1)
    program = TrainProgram.of(case.experiment, mesh_of(case), case.experiment.batch_spec, 8)
    batch = synthetic_batch(program, case)
    assert batch["image"].shape == (8, 16, 16, 3) and batch[ENCODER].keys() == program.batch[ENCODER].keys()
    assert not any(name.startswith(("decoder", "post")) for name in batch[ENCODER])


def test_an_autoencoder_of_other_latents_is_refused(directories):
    with refused("config.run.autoencoder", "", fix="ig_jax.encode"):
        online("")
    with refused("config.run.autoencoder", str(directories / "va"), expected="4 channels, not of va_vae_f2d6"):
        online(directories / "va").open_split("train")
    with refused("config.model.channels", 4, fix="data.source=images"):
        online(directories / "sd", source="auto").open_split("train")
    with refused("config.latents.scale", (1.0,) * 4, fix="ig_jax.encode measures"):
        online(directories / "sd", **{"latents.scale": (1.0,) * 4})
    with refused("config.data.compute", "int8"):
        online(directories / "sd", **{"data.compute": "int8"})
