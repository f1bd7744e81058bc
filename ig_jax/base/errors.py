"""User errors with their parts, and the exit codes of all commands."""

import contextlib
import sys
from collections.abc import Iterator

FINISHED = 0
BUG = 1
BAD_INPUT = 2  # config, data, checkpoint or flag: one line on stderr, nothing written
DIVERGED = 3  # the loss stopped being finite; the last finite checkpoint is intact
PEER_FAILED = 70  # another process of this run failed, and its line is the last one; rerun once that is mended
RESUMABLE = 75  # preempted after saving; rerun the same command to resume (EX_TEMPFAIL)


class UserError(ValueError):
    """A mistake the user can fix, as one line with its parts as fields.

    `name` is the setting, flag, file or object at fault, `value` what it was, `expected` what it must be, and `fix`
    what to do. The line is `problem; fix`, where the problem is "name=value must be expected" unless it is given in
    words of its own.
    """

    def __init__(self, problem: str = "", *, name: str = "", value: object = None, expected: str = "", fix: str = ""):
        self.name, self.value, self.expected, self.fix = name, value, expected, fix
        self._problem = problem
        super().__init__(str(self))

    def __str__(self) -> str:
        problem = self._problem or f"{self.name}={short(repr(self.value))} must be {self.expected}"
        return f"{problem}; {self.fix}" if self.fix else problem

    def within(self, section: str) -> "UserError":
        """The same error of a setting inside `section`: its name becomes "section.name"."""
        problem = f"{section}.{self._problem}" if self._problem else ""
        return type(self)(
            problem, name=f"{section}.{self.name}", value=self.value, expected=self.expected, fix=self.fix
        )

    def at(self, place: str, fix: str = "") -> "UserError":
        """The same error of something stored at `place`; `fix` replaces its own."""
        problem, fix = self._problem or str(self).removesuffix(f"; {self.fix}"), fix or self.fix
        return type(self)(f"{place}: {problem}", name=self.name, value=self.value, expected=self.expected, fix=fix)


class Diverged(RuntimeError):
    """Training produced a loss or gradient that is not finite."""


class Preempted(RuntimeError):
    """A signal asked the run to stop; its state is saved and the same command resumes it.

    agreed: every process of the run stops after the same step.
    """

    def __init__(self, line: str, agreed: bool = False):
        super().__init__(line)
        self.agreed = agreed


def damaged(file: object, problem: str, fix: str = "copy it again from where it was made") -> UserError:
    """The error of a file, for the caller to raise; a record in it has its row in `problem`."""
    return UserError(f"{file}: {problem}", name=str(file), fix=fix)


def check(holds: bool, name: str, value, expected: str, fix: str = "") -> None:
    """Raise UserError "name=value must be expected; fix" unless `holds`."""
    if not holds:
        raise UserError(name=name, value=value, expected=expected, fix=fix)


def one_line(error: BaseException, most: int = 200) -> str:
    """The message of an exception on one line, or its type where it has none; a long one loses its middle."""
    return short(" ".join(str(error).split()) or type(error).__name__, most)


def short(text: str, most: int = 200) -> str:
    """A text of at most `most` characters; a longer one loses its middle."""
    return text if len(text) <= most else f"{text[: most // 2 - 2]} .. {text[2 - most // 2 :]}"


@contextlib.contextmanager
def warn_if_failing(kind: type[BaseException] | None) -> Iterator[None]:
    """Turn a UserError into a warning while an exception of type `kind` is already ending the run."""
    try:
        yield
    except UserError as error:
        if kind is None:
            raise
        print(f"ig_jax: warning: {error}", file=sys.stderr, flush=True)
