"""TensorBoard logs of a run."""

import collections
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ig_jax.base.buckets import is_remote
from ig_jax.base.errors import UserError, warn_if_failing


class TensorBoard:
    """Scalars and previews through clu, written in the background; a later call raises an error as a UserError.

    Not through clu's AsyncWriter: it logs a traceback in addition to raising, and its import waits for TensorFlow.
    """

    def __init__(self, directory: Path):
        self._directory = directory / "tensorboard"
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: collections.deque[Future] = collections.deque()  # futures, oldest first

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, kind, *exception) -> None:
        try:
            with warn_if_failing(kind):
                self._settle(wait=True)
        finally:
            self._thread.shutdown()
            if "_writer" in vars(self):
                self._writer.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._later(lambda: self._writer.write_scalars(step, values))

    def image(self, step: int, picture: np.ndarray) -> None:
        """One picture uint8 (H, W, 3)."""
        self._later(lambda: self._writer.write_images(step, {"preview": picture[None]}))

    def _later(self, write: Callable[[], None]) -> None:
        if is_remote(self._directory):  # whose objects cannot be appended to; metrics.jsonl has the numbers
            return
        self._settle(wait=False)
        self._pending.append(self._thread.submit(write))

    def _settle(self, wait: bool) -> None:
        """Raise the error of a finished write, or with `wait` of any write."""
        while self._pending and (wait or self._pending[0].done()):
            error = self._pending.popleft().exception()
            if error:
                raise UserError(
                    f"TensorBoard logs in {str(self._directory)!r} could not be written: {error}",
                    name="tensorboard",
                    value=str(self._directory),
                    fix="free space or choose another --workdir",
                ) from error

    @functools.cached_property
    def _writer(self):
        """Created by the first write, in the background: clu imports TensorFlow, two seconds that no step waits for."""
        from clu import metric_writers

        return metric_writers.SummaryWriter(str(self._directory))
