"""Latents as LightningDiT's extract_features.py writes them: samples, in shards of 10,000, with their mirror images.

    DIR/latents_rank00_shard000.safetensors   latents, latents_flip float32 (N, C, h, w); labels int64 (N,)
    DIR/latents_stats.pt                      mean, std float32 (1, C, 1, 1) of the latents

Source: hustvl/LightningDiT extract_features.py, datasets/img_latent_dataset.py.
"""

import itertools
import math
import os
import re
import weakref
from pathlib import Path

import numpy as np

from ig_jax.base.errors import damaged
from ig_jax.data.dataset import AUTO, DataConfig
from ig_jax.data.folders import checksum, listing, opened_path, source_of, spec_of
from ig_jax.data.formats.registry import data_format
from ig_jax.data.sources import Arrays, Source
from ig_jax.models.latents import SD_VAE_SCALING, LatentScaling, autoencoder_name, from_mean_std
from ig_jax.weightfiles.files import open_weights
from ig_jax.weightfiles.sets import channel_statistics

STATS = "latents_stats.pt"
ARRAYS = {"latent": "latents", "latent_flip": "latents_flip"}  # of a batch -> of a file
_SHARD = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")


def root_of(path: Path, split: str) -> Path | None:
    """The folder with the shards: `path`, or the one inside that is named after the split; None without shards."""
    inside = sorted(path.glob(f"*_{split}_*")) if path.is_dir() else []
    return next((folder for folder in [path, *inside] if any(folder.glob("latents_rank*_shard*.safetensors"))), None)


@data_format("ldit", recognise=lambda path: root_of(path, "train") is not None)
def open_ldit(config: DataConfig, split: str) -> Source:
    """Latents normalised by the latents_stats.pt among them; left to "auto", 4 channels without it are ldit-sd.

    Raises: UserError naming the file that is missing, damaged or does not fit the others.
    """
    return open_shards(config, split, "ldit")


def open_shards(config: DataConfig, split: str, name: str) -> Source:
    """The source of the format "ldit", or of "ldit-sd", which has no statistics."""
    path = opened_path(config.folder, split)
    root = root_of(path, split)
    if root is None:
        raise damaged(path, "holds no latents_rank00_shard000.safetensors", "name the folder of the shards")
    shards = [Shard(root / file) for file in _whole(root, listing(root, ".safetensors"))]
    first = shards[0]
    for shard in shards:
        if (shard.shape, shard.dtype) != (first.shape, first.dtype):
            raise damaged(shard.path, f"has latents {shard.shape} {shard.dtype}, {first.path.name} {first.shape}")
        if config.mirrored is not False and not shard.mirrored:
            fix = "set --config.data.mirrored=False to train without mirror images"
            raise damaged(shard.path, "has no latents_flip, the encoded mirror images", fix)
    labels = np.concatenate([shard.labels for shard in shards])
    starts = np.cumsum([0, *(len(shard.labels) for shard in shards)])
    # Each rank wrote its own shards: row 0 of the second follows the last row of the first.
    shard_of = lambda row: int(np.searchsorted(starts, row, side="right")) - 1

    def place(row: int) -> str:
        at = shard_of(row)
        return f"{shards[at].path}, index {row - int(starts[at])}"

    stats = root / STATS
    plain = name == "ldit-sd" or (
        config.source == AUTO and first.shape[0] == SD_VAE_SCALING.channels and not stats.exists()
    )
    scaling = {} if plain else {"scaling": read_scaling(stats, first.shape[0])}
    arrays = tuple(ARRAYS)[: 1 if config.mirrored is False else 2]
    identity = f"ldit:{checksum(labels.tobytes(), *(shard.header for shard in shards))}:{split}[{len(labels)}]"
    spec = spec_of("latents", first.shape, first.dtype, identity, first.path, mirrored=len(arrays) == 2, **scaling)

    def read(rows: np.ndarray) -> Arrays:
        batch = {array: np.empty((len(rows), *first.shape), first.dtype) for array in arrays}
        for index, row in enumerate(rows.tolist()):
            at = shard_of(row)
            for array in arrays:
                shards[at].read(array, row - int(starts[at]), batch[array][index])
        return batch | {"label": labels[rows].astype(np.int32)}

    return source_of(spec, len(labels), read, labels, place)


def _whole(root: Path, files: list[str]) -> list[str]:
    """The files of all shards.  Raises: UserError naming the first that is missing."""
    found: dict[int, list[int]] = {}
    for file in files:
        if match := _SHARD.fullmatch(file):
            found.setdefault(int(match[1]), []).append(int(match[2]))
    for rank in range(max(found) + 1):
        numbers = sorted(found.get(rank, []))
        if numbers != list(range(max(numbers, default=0) + 1)):
            gap = next(number for number in range(len(numbers) + 1) if number not in numbers)
            raise damaged(
                root / f"latents_rank{rank:02d}_shard{gap:03d}.safetensors", "is missing, and later ones are there"
            )
    return [file for file in files if _SHARD.fullmatch(file)]


class Shard:
    """One file of latents, checked when it is opened and read by rows."""

    def __init__(self, path: Path):
        self.path = path
        with open_weights(path) as weights:
            tensors = weights.joined()  # in the order of their bytes
            for key in ("latents", "labels"):
                if key not in tensors:
                    raise damaged(path, f"has no {key}, only {', '.join(sorted(tensors))}")
            self.labels = tensors["labels"].read()  # (N,)
        latents, flipped = tensors["latents"], tensors.get("latents_flip")
        count, *shape = latents.shape or (0,)
        if self.labels.shape != (count,) or self.labels.dtype.kind not in "iu":
            found = f"labels {self.labels.shape} {self.labels.dtype} and latents {latents.shape}"
            raise damaged(path, f"has {found}: one whole number belongs to each latent")
        if flipped is not None and (flipped.shape, flipped.dtype) != (latents.shape, latents.dtype):
            raise damaged(path, f"has latents_flip {flipped.shape} and latents {latents.shape}")
        self.shape, self.dtype, self.mirrored = tuple(shape), latents.dtype, flipped is not None  # (C, h, w)
        self._row_bytes = math.prod(shape) * latents.dtype.itemsize
        # The library has checked that the tensors fill the file, one after another and to its end.
        sizes = [tensor.nbytes for tensor in tensors.values()]
        starts = itertools.accumulate(sizes, initial=path.stat().st_size - sum(sizes))
        self._starts = dict(zip(tensors, starts))
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.header = os.pread(self._file, min(self._starts.values()), 0)

    def read(self, array: str, row: int, target: np.ndarray) -> None:
        """Read one row into `target` (C, h, w).  Raises: UserError where the file has become shorter."""
        count = os.preadv(self._file, [target.data], self._starts[ARRAYS[array]] + row * self._row_bytes)
        if count != self._row_bytes:
            raise damaged(self.path, f"index {row} ends early ({count} of {self._row_bytes} bytes)")


def read_scaling(file: Path, channels: int) -> LatentScaling:
    """The scaling of measured statistics.  Raises: UserError for those of other latents."""
    if not file.is_file():
        fix = "copy it from where the shards were made, or name data.source=ldit-sd for latents that have none"
        raise damaged(file, "is missing: the mean and deviation of these latents", fix)
    mean, std = channel_statistics(file, channels)
    name = autoencoder_name(channels)
    return from_mean_std(name, mean, std, SD_VAE_SCALING.uint8_rule if name == SD_VAE_SCALING.name else "half")
