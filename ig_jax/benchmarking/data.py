"""Latents per second and core of each format on disk, and of a folder of the user's."""

import contextlib
import dataclasses
import io
import json
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ig_jax.base.files import append_lines, local_path
from ig_jax.base.versions import versions
from ig_jax.data import pipeline
from ig_jax.data.sources import Arrays, Source
from ig_jax.data.spec import BatchSpec
from ig_jax.encoding import copying
from ig_jax.encoding.folder import Folder
from ig_jax.models.latents import SD_VAE_SCALING
from ig_jax.weightfiles.files import LazyTensor, write_safetensors, write_torch

COUNT = 1024  # images of each synthetic folder
BATCH = 256
SIDE, CHANNELS = 32, 4  # the SD autoencoder at 256 pixels


@dataclasses.dataclass(frozen=True)
class Row:
    """What one folder gives."""

    name: str
    dtype: str
    bytes_each: int  # of one image, mirror image included
    read: float  # images per CPU second, rows in random order, from the page cache
    fed: float  # the same through the pipeline, with its order and its threads

    def __str__(self) -> str:
        numbers = (
            f"{self.bytes_each:>9,}{self.read:>12,.0f}{self.read * self.bytes_each / 1e6:>10,.0f}{self.fed:>12,.0f}"
        )
        return f"{self.name:<12}{self.dtype:<10}{numbers}"


def run(folder: str, results: Path, seconds: float = 2.0) -> None:
    """Measure a folder, or without one a synthetic folder of each format; print a table and append JSON lines."""
    print(f"{'format':<12}{'dtype':<10}{'bytes':>9}{'images/s':>12}{'MB/s':>10}{'pipeline/s':>12}   per core")
    with tempfile.TemporaryDirectory() as temporary:
        folders = [("auto", local_path(folder, "--folder"))] if folder else synthetic(Path(temporary))
        for name, path in folders:
            row = measured(copying.open_latents(str(path), name, "train"), name, seconds)
            print(row, flush=True)
            append_lines(results, [{"benchmark": "data", **dataclasses.asdict(row), "versions": versions()}])


def measured(source: Source, name: str, seconds: float) -> Row:
    """Rates in CPU time of this process, so that other processes of the machine count little."""
    spec = dataclasses.replace(source.spec, class_names=source.spec.class_names or tuple(map(str, range(1 << 20))))
    source = dataclasses.replace(source, spec=spec)
    size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in spec.arrays.values() if shape)
    batch = min(BATCH, len(source))
    rows = np.random.default_rng(0).permutation(len(source))
    chunks = [rows[start : start + batch] for start in range(0, len(rows) - batch + 1, batch)]
    for chunk in chunks:  # into the page cache
        source.gather(chunk)
    read = _rate(lambda count: source.gather(chunks[count % len(chunks)]), batch, seconds)
    feed = pipeline.batches(source, seed=0, global_batch=batch, start_step=0, rows=range(batch), threads=1)
    with feed:
        fed = _rate(lambda count: next(feed), batch, seconds)
    return Row(name, spec.dtype, size, read, fed)


def _rate(work: Callable[[int], object], images: int, seconds: float) -> float:
    """Images per CPU second of repeated `work`, `images` each."""
    work(0)
    began, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        work(count)
        count += 1
    return count * images / (time.process_time() - cpu)


def synthetic(root: Path) -> Iterator[tuple[str, Path]]:
    """(format, folder) of random latents of the SD autoencoder's shape, as each published writer lays them out."""
    rng = np.random.default_rng(0)
    moments = rng.random((COUNT, 2 * CHANNELS, SIDE, SIDE), np.float32)
    labels = rng.integers(0, 1000, COUNT)
    for dtype in ("bfloat16", "float32"):
        for mirrored in (True, False):
            yield "shards", _shards(root / f"shards-{dtype}-{mirrored}", moments, labels, dtype, mirrored)
    yield "repa", _repa(root / "repa", moments, labels)
    archive = root / "edm2.zip"
    with zipfile.ZipFile(archive, "w") as opened_archive:
        for file in sorted((root / "repa").rglob("*.*")):
            opened_archive.write(file, file.relative_to(root / "repa"))
    yield "edm2", archive
    latents = moments[:, :CHANNELS]
    (root / "ldit").mkdir()
    arrays = {"latents": latents, "latents_flip": latents, "labels": labels.astype(np.int64)}
    tensors = {name: LazyTensor.of(np.asarray(array)) for name, array in arrays.items()}
    write_safetensors(root / "ldit" / "latents_rank00_shard000.safetensors", tensors)
    (root / "mf").mkdir()
    yield "ldit-sd", root / "ldit"
    for row, (image, label) in enumerate(zip(moments, labels)):
        example = {"image": LazyTensor.of(image), "label": LazyTensor.of(np.asarray(label, np.int64))}
        write_torch(root / "mf" / f"{row:08d}.pt", example)
    yield "mf", root / "mf"


def _repa(root: Path, moments: np.ndarray, labels: np.ndarray) -> Path:
    names = [f"{row // 1000:05d}/img-mean-std-{row:08d}.npy" for row in range(len(moments))]
    for name, image in zip(names, moments):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, image)
    (root / "dataset.json").write_text(json.dumps({"labels": list(zip(names, labels.tolist()))}))
    return root


def _shards(root: Path, moments: np.ndarray, labels: np.ndarray, dtype: str, mirrored: bool) -> Path:
    """Two shards of `moments` (N, 2C, h, w), as mirror images too if `mirrored`."""
    names = tuple(map(str, range(1000)))
    spec = BatchSpec("moments", (SIDE, SIDE, CHANNELS), dtype, mirrored, SD_VAE_SCALING, names, "random numbers")
    stored, labels = np.moveaxis(moments, 1, -1).astype(spec.arrays["moments"][1]), labels.astype(np.int32)

    def read(rows: np.ndarray) -> Arrays:
        return dict.fromkeys(spec.arrays, stored[rows]) | {"label": labels[rows]}

    source, size = Source(spec, len(labels), read, labels), -(-len(labels) // 2)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        copying.copy(source, Folder(root, "train", len(labels), size), "train", size)
    return root
