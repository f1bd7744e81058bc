"""The sample command: the same bytes however it is run, and refusals in one line."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_checkpoint as tiny
import toy
from PIL import Image
from refusal import ANYTHING, refused

from ig_jax import sample
from ig_jax.base import cli
from ig_jax.base.errors import RESUMABLE
from ig_jax.generation import decode, pretrained
from ig_jax.generation.labels import labels_for
from ig_jax.models.autoencoder import AutoencoderConfig
from ig_jax.models.latents import from_factor
from ig_jax.parallel.mesh import make_mesh
from ig_jax.parallel.sharding import replicated
from ig_jax.pictures import images, plots


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("run"), tiny.experiment())


def run(**given):
    """One command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample", *(f"--{name}={value}" for name, value in given.items())])
        cli.parse(toy.fresh(sample.FLAGS))
        sample.main()


def files(folder):
    """Contents by name, without the metadata, which depend on the machine and the time."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "recipe.json"}


PROGRAM = "from ig_jax import sample; from ig_jax.base import cli; cli.run(sample.main, sample.FLAGS, '')"


def environment():
    """The environment of a command on one device, in any directory."""
    path = os.pathsep.join([str(toy.ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}


def command(*args, program=PROGRAM):
    """The command as a process, on one device."""
    return subprocess.run([sys.executable, "-c", program, *args], env=environment(), capture_output=True, text=True)


PLAIN = dict(num=12, ig_scale=2.0, cfg_scale=1.5, cfg_interval="0,0.7", batch_size=4)


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(checkpoint=checkpoint, out=out, **PLAIN)
    return out


def test_writes_images_archive_grid_and_metadata(whole):
    metadata = json.loads((whole / "recipe.json").read_text())
    assert sorted(files(whole)) == sorted([f"{i:06d}.png" for i in range(12)] + ["samples.npz"])
    assert whole.with_name(f"{whole.name}_grid.png").is_file()  # elsewhere: all pictures of the folder are samples
    with np.load(whole / "samples.npz") as archive:
        assert archive["arr_0"].shape == (12, 8, 8, 3) and archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_1"], np.arange(12) % 10)
        for i, image in enumerate(archive["arr_0"]):
            np.testing.assert_array_equal(np.asarray(Image.open(whole / f"{i:06d}.png")), image[..., 0])
        assert archive["arr_0"].std() > 10
    # Four steps at 1, 0.75, 0.5, 0.25: the batch is doubled on the last two.
    assert metadata["evaluations_per_image"] == 6 and metadata["grid"] == [1.0, 0.75, 0.5, 0.25]
    assert metadata["finished"]["images"] == 12 and len(metadata["checkpoint"]["digest"]) == 64
    for key in ("recipe", "labels", "seed", "versions", "device", "processes"):
        assert key in metadata


@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_batch_size_changes_no_byte(checkpoint, whole, tmp_path, batch_size):
    run(checkpoint=checkpoint, out=tmp_path / "out", **(PLAIN | {"batch_size": batch_size}))
    assert files(tmp_path / "out") == files(whole)


KILLED = """
import os, signal, sys, threading
from ig_jax import sample
from ig_jax.base import cli, files
left, lock, replace = [int(sys.argv.pop())], threading.Lock(), os.replace
def deadly(source, target):
    with lock:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)  # its bytes are written, but it has no name yet
        replace(source, target)
files.os.replace = deadly
cli.run(sample.main, sample.FLAGS, "")
"""


def test_a_killed_run_is_resumed_to_the_same_files(checkpoint, whole, tmp_path):
    """One device here and eight in the fixture: the bytes are the same on both."""
    args = [f"--{k}={v}" for k, v in (PLAIN | {"checkpoint": checkpoint, "out": tmp_path / "out"}).items()]
    for survived in ("4", "3"):  # recipe.json and some images; then recipe.json again and some more
        assert command(*args, survived, program=KILLED).returncode == -signal.SIGKILL
        assert any(path.name.endswith(".tmp") for path in (tmp_path / "out").iterdir())
    ended = command(*args)
    assert ended.returncode == 0, ended.stderr
    assert files(tmp_path / "out") == files(whole)
    assert "nothing to do" in command(*args).stdout


def test_two_processes_write_one_folder(checkpoint, whole, tmp_path):
    args = [f"--{k}={v}" for k, v in (PLAIN | {"checkpoint": checkpoint, "out": tmp_path / "out"}).items()]
    ended = subprocess.run(
        [toy.ROOT / "launch" / "local.sh", "2", sys.executable, "-m", "ig_jax.sample", *args],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=toy.HANGS,
    )
    assert ended.returncode == 0, ended.stderr
    assert files(tmp_path / "out") == files(whole)
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["processes"] == 2
    assert ended.stdout.count("wrote") == 1


def test_latents_decode_later_to_the_same_images(checkpoint, whole, tmp_path):
    run(checkpoint=checkpoint, out=tmp_path / "latents", save="latents", **PLAIN)
    assert np.load(tmp_path / "latents" / "000003.npy").shape == (8, 8, 1)
    run(decode=tmp_path / "latents", out=tmp_path / "out", batch_size=8)
    assert files(tmp_path / "out") == files(whole)


def test_archive_alone_leaves_no_parts(checkpoint, whole, tmp_path):
    run(checkpoint=checkpoint, out=tmp_path / "out", save="npz", **PLAIN)
    assert sorted(files(tmp_path / "out")) == ["samples.npz"]
    assert (tmp_path / "out" / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()


def test_the_grid_says_what_made_it(checkpoint, tmp_path, monkeypatch):
    lines, text = [], plots.Page.text
    monkeypatch.setattr(
        plots.Page, "text", lambda self, x, y, line, *a: (lines.append(line), text(self, x, y, line, *a))
    )
    run(checkpoint=checkpoint, out=tmp_path, **PLAIN)
    digest = json.loads((tmp_path / "recipe.json").read_text())["checkpoint"]["digest"]
    weights = f"digits, step 0, EMA 0.999, sha256 {digest[:8]}"
    assert " ".join(lines) == f"{weights}; euler, 4 steps, seed 0; IG 2 + CFG 1.5 on (0, 0.7]"


@pytest.mark.parametrize("save", ["png,npz", "npz", "png"])
def test_a_finished_folder_grows(checkpoint, whole, tmp_path, save):
    """The first images stay, those that an archive alone holds included."""
    given = PLAIN | dict(checkpoint=checkpoint, out=tmp_path / "out", save=save)
    run(**given | dict(num=5))
    first = files(tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*.png")}
    run(**given)
    grown = files(tmp_path / "out")
    expected = {name: content for name, content in files(whole).items() if name in grown}
    assert grown == expected and len(grown) == {"png,npz": 13, "npz": 1, "png": 12}[save]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("00000[0-4].png")} == times
    if "npz" in save:
        few, many = (np.load(io.BytesIO(content["samples.npz"])) for content in (first, grown))
        np.testing.assert_array_equal(many["arr_0"][:5], few["arr_0"])
        np.testing.assert_array_equal(many["arr_1"][:5], few["arr_1"])
    metadata = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert metadata["num"] == 12 and metadata["finished"]["images"] == 7
    with refused("--out", expected="the same num", says="another num (12)"):
        run(**given | dict(num=11))


def test_a_killed_growth_is_resumed(checkpoint, whole, tmp_path):
    """From any moment: the archive is removed only when each of its images has a file."""
    given = PLAIN | dict(checkpoint=checkpoint, out=tmp_path / "out", save="npz")
    run(**given | dict(num=5))
    args = [f"--{k}={v}" for k, v in given.items()]
    for survived in ("1", "5"):  # recipe.json alone; then the images that the archive holds, but for one
        assert command(*args, survived, program=KILLED).returncode == -signal.SIGKILL
        with refused("--out", expected="the same seed"):
            run(**given | dict(seed=1))
    run(**given)
    assert files(tmp_path / "out") == {name: files(whole)[name] for name in ("samples.npz",)}


def test_a_folder_grows_with_the_labels_that_it_has(checkpoint, tmp_path):
    given = PLAIN | dict(checkpoint=checkpoint, out=tmp_path / "out", labels=tmp_path / "labels", save="npz")
    (tmp_path / "labels").write_text("1 2 3")
    run(**given | dict(num=2))
    (tmp_path / "labels").write_text("1 7 3")
    with refused("--out", expected="the same labels_sha256"):
        run(**given | dict(num=4))
    (tmp_path / "labels").write_text("1 2 7 8")  # the first two are the same
    run(**given | dict(num=4))
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "samples.npz")["arr_1"], [1, 2, 7, 8])


def test_saved_latents_grow_and_so_do_their_images(checkpoint, whole, tmp_path):
    for num in (5, 12):
        run(**PLAIN | dict(checkpoint=checkpoint, out=tmp_path / "latents", save="latents", num=num))
        run(decode=tmp_path / "latents", out=tmp_path / "out", batch_size=8)
    assert files(tmp_path / "out") == files(whole)


def test_the_null_label_samples_without_a_class(checkpoint, tmp_path):
    """By its word and by its number; CFG then has nothing to guide away from."""
    given = PLAIN | dict(checkpoint=checkpoint, num=3, save="npz", cfg_scale=1.0)
    for name, more in (("word", dict(labels="null")), ("number", dict(labels="10")), ("classes", {})):
        run(out=tmp_path / name, **given | more)
    word, number, classes = (np.load(tmp_path / name / "samples.npz") for name in ("word", "number", "classes"))
    np.testing.assert_array_equal(word["arr_0"], number["arr_0"])
    np.testing.assert_array_equal(word["arr_1"], [10] * 3)
    assert (word["arr_0"] != classes["arr_0"]).any()
    model = pretrained.load(checkpoint)
    recipe = model.recipe.replace(ig_scale=2.0, cfg_scale=1.0)
    np.testing.assert_array_equal(word["arr_0"], model.sample([10] * 3, recipe).repeat(3, -1))


def of_pixels(channels):
    """A model of pixels with other channels than grey and RGB."""
    e = tiny.experiment(channels=channels)
    data = dataclasses.replace(e.data, holds="pixels", dtype="uint8")
    return in_memory(dataclasses.replace(e, latents=from_factor("pixels", 1.0, channels, "half"), data=data))


@pytest.mark.parametrize("channels, mode", [(2, "LA"), (4, "RGBA")])
def test_images_with_alpha_are_written(tmp_path, monkeypatch, channels, mode):
    model = of_pixels(channels)
    monkeypatch.setattr(pretrained, "load", lambda *args, **kwargs: model)
    run(checkpoint="alpha", out=tmp_path, num=3, steps=2)
    with Image.open(tmp_path / "000001.png") as picture, np.load(tmp_path / "samples.npz") as archive:
        assert picture.mode == mode
        np.testing.assert_array_equal(np.asarray(picture), archive["arr_0"][1])


def test_images_that_no_file_can_hold_are_refused(tmp_path, monkeypatch, no_compilation):
    model = of_pixels(5)
    monkeypatch.setattr(pretrained, "load", lambda *args, **kwargs: model)
    with refused("model.channels", 5, expected="4 (RGBA)", fix="--save=latents"):
        run(checkpoint="many", out=tmp_path / "out", num=3)
    assert not (tmp_path / "out").exists()


def test_a_removed_image_is_sampled_again(checkpoint, whole, tmp_path):
    run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)
    (tmp_path / "out" / "000007.png").unlink()
    run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)
    assert files(tmp_path / "out") == files(whole)


def test_a_removed_archive_is_assembled_again(checkpoint, whole, tmp_path):
    run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)
    (tmp_path / "out" / "samples.npz").unlink()
    run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)
    assert files(tmp_path / "out") == files(whole)


def test_a_changed_file_of_labels_is_refused(checkpoint, tmp_path):
    """Otherwise the archive would pair the existing images with the new labels."""
    (tmp_path / "labels").write_text("1 2 3")
    given = PLAIN | dict(checkpoint=checkpoint, out=tmp_path / "out", labels=tmp_path / "labels", num=4)
    run(**given)
    (tmp_path / "out" / "000001.png").unlink()
    (tmp_path / "labels").write_text("7")
    with refused("--out", str(tmp_path / "out"), expected="the same labels_sha256", fix="another --out"):
        run(**given)


def test_a_run_that_failed_before_its_first_image_does_not_keep_its_folder(checkpoint, tmp_path):
    """Samples that are not finite leave recipe.json and no image: another scale may use the folder."""
    given = PLAIN | dict(checkpoint=checkpoint, out=tmp_path / "out", num=2)
    with refused("solver", "euler", fix="lower the guidance scales", says="not finite"):
        run(**given | dict(ig_scale=1e38, cfg_scale=1e38))
    run(**given)
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["recipe"]["ig_scale"] == 2


def test_other_files_that_look_temporary_are_left_alone(checkpoint, tmp_path):
    (tmp_path / "out" / ".a.0123abcd.tmp").mkdir(parents=True)
    (tmp_path / "out" / ".mine.tmp").write_text("")
    (tmp_path / "out" / ".000000.png.0123abcd.tmp").write_text("")
    run(**PLAIN | dict(checkpoint=checkpoint, out=tmp_path / "out", num=2))
    assert sorted(p.name for p in (tmp_path / "out").glob(".*")) == [".a.0123abcd.tmp", ".mine.tmp"]


def test_a_preset_has_random_labels_as_its_fid_was_measured(checkpoint, tmp_path):
    given = dict(checkpoint=checkpoint, num=30, steps=2, save="npz", preset="sit-xl-ig")
    run(out=tmp_path / "a", **given)
    run(out=tmp_path / "b", **given, labels="balanced")
    random, balanced = (np.load(tmp_path / name / "samples.npz")["arr_1"] for name in "ab")
    np.testing.assert_array_equal(random, labels_for(np.arange(30), "random", 10, 0))
    np.testing.assert_array_equal(balanced, np.arange(30) % 10)


def test_a_signal_ends_in_one_line_that_says_how_to_resume(checkpoint, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ig_jax.sample",
            f"--checkpoint={checkpoint}",
            f"--out={tmp_path / 'out'}",
            "--num=100000",
            "--save=png",
            "--batch_size=8",
        ],
        cwd=toy.ROOT,
        env=toy.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + toy.HANGS
    while not list((tmp_path / "out").glob("*.png")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=toy.HANGS)[0].splitlines()
    assert process.returncode == RESUMABLE
    assert printed[-1] == "ig_jax: stopped: SIGTERM; rerun the same command to resume"
    assert not any("Traceback" in line for line in printed) and len(files(tmp_path / "out")) > 1


def test_a_closed_pipe_ends_in_one_line(checkpoint, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "ig_jax.sample", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'out'}", "--num=2"],
        cwd=toy.ROOT,
        env=toy.environment(),
        text=True,
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert done.returncode == RESUMABLE
    assert done.stderr.splitlines()[-1].startswith("ig_jax: stopped: no reader of the output")
    assert "Traceback" not in done.stderr


def test_python_takes_classes_and_nothing_else(checkpoint):
    model = pretrained.load(checkpoint)
    recipe = model.recipe.replace(steps=2)
    assert model.sample([], recipe).shape == (0, 8, 8, 1)
    assert model.sample([3, 10], recipe).shape == (2, 8, 8, 1)  # 10 is the null label
    for labels in ([3, 11], [-1], [1.7], ["1"], 3):
        with refused("labels"):
            model.sample(labels, recipe)
    with refused("seed", -1):
        model.sample([1], recipe, seed=-1)
    with refused("batch_size", 0):
        model.sample([1], recipe, batch_size=0)


def test_adaptive_solver_reports_its_evaluations(checkpoint, tmp_path):
    pytest.importorskip("diffrax")
    run(
        checkpoint=checkpoint,
        out=tmp_path,
        num=4,
        solver="dopri5",
        steps=200,
        rtol=1e-2,
        cfg_scale=1.5,
        cfg_interval="0,0.7",
    )
    metadata = json.loads((tmp_path / "recipe.json").read_text())
    assert metadata["evaluations_per_image"] > 14 and metadata["recipe"]["rtol"] == 1e-2


def in_memory(e, seed=0):
    """A model that was never on disk."""
    mesh = make_mesh()
    params = jax.device_put(tiny.state(e, seed).params, replicated(mesh))
    return pretrained.Pretrained(e, params, mesh, 0, "0.999", f"{seed}", tuple("0123456789"))


def test_autoguidance_takes_a_second_model(checkpoint, whole, tmp_path, monkeypatch):
    weak = in_memory(tiny.experiment(depth=1, inter_depth=()), seed=3)
    both = dataclasses.replace(in_memory(tiny.experiment()), second=weak)
    monkeypatch.setattr(pretrained, "load", lambda *args, **kwargs: both)
    run(checkpoint=checkpoint, out=tmp_path / "out", **(PLAIN | dict(auto_scale=1.8)))
    assert files(tmp_path / "out")["samples.npz"] != files(whole)["samples.npz"]
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["second"]["digest"] == "3"
    assert both.metadata(both.recipe.replace(auto_scale=1.0))["second"] is None  # it is at hand, and does not guide


def test_the_documented_example_runs(checkpoint):
    lines = [line[4:] for line in pretrained.__doc__.splitlines() if line.startswith("    ")]
    names = {"pretrained": pretrained, "dataclasses": dataclasses}
    exec("\n".join(lines).replace('"runs/digits"', repr(str(checkpoint))), names)
    assert names["images"].shape == (4, 8, 8, 1) and names["images"].dtype == np.uint8
    assert names["out"].final.shape == names["out"].intermediate[0].shape == (2, 8, 8, 1)


@pytest.fixture
def no_compilation(monkeypatch):
    """Nothing is compiled before the input has been checked."""
    monkeypatch.setattr("ig_jax.generation.sampler.make_sampler", lambda *a: pytest.fail("compiled"))


@pytest.mark.parametrize(
    "given, name, value, words",
    [
        (dict(ig_interval="0.3,1.2"), "ig_interval", (0.3, 1.2), dict(expected="lo < hi <= 1")),
        (dict(cfg_interval="0.7,0.2"), "cfg_interval", (0.7, 0.2), dict(expected="lo < hi")),
        (dict(ig_interval="0.3"), "ig_interval", (0.3,), dict(expected="2 numbers")),
        (dict(ig_head=2), "ig_head", 2, dict(expected="in 0..1")),
        (dict(ig_head="0.5,0.3,0.2"), "ig_head", (0.5, 0.3, 0.2), dict(expected="2 weights")),
        (dict(labels="3,11"), "labels", 11, dict(expected="in 0..9")),
        (dict(labels="some"), "labels", "some", dict(expected="a list such as 3,1,4")),
        (dict(labels="missing.txt"), "labels", "missing.txt", dict(expected="a readable file", fix="path")),
        (dict(labels="9" * 20), "labels", "9" * 20, dict(expected="whole numbers")),
        (dict(steps=0), "steps", 0, dict(expected="at least 1")),
        (dict(solver="sde", steps=1), "steps", 1, dict(expected="at least 2 for the solver sde")),
        (dict(solver="rk9"), "solver", "rk9", dict(expected="heun")),
        (dict(solver="euler", last_step="tweedie"), "last_step", "tweedie", dict(expected="'euler'", fix="sde")),
        (dict(solver="sde", shift=0.3), "shift", 0.3, dict(expected="'sde'", fix="euler")),
        (dict(shift="inf"), "shift", float("inf"), dict(expected="finite")),
        (dict(solver="sde", diffusion_norm="inf"), "diffusion_norm", float("inf"), dict(expected="finite")),
        (dict(ig_scale="fast"), "ig_scale", "fast", dict(expected="cosine:1,2")),
        (dict(ig_scale=-1), "ig_scale", -1.0, dict(expected="at least 0")),
        (dict(ig_scale="nan"), "ig_scale", ANYTHING, dict(expected="finite")),
        (dict(cfg_scale=2, prefix_scale=2), "(cfg_scale, prefix_scale)", (2.0, 2.0), dict(expected="1 for one")),
        (dict(cfg_scale=2, cfg_channels="first_three"), "cfg_channels", "first_three", dict(expected="1 channels")),
        (dict(auto_scale=2), "auto_scale", 2.0, dict(fix="--auto_checkpoint")),
        (dict(preset="lightningdit-ig"), "preset", "lightningdit-ig", dict(expected="sit", fix="sit-xl-ig")),
        (dict(preset="best"), "preset", "best", dict(expected="sit-xl-ig")),
        (dict(num=0), "--num", 0, dict(expected="at least 1")),
        (dict(seed=-1), "--seed", -1, dict(expected="at least 0")),
        (dict(batch_size=0), "--batch_size", 0, dict(expected="at least 1")),
        (dict(save="gif"), "save", "gif", dict(expected="png, npz")),
        (dict(save="png,latents"), "save", "png,latents", dict(expected="or latents")),
        (dict(ema="0.5"), "ema", "0.5", dict(expected="0.999")),
        (dict(checkpoint="nowhere"), "checkpoint", "nowhere", dict(fix="--workdir")),
        (dict(autoencoder="nowhere"), "autoencoder", "nowhere", dict(expected="left out for a model of pixels")),
        (dict(decode="nowhere"), "--decode", "nowhere", dict(expected="without --checkpoint, --num, --ig_scale")),
    ],
)
def test_bad_input_is_refused_before_compilation(checkpoint, tmp_path, no_compilation, given, name, value, words):
    with refused(name, value, **words):
        run(**({"checkpoint": checkpoint, "out": tmp_path / "out", "num": 4, "ig_scale": 1} | given))
    assert not (tmp_path / "out").exists()


def test_latent_model_needs_its_autoencoder_or_saves_latents(tmp_path, monkeypatch):
    latent = in_memory(tiny.experiment(channels=4))
    monkeypatch.setattr(pretrained, "load", lambda *args, **kwargs: latent)
    with refused("autoencoder", "", fix="or --save=latents"):
        run(checkpoint="latent", out=tmp_path / "out", num=2)
    assert not (tmp_path / "out").exists()
    run(checkpoint="latent", out=tmp_path / "out", num=2, save="latents")
    assert np.load(tmp_path / "out" / "000001.npy").shape == (8, 8, 4)
    with refused("autoencoder", "", expected="the sd_vae autoencoder"):
        run(decode=tmp_path / "out", out=tmp_path / "images")
    with refused("--decode", "nowhere", expected="a finished folder"):
        run(decode="nowhere", out=tmp_path / "images")


def test_images_of_another_decoder_are_other_images(tmp_path, monkeypatch):
    config = AutoencoderConfig(channels=(8, 8), layers=1, latent_channels=4, groups=4)
    latent = in_memory(tiny.experiment(channels=4))

    def first_image(folder, metadata, *args, **kwargs):
        folder.prepare(metadata)
        folder.write(0, np.zeros((16, 16, 3), np.uint8))

    monkeypatch.setattr(sample, "write_samples", first_image)

    def sample_with(digest):
        model = dataclasses.replace(latent, autoencoder=decode.Autoencoder(config, {}, digest))
        monkeypatch.setattr(pretrained, "load", lambda *args, **kwargs: model)
        run(checkpoint="latent", out=tmp_path / "out", num=2, steps=2)

    sample_with("first")
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["autoencoder"] == "first"
    with refused("--out", expected="the same autoencoder"):
        sample_with("second")


def test_a_folder_of_something_else_is_left_alone(checkpoint, whole, tmp_path):
    with refused("--out", str(whole), expected="the same seed", says="another seed (0)"):
        run(checkpoint=checkpoint, out=whole, **(PLAIN | {"seed": 1}))
    with refused("--out", str(whole), expected="the same recipe", says="ig_scale is 2.0"):
        run(checkpoint=checkpoint, out=whole, **(PLAIN | {"ig_scale": 1.7}))
    images.write_png(tmp_path / "000000.png", np.zeros((2, 2, 1), np.uint8))
    with refused("out", str(tmp_path), expected="recipe.json", fix="another --out"):
        run(checkpoint=checkpoint, out=tmp_path, **PLAIN)
    for content in ("{", "[]", '{"flour": 2}'):
        (tmp_path / "recipe.json").write_text(content)
        with refused("out", str(tmp_path), expected="a readable recipe.json"):
            run(checkpoint=checkpoint, out=tmp_path, **PLAIN)


def test_archive_too_large_for_the_disk_is_refused(checkpoint, tmp_path, monkeypatch, no_compilation):
    free = type("Usage", (), {"free": 700})
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with refused("num", 12, expected="samples.npz", fix="leave npz out"):
        run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)


def test_a_full_disk_ends_in_one_line_and_the_same_command_resumes(checkpoint, whole, tmp_path, monkeypatch):
    write, left = os.fsync, [6]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(images.os, "fsync", full)
        with refused("path", fix="space", says="No space left"):
            run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)
    there = files(tmp_path / "out")
    assert 3 <= len(there) < 12 and all(files(whole)[name] == content for name, content in there.items())
    run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)
    assert files(tmp_path / "out") == files(whole)


def test_unwritable_folder_is_one_line(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with refused("out", str(tmp_path / "file"), expected="a directory"):
        run(checkpoint=checkpoint, out=tmp_path / "file", num=4)
    with refused("out", str(tmp_path / "file" / "out"), expected="a readable recipe.json"):
        run(checkpoint=checkpoint, out=tmp_path / "file" / "out", num=4)


def test_eight_devices_are_in_use():
    assert jax.device_count() == 8
