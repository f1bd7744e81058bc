"""Assertions about refusals: the parts of a UserError, not its sentence."""

import contextlib
from collections.abc import Iterator

import pytest

from ig_jax.base.errors import UserError

ANYTHING = object()


@contextlib.contextmanager
def refused(
    name: str, value=ANYTHING, *, expected: str = "", fix: str = "", says: str = ""
) -> Iterator[pytest.ExceptionInfo]:
    """Assert that the block raises a UserError with these parts, on one line.

    `name` and `value` are compared whole; `expected`, `fix` and `says` (the line itself) need to contain the given
    words only.
    """
    with pytest.raises(UserError) as caught:
        yield caught
    error = caught.value
    assert error.name == name, error
    assert value is ANYTHING or error.value == value, error
    assert expected in error.expected and fix in error.fix and says in str(error), error
    assert "\n" not in str(error)
