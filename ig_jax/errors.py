"""What a user can get wrong, and the exit codes of every command."""

import contextlib
import sys
from collections.abc import Iterator

FINISHED = 0
BAD_INPUT = 2  # config, data, checkpoint or flag: one line on stderr, nothing written
DIVERGED = 3  # the loss stopped being finite; the last finite checkpoint is intact
RESUMABLE = 75  # preempted after saving; the same command goes on (EX_TEMPFAIL)


class UserError(ValueError):
    """A mistake the user can mend; its one line names the value, what was expected and the mend."""


class Diverged(RuntimeError):
    """Training produced a loss or gradient that is not finite."""


class Preempted(RuntimeError):
    """A signal asked the run to stop; its state is saved and the same command resumes it."""


@contextlib.contextmanager
def second_to(kind: type[BaseException] | None) -> Iterator[None]:
    """Make a UserError a warning where an exception of `kind` is on its way out already: what ended a run first."""
    try:
        yield
    except UserError as error:
        if kind is None:
            raise
        print(f"ig_jax: warning: {error}", file=sys.stderr, flush=True)


def check(holds: bool, name: str, value, expected: str, mend: str = "") -> None:
    """Raise UserError "name=value must be expected; mend" unless `holds`."""
    if not holds:
        raise UserError(f"{name}={value!r} must be {expected}" + (f"; {mend}" if mend else ""))
