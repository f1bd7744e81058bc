"""A folder of samples: one file for each, so that a killed run resumes, and recipe.json with its metadata.

A sample is missing when its file is: a file gets its name only when it is complete, and other files in the folder do
not matter. The archive is assembled at the end, and the grid next to the folder, whose pictures are samples alone. A
folder can grow: its samples are the first ones of any larger number.
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ig_jax.base.errors import UserError, check
from ig_jax.base.files import atomic_file, free_bytes, remove_folder, remove_leftovers, user_path, write_text, writing
from ig_jax.generation import captions
from ig_jax.pictures import images

METADATA, LABELS = "recipe.json", "labels.npy"
FORMATS = ("png", "npz", "latents")
GRID = 100  # images shown in the grid
# The metadata that decide a sample, apart from its label; the others record how the samples were made.
IDENTITY = ("kind", "checkpoint", "second", "autoencoder", "recipe", "seed", "labels", "save", "scales")


class Folder:
    """Where `count` samples go, and in which formats: "png" and/or the archive "npz", or "latents"."""

    def __init__(self, path: str | Path, count: int, save: Sequence[str]):
        check_formats(save)
        self.path, self.count, self.save = user_path(path, "out"), count, tuple(save)
        # Without PNGs the archive still needs parts that survive a kill; they are removed when it is complete.
        self._parts = self.path / "parts" if self.save == ("npz",) else self.path
        self._suffix = ".npy" if "latents" in save else ".png"
        self._archive = self.path / "samples.npz"

    def part(self, index: int) -> Path:
        """The file of one sample."""
        return self._parts / f"{index:06d}{self._suffix}"

    def prepare(self, metadata: dict) -> None:
        """Make the folder, delete what a killed run left half written, and write recipe.json."""
        with writing(self._parts):
            self._parts.mkdir(parents=True, exist_ok=True)
        for folder in {self.path, self._parts}:
            remove_leftovers(folder)
        self.write_metadata(metadata)
        if 0 < self._archived() < self.count:  # the folder grows, and the samples must outlive their archive
            with self._archive.open("rb") as file:
                for i, image in enumerate(images.read_npz(file)):
                    if not self.part(i).exists():
                        grey = (image[..., :1] == image).all()  # as write_npz made it of one channel
                        self.write(i, image[..., :1] if grey else image)
            self._archive.unlink()

    def check_space(self, shape: tuple[int, ...]) -> None:
        """Raise UserError when the archive of images (H, W, C) does not fit on the disk."""
        needed = (
            self.count * int(np.prod(shape[:2])) * max(shape[2], 3)
            if "npz" in self.save and self._archived() < self.count
            else 0
        )
        free = free_bytes(self.path)
        expected = f"so few that samples.npz, {needed / 1e9:,.1f} GB, fits into {free / 1e9:,.1f} GB of free space"
        check(needed <= free, "num", self.count, expected, "free some, or leave npz out of --save")

    def metadata(self) -> dict | None:
        """The contents of recipe.json, None without one.  Raises: UserError when it cannot be read."""
        out, fix = str(self.path), "choose another --out"
        check(not self.path.exists() or self.path.is_dir(), "out", out, "a directory, not a file")
        try:
            found = json.loads((self.path / METADATA).read_text())
            if not (isinstance(found, dict) and {"num", "finished"} <= found.keys()):
                raise ValueError("it is not of samples")
            return found
        except FileNotFoundError:
            check(bool(self.missing().all()), "out", out, f"a folder whose samples have a {METADATA}", fix)
            return None
        except (OSError, ValueError) as error:
            raise UserError(name="out", value=out, expected=f"a folder with a readable {METADATA}", fix=fix) from error

    def write_metadata(self, metadata: dict) -> None:
        """Replace recipe.json."""
        write_text(self.path / METADATA, json.dumps(metadata, indent=2))

    def missing(self) -> np.ndarray:
        """bool (count,): samples without a file."""
        there = {path.name for path in self._parts.glob(f"*{self._suffix}")}
        archived = self._archived() if self.save == ("npz",) else 0
        return np.array([i >= archived and self.part(i).name not in there for i in range(self.count)])

    def _archived(self) -> int:
        """The number of images in the archive; 0 without one that can be read."""
        try:
            with self._archive.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return len(archive["arr_1"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return 0

    def check_same(self, metadata: dict, labels: np.ndarray, grows: bool = False) -> None:
        """Raise UserError when the folder holds something else, or not the first ones of a larger number."""
        found, asked = self.metadata() or metadata, metadata
        if grows and found["num"] < len(labels):
            asked = metadata | {"num": found["num"], "labels_sha256": digest(labels[: found["num"]])}
        for key in (*IDENTITY, "num", "labels_sha256"):
            if found.get(key) != asked.get(key):
                difference = _difference(found.get(key), asked.get(key))
                raise UserError(
                    f"--out={str(self.path)!r} holds images of another {key} ({difference})",
                    name="--out",
                    value=str(self.path),
                    expected=f"a folder of the same {key}",
                    fix="choose another --out",
                )

    def is_finished(self, metadata: dict, labels: np.ndarray) -> bool:
        """Whether the folder holds all of these samples.  Raises: UserError when it holds something else."""
        found = self.metadata()
        if found is None or not found["finished"] and self.missing().all():
            return False  # nothing is there, or an earlier run failed before its first sample
        self.check_same(metadata, labels, grows=True)
        # A sample or an archive that was deleted is made again.
        complete = not self.missing().any() and ("npz" not in self.save or self._archived() == self.count)
        return bool(found["finished"]) and found["num"] == self.count and complete

    def write(self, index: int, sample: np.ndarray) -> None:
        """Write one sample: an image uint8 (H, W, C) or a latent float32 (H, W, C)."""
        if self._suffix == ".png":
            images.write_png(self.part(index), sample)
        else:
            with atomic_file(self.part(index)) as file:
                np.save(file, sample)

    def read(self, index: int) -> np.ndarray:
        """One finished sample (H, W, C), as it was written.  Raises: UserError for a damaged file."""
        path = self.part(index)
        try:
            with path.open("rb") as file:
                if self._suffix == ".npy":
                    return np.load(file, allow_pickle=False)
                image = np.asarray(Image.open(file))
        except (OSError, ValueError) as error:
            problem = f"{str(path)!r} cannot be read ({error})"
            raise UserError(problem, name=str(path), fix="remove it and run again") from error
        return image if image.ndim == 3 else image[..., None]

    def labels(self) -> np.ndarray:
        """The labels int (count,) of a finished folder of latents."""
        with (self.path / LABELS).open("rb") as file:
            return np.load(file, allow_pickle=False)

    def finish(self, labels: np.ndarray, metadata: dict) -> None:
        """Write the grid, the archive and last the metadata, from the finished samples."""
        if "latents" in self.save:
            with atomic_file(self.path / LABELS) as file:
                np.save(file, labels)
        elif "npz" not in self.save or not self._archive.exists():
            shown = np.stack([images.three_channels(self.read(i)) for i in range(min(self.count, GRID))])
            from ig_jax.pictures import plots  # late: matplotlib takes half a second

            picture = plots.sheet(shown, columns=10, caption=captions.of_metadata(metadata))
            images.write_png(self.path.with_name(f"{self.path.name}_grid.png"), picture)
            if "npz" in self.save:
                images.write_npz(self._archive, (self.read(i) for i in range(self.count)), labels)
        if self._parts != self.path:
            remove_folder(self._parts)
        self.write_metadata(metadata)


def check_formats(save: Sequence[str]) -> None:
    """Raise UserError for formats that a folder cannot have."""
    known = bool(save) and set(save) <= set(FORMATS) and ("latents" not in save or len(save) == 1)
    check(known, "save", ",".join(save), "png, npz, png,npz or latents")


def digest(labels: np.ndarray) -> str:
    """The sha256 (hex) of labels."""
    return hashlib.sha256(labels.tobytes()).hexdigest()


def _difference(stored, asked) -> str:
    """The stored value, or the first entry that differs of two sections."""
    if not (isinstance(stored, dict) and isinstance(asked, dict)):
        return str(stored)
    name = next(name for name in stored | asked if stored.get(name) != asked.get(name))
    return f"{name} is {stored.get(name)}"
