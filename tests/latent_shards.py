"""Folders of our shards, written in a test."""

import numpy as np

from ig_jax.data.shards import Card, RecordLayout, sha256, shard_file, write_card, write_shard
from ig_jax.models.latents import SD_VAE_SCALING


def write(
    folder,
    *,
    lengths=(5, 4, 3),
    side=8,
    stage="moments",
    dtype="float32",
    flip="both",
    classes=10,
    label=None,
    name=None,
    given=None,
):
    """A folder of SD-VAE moments or latents of images; (arrays by name (N, ...), labels) as they should be read.

    given: those arrays and labels instead of random ones.
    """
    count, channels = sum(lengths), 8 if stage == "moments" else 4
    layout = RecordLayout(stage, (side, side, channels), dtype, flip == "both")
    rng = np.random.default_rng(0)
    arrays = {name: rng.random((count, *layout.shape), np.float32).astype(layout.dtype) for name in layout.arrays}
    if given:
        arrays, known = given
        label = lambda row: int(known[row])
    labels = [label(row) if label else row * 7 % classes for row in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    digests, start = {}, 0
    for index, length in enumerate(lengths):
        path = folder / shard_file("train", index, len(lengths))
        records = (
            layout.encode(
                {array: values[row] for array, values in arrays.items()},
                labels[row],
                name(row) if name else f"n{labels[row]}/{row**3}.JPEG",
            )
            for row in range(start, start + length)
        )
        write_shard(path, records)
        digests[path.name], start = sha256(path), start + length
    write_card(
        folder,
        Card(
            autoencoder={"name": "sd_vae", "digest": "", "factor": 8},
            input_range=(-1.0, 1.0),
            crop="centre",
            size=8 * side,
            stage=stage,
            shape=layout.shape,
            dtype=dtype,
            compute="",
            flip=flip,
            split="train",
            count=count,
            class_names=tuple(map(str, range(classes))),
            synsets=(),
            class_histogram=tuple(np.bincount(labels, minlength=classes).tolist()),
            channel_mean=(0.0,) * 4,
            channel_std=(1.0,) * 4,
            scaling=SD_VAE_SCALING,
            shard_size=max(lengths),
            shard_lengths=tuple(lengths),
            shards=digests,
            broken=(),
            source="test",
            versions={},
        ),
    )
    return arrays, np.asarray(labels)
