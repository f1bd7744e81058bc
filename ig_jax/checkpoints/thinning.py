"""Checkpoints without what only training needs."""

import json
import os
import shutil
from pathlib import Path

from ig_jax.base.files import atomic_directory, atomic_file, local_path
from ig_jax.checkpoints.steps import Checkpoints, find, nothing_saved, open_newest, stored_arrays

TRAINING = ("params", "optimizer")  # items of a step


def thin(checkpoint: str | os.PathLike, out: Path | None = None) -> tuple[int, int]:
    """(bytes removed, bytes left) of all steps of a run, or of one; with `out` of the newest, copied to there.

    The rest is read and checked first. Killed in between, the same call finishes it.
    Raises: UserError for a checkpoint that is missing or damaged, or a directory that cannot be written.
    """
    directory, only = find(local_path(checkpoint, "checkpoint"))
    with Checkpoints(directory, read_only=True) as reader:
        folders = [only] if only else [directory / str(step) for step in reader.steps()]
    if not folders:
        raise nothing_saved(checkpoint)
    folders = folders[:1] if out else folders
    for folder in folders:
        open_newest(folder, lambda meta: stored_arrays(meta, meta["arrays"].keys() - TRAINING), as_readers=True)
    removed = sum(_size(folder / item) for folder in folders for item in TRAINING)
    if out:
        with atomic_directory(out) as new:
            copy = new / "checkpoints" / str(_meta(folders[0])["step"])
            shutil.copytree(folders[0], copy, ignore=lambda place, names: set(TRAINING) & set(names))
            _forget(copy)
    else:
        for folder in folders:
            _forget(folder)
            for item in TRAINING:
                shutil.rmtree(folder / item, ignore_errors=True)
    return removed, sum(_size(folder) for folder in ([out] if out else folders))


def _meta(folder: Path) -> dict:
    return json.loads((folder / "meta" / "metadata").read_text())


def _forget(folder: Path) -> None:
    """Take what only training needs out of the list of a step's arrays."""
    meta = _meta(folder)
    meta["arrays"] = {item: arrays for item, arrays in meta["arrays"].items() if item not in TRAINING}
    with atomic_file(folder / "meta" / "metadata") as file:
        file.write(json.dumps(meta).encode())


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
