"""What all commands share: flags, one-line errors, exit codes."""

import os
import sys
import traceback
from collections.abc import Callable

from absl import flags

from ig_jax import errors

HELP = ("-h", "--h", "-help", "--help")


def run(main: Callable[[], None], values: flags.FlagValues, doc: str, argv: list[str] | None = None) -> None:
    """Parse flags into `values`, call `main`, and leave with the exit code that tells a launcher what to do.

    0 finished, 2 bad input (one line on stderr), 3 diverged, 75 stopped but resumable, 1 a bug (traceback).
    """
    argv = sys.argv if argv is None else argv
    flags.DEFINE_bool("debug", False, "Show the traceback behind a one-line error.", flag_values=values)
    if any(arg in HELP for arg in argv[1:]):
        print(f"{doc.strip()}\n{values.get_help()}")
        sys.exit(errors.FINISHED)
    try:
        parse(values, argv)
        main()
    except errors.UserError as error:
        _leave(str(error), errors.BAD_INPUT, values)
    except errors.Diverged as error:
        _leave(str(error), errors.DIVERGED, values)
    except errors.Preempted as error:
        _leave(str(error), errors.RESUMABLE, values)


def parse(values: flags.FlagValues, argv: list[str]) -> None:
    """Fill `values`; whatever goes wrong in a flag or a config file is the user's to mend."""
    flags.FLAGS.mark_as_parsed()  # grain and tfds read absl's own flags and want them parsed
    try:
        rest = values(argv)
    except Exception as error:  # a config file is arbitrary Python, and overrides raise many types
        raise errors.UserError(" ".join(str(error).split()) or type(error).__name__) from error
    if rest[1:]:
        raise errors.UserError(f"argument {rest[1]!r} is not a flag; write --name=value (see --help)")


def required(holder: flags.FlagHolder):
    """The value of a flag that must be given."""
    if holder.value in (None, ""):
        raise errors.UserError(f"--{holder.name} is missing; {holder._flagvalues[holder.name].help}")
    return holder.value


def _leave(message: str, code: int, values: flags.FlagValues) -> None:
    if "debug" in values and values["debug"].value:
        traceback.print_exc()
    word = "stopped" if code == errors.RESUMABLE else "error"
    print(f"ig_jax: {word}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def quiet_libraries() -> None:
    """Keep TensorFlow's start-up notes off the terminal; it only writes event files here."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
