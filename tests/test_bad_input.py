"""Bad input of every command: one line that names the value and the fix, exit code 2, and no file written."""

import functools
import importlib
import json
import shutil
import signal
import sys

import pytest
import toy
from absl import flags

from ig_jax.base import cli

CONFIG = "--config=configs/digits.py"


def outcome(command: str, *arguments: str, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command run in this process."""
    module = importlib.import_module(f"ig_jax.{command}")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"ig_jax.{command}", *arguments])
        cli.run(module.main, toy.fresh(module.FLAGS), module.__doc__, getattr(module, "WORDS", ()))
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


def assert_one_line(result, words: str):
    code, _, err = result
    assert code == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ig_jax: error: "), err
    assert len(lines[0]) < 400
    assert words in lines[0]


# Overrides of configs/digits.py and what the line must say.
CONFIGS = [
    ("model.inter_depth=7", "config.model.inter_depth=7 must be in 1..6"),
    ("model.inter_depth=0", "config.model.inter_depth=0 must be in 1..6"),
    ("model.inter_depth=(2,2)", "without repeats"),
    ("model.width=66", "config.model.width=66 must be a multiple of 4"),
    ("model.num_heads=3", "config.model.width=64 must be a multiple of num_heads=3"),
    ("model.num_heads=0", "config.model.num_heads=0 must be at least 1"),
    ("model.patch_size=3", "config.model.input_size=8 must be a multiple of patch_size=3"),
    ("model.depth=-2", "config.model.depth=-2 must be at least 1"),
    ("model.mlp_ratio=0.0", "config.model.mlp_ratio=0.0 must be greater than 0"),
    ("model.mlp_ratio=nan", "config.model.mlp_ratio=nan must be a finite number"),
    ("model.dtype=float16", "must be one of float32, bfloat16"),
    ("model.norm=batch", "must be one of layernorm, rmsnorm"),
    ("model.attention=flash", "config.model.attention='flash' must be one of auto, xla, cudnn"),  # not in the file
    ("run.stepz=3", "config.run.stepz is not a setting that anything reads; did you mean config.run.steps?"),
    ("foo.bar=3", "config.foo is not a setting that anything reads"),
    ("model.remat=some", "must be one of none, dots, full"),
    ("model.num_classes=12", "must be 10, the classes of"),
    ("model.input_size=16", "data image shape=(8, 8, 1) must be (16, 16, 1)"),
    ("model.channels=3", "config.latents.scale=(1.0,) must be one factor for each of the 3 channels"),
    ("loss.omega=1.0", "config.loss.omega=1.0 must be in [0, 1)"),
    ("loss.omega=-0.1", "config.loss.omega=-0.1 must be in [0, 1)"),
    ("loss.omega=inf", "config.loss.omega=inf must be a finite number"),
    ("loss.gap_source=final", "must be ema or online"),
    ("loss.label_drop=1.5", "config.loss.label_drop=1.5 must be in [0, 1)"),
    ("loss.inter_weight=(0.5,0.5)", "must be one weight for each of model.inter_depth=(2,)"),
    ("loss.inter_weight=(-1.0,)", "must be at least 0"),
    ("loss.start_step=-1", "config.loss.start_step=-1 must be at least 0"),
    ("optimizer.learning_rate=0.0", "config.optimizer.learning_rate=0.0 must be greater than 0"),
    ("optimizer.learning_rate=nan", "config.optimizer.learning_rate=nan must be a finite number"),
    ("optimizer.learning_rate=-0.001", "must be greater than 0"),
    ("optimizer.schedule=linear", "must be constant or cosine"),
    ("optimizer.b2=1.0", "config.optimizer.b2=1.0 must be in [0, 1)"),
    ("optimizer.accumulate=0", "must be at least 1 micro-batch"),
    ("optimizer.accumulate=3", "config.data.batch_size=128 must be a multiple of 24"),
    ("optimizer.clip_norm=-1.0", "must be at least 0"),
    ("ema.decays=()", "must be at least one decay"),
    ("ema.decays=(1.0,)", "must be in [0, 1)"),
    ("ema.decays=(0.9,0.9)", "without repeats"),
    ("data.batch_size=0", "config.data.batch_size=0 must be at least 1"),
    ("data.batch_size=12", "config.data.batch_size=12 must be a multiple of 8"),
    ("data.batch_size=4096", "global_batch=4096 must be in [1, 1437]"),
    ("data.pad=-1", "config.data.pad=-1 must be at least 0"),
    ("data.pad=2", "data image shape=(12, 12, 1) must be (8, 8, 1)"),
    ("data.source=folder", "config.data.source='folder' must be one of auto, "),
    ("data.split=validation", "validation"),
    ("data.name=", "config.data.name='' must be a TFDS data set name"),
    ("mesh.data=3", "must multiply to the 8 devices"),
    ("mesh.fsdp=0", "mesh.fsdp=0 must be -1 or at least 1"),
    ("mesh.fsdp=-1", "with at most one -1"),
    ("run.steps=0", "config.run.steps=0 must be at least 1"),
    ("run.checkpoint_every=0", "must be at least 1"),
    ("run.keep_checkpoints=0", "must be at least 1"),
    ("run.preview_every=-1", "must be at least 0"),
    ("latents.name=sd_vae", "config.run.autoencoder='' must be the autoencoder that encodes the images"),
    ("sample.solver=rk4", "config.sample.solver='rk4' must be one of"),
    ("sample.steps=0", "config.sample.steps=0 must be at least 1"),
    ("sample.ig_interval=(0.5,0.3)", "config.sample.ig_interval=(0.5, 0.3) must be lo,hi"),
    ("sample.cfg_interval=(0.0,1.5)", "config.sample.cfg_interval=(0.0, 1.5) must be lo,hi"),
    ("sample.cfg_interval=(0.0,)", "config.sample.cfg_interval=(0.0,) must be 2 numbers"),
    ("sample.ig_scale=nan", "config.sample.ig_scale=nan must be finite and at least 0"),
    ("seed=-1", "config.seed=-1 must be in [0, 2^31)"),
    ("seed=None", "seed"),
    ("seed=1.5", "seed"),
    ("run.steps=many", "run.steps"),
    ("run.stepz=5", "stepz"),
    ("learning_rate=1", "learning_rate"),
    ("process.kind=quadratic", "quadratic"),
]


@pytest.mark.parametrize("override,words", CONFIGS, ids=[override for override, _ in CONFIGS])
def test_a_bad_config_is_one_line_before_anything_is_written(override, words, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert_one_line(outcome("train", CONFIG, f"--workdir={workdir}", f"--config.{override}", capsys=capsys), words)
    assert not (workdir / "checkpoints").exists() or not list((workdir / "checkpoints").glob("[0-9]*"))


def config_file(tmp_path, change: str) -> str:
    """configs/digits.py with one line of Python added at the end of get_config."""
    text = (toy.ROOT / "configs" / "digits.py").read_text()
    path = tmp_path / "changed.py"
    path.write_text(text.replace("    return config\n", f"    {change}\n    return config\n"))
    return f"--config={path}"


@pytest.mark.parametrize(
    "change,words",
    [
        (
            "config.optimiser = dict(lr=1)",
            "config.optimiser is not a setting that anything reads; did you mean config.optimizer?",
        ),
        ("config.model.window = 4", "config.model.window is not a setting that anything reads"),
        ("del config.loss.omega", "config.loss.omega is missing"),
        ("config.seed = None", "config.seed=None must be a whole number"),
        ("config.run.steps = True", "config.run.steps=True must be a whole number"),
        ("config.loss = 3", "Could not override field 'loss'"),
        ("config.loss.accelerate = 'yes'", "Could not override field 'accelerate'"),
        ("config.ema.decays = ('a',)", "config.ema.decays='a' must be a finite number"),
        ("raise ValueError('boom')", "boom"),
        (
            "config.model.inter_depth = (); config.loss.inter_weight = (); config.loss.accelerate = True",
            "config.loss.accelerate=True must be False for a model without an intermediate head",
        ),
    ],
)
def test_a_bad_config_file_is_one_line(change, words, tmp_path, capsys):
    assert_one_line(
        outcome("train", config_file(tmp_path, change), f"--workdir={tmp_path / 'run'}", capsys=capsys), words
    )


@pytest.mark.parametrize(
    "arguments,words",
    [
        ([CONFIG], "--workdir is missing"),
        (["--workdir=/tmp/x"], "--config is missing"),
        (["--config=configs/nothing.py", "--workdir=/tmp/x"], "nothing.py"),
        (
            ["--config=configs/digits.py:huge", "--workdir=/tmp/x"],
            "config argument 'huge' must have at most one word of each",
        ),
        ([CONFIG, "--workdir=/dev/null/x"], "workdir='/dev/null/x' must be a writable directory"),
        ([CONFIG, "--workdir=/tmp/x", "--stpes=3"], "stpes"),
        ([CONFIG, "--workdir=/tmp/x", "extra"], "argument 'extra' is not a flag"),
    ],
)
def test_bad_train_flags(arguments, words, capsys):
    assert_one_line(outcome("train", *arguments, capsys=capsys), words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps."""
    workdir = tmp_path_factory.mktemp("trained")
    done = toy.run("ig_jax.train", CONFIG, f"--workdir={workdir}", *toy.flags(**{"run.steps": 2}))
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--num=0"], "--num=0 must be at least 1"),
        (["--batch_size=0"], "--batch_size=0 must be at least 1"),
        (["--seed=-1"], "--seed=-1 must be at least 0"),
        (["--steps=0"], "steps=0 must be at least 1"),
        (["--solver=rk4"], "solver='rk4' must be one of"),
        (["--solver=sde", "--steps=1"], "steps=1 must be at least 2"),
        (["--ig_scale=nan"], "ig_scale=nan must be finite and at least 0"),
        (["--ig_scale=-1"], "ig_scale=-1.0 must be finite and at least 0"),
        (["--cfg_scale=two"], "cfg_scale"),
        (["--ig_interval=1,0.3"], "ig_interval=(1.0, 0.3) must be lo,hi with 0 <= lo < hi <= 1"),
        (["--cfg_interval=0,2"], "cfg_interval=(0.0, 2.0) must be lo,hi"),
        (["--cfg_interval=0.5"], "cfg_interval=(0.5,) must be 2 numbers"),
        (["--labels=11"], "labels=11 must be in 0..9"),
        (["--labels=cat"], "labels='cat' must be balanced, random"),
        (["--ema=0.5"], "ema='0.5' must be one of 0.999"),
        (["--compare"], "Unknown command line flag 'compare'"),  # a command of its own, visualize
    ],
)
def test_bad_sample_flags(trained, tmp_path, arguments, words, capsys):
    out = tmp_path / "out"
    result = outcome("sample", f"--checkpoint={trained}", f"--out={out}", *arguments, capsys=capsys)
    assert_one_line(result, words)
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--out=/tmp/x"], "--checkpoint is missing"),
        (["--checkpoint=/nowhere", "--out=/tmp/x"], "checkpoint='/nowhere' must be an existing directory"),
    ],
)
def test_bad_checkpoint_flags(arguments, words, capsys):
    for command in ("sample", "evaluate"):
        assert_one_line(outcome(command, *arguments, capsys=capsys), words)


URL = "ftp://host/run"  # of a kind that is no bucket
PLACES = [  # every flag that names a place, and what else its command needs before it
    ("train", "workdir", [CONFIG]),
    ("train", "workdir", [CONFIG, "--config.init.checkpoint=ftp://host/base"]),
    ("sample", "checkpoint", ["--out=out"]),
    ("sample", "out", ["--checkpoint=TRAINED"]),
    ("visualize", "out", ["compare", "--checkpoint=TRAINED"]),
    ("sample", "decode", ["--out=out"]),
    ("evaluate", "checkpoint", ["--out=out"]),
    ("evaluate", "out", ["--checkpoint=TRAINED"]),
    ("evaluate", "classifier", ["--checkpoint=TRAINED", "--out=out"]),
    ("convert", "from", ["--out=out"]),
    ("convert", "out", ["--from=nowhere.pt"]),
    ("convert", "to", ["--checkpoint=TRAINED"]),
    ("convert", "checkpoint", ["--to=out.pt"]),
    ("preflight", "results", [CONFIG, "--target=cpu:1"]),
    ("benchmark", "results", ["train", "--model=SiT-S/2"]),
    ("benchmark", "profile", ["train", "--model=SiT-S/2"]),
]


@pytest.mark.parametrize("command, flag, others", PLACES)
@pytest.mark.parametrize("value, words", [(URL, "a path on this machine"), ("x" * 4200, "File name too long")])
def test_a_place_that_cannot_be_is_refused_and_nothing_is_created(
    command, flag, others, value, words, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    others = [text.replace("TRAINED", str(trained)).replace("=configs", f"={toy.ROOT}/configs") for text in others]
    code, _, err = outcome(command, *others, f"--{flag}={value}", capsys=capsys)
    assert code == 2 and err.count("\n") == 1 and len(err) < 500 and words in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["idx", "auto"])
@pytest.mark.parametrize("folder, words", [(URL, "a path on this machine"), ("x" * 4200, "File name too long")])
def test_data_that_cannot_be_there_are_refused(source, folder, words, tmp_path, capsys):
    data = [f"--config.data.source={source}", f"--config.data.folder={folder}", "--config.data.name="]
    code, _, err = outcome("train", CONFIG, f"--workdir={tmp_path}/run", *data, capsys=capsys)
    assert code == 2 and err.count("\n") == 1 and "data.folder=" in err and words in err, err
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_an_empty_directory_is_no_checkpoint(tmp_path, capsys):
    result = outcome("sample", f"--checkpoint={tmp_path}", f"--out={tmp_path / 'out'}", capsys=capsys)
    assert_one_line(result, "must be a directory that holds a saved step")


def test_a_half_written_checkpoint_is_refused(trained, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    for path in (broken / "checkpoints" / "2").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for command in (
        ["ig_jax.sample", f"--checkpoint={broken}", f"--out={tmp_path / 'out'}"],
        ["ig_jax.train", CONFIG, f"--workdir={broken}", *toy.flags(**{"run.steps": 4})],
    ):
        done = toy.run(*command)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.startswith("ig_jax: error: checkpoint directory") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (broken / "checkpoints" / "4").exists()


def test_a_full_disk_is_the_users_to_mend_and_a_failing_one_is_a_bug(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ig_jax.train"])
    run = functools.partial(cli.run, values=flags.FlagValues(), doc="")

    def fill():
        with open("/dev/full", "w") as file:
            file.write("metrics")

    with pytest.raises(SystemExit) as left:
        run(fill)
    assert left.value.code == 2
    assert capsys.readouterr().err == "ig_jax: error: No space left on device; free space and rerun the same command\n"
    with pytest.raises(IsADirectoryError):
        run(lambda: open("/", "w"))  # noqa: SIM115 (it raises)


@pytest.fixture
def signals():
    """As in a terminal: what a shell puts into the background ignores SIGINT, and `cli.run` keeps its own SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_asked_to_stop_can_be_given_again(number, signals, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ig_jax.evaluate"])
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: signal.raise_signal(number), flags.FlagValues(), "")
    assert left.value.code == 75
    assert capsys.readouterr().err == f"ig_jax: stopped: {number.name}; rerun the same command to resume\n"


def test_a_checkpoint_of_another_network_is_refused(trained):
    done = toy.run("ig_jax.train", CONFIG, f"--workdir={trained}", *toy.flags(**{"run.steps": 4, "model.width": 64}))
    assert done.returncode == 2
    assert "is float32 [32" in done.stderr and "but the config needs float32 [64" in done.stderr


def test_images_of_another_recipe_are_not_overwritten(trained, tmp_path, capsys):
    common = [f"--checkpoint={trained}", f"--out={tmp_path / 'out'}", "--num=2", "--steps=2"]
    done = toy.run("ig_jax.sample", *common)
    assert done.returncode == 0, done.stderr
    assert_one_line(
        outcome("sample", *common, "--ig_scale=3", capsys=capsys), "holds images of another recipe (ig_scale is 2.0)"
    )
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["recipe"]["ig_scale"] == 2.0


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_help_names_every_flag(command, capsys):
    code, out, _ = outcome(command, "--help", capsys=capsys)
    module = sys.modules[f"ig_jax.{command}"]
    assert code == 0 and all(f"--{name}" in out or f"--[no]{name}" in out for name in module.FLAGS)
