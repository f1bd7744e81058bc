"""The configs that come with ig_jax, by name: `get("digits:runlocal")`."""

import functools
import runpy
import sysconfig
from pathlib import Path

import ml_collections

from ig_jax.base.errors import check

CHECKOUT = Path(__file__).parents[2] / "configs"


@functools.cache
def folder() -> Path:
    """Where they are: in the checkout, or where an installation puts data."""
    return CHECKOUT if CHECKOUT.is_dir() else Path(sysconfig.get_path("data")) / "share" / "ig_jax" / "configs"


def names() -> list[str]:
    """The names of all."""
    return sorted(path.stem for path in folder().glob("*.py"))


def get(name: str) -> ml_collections.ConfigDict:
    """The config NAME or NAME:ARGUMENT, as `train --config=NAME:ARGUMENT` reads it.

    Raises: UserError for an unknown name, and whatever the config says of its argument.
    """
    stem, colon, argument = name.partition(":")
    check(stem in names(), "config", stem, f"one of {', '.join(names())}")
    return runpy.run_path(str(folder() / f"{stem}.py"))["get_config"](*[argument] if colon else [])
