"""The sample command: the same bytes however it is run, and one line for what cannot be done."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_checkpoint as tiny
import toy
from PIL import Image

from ig_jax import cli, pretrained, sample
from ig_jax.errors import RESUMABLE, UserError
from ig_jax.generation import decode, images
from ig_jax.generation.labels import labels_for
from ig_jax.models.autoencoder_config import AutoencoderConfig
from ig_jax.parallel.mesh import make_mesh
from ig_jax.parallel.sharding import replicated


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("run"), tiny.experiment())


def run(**given):
    """One command in this process."""
    for name in sample.FLAGS:
        sample.FLAGS[name].unparse()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample", *(f"--{name}={value}" for name, value in given.items())])
        cli.parse(sample.FLAGS)
        sample.main()


def files(folder):
    """Contents by name, but what tells the machine and the time."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "recipe.json"}


def command(*args, program="import sys; from ig_jax import cli, sample; cli.run(sample.main, sample.FLAGS, '')"):
    """The command as a process, on one device."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(toy.ROOT), os.environ.get("PYTHONPATH", "")]),
                                "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", program, *args], env=environment, capture_output=True, text=True)


PLAIN = dict(num=12, ig_scale=2.0, cfg_scale=1.5, cfg_interval="0,0.7", batch_size=4)


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(checkpoint=checkpoint, out=out, **PLAIN)
    return out


def test_writes_images_archive_grid_and_record(whole):
    record = json.loads((whole / "recipe.json").read_text())
    assert sorted(files(whole)) == sorted([f"{i:06d}.png" for i in range(12)] + ["grid.png", "samples.npz"])
    with np.load(whole / "samples.npz") as archive:
        assert archive["arr_0"].shape == (12, 8, 8, 1) and archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_1"], np.arange(12) % 10)
        for i, image in enumerate(archive["arr_0"]):
            np.testing.assert_array_equal(np.asarray(Image.open(whole / f"{i:06d}.png")), image[..., 0])
        assert archive["arr_0"].std() > 10
    # Four steps at 1, 0.75, 0.5, 0.25: the batch is doubled on the last two.
    assert record["evaluations_per_image"] == 6 and record["grid"] == [1.0, 0.75, 0.5, 0.25]
    assert record["finished"]["images"] == 12 and len(record["checkpoint"]["digest"]) == 64
    for key in ("recipe", "solver", "labels", "seed", "versions", "device", "processes"):
        assert key in record


@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_batch_size_changes_no_byte(checkpoint, whole, tmp_path, batch_size):
    run(checkpoint=checkpoint, out=tmp_path / "out", **(PLAIN | {"batch_size": batch_size}))
    assert files(tmp_path / "out") == files(whole)


KILLED = """
import os, signal, sys, threading
from ig_jax import cli, sample
from ig_jax.generation import images
left, lock, replace = [int(sys.argv.pop())], threading.Lock(), os.replace
def deadly(source, target):
    with lock:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)  # its bytes are written, its name is not given
        replace(source, target)
images.os.replace = deadly
cli.run(sample.main, sample.FLAGS, "")
"""


def test_a_killed_run_goes_on_to_the_same_files(checkpoint, whole, tmp_path):
    """One device here and eight in the fixture: the bytes are the same on both."""
    args = [f"--{k}={v}" for k, v in (PLAIN | {"checkpoint": checkpoint, "out": tmp_path / "out"}).items()]
    for survived in ("4", "3"):  # the record and some images; then the record again and some more
        assert command(*args, survived, program=KILLED).returncode == -signal.SIGKILL
        assert any(path.name.endswith(".tmp") for path in (tmp_path / "out").iterdir())
    ended = command(*args)
    assert ended.returncode == 0, ended.stderr
    assert files(tmp_path / "out") == files(whole)
    assert "nothing to do" in command(*args).stdout


def test_two_processes_write_one_folder(checkpoint, whole, tmp_path):
    args = [f"--{k}={v}" for k, v in (PLAIN | {"checkpoint": checkpoint, "out": tmp_path / "out"}).items()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(toy.ROOT), os.environ.get("PYTHONPATH", "")]),
                                "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([toy.ROOT / "launch" / "local.sh", "2", sys.executable, "-m", "ig_jax.sample", *args],
                           env=environment, capture_output=True, text=True, timeout=toy.HANGS)
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
    assert sorted(files(tmp_path / "out")) == ["grid.png", "samples.npz"]
    assert (tmp_path / "out" / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()


def test_a_removed_image_is_drawn_again(checkpoint, whole, tmp_path):
    run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)
    (tmp_path / "out" / "000007.png").unlink()
    run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)
    assert files(tmp_path / "out") == files(whole)


def test_a_removed_archive_is_put_together_again(checkpoint, whole, tmp_path):
    run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)
    (tmp_path / "out" / "samples.npz").unlink()
    run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)
    assert files(tmp_path / "out") == files(whole)


def test_a_file_of_labels_that_has_changed_is_other_labels(checkpoint, tmp_path):
    """Otherwise the archive would give the images that are there the labels of the new ones."""
    (tmp_path / "labels").write_text("1 2 3")
    given = PLAIN | dict(checkpoint=checkpoint, out=tmp_path / "out", labels=tmp_path / "labels", num=4)
    run(**given)
    (tmp_path / "out" / "000001.png").unlink()
    (tmp_path / "labels").write_text("7")
    with pytest.raises(UserError, match="holds images of another labels_sha256"):
        run(**given)


def test_what_came_to_nothing_does_not_keep_its_folder(checkpoint, tmp_path):
    """Samples that are not finite leave a record and no image: another scale may go there."""
    given = PLAIN | dict(checkpoint=checkpoint, out=tmp_path / "out", num=2)
    with pytest.raises(UserError, match="lower the guidance scales"):
        run(**given | dict(ig_scale=1e38, cfg_scale=1e38))
    run(**given)
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["recipe"]["ig_scale"] == 2


def test_other_files_that_look_temporary_are_left_alone(checkpoint, tmp_path):
    (tmp_path / "out" / ".a.0123abcd.tmp").mkdir(parents=True)
    (tmp_path / "out" / ".mine.tmp").write_text("")
    (tmp_path / "out" / ".000000.png.0123abcd.tmp").write_text("")
    run(**PLAIN | dict(checkpoint=checkpoint, out=tmp_path / "out", num=2))
    assert sorted(p.name for p in (tmp_path / "out").glob(".*")) == [".a.0123abcd.tmp", ".mine.tmp"]


def test_a_preset_draws_random_classes_as_its_number_was_measured(checkpoint, tmp_path):
    given = dict(checkpoint=checkpoint, num=30, steps=2, save="npz", preset="sit-xl-ig")
    run(out=tmp_path / "a", **given)
    run(out=tmp_path / "b", **given, labels="balanced")
    drawn, balanced = (np.load(tmp_path / name / "samples.npz")["arr_1"] for name in "ab")
    np.testing.assert_array_equal(drawn, labels_for(np.arange(30), "random", 10, 0))
    np.testing.assert_array_equal(balanced, np.arange(30) % 10)


def test_asked_to_stop_it_says_that_it_can_go_on(checkpoint, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "ig_jax.sample", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'out'}", "--num=100000",
         "--save=png", "--batch_size=8"], cwd=toy.ROOT, env=toy.environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    said = [line for line, _ in zip(process.stdout, range(8))]
    process.send_signal(signal.SIGTERM)
    said += process.communicate(timeout=toy.HANGS)[0].splitlines()
    assert process.returncode == RESUMABLE
    assert said[-1] == "ig_jax: stopped: SIGTERM; the same command goes on from what is there"
    assert not any("Traceback" in line for line in said) and len(files(tmp_path / "out")) > 1


def test_a_reader_that_leaves_is_one_line(checkpoint, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "ig_jax.sample", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'out'}", "--num=2"],
        cwd=toy.ROOT, env=toy.environment(), text=True, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == RESUMABLE
    assert done.stderr.splitlines()[-1].startswith("ig_jax: stopped: nobody reads") and "Traceback" not in done.stderr


def test_python_takes_classes_and_nothing_else(checkpoint):
    model = pretrained.load(checkpoint)
    recipe = dataclasses.replace(model.recipe, steps=2)
    assert model.sample(recipe, []).shape == (0, 8, 8, 1)
    assert model.sample(recipe, [3, 10]).shape == (2, 8, 8, 1)  # 10 is the null label
    for labels in ([3, 11], [-1], [1.7], ["1"], 3):
        with pytest.raises(UserError, match="^labels="):
            model.sample(recipe, labels)
    with pytest.raises(UserError, match="^seed=-1"):
        model.sample(recipe, [1], seed=-1)
    with pytest.raises(UserError, match="^batch_size=0"):
        model.sample(recipe, [1], batch_size=0)


def test_adaptive_solver_reports_its_evaluations(checkpoint, tmp_path):
    pytest.importorskip("diffrax")
    run(checkpoint=checkpoint, out=tmp_path, num=4, solver="dopri5", steps=200, rtol=1e-2, cfg_scale=1.5,
        cfg_interval="0,0.7")
    record = json.loads((tmp_path / "recipe.json").read_text())
    assert record["evaluations_per_image"] > 14 and record["solver"]["rtol"] == 1e-2


@pytest.mark.parametrize("kind, flag", [("compare", {"compare": True, "num": 10}), ("gap", {"gap": True, "num": 2}),
                                        ("map", {"map": "ig:1,2;cfg:1,1.5", "num": 4})])
def test_pictures(checkpoint, tmp_path, kind, flag, capsys):
    run(checkpoint=checkpoint, out=tmp_path, ig_scale=2, cfg_scale=1.5, **flag)
    picture = np.asarray(Image.open(tmp_path / f"{kind}.png"))
    assert picture.shape[-1] == 3 and picture.shape[0] > 150 and 5 < picture.std() < 120
    drawn = {"compare": "40/40 images", "map": "16/16 images", "gap": ""}
    assert drawn[kind] in capsys.readouterr().err


def in_memory(e, seed=0):
    """A model that was never on disk."""
    mesh = make_mesh()
    params = jax.device_put(tiny.state(e, seed).params, replicated(mesh))
    return pretrained.Pretrained(e, params, mesh, 0, "0.999", f"{seed}", tuple("0123456789"))


def test_autoguidance_takes_a_second_model(checkpoint, whole, tmp_path, monkeypatch):
    weak = in_memory(tiny.experiment(depth=1, inter_depth=()), seed=3)
    both = dataclasses.replace(in_memory(tiny.experiment()), weak=weak)
    monkeypatch.setattr(pretrained, "load", lambda *args, **kwargs: both)
    run(checkpoint=checkpoint, out=tmp_path / "out", **(PLAIN | dict(auto_scale=1.8)))
    assert files(tmp_path / "out")["samples.npz"] != files(whole)["samples.npz"]
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["weak"]["digest"] == "3"


def test_the_documented_example_runs(checkpoint):
    lines = [line[4:] for line in pretrained.__doc__.splitlines() if line.startswith("    ")]
    names = {"pretrained": pretrained, "dataclasses": dataclasses}
    exec("\n".join(lines).replace('"runs/digits"', repr(str(checkpoint))), names)  # noqa: S102
    assert names["images"].shape == (4, 8, 8, 1) and names["images"].dtype == np.uint8


@pytest.fixture
def no_compilation(monkeypatch):
    """Nothing is traced for a device before the input has been found good."""
    monkeypatch.setattr("ig_jax.generation.generate.make_sampler", lambda *a: pytest.fail("compiled"))


@pytest.mark.parametrize("given, named", [
    (dict(ig_interval="0.3,1.2"), "ig_interval"),
    (dict(cfg_interval="0.7,0.2"), "cfg_interval"),
    (dict(ig_interval="0.3"), "ig_interval"),
    (dict(ig_head=2), "ig_head"),
    (dict(ig_head="0.5,0.3,0.2"), "ig_head"),
    (dict(labels="3,11"), "labels=11"),
    (dict(labels="some"), "labels='some'"),
    (dict(labels="missing.txt"), "missing.txt"),
    (dict(steps=0), "steps=0"),
    (dict(solver="sde", steps=1), "steps=1"),
    (dict(solver="rk9"), "solver='rk9'"),
    (dict(solver="euler", last_step="tweedie"), "last_step='tweedie'.*'euler'"),
    (dict(solver="sde", shift=0.3), "shift=0.3.*'sde'"),
    (dict(ig_scale="fast"), "ig_scale='fast'"),
    (dict(ig_scale=-1), "ig_scale"),
    (dict(ig_scale="nan"), "ig_scale"),
    (dict(cfg_scale=2, prefix_scale=2), "prefix_scale"),
    (dict(cfg_scale=2, cfg_channels="first_three"), "cfg_channels"),
    (dict(auto_scale=2), "auto_checkpoint"),
    (dict(preset="lightningdit-ig"), "preset='lightningdit-ig'"),
    (dict(preset="best"), "preset='best'"),
    (dict(num=0), "num=0"),
    (dict(seed=-1), "seed=-1"),
    (dict(batch_size=0), "batch_size=0"),
    (dict(save="gif"), "save='gif'"),
    (dict(save="png,latents"), "save"),
    (dict(ema="0.5"), "ema='0.5'"),
    (dict(map="ig:1,2"), "map="),
    (dict(map="ig:1,2;ig:1"), "map="),
    (dict(compare=True), "ig_scale, cfg_scale"),
    (dict(compare=True, gap=True), "--compare, --gap"),
    (dict(checkpoint="nowhere"), "nowhere"),
    (dict(autoencoder="nowhere"), "nowhere"),
    (dict(decode="nowhere"), "--decode='nowhere' must be given without --checkpoint, --num, --ig_scale"),
    (dict(gap=True, solver="ab2"), "use euler, heun, trapezoid or sde"),
    (dict(labels="99999999999999999999"), "labels='99999999999999999999'"),
    (dict(shift="inf"), "shift=inf"),
    (dict(solver="sde", diffusion_norm="inf"), "diffusion_norm=inf"),
])
def test_bad_input_is_one_line_before_compilation(checkpoint, tmp_path, no_compilation, given, named):
    with pytest.raises(UserError, match=named) as caught:
        run(**({"checkpoint": checkpoint, "out": tmp_path / "out", "num": 4, "ig_scale": 1} | given))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_latent_model_needs_its_autoencoder_or_saves_latents(tmp_path, monkeypatch):
    latent = in_memory(tiny.experiment(channels=4))
    monkeypatch.setattr(pretrained, "load", lambda *args, **kwargs: latent)
    with pytest.raises(UserError, match="--autoencoder, or --save=latents"):
        run(checkpoint="latent", out=tmp_path / "out", num=2)
    assert not (tmp_path / "out").exists()
    run(checkpoint="latent", out=tmp_path / "out", num=2, save="latents")
    assert np.load(tmp_path / "out" / "000001.npy").shape == (8, 8, 4)
    with pytest.raises(UserError, match="autoencoder"):
        run(decode=tmp_path / "out", out=tmp_path / "images")
    with pytest.raises(UserError, match="--decode='nowhere'"):
        run(decode="nowhere", out=tmp_path / "images")


def test_images_of_another_decoder_are_other_images(tmp_path, monkeypatch):
    config = AutoencoderConfig(channels=(8, 8), layers=1, latent_channels=4, groups=4)
    latent = in_memory(tiny.experiment(channels=4))

    def first_image(model, recipe, labels, folder, record):
        folder.prepare(record)
        folder.write(0, np.zeros((16, 16, 3), np.uint8))

    monkeypatch.setattr(sample, "write_samples", first_image)

    def draw_with(digest):
        model = dataclasses.replace(latent, autoencoder=decode.Autoencoder(config, {}, digest))
        monkeypatch.setattr(pretrained, "load", lambda *args, **kwargs: model)
        run(checkpoint="latent", out=tmp_path / "out", num=2, steps=2)

    draw_with("first")
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["autoencoder"] == "first"
    with pytest.raises(UserError, match="holds images of another autoencoder"):
        draw_with("second")


def test_a_folder_of_something_else_is_left_alone(checkpoint, whole, tmp_path):
    with pytest.raises(UserError, match="another seed"):
        run(checkpoint=checkpoint, out=whole, **(PLAIN | {"seed": 1}))
    with pytest.raises(UserError, match="another recipe"):
        run(checkpoint=checkpoint, out=whole, **(PLAIN | {"ig_scale": 1.7}))
    images.write_png(tmp_path / "000000.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(UserError, match="something else"):
        run(checkpoint=checkpoint, out=tmp_path, **PLAIN)


def test_archive_too_large_for_the_disk_is_refused(checkpoint, tmp_path, monkeypatch, no_compilation):
    free = type("Usage", (), {"free": 700})
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(UserError, match="num=12 .*samples.npz"):
        run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)


def test_full_disk_ends_in_one_line_and_the_same_command_goes_on(checkpoint, whole, tmp_path, monkeypatch):
    write, left = os.fsync, [6]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(images.os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)
    there = files(tmp_path / "out")
    assert 3 <= len(there) < 12 and all(files(whole)[name] == content for name, content in there.items())
    run(checkpoint=checkpoint, out=tmp_path / "out", **PLAIN)
    assert files(tmp_path / "out") == files(whole)


def test_unwritable_folder_is_one_line(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out="):
        run(checkpoint=checkpoint, out=tmp_path / "file", num=4)
    with pytest.raises(UserError, match="out="):
        run(checkpoint=checkpoint, out=tmp_path / "file" / "out", num=4)


def test_eight_devices_are_in_use():
    assert jax.device_count() == 8
