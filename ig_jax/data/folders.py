"""Folders of latents written by published code: what their formats share."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ig_jax.base.copies import local_copy
from ig_jax.base.errors import UserError, check, damaged
from ig_jax.data.sources import Arrays, Source
from ig_jax.data.spec import FLOATS, BatchSpec, unstated


def existing_path(folder: str) -> Path:
    """The path of config.data.folder.  Raises: UserError where it is not given or not there."""
    setting = "data.folder"
    check(folder != "", setting, folder, "the folder of the data", "set --config.data.folder=DIR")
    path = local_copy(folder, setting)
    check(path.exists(), setting, folder, "a folder or file that exists")
    return path


def opened_path(folder: str, split: str) -> Path:
    """The folder or file of one split: config.data.folder/SPLIT where it exists, for "train" also the folder itself.

    Raises: UserError for a folder that is not there, and for a split that it does not have.
    """
    path = existing_path(folder)
    if (path / split).is_dir():
        return path / split
    problem = f"split={split!r} is not in {path}"
    if split != "train":
        raise UserError(problem, name="split", value=split, expected="train", fix=f"it holds train, or make {split}/")
    return path


def listing(folder: Path, suffix: str) -> list[str]:
    """The sorted names of the files in a folder that end so.  Raises: UserError when it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.name.endswith(suffix))
    except OSError as error:
        raise damaged(folder, f"cannot be listed ({error.strerror})", "check the path and its permissions") from error


def spec_of(holds: str, shape: tuple[int, ...], dtype: np.dtype, identity: str, file: object, **more: Any) -> BatchSpec:
    """The specification of arrays stored as `shape` (2C, h, w) or (C, h, w), for which `file` stands.

    Raises: UserError for another rank, an odd number of channels of moments, or a dtype that is not floating point.
    """
    halves = 2 if holds == "moments" else 1
    if len(shape) != 3 or 0 in shape or shape[0] % halves or dtype.name not in FLOATS:
        wanted = "(2C, h, w), mean and spread" if holds == "moments" else "(C, h, w)"
        raise damaged(file, f"has shape {shape} and dtype {dtype}, expected {wanted}, floating point")
    channels = shape[0] // halves
    latent_shape = (shape[1], shape[2], channels)
    fields: dict[str, Any] = {"mirrored": False, "scaling": unstated(channels), "class_names": ()} | more
    return BatchSpec(holds, latent_shape, dtype.name, identity=identity, channels_first=True, **fields)


def check_like(found: np.ndarray, first: np.ndarray, file: str, row: int) -> None:
    """Raise UserError for an array of another shape or dtype than that of the first row."""
    if (found.shape, found.dtype) != (first.shape, first.dtype):
        problem = f"row {row} has shape {found.shape} {found.dtype}, the first {first.shape} {first.dtype}"
        raise damaged(file, problem)


def checksum(*parts: bytes) -> str:
    """A name of these bytes, for the identity of data."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return f"{value:08x}"


def source_of(spec: BatchSpec, length: int, read, labels: np.ndarray | None, place: Callable[[int], str]) -> Source:
    """A source whose numbers are checked as they are read: all finite, no standard deviation negative."""

    def checked(rows: np.ndarray) -> Arrays:
        batch = read(rows)
        for name, values in batch.items():
            if name != "label":
                _check_numbers(spec, values, rows, place)
        return batch

    return Source(spec, length, checked, labels, place)


def _check_numbers(spec: BatchSpec, values: np.ndarray, rows: np.ndarray, place: Callable[[int], str]) -> None:
    """Raise UserError naming the first record of `values` (B, channels, h, w) with an impossible number."""
    # A sum is finite where all of its terms are, and costs less than asking each of them.
    with np.errstate(invalid="ignore", over="ignore"):
        sums = values.sum(axis=(1, 2, 3), dtype=np.float32)
    for index in np.flatnonzero(~np.isfinite(sums)):
        bad = np.argwhere(~np.isfinite(values[index].astype(np.float32)))
        if bad.size:
            problem = f"row {rows[index]} holds a number that is not finite at {bad[0].tolist()}"
            raise damaged(place(int(rows[index])), problem)
    if spec.holds == "moments" and spec.spread == "std":
        least = values[:, spec.latent_shape[-1] :].min(axis=(1, 2, 3))
        for index in np.flatnonzero(least < 0):
            raise damaged(
                place(int(rows[index])),
                f"row {rows[index]} has the standard deviation {float(least[index]):.3g}: it looks like a log-variance",
                "use latents that were written with standard deviations",
            )
