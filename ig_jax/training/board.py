"""What TensorBoard shows of a run."""

import collections
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ig_jax.errors import UserError, second_to


class TensorBoard:
    """Scalars and previews through clu, in the background; an error comes out of a later call, as a UserError.

    Not through clu's own pool, which prints the traceback too.
    """

    def __init__(self, directory: Path):
        self._directory = directory / "tensorboard"
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending = collections.deque()  # futures, oldest first

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, kind, *exception) -> None:
        try:
            with second_to(kind):
                self._settle(wait=True)
        finally:
            self._thread.shutdown()
            if "_writer" in vars(self):
                self._writer.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._later(lambda: self._writer.write_scalars(step, values))

    def image(self, step: int, picture: np.ndarray) -> None:
        """One picture uint8 [h, w, 3]."""
        self._later(lambda: self._writer.write_images(step, {"preview": picture[None]}))

    def _later(self, write: Callable[[], None]) -> None:
        self._settle(wait=False)
        self._pending.append(self._thread.submit(write))

    def _settle(self, wait: bool) -> None:
        """Raise what went wrong in what is written, or after waiting in all of it."""
        while self._pending and (wait or self._pending[0].done()):
            error = self._pending.popleft().exception()
            if error:
                raise UserError(f"TensorBoard logs in {str(self._directory)!r} could not be written: {error}; free space "
                                "or choose another --workdir") from error

    @functools.cached_property
    def _writer(self):
        """Made by the first write, in the background: clu brings TensorFlow, two seconds that no step waits for."""
        from clu import metric_writers

        return metric_writers.SummaryWriter(str(self._directory))
