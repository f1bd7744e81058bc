"""Images -> shards of moments or latents, in any number of processes, each of which writes shards of its own."""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from ig_jax.base.errors import UserError
from ig_jax.base.progress import LINE, Progress
from ig_jax.checkpoints.autoencoder import Autoencoder
from ig_jax.data import shards
from ig_jax.data.images.decoding import Decoder, Part
from ig_jax.data.images.listing import Images
from ig_jax.encoding import encoder
from ig_jax.encoding.folder import Folder

IN_FLIGHT = 2  # batches on the devices: one is computed while the last one is written
EVERY = 10.0  # seconds between lines of progress


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to write; all but the last two decide the bytes of the shards."""

    size: int
    stage: str  # "moments" | "latents"
    dtype: str
    compute: str  # dtype of the convolutions
    mirrored: bool
    split: str
    shard_size: int
    batch_size: int  # images of one device at a time: the same image in another batch may differ in its last bit
    skip_broken: bool
    workers: int

    def plan(self, images: Images, found: Autoencoder) -> dict:
        """Everything that decides the bytes of the shards."""
        choices = {name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_IN_PLAN}
        return choices | {"images": images.digest(), "count": len(images), "autoencoder": found.digest}

    def layout(self, found: Autoencoder) -> shards.RecordLayout:
        """The records of these latents.  Raises: UserError for a size that the autoencoder cannot encode."""
        shape = encoder.stored_shape(found.config, self.size, self.stage)
        return shards.RecordLayout(self.stage, shape, self.dtype, self.mirrored)


NOT_IN_PLAN = ("skip_broken", "workers")


def summary(folder: Folder, images: Images, found: Autoencoder, settings: Settings) -> str:
    """What is going to be done, for the terminal."""
    layout = settings.layout(found)
    classes, empty = len(images.synsets), [images.synsets[i] for i in np.flatnonzero(images.histogram() == 0)]
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} in {jax.process_count()} processes"
    mirrors = "both mirrors" if settings.mirrored else "no mirrors"
    size = len(images) * layout.size / 1e9
    lines = [
        f"{len(images):,} images of {classes} classes from {images.source}",
        f"{settings.stage} {layout.shape} {settings.dtype} of {settings.size} px, {mirrors}",
        f"by {found.name} {found.digest[:12]} in {settings.compute} on {devices}",
        f"{len(folder.files)} shards of {settings.shard_size:,} images, {size:,.2f} GB, in {folder.path}",
    ]
    if empty:
        lines.append(f"{len(empty)} classes have no images: {_some(empty)}")
    if images.ignored:
        lines.append(f"{len(images.ignored)} files are not images and are left out: {_some(images.ignored)}")
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", .." if len(names) > 5 else "")


def write_shards(folder: Folder, images: Images, found: Autoencoder, settings: Settings) -> None:
    """Encode the images of the missing shards, the shards divided over the processes.

    Raises: UserError for an image that cannot be read or decoded, and when a shard cannot be written.
    """
    own = folder.own()
    if not own:
        return
    layout, size = settings.layout(found), settings.batch_size
    encode = encoder.make_encode(found, settings.stage, settings.dtype, settings.mirrored, settings.compute)
    rows = {shard: folder.rows(shard) for shard in own}
    parts = {shard: [part[at : at + size] for at in range(0, len(part), size)] for shard, part in rows.items()}
    clock, total = _Clock(), sum(map(len, rows.values()))
    with Decoder(images, settings.size, settings.workers) as decoder, Progress(total, "images") as progress:

        def show(done: int = 0) -> None:
            progress.advance(done)
            if clock.is_time() or not done:
                progress.show(f"{clock.waiting():.1%} waiting for decoding", every=LINE)

        decoded = clock.timed(decoder.parts(itertools.chain.from_iterable(parts.values())))
        for shard in own:
            of_shard = itertools.islice(decoded, len(parts[shard]))
            encoded = _encoded(of_shard, encode, jax.local_device_count(), settings)
            shards.write_shard(folder.files[shard], _records(encoded, images, layout, settings.skip_broken, show))
        show()


def _encoded(
    parts: Iterator[Part], encode: Callable, devices: int, settings: Settings
) -> Iterator[tuple[Part, dict[str, np.ndarray]]]:
    """Each part with its encoded arrays, one part to a device, while the devices compute the next batch."""
    pending: collections.deque[tuple[list[Part], dict[str, jax.Array]]] = collections.deque()
    size = settings.batch_size

    def finished() -> Iterator[tuple[Part, dict[str, np.ndarray]]]:
        batch, arrays = pending.popleft()
        host = {name: np.asarray(array) for name, array in arrays.items()}
        for device, part in enumerate(batch):
            yield part, {name: array[device * size :] for name, array in host.items()}

    while batch := list(itertools.islice(parts, devices)):
        pixels = np.zeros((devices * size, settings.size, settings.size, 3), np.uint8)
        rows = np.zeros(devices * size, np.int64)
        for device, part in enumerate(batch):
            at = slice(device * size, device * size + len(part.rows))
            pixels[at], rows[at] = part.pixels, part.rows
        pending.append((batch, encode(pixels, rows)))
        if len(pending) >= IN_FLIGHT:
            yield from finished()
    while pending:
        yield from finished()


def _records(
    encoded: Iterator[tuple[Part, dict[str, np.ndarray]]],
    images: Images,
    layout: shards.RecordLayout,
    skip_broken: bool,
    show: Callable[[int], None],
) -> Iterator[bytes]:
    """The records of a shard.  Raises: UserError for an image that cannot be decoded, unless they are skipped."""
    for part, arrays in encoded:
        for number, row in enumerate(part.rows):
            if row not in part.broken:
                example = {name: array[number] for name, array in arrays.items()}
                yield layout.encode(example, int(images.labels[row]), images.names[row])
            elif not skip_broken:
                raise UserError(
                    f"{images.names[row]} of {images.source} cannot be decoded ({part.broken[row]})",
                    name=images.names[row],
                    fix="replace the file, or leave such images out with --skip_broken",
                )
        show(len(part.rows))


class _Clock:
    """The share of its time that the encoder waits for decoded images, without the wait for the first ones."""

    def __init__(self):
        self._began, self._waited, self._due = time.monotonic(), 0.0, 0.0

    def timed(self, parts: Iterator[Part]) -> Iterator[Part]:
        """The same parts, with the time that each of them takes to come counted."""
        asked = self._began
        for number, part in enumerate(parts):
            now = time.monotonic()
            self._began, self._waited = (self._began, self._waited + now - asked) if number else (now, 0.0)
            yield part
            asked = time.monotonic()

    def waiting(self) -> float:
        return self._waited / max(time.monotonic() - self._began, 1e-9)

    def is_time(self) -> bool:
        """Whether the last line of progress is old."""
        old = time.monotonic() >= self._due
        self._due = time.monotonic() + EVERY if old else self._due
        return old
