"""A folder of latents in any form -> shards of ours, its numbers bit for bit."""

from collections.abc import Iterator

import numpy as np

from ig_jax.base.errors import UserError, check
from ig_jax.base.progress import LINE, Progress, waiting
from ig_jax.data import shards
from ig_jax.data.dataset import AUTO, DataConfig
from ig_jax.data.formats import registry
from ig_jax.data.sources import Source
from ig_jax.data.spec import UNSTATED
from ig_jax.encoding.finishing import contents
from ig_jax.encoding.folder import Folder
from ig_jax.models.latents import autoencoder_name, conventional
from ig_jax.parallel import processes

ROWS = 64  # read at a time


def open_latents(path: str, form: str, split: str) -> Source:
    """The source of a folder.  Raises: UserError for pixels, for an unknown folder, and as the format does."""
    try:
        name = registry.recognised(path) if form == AUTO else form
        source = registry.opener(name)(
            DataConfig(form, "", path, split, split, 1, 0, False, holds=AUTO, dtype=AUTO, mirrored=AUTO), split
        )
    except UserError as error:
        if not error.name.startswith("data."):  # a file
            raise
        flag = {"data.folder": "--from", "data.source": "--source"}.get(error.name, error.name)
        fix = error.fix.replace("data.source", "--source").replace("--config.", "")
        raise UserError(name=flag, value=error.value, expected=error.expected, fix=fix) from error
    check(source.spec.holds != "pixels", "--from", path, "latents", "encode pixels with --images")
    return source


def copy(source: Source, folder: Folder, split: str, shard_size: int) -> str:
    """Write the shards and the card of a source; returns what was found, for the terminal.

    Raises: UserError for a record that cannot be read, and when a shard cannot be written.
    """
    spec = source.spec
    (height, width, channels), halves = spec.latent_shape, 2 if spec.holds == "moments" else 1
    layout = shards.RecordLayout(spec.holds, (height, width, halves * channels), spec.dtype, spec.mirrored)
    names = [f"{row:08d}" for row in range(len(source))]
    if processes.is_first():
        print(f"{len(source):,} {spec.holds} {layout.shape} {spec.dtype} of {spec.identity}", flush=True)
    plan = {"from": spec.identity, "count": len(source), "shard_size": shard_size, "split": split}
    folder.begin(plan, layout.size)
    if folder.is_complete():
        return f"nothing to do: {folder.path} already holds these latents"
    own = folder.own()
    with Progress(sum(len(folder.rows(shard)) for shard in own), "images") as progress:
        for shard in own:
            shards.write_shard(folder.files[shard], _records(source, layout, names, folder.rows(shard)))
            progress.advance(len(folder.rows(shard)))
            progress.show(every=LINE)
    processes.wait_for_all("all shards are written")
    if not processes.is_first():
        return ""
    with waiting(f"reading {len(folder.files)} shards back"):
        fields, rows = contents(folder, layout, names, source.labels, len(spec.class_names), spec.spread)
    check(len(rows) == len(source), "--out", str(folder.path), "shards of every record", "remove it")
    scaling = spec.scaling
    if scaling.name == UNSTATED:
        scaling = conventional(autoencoder_name(channels), fields["channel_mean"], fields["channel_std"])
    histogram = fields["class_histogram"]
    class_names = spec.class_names or tuple(map(str, range(len(histogram))))
    card = shards.Card(
        **fields,
        autoencoder={"name": scaling.name, "digest": "", "factor": 0},
        input_range=(0.0, 1.0) if scaling.uint8_rule == "unit" else (-1.0, 1.0),
        stage=spec.holds,
        split=split,
        class_names=class_names,
        synsets=class_names,
        scaling=scaling,
        shard_size=shard_size,
        source=spec.identity,
        spread=spec.spread,
    )
    shards.write_card(folder.path, card)
    empty = sum(count == 0 for count in histogram)
    return f"every record once: {card.count:,} in {len(histogram)} classes, {empty} of them empty\nwrote {folder.path}"


def _records(source: Source, layout: shards.RecordLayout, names: list[str], rows: range) -> Iterator[bytes]:
    for start in range(0, len(rows), ROWS):
        part = np.asarray(rows[start : start + ROWS])
        batch = source.read(part)
        labels = batch.pop("label")
        if source.spec.channels_first:
            batch = {name: np.moveaxis(values, 1, -1) for name, values in batch.items()}
        for number, row in enumerate(part.tolist()):
            arrays = {name: values[number] for name, values in batch.items()}
            yield layout.encode(arrays, int(labels[number]), names[row])
