"""Writing of many samples to a folder, each batch while the next one is sampled."""

import concurrent.futures
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ig_jax.base.progress import LINE, Progress
from ig_jax.generation.folder import Folder
from ig_jax.generation.sampler import Batch, local_rows
from ig_jax.parallel import processes

THREADS = 4  # that encode and write; PNG compression releases the interpreter lock


def write_samples(
    folder: Folder,
    metadata: dict,
    labels: np.ndarray,
    sample: Callable[[np.ndarray], Iterator[Batch]],
    decode: Callable[[jax.Array], jax.Array],
    check: Callable[[np.ndarray], None] = lambda latents: None,
) -> None:
    """Write the missing samples of a folder, then its grid, archive and metadata.

    `sample(indices)` yields batches of latents, `decode(latents)` makes what is saved of them, and `check(latents)`
    raises for latents that are not finite. Each process writes the rows on its own devices, and the first one the
    files of the whole folder.
    """
    if processes.is_first():
        folder.prepare(metadata)
    missing = np.flatnonzero(processes.from_first(folder.missing()))
    processes.wait_for_all("missing samples are known")
    passes: list[float] = []
    began, existing = time.monotonic(), len(labels) - len(missing)
    pool, progress = concurrent.futures.ThreadPoolExecutor(THREADS), Progress(len(labels), "images", start=existing)
    with pool, progress:
        written: Iterator[None] = iter(())
        for batch in sample(missing):
            count = len(batch.indices)
            check(local_rows(batch.latents, count)[1])
            rows, samples = local_rows(decode(batch.latents), count)
            list(written)  # raises what went wrong; and no more than two batches are in memory
            written = pool.map(folder.write, batch.indices[rows].tolist(), samples)
            if batch.evaluations is not None:
                passes.extend(local_rows(batch.evaluations, count)[1])
            progress.advance(count)
            if processes.is_first():
                progress.show(every=LINE)
        list(written)
    processes.wait_for_all("all samples are written")
    seconds = time.monotonic() - began
    if passes and metadata["evaluations_per_image"] is None:  # of an adaptive solver
        metadata = metadata | {"evaluations_per_image": round(float(np.mean(passes)), 2)}
    rate = round(len(missing) / max(seconds, 1e-9), 2)
    finished = {"images": len(missing), "seconds": round(seconds, 2), "images_per_second": rate}
    if processes.is_first():
        folder.finish(labels, metadata | {"finished": finished})
        print(f"wrote {folder.path}: {len(missing)} images, {rate} images/s")
    processes.wait_for_all("the folder is complete")
