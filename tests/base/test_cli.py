"""Commands as processes: their flags, their streams, and the platform they find."""

import io
import os
import subprocess
import sys

import pytest
import toy

from ig_jax import preflight, train
from ig_jax.base import cli, progress
from ig_jax.base.progress import Progress


def test_overrides_of_one_call_are_gone_in_the_next(monkeypatch):
    for module in (train, preflight, train):
        for given, batch_size in (
            (["--config.data.batch_size=15"], 15),
            (["--config.data.batch_size=16"], 16),
            ([], 128),
        ):
            monkeypatch.setattr(sys, "argv", ["command", f"--config={toy.ROOT}/configs/digits.py", *given])
            cli.parse(toy.fresh(module.FLAGS))
            assert module.FLAGS.experiment().data.batch_size == batch_size


PROGRAM = """
import os, sys
from absl import flags
from ig_jax.base import cli, progress
from ig_jax.base.progress import Progress
from ig_jax.base.errors import UserError
from ig_jax.base.progress import Progress, waiting

def main():
    with open("data", "w") as file, Progress(2, "images") as progress, waiting("waiting", 0.01):
        os.write(2, b"from a library")
        for _ in range(2):
            progress.count("é ☃")
        print("wrote é ☃")
        file.write("kept")
    if sys.argv[1:]:
        raise UserError(name="é", value="☃", expected="plain")

cli.run(main, flags.FlagValues(), "")
"""


class Terminal(io.StringIO):
    isatty = lambda self: True


@pytest.mark.parametrize(
    "term,columns,wanted",
    [
        ("xterm", 80, "\r6/9 images  1 images/s  left 0:03  total 1.1812  data_wait 12.5%\x1b[K"),
        ("xterm", 40, "\r6/9 images  1 images/s  left 0:03\x1b[K"),
        ("dumb", 40, "6/9 images  1 images/s  left 0:03  total 1.1812  data_wait 12.5%  a name that fits no line\n"),
    ],
)
def test_progress_is_one_line_as_wide_as_the_terminal_or_plain_text(term, columns, wanted, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    with Progress(9, "images", stream=terminal) as shown:
        for then, rate in ((10.0, 0.2), (10.01, 4 / 10.01), (14.0, 1.0)):  # the first ones waited for a compilation
            now = then
            shown.advance(2)
            assert shown.rate() == pytest.approx(rate)
        shown.show("total 1.1812", "data_wait 12.5%", "a name that fits no line")
        shown.show("too early for another line", every=progress.LINE)
        assert wanted in terminal.getvalue() and terminal.getvalue().isascii()
        assert ("early" in terminal.getvalue()) == (columns == 80)
        assert ("\x1b" in terminal.getvalue()) == (term != "dumb")
        shown.show(rate=3.0)
        assert "3 images/s  left 0:01" in terminal.getvalue()


CLOSED = ["", "<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/null 2>/dev/null"]


def program(directory, redirection: str = "", code: str = PROGRAM, **environment) -> subprocess.CompletedProcess:
    (directory / "program.py").write_text(code)
    return subprocess.run(
        ["sh", "-c", f'"$0" program.py {redirection}', sys.executable],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(toy.ROOT), **environment},
        capture_output=True,
    )


@pytest.mark.parametrize("redirection", CLOSED)
def test_a_closed_stream_makes_no_difference(redirection, tmp_path):
    done = program(tmp_path, redirection)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "data").read_text() == "kept"
    assert (b"wrote" in done.stdout) == (">&-" not in redirection.replace("2>&-", "") and "null" not in redirection)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_a_letter_shows_its_number(encoding, tmp_path):
    done = program(tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "wrote é ☃".encode(encoding, "backslashreplace") in done.stdout
    refusal = PROGRAM.replace("if sys.argv[1:]", "if True")
    done = program(tmp_path, code=refusal, PYTHONIOENCODING=encoding)
    line = "ig_jax: error: é='☃' must be plain\n".encode(encoding, "backslashreplace")
    assert done.returncode == 2 and done.stderr.endswith(line)


LOOKS = """
from absl import flags
from ig_jax.base import cli, progress
from ig_jax.base.progress import Progress

def main():
    import jax
    jax.devices()
    {then}

cli.run(main, flags.FlagValues(), "")
"""


@pytest.mark.parametrize("platform", ["cuda", "gpu", "tpu", "no_such_platform"])
def test_a_platform_that_is_not_there_is_one_line(platform, tmp_path):
    done = program(tmp_path, code=LOOKS.format(then=""), JAX_PLATFORMS=platform)
    if done.returncode == 0:
        pytest.skip(f"this machine has a {platform}")
    last = done.stderr.decode().strip().splitlines()[-1]
    assert done.returncode == 2 and b"Traceback" not in done.stderr, done.stderr
    assert last.startswith(f"ig_jax: error: JAX_PLATFORMS='{platform}' must be platforms that JAX finds")
    assert "unset it" in last


def test_a_bug_on_a_platform_that_is_there_stays_one(tmp_path):
    done = program(tmp_path, code=LOOKS.format(then="raise RuntimeError('a bug')"), JAX_PLATFORMS="cpu")
    assert done.returncode == 1 and b"RuntimeError: a bug" in done.stderr


@pytest.mark.parametrize(
    "compiler,devices,chosen,platforms",
    [(True, [], None, "cpu"), (True, ["/dev/accel0"], None, None), (False, [], None, None), (True, [], "tpu", "tpu")],
)
def test_the_tpu_compiler_sleeps_where_no_accelerator_is(monkeypatch, compiler, devices, chosen, platforms):
    monkeypatch.delitem(sys.modules, "jax")  # of this process, whose setting stays
    monkeypatch.delenv("JAX_PLATFORMS")
    if chosen:
        monkeypatch.setenv("JAX_PLATFORMS", chosen)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: compiler or None)
    monkeypatch.setattr(cli.glob, "iglob", lambda pattern: [path for path in devices if pattern.startswith(path[:-1])])
    cli.let_tpu_compiler_sleep()
    assert os.environ.get("JAX_PLATFORMS") == platforms
