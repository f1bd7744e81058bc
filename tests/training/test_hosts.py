"""Training in two processes: the run of one process, and all of them leave when one does."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import toy

from ig_jax.base.errors import BUG, PEER_FAILED, RESUMABLE
from ig_jax.parallel.mesh import make_mesh
from ig_jax.training.memory import device_bytes
from ig_jax.training.program import TrainProgram
from ig_jax.training.workdir import read_metrics

FLAGS = ["--config=configs/digits.py", *toy.flags(**{"run.steps": 8, "run.checkpoint_every": 5})]
LONG = [*FLAGS, "--config.run.steps=100000"]


class Two:
    """Two processes of `ig_jax.train`, or of it with a fault, each with its log."""

    def __init__(self, workdir, *flags, fault="", devices=1):
        self.workdir = workdir
        self.logs = [workdir.with_name(f"{workdir.name}-{index}.log") for index in range(2)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["tests/faulty.py", fault] if fault else ["-m", "ig_jax.train"]
        self.processes = []
        for index, log in enumerate(self.logs):
            place = {"PROCESSES": "2", "PROCESS": str(index), "COORDINATOR": f"127.0.0.1:{port}"}
            environment = toy.environment(devices) | {f"IG_JAX_{name}": value for name, value in place.items()}
            with log.open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *flags, f"--workdir={workdir}", "--heartbeat_timeout=5"],
                        cwd=toy.ROOT,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait_for(self, step):
        path, deadline = self.workdir / "metrics.jsonl", time.monotonic() + toy.HANGS
        while not (path.exists() and path.read_text().count('\n{"step": ') >= step):
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.processes), self.last_lines()
            time.sleep(0.05)

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()

    def codes(self):
        return [process.wait(timeout=toy.HANGS) for process in self.processes]

    def last_lines(self):
        return [log.read_text().rstrip().rpartition("\n")[2] for log in self.logs]


def losses(workdir, name="loss/total"):
    return [line[name] for line in read_metrics(workdir) if name in line]


def digests(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["arrays"]


@pytest.fixture(scope="module")
def start():
    """`Two`, of which nothing is left after the tests."""
    started = []
    yield lambda *arguments, **options: started.append(Two(*arguments, **options)) or started[-1]
    for two in started:
        two.end()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run in two processes with four devices each, its state over four of the eight."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    sharded = ["--config.mesh.fsdp=4", "--config.run.preview_images=4", "--config.model.width=128"]
    sharded += ["--config.run.evaluate_every=8", "--config.run.evaluate_samples=0"]
    two = start(workdir, *FLAGS, *sharded, devices=4)
    assert two.codes() == [0, 0], two.last_lines()
    return workdir, sharded


def test_two_processes_train_as_one_does(whole, tmp_path):
    workdir, sharded = whole
    done = toy.run("ig_jax.train", *FLAGS, *sharded, f"--workdir={tmp_path}", devices=8)
    assert done.returncode == 0, done.stderr
    for name, count in (("loss/total", 8), ("held_out/final", 1)):
        np.testing.assert_allclose(losses(workdir, name), losses(tmp_path, name), rtol=1e-6)
        assert len(losses(workdir, name)) == count
    assert len(list((workdir / "previews").iterdir())) == 1
    e = toy.experiment(**{"model.width": 128})
    whole = TrainProgram.of(e, make_mesh(devices=jax.devices()[:1]), e.batch_spec, 16).layout
    for log in (workdir.with_name(f"{workdir.name}-0.log").read_text(), done.stdout):
        held = float(re.search(r"state of ([\d.]+) GB on each", log)[1]) * 1e9
        assert held == pytest.approx(device_bytes(whole) / 4, rel=0.1)


def test_one_process_goes_on_where_two_were(whole):
    workdir, sharded = whole
    done = toy.run("ig_jax.train", *FLAGS, *sharded, f"--workdir={workdir}", "--config.run.steps=9", devices=8)
    assert done.returncode == 0 and "8 -> 9" in done.stdout, done.stderr
    assert len(losses(workdir)) == 9


@toy.SLOW
def test_two_processes_measure_what_one_does(start, tmp_path):
    """FD-CNN while training, and the table of `evaluate`."""
    flags = [*FLAGS, "--config.run.evaluate_every=8", "--config.run.evaluate_samples=32"]
    two = start(tmp_path / "two", *flags)
    assert two.codes() == [0, 0], two.last_lines()
    done = toy.run("ig_jax.train", *flags, f"--workdir={tmp_path / 'one'}", devices=2)
    assert done.returncode == 0, done.stderr
    for name in ("fd_cnn_32", "agreement_32"):
        assert losses(tmp_path / "two", name) == pytest.approx(losses(tmp_path / "one", name), rel=1e-5)
    tables = []
    for launcher, out in (([toy.ROOT / "launch" / "local.sh", "2"], "together"), ([], "alone")):
        given = dict(checkpoint=tmp_path / "one", out=tmp_path / out, num=32, ig_scales=2, cfg_scales=1, batch_size=16)
        command = [*launcher, sys.executable, "-m", "ig_jax.evaluate", *(f"--{k}={v}" for k, v in given.items())]
        ended = subprocess.run(
            command, cwd=toy.ROOT, env=toy.environment(), capture_output=True, text=True, timeout=toy.HANGS
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("classifier  correct") == 1  # one of them prints
        tables.append(json.loads((tmp_path / out / "table.json").read_text())["rows"])
    for row, same in zip(*tables, strict=True):
        for name in ("fd_cnn", "agreement"):
            assert row[name] == pytest.approx(same[name], rel=1e-5)


def test_a_signal_to_one_stops_both_after_the_same_step(start, tmp_path):
    two = start(tmp_path / "run", *LONG)
    two.wait_for(1)
    two.processes[1].send_signal(signal.SIGUSR1)
    assert two.codes() == [RESUMABLE] * 2, two.last_lines()
    step = len(losses(two.workdir))
    assert two.last_lines() == [f"ig_jax: stopped: SIGUSR1 at step {step}; saved, rerun the same command to resume"] * 2
    assert digests(two.workdir, step)


def test_an_exception_in_one_ends_both_at_once_with_its_line(start, tmp_path):
    two = start(tmp_path / "run", *LONG, fault="raise@3:1")
    assert two.processes[1].wait(timeout=toy.HANGS) == BUG
    failed = time.monotonic()
    assert two.codes() == [PEER_FAILED, BUG], two.last_lines()
    assert time.monotonic() - failed < 15  # 5 on an idle machine; here other tests compile at the same time
    line = "RuntimeError: boom"
    assert two.last_lines() == [f"ig_jax: error: process 1: {line}", f"ig_jax: error: {line}"]


@toy.SLOW
@pytest.mark.parametrize("fault", ["", "gil@3:1"])
def test_a_frozen_process_is_noticed(start, tmp_path, fault):
    two = start(tmp_path / "run", *LONG, fault=fault)
    if not fault:
        two.wait_for(1)
        two.processes[1].send_signal(signal.SIGSTOP)
    assert two.processes[0].wait(timeout=toy.HANGS) == PEER_FAILED
    assert two.last_lines()[0] == "ig_jax: error: process 1 has been silent for 5 s"


@pytest.mark.parametrize(
    "fault", ["hang@3:1", *(pytest.param(fault, marks=toy.SLOW) for fault in ("save@5:1", "skip@5:1"))]
)
def test_a_process_that_hangs_ends_both_with_every_stack(start, tmp_path, fault):
    two = start(tmp_path / "run", *LONG, "--config.run.step_deadline=15", fault=fault)
    assert two.codes() == [RESUMABLE] * 2, two.last_lines()
    assert all("took more than 15 s" in line for line in two.last_lines())
    assert "most recent call first" in two.logs[1].read_text() and "faulty.py" in two.logs[1].read_text()


@toy.SLOW
@pytest.mark.parametrize(
    "seconds, number", [(2, signal.SIGTERM), (5, signal.SIGINT), (9, signal.SIGHUP), (14, signal.SIGTERM)]
)
def test_before_the_first_step_both_leave_at_once(start, tmp_path, number, seconds):
    two = start(tmp_path / "run", *LONG, "--init_timeout=20")
    time.sleep(seconds)
    asked = time.monotonic()
    two.processes[0].send_signal(number)
    assert two.processes[0].wait(timeout=toy.HANGS) == RESUMABLE and time.monotonic() - asked < 15, two.last_lines()
    # A peer that has not met the other waits for it as long as it may, and then says for whom.
    assert two.codes()[1] in (RESUMABLE, PEER_FAILED) and time.monotonic() - asked < 60, two.last_lines()
    assert two.last_lines()[1].startswith("ig_jax: "), two.last_lines()


@toy.SLOW
def test_a_killed_process_ends_its_peer(start, tmp_path):
    for victim in (0, 1):
        two = start(tmp_path / f"run{victim}", *LONG)
        two.wait_for(2)
        two.processes[victim].kill()
        assert two.processes[1 - victim].wait(timeout=30) in (PEER_FAILED, -signal.SIGABRT)
