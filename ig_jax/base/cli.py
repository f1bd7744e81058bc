"""Entry point of every command: flags, one-line errors, exit codes."""

import errno
import gc
import glob
import importlib.util
import io
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable

from absl import flags

from ig_jax.base import errors
from ig_jax.base.signals import AGAIN, stop_on_signals

# Of TPUs, of NVIDIA and of AMD.
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
HELP = ("-h", "--h", "-help", "--help")


def run(main: Callable[..., None], values: flags.FlagValues, doc: str, words: tuple[str, ...] = ()) -> None:
    """Parse sys.argv into `values`, call `main`, and exit with a code for the launcher.

    A command with subcommands names them as `words`; `main` is called with the chosen one.
    Exit codes: 0 finished, 2 bad input (one line on stderr), 3 diverged, 70 another process failed, 75 stopped but
    resumable, 1 a bug (traceback).
    """
    open_streams()
    let_tpu_compiler_sleep()
    if "debug" not in values:
        flags.DEFINE_bool("debug", False, "Show the traceback behind a one-line error.", flag_values=values)
    if any(arg in HELP for arg in sys.argv[1:]):
        print(f"{doc.strip()}\n{values.get_help()}")
        sys.exit(errors.FINISHED)
    collect_less_often()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # or the command leaves at once
        stop_on_signals()
    try:
        main(*parse(values, words))
    except (Exception, KeyboardInterrupt) as error:
        if verdict(error)[1] == errors.BUG:
            raise
        sys.exit(report(error, bool(values["debug"].value)))


def verdict(error: BaseException) -> tuple[str, int]:
    """(line, exit code) of what ended a command."""
    match error:
        case errors.UserError():
            return str(error), errors.BAD_INPUT
        case errors.Diverged():
            return str(error), errors.DIVERGED
        case errors.Preempted():
            return str(error), errors.RESUMABLE
        case KeyboardInterrupt():
            return f"SIGINT; {AGAIN}", errors.RESUMABLE
        case BrokenPipeError():
            return f"no reader of the output; {AGAIN}", errors.RESUMABLE
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f" ({error.filename})" if error.filename else ""
            return f"{error.strerror}{what}; free space and rerun the same command", errors.BAD_INPUT
        case Exception() if problem := platform_problem():
            return str(problem), errors.BAD_INPUT
    return f"{type(error).__name__}: {errors.one_line(error)}", errors.BUG


def report(error: BaseException, debug: bool = False) -> int:
    """Print what ended a command, the traceback of a bug included; its exit code."""
    drop_dead_streams()
    line, code = verdict(error)
    if debug or code == errors.BUG:
        traceback.print_exception(error)
    word = "stopped" if code == errors.RESUMABLE else "error"
    print(f"ig_jax: {word}: {' '.join(line.split())}", file=sys.stderr, flush=True)
    return code


def parse(values: flags.FlagValues, words: tuple[str, ...] = ()) -> list[str]:
    """Fill `values`; every failure of a flag or a config file is a UserError.

    Returns the other arguments: one of `words` for a command with subcommands, otherwise none.
    """
    flags.FLAGS.mark_as_parsed()  # grain and tfds read absl's own flags and want them parsed
    try:
        rest = values(sys.argv)
    except Exception as error:  # a config file is arbitrary Python, and overrides raise many types
        if found := re.match(r"flag --(\w+)=(.*?): ", str(error)):  # what follows are Python's words
            parser = values[found[1]].parser
            expected = parser.syntactic_help or f"one of {', '.join(getattr(parser, 'enum_values', ('true', 'false')))}"
            raise errors.UserError(name=f"--{found[1]}", value=found[2], expected=expected) from error
        raise errors.UserError(_last_line(error).removeprefix("ERROR:: ")) from error
    if words:
        errors.check(len(rest) == 2 and rest[1] in words, "command", " ".join(rest[1:]), f"one of {', '.join(words)}")
    elif rest[1:]:
        raise errors.UserError(
            f"argument {rest[1]!r} is not a flag", name="argument", value=rest[1], fix="write --name=value (see --help)"
        )
    return rest[1:]


def define_launch(values: flags.FlagValues) -> None:
    """Define what the launcher of a command in several processes may say (parallel/processes.py)."""
    for name, default, text in (
        ("expect_processes", 0, "Processes that must have joined; 0 for what the launcher promises."),
        ("expect_devices", 0, "Devices that all processes together must have; 0 for any number."),
        ("init_timeout", 120, "Seconds to wait for the other processes at the start."),
        ("heartbeat_timeout", 20, "Seconds after which a silent process counts as dead."),
        ("shutdown_timeout", 20, "Seconds to wait for the other processes at the end."),
    ):
        flags.DEFINE_integer(name, default, text, lower_bound=0, flag_values=values)


def required(holder: flags.FlagHolder | flags.Flag):
    """The value of a flag that must be given."""
    try:
        value = holder.value
        hasattr(value, "keys")  # a config file that could not be loaded raises at its first use
    except Exception as error:  # of many types
        raise errors.UserError(f"--{holder.name}: {_last_line(error)}", name=f"--{holder.name}") from error
    if value in (None, ""):
        raise errors.UserError(f"--{holder.name} is missing", name=f"--{holder.name}", fix="see --help")
    return value


def open_streams() -> None:
    """Give standard streams that the caller closed to the null device, and let every terminal take every letter."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:  # or the next file would take the number, and what libraries write there
                os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if number else "r"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_dead_streams() -> bool:
    """Turn output that nobody reads any more, what is in its buffer included, to the null device; whether any was."""
    found = False
    for number in (1, 2):
        poll = select.poll()
        poll.register(number, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            found = True
    return found


def let_tpu_compiler_sleep() -> None:
    """Choose the CPU where the TPU compiler is installed (for preflight) and no accelerator is.

    JAX would wake it, and it complains in many lines.
    """
    devices = (path for pattern in ACCELERATORS for path in glob.iglob(pattern))
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None or any(devices):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # which has read its environment
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def platform_problem() -> errors.UserError | None:
    """What is wrong with JAX_PLATFORMS, where JAX finds no device because of it."""
    wanted, jax = os.environ.get("JAX_PLATFORMS"), sys.modules.get("jax")
    if not wanted or jax is None:
        return None
    try:
        jax.devices()
    except Exception as error:  # of many types, AssertionError among them
        why = f" ({errors.one_line(error)})" if str(error) else ""
        expected, fix = f"platforms that JAX finds on this machine{why}", "unset it, or install the extra cuda or tpu"
        return errors.UserError(name="JAX_PLATFORMS", value=wanted, expected=expected, fix=fix)
    return None


def _last_line(error: Exception) -> str:
    """The last line of a message, where a traceback or a list of attempts ends in its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def collect_less_often() -> None:
    """Collect garbage after 10,000 new objects, not 700: tracing creates millions, and startup waits for each pass."""
    gc.set_threshold(10_000, *gc.get_threshold()[1:])


def quiet_libraries() -> None:
    """Keep TensorFlow's start-up messages off the terminal; TFDS decodes images with it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
