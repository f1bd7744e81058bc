"""Training that is killed, asked to stop or launched twice: the same command resumes, bitwise identical."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from types import ModuleType

import jax
import numpy as np
import pytest
import toy
from refusal import refused

from ig_jax.base.compilations import trim
from ig_jax.base.errors import BAD_INPUT, RESUMABLE
from ig_jax.checkpoints.steps import Checkpoints
from ig_jax.generation import pretrained
from ig_jax.training import goodput, resume
from ig_jax.training.loop import train
from ig_jax.training.program import TrainProgram
from ig_jax.training.tensorboard import TensorBoard
from ig_jax.training.workdir import MetricsFile, read_metrics

STEPS = 20
SECRET = "canary-4f1c"  # in the environment of a run, and nowhere in what it leaves
FLAGS = toy.flags(**{"run.steps": STEPS, "run.checkpoint_every": 4})


def command(workdir, *more):
    return ["ig_jax.train", "--config=configs/digits.py", f"--workdir={workdir}", *FLAGS, *more]


# Trains, and ends with another code where TensorFlow was imported.
NO_TENSORFLOW = """
import atexit, os, runpy, sys
atexit.register(lambda: "tensorflow" in sys.modules and os._exit(9))
runpy.run_module("ig_jax.train", run_name="__main__", alter_sys=True)
"""


def launch(workdir, *more, code=""):
    """The same command as a process in the background; or a program that runs it."""
    module, *flags = command(workdir, *more)
    return subprocess.Popen(
        [sys.executable, *(["-c", code] if code else ["-m", module]), *flags],
        cwd=toy.ROOT,
        text=True,
        env=toy.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def metrics(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["step"]: toy.learnt(line) for line in map(json.loads, lines) if "step" in line}


def starts(workdir, word="start"):
    """What metrics.jsonl says of each start."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line[word] for line in lines if word in line]


def wait_for_step(workdir, process, step):
    deadline, ended = time.monotonic() + toy.HANGS, False
    while time.monotonic() < deadline and not ended:
        ended = process.poll() is not None  # asked first: what it wrote last may be the step waited for
        try:
            if max(metrics(workdir), default=0) >= step:
                return
        except json.JSONDecodeError:  # caught in the middle of a line
            pass
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached: {process.communicate()[0]}")


def final_digest(workdir):
    """What names every array of the last checkpoint: parameters, average and optimizer."""
    path = workdir / "checkpoints" / str(max(metrics(workdir))) / "meta" / "metadata"
    return json.loads(path.read_text())["arrays"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_TOKEN", SECRET)
        done = toy.run(*command(workdir))
    assert done.returncode == 0, done.stderr
    return workdir, done


def assert_equals(workdir, uninterrupted):
    assert metrics(workdir) == metrics(uninterrupted)  # floats are written in full
    assert final_digest(workdir) == final_digest(uninterrupted)


def test_a_run_says_what_it_does_and_leaves_what_it_promises(uninterrupted):
    workdir, done = uninterrupted
    for words in ("devices", "mesh", "parameters", "GFLOP per step", "the intermediate head adds", "epochs"):
        assert words in done.stdout
    assert f"{STEPS}/{STEPS} steps" in done.stderr and "steps/s" in done.stderr and "left 0:00" in done.stderr
    assert set(metrics(workdir)) == set(range(1, STEPS + 1))
    assert f"saved step {STEPS} in {workdir}" in done.stdout and "ig_jax.sample --checkpoint=" in done.stdout
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 1
    assert read_metrics(workdir)[0].keys() > set(toy.SPEED)
    assert json.loads((workdir / "config.json").read_text())["run"]["steps"] == STEPS
    assert {"sigma/cosine", "gradient", "update", "goodput", "seconds/total"} <= set(read_metrics(workdir)[-1])
    left = [path.read_bytes() for path in workdir.rglob("*") if path.is_file()]
    assert SECRET not in done.stdout + done.stderr and not any(SECRET.encode() in content for content in left)


def test_a_finished_run_has_nothing_to_do(uninterrupted):
    workdir, _ = uninterrupted
    before = final_digest(workdir), (workdir / "config.json").read_text()
    again = toy.run(*command(workdir, "--config.optimizer.learning_rate=7.0"))
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert (final_digest(workdir), (workdir / "config.json").read_text()) == before


def test_killed_at_random_moments_it_ends_in_the_same_bits(uninterrupted, tmp_path):
    chance, moments = random.Random(int.from_bytes(os.urandom(4), "big")), [time.time()]
    for low, high in ((2, 9), (9, 17)):
        process = launch(tmp_path)
        wait_for_step(tmp_path, process, chance.randint(low, high))
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.communicate()
        moments.append(time.time())
    done = toy.run("ig_jax.train", f"--workdir={tmp_path}")  # what the run is, it knows itself
    assert done.returncode == 0, done.stderr
    assert_equals(tmp_path, uninterrupted[0])
    assert len(starts(tmp_path)) >= 2 and starts(tmp_path)[-1]["changed"] == {}
    last = read_metrics(tmp_path)[-1]
    seconds = {kind: last[f"seconds/{kind}"] for kind in goodput.KINDS}
    assert sum(seconds.values()) == pytest.approx(last["seconds/total"], rel=0.01)
    assert moments[2] - moments[1] < last["seconds/total"] < time.time() - moments[0]
    assert min(seconds[kind] for kind in ("productive", "start", "compile", "checkpoint", "down")) > 0


def test_asked_to_stop_it_saves_and_says_that_it_can_resume(uninterrupted, tmp_path):
    process = launch(tmp_path, "--config.run.steps=1000000", code=NO_TENSORFLOW)
    wait_for_step(tmp_path, process, 1)
    process.stdout.close()  # of a `tee` that died: nothing it printed is read any more
    assert process.wait(timeout=toy.HANGS) == RESUMABLE
    stopped_at = max(metrics(tmp_path))
    assert (tmp_path / "checkpoints" / str(stopped_at)).is_dir()
    process = launch(tmp_path, "--config.run.steps=1000000")
    wait_for_step(tmp_path, process, stopped_at + 1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # an impatient launcher changes nothing
    output = process.communicate(timeout=toy.HANGS)[0]
    assert process.returncode == RESUMABLE, output
    assert "ig_jax: stopped: SIGTERM at step" in output and "Traceback" not in output
    stopped_at = max(metrics(tmp_path))
    assert pretrained.load(tmp_path).step == stopped_at
    steps = max(STEPS, stopped_at + 4)
    done = toy.run(*command(tmp_path, f"--config.run.steps={steps}"))
    assert f"steps       {stopped_at} -> {steps}" in done.stdout
    whole = uninterrupted[0]
    if steps > STEPS:  # on a machine that was slow to deliver the signal
        whole = tmp_path / "whole"
        assert toy.run(*command(whole, f"--config.run.steps={steps}")).returncode == 0
    assert_equals(tmp_path, whole)


def two_steps(workdir, **changed):
    return train(toy.experiment(**{"run.steps": 2, **changed}), str(workdir))


@pytest.fixture
def lowered(monkeypatch):
    """An event: the step of a run has begun to be compiled."""
    begun, lower = threading.Event(), TrainProgram.lower
    monkeypatch.setattr(TrainProgram, "lower", lambda *arguments: begun.set() or lower(*arguments))
    return begun


def test_a_resumed_run_compiles_its_step_while_the_state_is_read(tmp_path, monkeypatch, lowered):
    two_steps(tmp_path)
    lowered.clear()
    in_time, restore = [], Checkpoints._restore
    monkeypatch.setattr(Checkpoints, "_restore", lambda *a: in_time.append(lowered.wait(toy.HANGS / 10)) or restore(*a))
    assert int(two_steps(tmp_path, **{"run.steps": 3}).step) == 3
    assert in_time == [True]


def test_a_run_that_cannot_go_on_compiles_no_step(tmp_path, lowered):
    two_steps(tmp_path)
    lowered.clear()
    two_steps(tmp_path)  # nothing is left to do
    for changed, name, expected in (
        ({"model.width": 64}, "checkpoint array params/blocks.0.attn.proj.bias", "float32 [64]"),
        ({"seed": 1}, "seed", "0"),
        # The arrays have the same shapes, and would mean something else.
        ({"model.num_heads": 4}, "config.model.num_heads", "2, as in the checkpoint of this run"),
    ):
        with refused(name, expected=expected):
            two_steps(tmp_path, **{"run.steps": 3, **changed})
    assert not lowered.is_set()


def test_a_run_elsewhere_compiles_nothing_anew_and_trains_the_same(tmp_path, monkeypatch):
    """The cache is moved in between: neither its place nor that of the run is part of a program's name."""
    monkeypatch.setenv("IG_JAX_CACHE", str(tmp_path / "cache"))
    first = toy.run(*command(tmp_path / "a", "--config.run.steps=4"))
    assert first.returncode == 0, first.stderr
    made = starts(tmp_path / "a", "ready")[0]
    assert made["programs"]["cached"] == 0 < made["programs"]["compiled"] and not made["step_cached"]
    assert "step compiled in" in first.stdout and made["step"] == 1 and min(made["seconds"].values()) > 0
    kept = {path.name.split("-")[0] for path in (tmp_path / "cache" / "compilations").iterdir()}
    assert {"jit_sharded", "jit_digest"} <= kept  # however quickly it compiled
    (tmp_path / "cache").rename(tmp_path / "moved")
    monkeypatch.setenv("IG_JAX_CACHE", str(tmp_path / "moved"))
    # The settings of the other run; nothing else says what to train.
    second = toy.run("ig_jax.train", f"--config={tmp_path / 'a'}", f"--workdir={tmp_path / 'b'}")
    assert second.returncode == 0, second.stderr
    made = starts(tmp_path / "b", "ready")[0]
    assert made["programs"]["compiled"] == 0 < made["programs"]["cached"] and made["step_cached"]
    assert "step from the cache in" in second.stdout
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")


def test_the_programs_used_last_are_kept_up_to_a_size(tmp_path):
    for number, name in enumerate(("used", "old", "new")):
        (tmp_path / f"{name}-cache").write_bytes(b"x" * 10)
        os.utime(tmp_path / f"{name}-cache", (3 if name == "used" else 0, number))
    trim(tmp_path, 25)
    assert {path.name for path in tmp_path.iterdir()} == {"used-cache", "new-cache"}


def test_a_second_launch_on_a_live_workdir_is_refused(tmp_path):
    process = launch(tmp_path, "--config.run.steps=100000", "--config.run.checkpoint_every=100000")
    wait_for_step(tmp_path, process, 1)
    second = toy.run(*command(tmp_path))
    assert second.returncode == BAD_INPUT
    assert second.stderr.startswith("ig_jax: error: workdir=") and f"pid {process.pid}" in second.stderr
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_lines_of_metrics_that_are_none_are_dropped(tmp_path):
    """What a machine that lost its power may leave: the run goes on, and every step has one line."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": 2.0}\n\n\xff\x00\n[]\n{"step": 2}\n{"step": 9}\n{"st')
    file = MetricsFile(tmp_path)
    file.cut(2)
    file.write(3, {"a": 1.0})
    assert [line["step"] for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())] == [
        1,
        2,
        3,
    ]


def test_tensorboard_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    full = lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    with refused("tensorboard", str(tmp_path), fix="free space", says="No space left"), TensorBoard(tmp_path) as board:
        board.scalars(1, {"a": 1.0})


def test_tensorboard_shows_a_resumed_run_once_with_its_settings(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("notf"))  # or it reads with TensorFlow
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams import metadata

    (tmp_path / "lr1").mkdir()
    for start, value in ((0, 1.0), (1, 2.0)):
        with TensorBoard(tmp_path / "lr1") as board:
            board.begin(start, {"run.steps": 4, "optimizer.name": "adamw", "ema.decays": (0.9,)})
            for step in range(start + 1, start + 3):
                board.scalars(step, {"loss/total": value})
            board.image(start + 1, "preview", np.zeros((2, 3, 3), np.uint8))
    found = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert list(found.Runs()) == ["lr1"]
    scalars = [(event.step, event.value) for event in found.Scalars("lr1", "loss/total")]
    assert scalars == [(1, 1.0), (2, 2.0), (3, 2.0)]
    assert [event.step for event in found.Images("lr1", "preview")] == [1, 2]
    assert b"run.steps = 4" in found.Tensors("lr1", "config")[0].tensor_proto.string_val[0]
    content = found.SummaryMetadata("lr1", metadata.SESSION_START_INFO_TAG).plugin_data.content
    assert metadata.parse_session_start_info_plugin_data(content).hparams["run.steps"].number_value == 4


def test_other_data_are_refused_on_resume(uninterrupted):
    workdir, _ = uninterrupted
    for change, word in (("data.batch_size=32", "global_batch"), ("seed=1", "seed")):
        done = toy.run(*command(workdir, f"--config.{change}", "--config.run.steps=30"))
        assert done.returncode == BAD_INPUT and word in done.stderr and "Traceback" not in done.stderr


def test_restored_weights_are_the_average_of_the_run(uninterrupted):
    model = pretrained.load(uninterrupted[0])
    assert (model.step, model.ema, model.config["run"]["steps"]) == (STEPS, "0.999", STEPS)
    assert all(array.dtype == "float32" for array in jax.tree.leaves(model.params))


def resumed(workdir, capsys, **changed):
    """The lines about changes that a resumed run prints."""
    capsys.readouterr()
    state = two_steps(workdir, **changed)
    lines = capsys.readouterr().out.splitlines()
    return state, [line.removeprefix("changed").strip() for line in lines if line.startswith("changed")]


def edit_settings(workdir, step, *edits):
    """Change the settings stored with a step, as another version may have written them."""
    path = workdir / "checkpoints" / str(step) / "meta" / "metadata"
    meta = json.loads(path.read_text())
    for edit in edits:
        edit(meta["config"])
    path.write_text(json.dumps(meta))


def test_what_a_resumed_run_learns_differently_is_printed(tmp_path, capsys):
    cosine = {"optimizer.schedule": "cosine", "optimizer.warmup_steps": 0}
    first = two_steps(tmp_path, **cosine, **{"optimizer.clip_norm": 0.0})
    moments = jax.device_get(first.opt_state)
    more = cosine | {"run.steps": 4, "loss.label_drop": 0.2, "ema.decays": (0.999, 0.9)}
    state, lines = resumed(tmp_path, capsys, **more)
    assert sorted(lines) == [
        "cosine over 2 -> 4 steps: learning rate 0.0e+00 -> 1.0e-03",
        "ema.decays (0.999,) -> (0.999, 0.9)",
        "loss.label_drop 0.1 -> 0.2",
        "optimizer.clip_norm 0.0 -> 1.0",
    ]
    assert set(state.ema) == {"0.999", "0.9"} and int(state.opt_state[1][0].count) == 4
    assert jax.tree.structure(moments) == jax.tree.structure(state.opt_state)
    edit_settings(
        tmp_path, 4, lambda stored: stored["loss"].pop("weighting"), lambda stored: stored["run"].update(no=1)
    )
    _, lines = resumed(tmp_path, capsys, **more | {"run.steps": 5, "optimizer.clip_norm": 0.0, "mesh.fsdp": 2})
    assert "optimizer.clip_norm 1.0 -> 0.0" in lines and not any("mesh" in line for line in lines)
    history = [(start["step"], start["changed"]) for start in starts(tmp_path)]
    assert [step for step, _ in history] == [0, 2, 4] and history[0][1] == {}
    assert history[1][1]["loss.label_drop"] == [0.1, 0.2] and history[2][1]["mesh.fsdp"] == [1, 2]
    assert list(metrics(tmp_path)) == [1, 2, 3, 4, 5]


def test_every_setting_is_in_the_table_of_a_resume():
    e = toy.experiment()
    for name, value, remedy in (
        ("optimizer.train_only", ("final_head",), "--config.init.checkpoint"),
        ("process.prediction", "noise", "empty workdir"),
        ("model.num_heads", 4, "empty workdir"),
        ("latents.uint8_rule", "sit", "empty workdir"),
    ):
        section, key = name.split(".")
        other = toy.replace(e, **{section: dataclasses.replace(getattr(e, section), **{key: value})})
        with refused(f"config.{name}", value, fix=remedy):
            resume.changes(e, other, 1)
    with refused("config.seed", 1, fix="empty workdir"):
        resume.changes(e, toy.replace(e, seed=1), 1)


def test_a_checkpoint_is_also_saved_by_the_clock(tmp_path):
    two_steps(tmp_path, **{"run.steps": 3, "run.checkpoint_every": 100, "run.checkpoint_minutes": 1e-6})
    assert {path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")} == {"2", "3"}  # two are kept
