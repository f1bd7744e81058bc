"""Our shards of latents, as ig_jax.encode writes them (data/shards.py), read without TensorFlow."""

from pathlib import Path

import numpy as np
from array_record.python import array_record_module as array_record

from ig_jax.base.errors import UserError, damaged, one_line
from ig_jax.data.dataset import DataConfig
from ig_jax.data.folders import checksum, opened_path
from ig_jax.data.formats.registry import data_format
from ig_jax.data.record_file import AGAIN, CHUNK_HEADER, CHUNK_KIND, SIMPLE, RecordFile, read_records
from ig_jax.data.shards import CARD, LABEL_AT, LABEL_TAG, Card, read_card, read_varint
from ig_jax.data.sources import Arrays, Source
from ig_jax.data.spec import BatchSpec


@data_format("shards", recognise=lambda path: (path / CARD).is_file() or any(path.glob("*.array_record-*-of-*")))
def open_shards(config: DataConfig, split: str) -> Source:
    """The moments or latents of a folder of shards.  Raises: UserError naming what is missing, surplus or damaged."""
    folder = opened_path(config.folder, split)
    card = read_card(folder)
    if split != card.split:
        fix = "encode those images to a folder of their own"
        raise UserError(name="split", value=split, expected=f"{card.split!r}, as in {folder}", fix=fix)
    files = [RecordFile(folder / name) for name in _whole(folder, card)]
    for file, length in zip(files, card.shard_lengths):
        if len(file.places) != length:
            raise damaged(file.path, f"has {len(file.places)} records, {CARD} says {length}", AGAIN)
    reader = ShardReader(card, files, mirrored=config.mirrored is not False and card.flip == "both")
    spec = BatchSpec(
        holds=card.stage,
        latent_shape=(card.shape[0], card.shape[1], card.scaling.channels),
        dtype=card.dtype,
        mirrored=reader.mirrored,
        scaling=card.scaling,
        class_names=tuple(card.class_names),
        spread=card.spread,
        identity=f"shards:{checksum(*map(str.encode, card.shards.values()))}:{split}[{card.count}]",
    )
    counts = np.asarray(card.class_histogram)
    return Source(spec, card.count, reader.read, place=reader.place, class_counts=counts)


def _whole(folder: Path, card: Card) -> list[str]:
    """The files of a folder, which are those of its card.  Raises: UserError naming one that is missing or surplus."""
    there = {path.name for path in folder.glob(f"*-{card.split}.array_record-*")}
    for name in sorted(card.shards.keys() - there):
        raise damaged(folder / name, f"is missing: {CARD} lists {len(card.shards)} shards", AGAIN)
    for name in sorted(there - card.shards.keys()):
        raise damaged(folder / name, f"is not one of the {len(card.shards)} shards of {CARD}", "move it elsewhere")
    return sorted(card.shards)


class ShardReader:
    """Rows of all shards, read into arrays at places that are found once, from the first record."""

    def __init__(self, card: Card, files: list[RecordFile], mirrored: bool):
        self._layout, self._files, self.mirrored = card.layout, files, mirrored
        self._starts = np.cumsum([0, *card.shard_lengths])
        self._places = np.concatenate([file.places for file in files])
        first = self._record(0)
        # In front of a record: the header of its chunk, the compression, the number of sizes, and its size.
        head = CHUNK_HEADER + 2 + (len(first).bit_length() + 6) // 7
        content = read_varint(first, 1)[1]  # of the Example
        whole = np.concatenate([np.zeros(head, np.uint8), np.frombuffer(first, np.uint8)])
        same = np.zeros(len(whole), bool)  # in all records
        whole[[CHUNK_KIND, CHUNK_KIND + 1]] = SIMPLE, 1  # a chunk of one record
        same[[CHUNK_KIND, CHUNK_KIND + 1, CHUNK_HEADER]] = True  # not compressed
        self._gaps, at, end = [], 0, head + content  # in front of each array, and after the last
        for start in (head + content + start for start in self._layout.starts.values()):
            same[end:start] = True
            self._gaps.append((whole[at:start], same[at:start]))
            at = end = start + self._layout.bytes
        same[at + 2 : at + 2 + len(LABEL_TAG)] = True
        self._gaps.append((whole[at : at + LABEL_AT + 2], same[at : at + LABEL_AT + 2]))

    def place(self, row: int) -> str:
        """The file and the index of a row."""
        file, index = self._where(row)
        return f"{file}, index {index}"

    def _where(self, row: int) -> tuple[Path, int]:
        at = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._files[at].path, row - int(self._starts[at])

    def read(self, rows: np.ndarray) -> Arrays:
        """The arrays of rows int (B,).  Raises: UserError naming the file and index of a damaged record."""
        layout, count = self._layout, len(rows)
        wanted = layout.arrays if self.mirrored else layout.arrays[:1]
        arrays = {name: np.empty((count, *layout.shape), layout.dtype) for name in wanted}
        unread = memoryview(bytearray(layout.bytes if len(wanted) < len(layout.arrays) else 0))
        gaps = [np.empty((count, len(expected)), np.uint8) for expected, _ in self._gaps]
        columns = []  # the parts of all records, in their order
        for gap, name in zip(gaps, layout.arrays):
            columns += [_rows(gap), _rows(arrays[name]) if name in arrays else [unread] * count]
        parts = list(zip(*columns, _rows(gaps[-1])))
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        descriptors = [self._files[shard].descriptor for shard in shards.tolist()]
        for short in read_records(descriptors, self._places[rows].tolist(), parts):
            raise damaged(self.place(int(rows[short])), "ends early: the file has become shorter", AGAIN)
        low, high = gaps[-1][:, LABEL_AT:].T.astype(np.int32)  # protobuf's varint: 7 bits a byte, the lowest first
        labels, good = np.where(low < 0x80, low, low & 0x7F | high << 7), np.minimum(low, high) < 0x80  # below 16,384
        for gap, (expected, same) in zip(gaps, self._gaps):
            good &= (gap == expected)[:, same].all(axis=1)
        for row in np.flatnonzero(~good):
            found, labels[row] = self._decoded(int(rows[row]))
            for name, values in arrays.items():
                values[row] = found[name]
        return arrays | {"label": labels}

    def _decoded(self, row: int) -> tuple[Arrays, int]:
        """(arrays, label) of a record whose sizes differ from the first, or that is damaged."""
        try:
            return self._layout.decode(self._record(row))
        except (ValueError, IndexError) as error:
            raise damaged(self.place(row), f"is no such record ({one_line(error)})", AGAIN) from error

    def _record(self, row: int) -> bytes:
        """One record through array_record's own reader, which checks it."""
        file, index = self._where(row)
        try:
            return array_record.ArrayRecordReader(str(file)).read([index])[0]
        except (RuntimeError, IndexError, ValueError) as error:
            raise damaged(self.place(row), f"cannot be read ({one_line(error)})", AGAIN) from error


def _rows(array: np.ndarray) -> list[memoryview]:
    """The bytes of each row of an array (B, ...), to be written."""
    content, size = array.reshape(-1).view(np.uint8).data, array.nbytes // len(array)
    return [content[start : start + size] for start in range(0, len(content), size)]
