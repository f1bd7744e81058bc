"""TensorBoard's event files, written without TensorFlow."""

import functools
import io
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ig_jax.base.buckets import is_remote
from ig_jax.base.errors import UserError


class TensorBoard:
    """One event file in a directory, whose name TensorBoard shows; none in a bucket, where no file can grow."""

    def __init__(self, directory: Path):
        self._directory = directory

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *exception) -> None:
        if "_records" in vars(self):
            self._records.close()

    def begin(self, step: int, settings: dict[str, Any]) -> None:
        """A run goes on after `step`: later events of other files count no more. The settings become text and hparams.

        settings: by dotted name.
        """
        if is_remote(self._directory):
            return
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # late: half a second

        table = "\n".join(f"    {name} = {json.dumps(value)}" for name, value in settings.items())
        plain = {name: value if isinstance(value, (int, float)) else str(value) for name, value in settings.items()}
        text: dict[str, Any] = dict(tag="config", metadata=dict(plugin_data=dict(plugin_name="text")))
        text["tensor"] = dict(dtype="DT_STRING", string_val=[table.encode()])
        self._write(step=step + 1, session_log=dict(status="START"))
        self._write(step=step, summary=hparams_pb(plain, trial_id=str(self._directory)))
        self._write(step=step, summary=dict(value=[text]))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name."""
        self._write(step=step, summary=dict(value=[dict(tag=n, simple_value=value) for n, value in values.items()]))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """One picture uint8 (H, W, 3)."""
        (height, width, channels), png = picture.shape, io.BytesIO()
        Image.fromarray(picture).save(png, format="PNG")
        image = dict(height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue())
        self._write(step=step, summary=dict(value=[dict(tag=name, image=image)]))

    def _write(self, **event: Any) -> None:
        """Append one event.  Raises: UserError where that fails."""
        if is_remote(self._directory):  # metrics.jsonl has the numbers
            return
        from tensorboard.compat.proto.event_pb2 import Event

        events = [event] if "_records" in vars(self) else [dict(file_version="brain.Event:2"), event]
        try:
            for one in events:
                self._records.write(Event(wall_time=time.time(), **one).SerializeToString())
            self._records.flush()
        except OSError as error:
            raise UserError(
                f"TensorBoard logs in {str(self._directory)!r} could not be written: {error}",
                name="tensorboard",
                value=str(self._directory),
                fix="free space or choose another directory",
            ) from error

    @functools.cached_property
    def _records(self):
        """The file, opened by the first event; TensorBoard reads those of a directory by name, so by time."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        return RecordWriter(open(self._directory / name, "ab"))
