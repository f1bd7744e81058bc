"""Many samples into a folder: resumable, the next batch drawn while the last one is decoded and written."""

import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ig_jax.generation import generate
from ig_jax.generation.folder import Folder, Writer
from ig_jax.generation.generate import Batch
from ig_jax.parallel import processes
from ig_jax.progress import Progress


def produce(
    folder: Folder, record: dict, labels: np.ndarray, *, draw: Callable[[np.ndarray], Iterator[Batch]],
    finish: Callable[[jax.Array], jax.Array], check: Callable[[np.ndarray], None],
    weights: Callable[[list[np.ndarray]], np.ndarray] | None,
) -> None:
    """Draw what is missing in the folder, then put it together.

    draw: sample indices -> batches of latents; finish: latents -> what is saved; check: raises for latents
    that are not finite; weights: evaluations of each piece -> forward passes of each image, for an adaptive
    solver. Each process writes the rows its own devices hold, the first one what is written once.
    """
    if processes.is_first():
        folder.prepare(record)
    missing = np.flatnonzero(processes.from_first(folder.missing()))
    processes.wait_for_all("missing samples are known")
    began, passes = time.monotonic(), []
    done = len(labels) - len(missing)
    with Writer(folder) as writer, Progress(len(labels), "images", start=done) as progress:
        for batch in draw(missing):
            count = len(batch.indices)
            rows, latents = generate.local_rows(batch.latents, count)
            check(latents)
            rows, samples = generate.local_rows(finish(batch.latents), count)
            writer.write(batch.indices[rows], samples)
            if weights is not None:
                passes.extend(weights([generate.local_rows(piece, count)[1] for piece in batch.evaluations]))
            progress.advance(count)
            if processes.is_first():
                progress.show(f"{progress.rate():.1f} images/s")
    processes.wait_for_all("all samples are written")
    seconds = time.monotonic() - began
    if passes:
        record = record | {"evaluations_per_image": round(float(np.mean(passes)), 2)}
    record = record | {"finished": {"images": len(missing), "seconds": round(seconds, 2),
                                    "images_per_second": round(len(missing) / max(seconds, 1e-9), 2)}}
    if processes.is_first():
        folder.finish(labels, record)
        rate = record["finished"]["images_per_second"]
        print(f"wrote {folder.path}: {len(missing)} images, {rate} images/s")
    processes.wait_for_all("the folder is whole")
