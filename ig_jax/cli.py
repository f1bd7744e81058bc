"""What all commands share: flags, one-line errors, exit codes."""

import errno
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable

from absl import flags

from ig_jax import errors

AGAIN = "the same command goes on from what is there"
HELP = ("-h", "--h", "-help", "--help")


def run(main: Callable[..., None], values: flags.FlagValues, doc: str, words: tuple[str, ...] = ()) -> None:
    """Parse sys.argv into `values`, call `main`, and leave with the exit code that tells a launcher what to do.

    A command that does several things names them as `words`; `main` is called with the one that was given.
    0 finished, 2 bad input (one line on stderr), 3 diverged, 75 stopped but resumable, 1 a bug (traceback).
    """
    if "debug" not in values:
        flags.DEFINE_bool("debug", False, "Show the traceback behind a one-line error.", flag_values=values)
    if any(arg in HELP for arg in sys.argv[1:]):
        print(f"{doc.strip()}\n{values.get_help()}")
        sys.exit(errors.FINISHED)
    collect_less_often()
    signal.signal(signal.SIGTERM, _stop)
    try:
        main(*parse(values, words))
    except errors.UserError as error:
        _leave(str(error), errors.BAD_INPUT, values)
    except errors.Diverged as error:
        _leave(str(error), errors.DIVERGED, values)
    except errors.Preempted as error:
        _leave(str(error), errors.RESUMABLE, values)
    except KeyboardInterrupt:
        _leave(f"{signal.SIGINT.name}; {AGAIN}", errors.RESUMABLE, values)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in its buffer
        _leave(f"nobody reads what this prints; {AGAIN}", errors.RESUMABLE, values)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f" ({error.filename})" if error.filename else ""
        _leave(f"{error.strerror}{what}; free space and give the same command again", errors.BAD_INPUT, values)


def _stop(number: int, frame) -> None:
    raise errors.Preempted(f"{signal.Signals(number).name}; {AGAIN}")


def parse(values: flags.FlagValues, words: tuple[str, ...] = ()) -> list[str]:
    """Fill `values`; whatever goes wrong in a flag or a config file is the user's to mend.

    What stands beside the flags: one of `words` for a command that does several things, otherwise nothing.
    """
    flags.FLAGS.mark_as_parsed()  # grain and tfds read absl's own flags and want them parsed
    try:
        rest = values(sys.argv)
    except Exception as error:  # a config file is arbitrary Python, and overrides raise many types
        raise errors.UserError(_said(error)) from error
    if words:
        errors.check(len(rest) == 2 and rest[1] in words, "command", " ".join(rest[1:]), f"one of {', '.join(words)}")
    elif rest[1:]:
        raise errors.UserError(f"argument {rest[1]!r} is not a flag; write --name=value (see --help)")
    return rest[1:]


def required(holder: flags.FlagHolder):
    """The value of a flag that must be given."""
    try:
        value = holder.value
        hasattr(value, "keys")  # a config file that could not be loaded says so at its first use
    except Exception as error:  # and in many types
        raise errors.UserError(f"--{holder.name}: {_said(error)}") from error
    if value in (None, ""):
        raise errors.UserError(f"--{holder.name} is missing; see --help")
    return value


def _said(error: Exception) -> str:
    """The last line of a message, where a traceback or a list of attempts ends in its cause."""
    if isinstance(error, KeyError):  # how ml_collections says that there is no foo for --config.foo.bar
        return f"there is no {error.args[0]} in the config; see its file"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _leave(message: str, code: int, values: flags.FlagValues) -> None:
    if "debug" in values and values["debug"].value:
        traceback.print_exc()
    word = "stopped" if code == errors.RESUMABLE else "error"
    print(f"ig_jax: {word}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def collect_less_often() -> None:
    """Let Python look for cycles after 10,000 new objects, not 700: tracing makes millions, and starts wait for it."""
    gc.set_threshold(10_000, *gc.get_threshold()[1:])


def quiet_libraries() -> None:
    """Keep TensorFlow's start-up notes off the terminal; it only writes event files here."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
