"""Settings as a run or a checkpoint stores them, maybe those of another version.

What they lack means "as before": the default of its field. Sampling reads the sections of the network alone. In the
others, a setting that no code reads any more is left out and named.
"""

import copy
import dataclasses
import json
import os
import sys
from typing import Any

from ig_jax.base.errors import UserError, check
from ig_jax.base.files import run_path
from ig_jax.base.schema import bind, unread
from ig_jax.config.experiment import Experiment, Trained
from ig_jax.data.dataset import AUTO, DataConfig
from ig_jax.models.latents import PIXELS

FILE = "config.json"  # of a run, with the settings of its last start
_NETWORK = tuple(field.name for field in dataclasses.fields(Trained))


def network(meta: dict, place: str | os.PathLike) -> Trained:
    """What sampling needs of the checkpoint at `place`.  Raises: UserError that names it and the setting."""
    sections = meta.get("config", {})
    return _bound(Trained, {name: sections[name] for name in _NETWORK if name in sections}, "config", meta, place)


def data(sections: dict, place: str | os.PathLike) -> DataConfig:
    """The data section of the settings of a checkpoint.  Raises: UserError."""
    return _bound(DataConfig, sections.get("data", {}), "config.data", {}, place)


def experiment(meta: dict, place: str | os.PathLike) -> Experiment:
    """The whole experiment of the checkpoint at `place`.  Raises: UserError that names it and the setting."""
    return _bound(Experiment, _readable(meta.get("config", {}), place), "config", meta, place)


def _readable(sections: dict, place: str | os.PathLike) -> dict:
    """The sections without what no code reads any more, which is warned of; those of the network stay as they are."""
    sections = copy.deepcopy(sections)
    for name in unread(Experiment, sections):
        *parents, last = name.split(".")
        section = sections
        for parent in parents:
            section = section[parent]
        if name.split(".")[0] not in _NETWORK:
            what = f"config.{name}={section.pop(last)!r} of {str(place)!r} is left out"
            print(f"ig_jax: warning: {what}: nothing reads it", file=sys.stderr, flush=True)
    return sections


def of_checkpoint(place: str | os.PathLike) -> dict[str, Any]:
    """The sections of a checkpoint, those of its network checked; the others are for `bind`, after overrides.

    What the data decided of a batch of latents is left to the data again: another folder may hold them differently.
    Raises: UserError.
    """
    from ig_jax.checkpoints.steps import stored_meta  # late: brings JAX and Orbax, which other configs do without

    meta = stored_meta(place)
    return _for_a_run(meta["config"] | network(meta, place).as_dict(), place)


def of_run(place: str | os.PathLike) -> dict[str, Any] | None:
    """The sections of a run, by its work directory, config.json, or checkpoint; None where there is no such thing.

    Raises: UserError for a damaged checkpoint.
    """
    path = run_path(place, "--config")
    path = path.parent if path.name == FILE else path
    try:
        sections = json.loads((path / FILE).read_text())
    except (OSError, ValueError):
        if not any((path / name).is_dir() for name in ("checkpoints", "meta")) and path.name != "checkpoints":
            return None
        return of_checkpoint(path)
    check(isinstance(sections, dict), "--config", str(place), f"a run, with its settings in {FILE}")
    return _for_a_run(sections, place)


def _for_a_run(sections: dict, place: str | os.PathLike) -> dict:
    sections = _readable(sections, place)
    if sections.get("latents", {}).get("name") != PIXELS.name:
        sections["data"] = sections.get("data", {}) | dict(holds=AUTO, dtype=AUTO, mirrored=AUTO)
    return sections


def _bound(cls: type, sections: dict, prefix: str, meta: dict, place: str | os.PathLike) -> Any:
    try:
        return bind(cls, sections, prefix)
    except UserError as error:
        version = meta.get("versions", {}).get("ig_jax")
        fix = f"use the version that wrote it{f', {version}' if version else ''}"
        raise error.at(f"checkpoint {str(place)!r}", fix) from error
