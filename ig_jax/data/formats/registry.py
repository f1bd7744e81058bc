"""Registry of data formats: config.data.source -> the function that opens it.

A format is one module of this package, found by its name (ldit-sd in ldit_sd.py), that registers its opener and, so
that config.data.source="auto" finds it, a function that recognises its folders:

    @data_format("repa", recognise=lambda folder: (folder / "vae-sd").is_dir())
    def open_repa(config: DataConfig, split: str) -> Source: ...

A format outside the package registers itself the same way when it is imported.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from ig_jax.base.errors import UserError, check
from ig_jax.data import formats
from ig_jax.data.folders import existing_path
from ig_jax.data.sources import Source

# (DataConfig, split) -> Source, with the input's shape (H, W, C) last for a format that crops; DataConfig itself asks
# this module for the names.
Opener = Callable[..., Source]
Recognise = Callable[[Path], bool]

_openers: dict[str, Opener] = {}
_recognise: dict[str, Recognise] = {}
_crops: set[str] = set()


def data_format(name: str, recognise: Recognise | None = None, crops: bool = False) -> Callable[[Opener], Opener]:
    """Register an opener (DataConfig, split) -> Source as the format `name`.

    recognise: whether a folder or file is of this format and of no other, by its names and not its numbers.
    crops: the opener makes images of the shape of the network's input, and is called with it.
    """

    def register(opener: Opener) -> Opener:
        _openers[name] = opener
        if recognise:
            _recognise[name] = recognise
        if crops:
            _crops.add(name)
        return opener

    return register


def names() -> list[str]:
    """The formats that can be opened: those of this package and those registered elsewhere."""
    here = {module.name.replace("_", "-") for module in pkgutil.iter_modules(formats.__path__)}
    return sorted((here | _openers.keys()) - {"registry"})


def opener(name: str) -> Opener:
    """The function that opens the format `name`.  Raises: UserError for an unknown one."""
    check(name in names(), "data.source", name, f"one of {', '.join(names())}")
    if name not in _openers:
        importlib.import_module(f"{__package__}.{name.replace('-', '_')}")  # late: a format may bring large libraries
    return _openers[name]


def crops(name: str) -> bool:
    """Whether the opener of a format is called with the shape of the network's input."""
    opener(name)
    return name in _crops


def recognised(folder: str) -> str:
    """The one format that recognises a folder or file.  Raises: UserError for none, and for more than one."""
    path, setting = existing_path(folder), "data.folder"
    for name in names():
        opener(name)
    found = [name for name in names() if name in _recognise and _recognise[name](path)]
    if not found:
        known = ", ".join(sorted(_recognise))
        raise UserError(name=setting, value=folder, expected=f"in a known form ({known})", fix="set data.source")
    if len(found) > 1:
        problem = f"{setting}={folder!r} may be {' or '.join(found)}, and nothing in its names says which"
        raise UserError(problem, name=setting, value=folder, expected="of one form", fix="set data.source")
    return found[0]
