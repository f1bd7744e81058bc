"""The folder samples are written to: one whole file for each sample, so that a killed run goes on where it
was.

Which samples are missing is read off the files that are there; a file has its name only when it is whole. The
archive and the grid are put together at the end from the finished parts.
"""

import concurrent.futures
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from ig_jax.errors import UserError, check
from ig_jax.files import atomic_file
from ig_jax.generation import images

RECORD, LABELS = "recipe.json", "labels.npy"
KINDS = ("png", "npz", "latents")
THREADS = 4  # that encode and write; PNG compression leaves the interpreter lock
GRID = 100  # images shown in grid.png


class Folder:
    """Where `count` samples go; `save` says as what: "png" and/or the archive "npz", or "latents"."""

    def __init__(self, path: str | Path, count: int, save: tuple[str, ...]):
        self.path, self.count, self.save = Path(path).expanduser().absolute(), count, tuple(save)
        unknown = [kind for kind in save if kind not in KINDS]
        check(save and not unknown and ("latents" not in save or len(save) == 1), "save", ",".join(save),
              "png, npz, png,npz or latents")
        # Without PNGs the archive still needs parts that outlive a kill; they are removed when it is whole.
        self._parts = self.path / "parts" if self.save == ("npz",) else self.path
        self._suffix = ".npy" if "latents" in save else ".png"

    def part(self, index: int) -> Path:
        """The file of one sample."""
        return self._parts / f"{index:06d}{self._suffix}"

    def prepare(self, record: dict) -> None:
        """Make the folder, clear what a killed run left half written, and say in recipe.json what will be
        in it.
        """
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out={str(self.path)!r} must be a writable directory ({error.strerror}); "
                            "choose another --out") from error
        for folder in {self.path, self._parts}:
            for leftover in folder.glob(f".*.{'[0-9a-f]' * 8}.tmp"):  # of atomic_file
                if not leftover.is_dir():
                    leftover.unlink(missing_ok=True)
        self.write_record(record)

    def check_space(self, shape: tuple[int, ...]) -> None:
        """Raise UserError where the archive of images of this shape cannot fit on the disk."""
        needed = self.count * int(np.prod(shape)) if "npz" in self.save and not self._archive.exists() else 0
        free = shutil.disk_usage(next(p for p in (self.path, *self.path.parents) if p.exists())).free
        check(needed <= free, "num", self.count,
              f"so few that {needed / 1e9:,.1f} GB of samples.npz fit into the {free / 1e9:,.1f} GB free in "
              f"{str(self.path)!r}", "make space, or leave npz out of --save")

    def record(self) -> dict | None:
        """recipe.json as it is there.  Raises: UserError when it cannot be read."""
        check(not self.path.exists() or self.path.is_dir(), "out", str(self.path), "a directory, not a file")
        try:
            return json.loads((self.path / RECORD).read_text())
        except FileNotFoundError:
            check(self.missing().all(), "out", str(self.path), f"a folder whose samples have a {RECORD}",
                  "these are of something else; choose another --out")
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"out={str(self.path)!r} has a {RECORD} that cannot be read; choose another --out"
                            ) from error

    def write_record(self, record: dict) -> None:
        """recipe.json, whole or as it was."""
        with atomic_file(self.path / RECORD) as file:
            file.write((json.dumps(record, indent=2) + "\n").encode())

    def missing(self) -> np.ndarray:
        """bool [count]: samples whose file is not there."""
        if self._archive.exists() and "png" not in self.save:
            return np.zeros(self.count, bool)
        there = {path.name for path in self._parts.glob(f"*{self._suffix}")}
        return np.array([self.part(i).name not in there for i in range(self.count)])

    def whole(self) -> bool:
        """Whether every sample is there, and the archive where one was asked for."""
        return not self.missing().any() and ("npz" not in self.save or self._archive.exists())

    def write(self, index: int, sample: np.ndarray) -> None:
        """One sample: uint8 [H, W, C] image or float32 latent."""
        if self._suffix == ".png":
            images.write_png(self.part(index), sample)
        else:
            with atomic_file(self.part(index)) as file:
                np.save(file, sample)

    def read(self, index: int) -> np.ndarray:
        """One finished sample.  Raises: UserError for a file that is not what `write` wrote."""
        try:
            if self._suffix == ".npy":
                return np.load(self.part(index), allow_pickle=False)
            with Image.open(self.part(index)) as picture:
                image = np.asarray(picture)
        except (OSError, ValueError) as error:
            raise UserError(f"{str(self.part(index))!r} cannot be read ({error}); remove it and run again"
                            ) from error
        return image if image.ndim == 3 else image[..., None]

    def labels(self) -> np.ndarray:
        """The labels int [count] of a finished folder of latents."""
        return np.load(self.path / LABELS, allow_pickle=False)

    def finish(self, labels: np.ndarray, record: dict) -> None:
        """The grid, the archive and last the record, from finished parts."""
        if "latents" not in self.save and not ("npz" in self.save and self._archive.exists()):
            shown = np.stack([self.read(i) for i in range(min(self.count, GRID))])
            zoom = images.comfortable_zoom(shown.shape[1])
            picture = images.grid(shown, columns=min(10, len(shown)), zoom=zoom)
            images.write_png(self.path / "grid.png", picture)
            if "npz" in self.save:
                images.stream_npz(self._archive, (self.read(i) for i in range(self.count)), labels)
        if "latents" in self.save:
            with atomic_file(self.path / LABELS) as file:
                np.save(file, labels)
        if self._parts != self.path:
            shutil.rmtree(self._parts, ignore_errors=True)
        self.write_record(record)

    @property
    def _archive(self) -> Path:
        return self.path / "samples.npz"


class Writer:
    """Writes samples in threads while the devices draw the next; a failure is raised at the next call."""

    def __init__(self, folder: Folder):
        self._folder = folder
        self._pool = concurrent.futures.ThreadPoolExecutor(THREADS)
        self._pending: list[concurrent.futures.Future] = []

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *rest) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._wait()

    def write(self, indices: np.ndarray, samples: np.ndarray) -> None:
        """Start writing a batch, once the batch before is on disk: memory holds two at most."""
        self._wait()
        self._pending = [self._pool.submit(self._folder.write, int(i), sample)
                         for i, sample in zip(indices, samples)]

    def _wait(self) -> None:
        for future in self._pending:
            future.result()
        self._pending = []
