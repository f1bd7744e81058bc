"""A run under random faults ends in the state of an undisturbed one.  IG_JAX_SLOW=1, IG_JAX_CHAOS_FAULTS=12"""

import os
import random
import signal
import subprocess
import sys
import time

import test_resume as resume
import toy

from ig_jax.base.errors import BUG, FINISHED, RESUMABLE
from ig_jax.training.workdir import read_metrics

FAULTS = int(os.environ.get("IG_JAX_CHAOS_FAULTS", "12"))
STEPS = 8 * FAULTS


def start(workdir, fault=""):
    command = ["tests/faulty.py", fault] if fault else ["-m", "ig_jax.train"]
    flags = toy.flags(**{"run.steps": STEPS, "run.checkpoint_every": 4})
    return subprocess.Popen(
        [sys.executable, *command, "--config=configs/digits.py", f"--workdir={workdir}", *flags],
        cwd=toy.ROOT,
        env=toy.environment() | {"IG_JAX_CACHE": str(workdir.with_name("cache"))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def last_step(workdir):
    return max((line["step"] for line in read_metrics(workdir)), default=0)


def damage(workdir, chance):
    """Cut a file of the newest step, or every compiled program, or leave half a line behind the metrics."""
    steps = sorted((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name.partition(".")[0]))
    files = [path for path in steps[-1].rglob("*") if path.is_file() and path.stat().st_size] if len(steps) > 1 else []
    kind = chance.choice(("step", "compilations", "metrics"))
    if kind == "step":
        files = files and [chance.choice(files)]
    elif kind == "compilations":
        files = [path for path in workdir.with_name("cache").rglob("*") if path.is_file()]
    else:  # the line of a step is whole before the step is saved; a kill tears one behind it
        files = []
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1')
    for path in files:
        os.truncate(path, path.stat().st_size // 2)
    return kind, files[:1]


@toy.SLOW
def test_random_faults_leave_no_trace_in_what_is_learnt(tmp_path):
    seed = random.randrange(2**32)
    chance, workdir, story = random.Random(seed), tmp_path / "chaos", [f"seed {seed}"]
    whole = start(tmp_path / "whole")
    assert "Traceback" not in whole.communicate(timeout=toy.HANGS)[0]
    for _ in range(FAULTS):
        done = last_step(workdir)
        kind = chance.choice(("kill", "kill in a save", "SIGTERM", "SIGINT", "SIGHUP", "twice", "raise", "damage"))
        story.append(f"step {done}: {kind}")
        if kind == "damage":
            if workdir.exists():
                story.append(str(damage(workdir, chance)))
            continue
        at = done + chance.randint(1, 9)
        inside = {"kill in a save": f"torn@{at - at % 4 + 4}:0", "raise": f"raise@{at}:0"}.get(kind, "")
        process = start(workdir, inside)
        if not inside:
            early = chance.random() < 0.3  # or stopped before the first step, in its imports or its compilation
            while not early and process.poll() is None and last_step(workdir) < at:
                time.sleep(0.05)
            time.sleep(chance.random() * (8 if early else 0.3))
            for number in {"kill": ["SIGKILL"], "twice": ["SIGTERM", "SIGUSR1"]}.get(kind, [kind]):
                process.send_signal(getattr(signal, number))
        output = process.communicate(timeout=toy.HANGS)[0]
        expected = {"kill": -signal.SIGKILL, "kill in a save": -signal.SIGKILL, "raise": BUG}.get(kind, RESUMABLE)
        assert process.returncode in (expected, FINISHED), "\n".join([*story, output])
    process = start(workdir)
    output = process.communicate(timeout=toy.HANGS)[0]
    assert process.returncode == FINISHED, "\n".join([*story, output])
    assert resume.metrics(workdir) == resume.metrics(tmp_path / "whole"), "\n".join(story)
    assert resume.final_digest(workdir) == resume.final_digest(tmp_path / "whole"), "\n".join(story)
    print(*story, sep="\n")
