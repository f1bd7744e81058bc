"""The check that ends an encoding: all shards are read back, against their source, and described in the card."""

import concurrent.futures
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import PIL

from ig_jax.base.buckets import is_remote
from ig_jax.base.copies import at_hand, local_copy
from ig_jax.base.errors import check, damaged
from ig_jax.base.progress import waiting
from ig_jax.base.versions import version, versions
from ig_jax.checkpoints.autoencoder import Autoencoder
from ig_jax.data import crop, shards, statistics
from ig_jax.data.images.listing import Images
from ig_jax.data.spec import FORMS, LOG_VARIANCES
from ig_jax.encoding.folder import Folder
from ig_jax.encoding.images import Settings
from ig_jax.models import autoencoder, latents
from ig_jax.pictures import images as pictures

THREADS = 4  # numpy and hashlib release the interpreter lock
SHOWN = 64  # images in the picture
PICTURE = "check.png"
AGAIN = "remove this file and run the same command again"
ENOUGH = 10_000  # images whose statistics can be held against the known ones
TOLERANCE = 0.1  # in known standard deviations


def finish(folder: Folder, images: Images, found: Autoencoder, settings: Settings, source: str) -> str:
    """Check all shards, write the card and the picture; returns what was found, for the terminal."""
    with waiting(f"reading {len(folder.files)} shards back"):
        card = check_and_describe(folder, images, found, settings, source)
        psnr = write_picture(folder, images, found, card)
    numbers = lambda values: " ".join(f"{value:.4f}" for value in values[:8]) + (" .." if len(values) > 8 else "")
    lines = [
        f"every image once: {card.count:,} of {len(images):,} images, {len(card.broken)} broken",
        f"channel means {numbers(card.channel_mean)}",
        f"channel stds  {numbers(card.channel_std)}",
        known_statistics(card),
        f"{folder.path / PICTURE}: images next to their decoded latents, PSNR {psnr:.1f} dB",
        f"wrote {folder.path}",
    ]
    return "\n".join(line for line in lines if line)


class Summary(NamedTuple):
    """What one shard holds; the sums run over its images and positions in float64."""

    length: int
    sha256: str
    sums: np.ndarray  # (3, C): of means, of their squares, and of the posterior's variances (0 for latents)
    labels: list[int]
    rows: list[int]  # of the source, of the images that are there


def summarise(
    path: Path, layout: shards.RecordLayout, expected: Iterable[tuple[int, str, int | None]], spread: str = "std"
) -> Summary:
    """Read a shard back.  `expected`: row, name and label, if known, of each image of its part of the source.

    spread: second half of moments, "std" | "logvar".
    Raises: UserError for damage, numbers that are not finite, and images that are not expected, or not in this order.
    """
    channels = layout.shape[-1] // (2 if layout.arrays[0] == FORMS["moments"] else 1)
    sums, labels, rows, position = np.zeros((3, channels)), list[int](), list[int](), iter(expected)
    for record in shards.read_shard(path):
        try:
            arrays, label = layout.decode(record)
            name = layout.name(record)
        except ValueError as error:
            raise damaged(path, f"record {len(rows)} is damaged ({error})", AGAIN) from error
        row = next((row for row, *known in position if known in ([name, label], [name, None])), None)
        if row is None:
            raise damaged(path, f"record {len(rows)}, {name} with label {label}, is not the next of the source", AGAIN)
        values = {field: array.astype(np.float64) for field, array in arrays.items()}
        if not all(np.isfinite(array).all() for array in values.values()):
            raise damaged(path, f"record {len(rows)}, {name}, is not finite", AGAIN)
        stored = values[layout.arrays[0]].reshape(-1, layout.shape[-1])
        mean, second = stored[:, :channels], stored[:, channels:]
        variance = np.exp(np.clip(second, *LOG_VARIANCES)) if spread == "logvar" else second**2
        sums += [mean.sum(0), (mean**2).sum(0), variance.sum(0) if variance.size else np.zeros(channels)]
        labels.append(label)
        rows.append(row)
    return Summary(len(rows), shards.sha256(path), sums, labels, rows)


def contents(
    folder: Folder,
    layout: shards.RecordLayout,
    names: Sequence[str],
    labels: np.ndarray | None,
    classes: int,
    spread: str = "std",
) -> tuple[dict, np.ndarray]:
    """(fields of the card, rows of the source that are there) of all shards, read back.

    names, labels (if known), spread of moments: of the source.

    Raises: UserError naming the shard that is wrong.
    """

    def one(shard: int) -> Summary:
        expected = ((row, names[row], None if labels is None else int(labels[row])) for row in folder.rows(shard))
        with at_hand(folder.files[shard]) as path:
            return summarise(path, layout, expected, spread)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(one, range(len(folder.files))))
    count = sum(part.length for part in parts)
    height, width, _ = layout.shape
    mean, square, variance = np.sum([part.sums for part in parts], axis=0) / max(count * height * width, 1)
    of_images = np.concatenate([np.asarray(part.labels, np.int64) for part in parts])
    card = dict(
        shape=layout.shape,
        dtype=str(layout.dtype),
        flip="both" if len(layout.arrays) == 2 else "none",
        count=count,
        class_histogram=tuple(np.bincount(of_images, minlength=classes).tolist()),
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple(np.sqrt(square + variance - mean**2).tolist()),
        shard_lengths=tuple(part.length for part in parts),
        shards={file.name: part.sha256 for file, part in zip(folder.files, parts)},
        versions=versions() | {"pillow": PIL.__version__, "array_record": version("array_record")},
    )
    return card, np.concatenate([np.asarray(part.rows, np.int64) for part in parts])


def check_and_describe(
    folder: Folder, images: Images, found: Autoencoder, settings: Settings, source: str
) -> shards.Card:
    """Check all shards of a folder and write its card.  Raises: UserError naming the shard that is wrong."""
    fields, rows = contents(folder, settings.layout(found), images.names, images.labels, len(images.synsets))
    check(len(rows) > 0, "--images", source, "images of which some can be decoded")
    scaling = latents.conventional(found.name, fields["channel_mean"], fields["channel_std"])
    card = shards.Card(
        **fields,
        autoencoder={"name": found.name, "digest": found.digest, "factor": found.config.factor},
        input_range=(-1.0, 1.0),
        crop="centre",
        size=settings.size,
        stage=settings.stage,
        compute=settings.compute,
        split=settings.split,
        class_names=images.class_names,
        synsets=images.synsets,
        scaling=scaling,
        shard_size=settings.shard_size,
        broken=_broken(images, np.setdiff1d(np.arange(len(images)), rows), folder),
        source=source,
    )
    shards.write_card(folder.path, card)
    return card


def _broken(images: Images, rows: np.ndarray, folder: Folder) -> tuple[str, ...]:
    """Name and reason of each image that has no record.  Raises: UserError for one that can be decoded."""
    broken = []
    for row in rows.tolist():
        try:
            crop.decode(images.read([images.places[row]])[0], 1)
        except ValueError as error:
            broken.append(f"{images.names[row]}: {error}")
        else:
            shard = next(file for index, file in enumerate(folder.files) if row in folder.rows(index))
            raise damaged(shard, f"lacks {images.names[row]}, which can be decoded", AGAIN)
    return tuple(broken)


def known_statistics(card: shards.Card) -> str:
    """How the statistics compare with the known ones of ImageNet; "" where none are known."""
    known = {256: statistics.SD_VAE_256, 512: statistics.SD_VAE_512}.get(card.size)
    if known is None or len(card.synsets) != 1000 or card.count < ENOUGH or card.scaling != latents.SD_VAE_SCALING:
        return ""
    mean, std = np.asarray(known.mean), np.asarray(known.std)
    distance = float(np.max(np.abs([np.asarray(card.channel_mean) - mean, np.asarray(card.channel_std) - std]) / std))
    verdict = "as they should be" if distance <= TOLERANCE else "NOT those of ImageNet in the SD autoencoder"
    return f"channel statistics are {verdict}: at most {distance:.2f} standard deviations from the known ones"


def write_picture(folder: Folder, images: Images, found: Autoencoder, card: shards.Card) -> float:
    """Write check.png, images in pairs with their decoded latents.  Returns the PSNR of the pairs in dB."""
    decode = jax.jit(lambda params, x: autoencoder.from_params(found.config, params).decode(x))
    params = jax.device_put(found.params, jax.local_devices()[0])
    pairs: list[np.ndarray] = []
    rows = {name: row for row, name in enumerate(images.names)}
    shown = card.shard_lengths[0] if is_remote(folder.path) else card.count  # of a bucket one shard is fetched
    for index in np.unique(np.arange(SHOWN) * shown // SHOWN).tolist():
        shard = int(np.searchsorted(np.cumsum(card.shard_lengths), index, side="right"))
        position = index - sum(card.shard_lengths[:shard])
        record = shards.read_record(local_copy(folder.files[shard]), position)
        stored = card.layout.decode(record)[0][card.layout.arrays[0]]
        latent = stored[None, ..., : found.config.latent_channels].astype(np.float32)
        place = images.places[rows[card.layout.name(record)]]
        decoded = latents.to_uint8(decode(params, latent), "half")
        pairs += [crop.decode(images.read([place])[0], card.size), np.asarray(decoded)[0]]
    picture = np.stack(pairs)
    zoom = pictures.comfortable_zoom(card.size)
    pictures.write_png(folder.path / PICTURE, pictures.grid(picture, columns=16, zoom=zoom))
    error = np.mean((picture[::2].astype(np.float64) - picture[1::2]) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))
