"""Features of many images on all devices, fetched while the next ones are computed, and kept so that a run resumes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ig_jax.base.errors import check
from ig_jax.base.files import atomic_file, writing
from ig_jax.base.progress import LINE, Progress
from ig_jax.checkpoints import inception as checkpoint
from ig_jax.generation import sampler
from ig_jax.models import inception
from ig_jax.parallel import processes
from ig_jax.parallel.sharding import batch_sharding, replicated

PART = 1024  # images in a file of features; large products are the fast ones
Found = dict[str, np.ndarray]  # "index" int (B,) and the features (B, ...) of each name


class InceptionNet:
    """The InceptionV3 of FID, a FeatureNet on a mesh: "pool", "spatial" and "logits", whole on every process."""

    def __init__(self, directory: str, mesh: Mesh):
        """Raises: UserError for a directory that `convert` did not write, or a damaged one."""
        params, self.digest = checkpoint.load(directory)
        self.mesh = mesh
        self._params = jax.device_put(params, replicated(mesh))
        rows = batch_sharding(mesh)
        placed: dict[str, Any] = dict(in_shardings=(replicated(mesh), rows), out_shardings=replicated(mesh))
        self._forward = jax.jit(lambda params, images: inception.forward(params, images)._asdict(), **placed)

    def __call__(self, images: np.ndarray | jax.Array) -> Mapping[str, jax.Array]:
        """Features of images uint8 (B, H, W, 1 or 3), which may still be being computed."""
        if isinstance(images, np.ndarray):  # that every process has
            images = jax.make_array_from_callback(images.shape, batch_sharding(self.mesh), lambda index: images[index])
        return self._forward(self._params, images)

    def padded(self, images: np.ndarray, size: int) -> np.ndarray:
        """Images filled up to a batch that the devices divide, so that any number compiles once."""
        short = sampler.padded(size, self.mesh) - len(images)
        return np.pad(images, ((0, short), *[(0, 0)] * 3), mode="edge") if short else images


def stream(net: InceptionNet, batches: Iterator[tuple[np.ndarray, np.ndarray | jax.Array]]) -> Iterator[Found]:
    """The features of batches (indices (b,), images (B, H, W, C), B >= b), each once the next one was dispatched."""
    ready = None
    for indices, images in batches:
        dispatched = indices, net(images)
        if ready is not None:
            yield _fetched(*ready)
        ready = dispatched
    if ready is not None:
        yield _fetched(*ready)


def _fetched(indices: np.ndarray, found: Mapping[str, jax.Array]) -> Found:
    return {"index": indices, **{name: np.asarray(array)[: len(indices)] for name, array in found.items()}}


class Store:
    """A folder of the features of images 0, 1, ..., in files of PART images that appear whole."""

    def __init__(self, folder: Path, what: dict):
        """`what` decides the features.  Raises: UserError for a folder of others, or one that cannot be written."""
        self.folder, identity = folder, json.dumps(what, sort_keys=True)
        place, fix = folder / "what.json", "choose another --out, or delete it"
        if processes.is_first():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                there = place.read_text() if place.exists() else identity
            check(there == identity, "--out", str(folder.parent), "a folder without features of something else", fix)
            with atomic_file(place) as file:
                file.write(identity.encode())
        # Counted by one process, before any of them writes: all must resume from the same image.
        self.done = int(processes.from_first(np.asarray(self._done() if processes.is_first() else 0)))

    def _done(self) -> int:
        done = 0
        while (path := self._path(done)).exists():
            with np.load(path, allow_pickle=False) as archive:
                done += len(archive["index"])
        return done

    def parts(self) -> Iterator[Found]:
        """What an earlier run stored, from image 0 to the first that was missing."""
        read = 0
        while read < self.done:
            with np.load(self._path(read), allow_pickle=False) as archive:
                part = {name: archive[name] for name in archive.files}
            yield part
            read += len(part["index"])

    def collect(self, found: Iterator[Found], progress: Progress) -> Iterator[Found]:
        """Parts of about PART images from batches in order, each stored before it is handed on."""
        waiting: list[Found] = []
        for batch in found:
            waiting.append(batch)
            progress.advance(len(batch["index"]))
            if processes.is_first():
                progress.show(every=LINE)
            if sum(len(part["index"]) for part in waiting) >= PART:
                yield self._stored(waiting)
                waiting = []
        if waiting:
            yield self._stored(waiting)

    def _stored(self, batches: list[Found]) -> Found:
        part = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        if processes.is_first():
            with atomic_file(self._path(int(part["index"][0]))) as file:
                np.savez(file, **part)  # type: ignore[arg-type]
        return part

    def _path(self, first: int) -> Path:
        return self.folder / f"{first:08d}.npz"
