"""ArrayRecord files of uncompressed records, one to a chunk, read straight into arrays.

array_record's own reader makes three copies of each record and reads 35,000 of 32 KB in a second of one core; read
into place they are 100,000. The form of a file:

    blocks of 65,536 bytes, each beginning with a header of 24 bytes that interrupts whatever lies across it
    chunks one after another: a header of 40 bytes, then their records' sizes and their records
    last of them the footer, with the place of every chunk, and at the end of the file a block that names its place

Source: google/riegeli doc/riegeli_records_file_format.md; google/array_record cpp/layout.proto.
"""

import os
import struct
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ig_jax.base.errors import damaged

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 65_536, 24, 40
MAGIC = 0x71930E704FDAE05E  # of the postscript
CHUNK_KIND = 24  # in the header of a chunk: its kind in one byte, then the number of its records
SIMPLE = 0x72  # the kind with plain records
LIMIT_FOOTER_BYTES = 1 << 28  # of some twenty million records
AGAIN = "copy it again, or run its ig_jax.encode command again"


class RecordFile:
    """An open file, and the places int64 (N,) of its records: of the headers of their chunks."""

    def __init__(self, path: Path):
        """Read the end of the file, not its records.  Raises: UserError where it is damaged or of another form."""
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self.descriptor)
            self.places = self._footer(os.fstat(self.descriptor).st_size)
        except (OSError, struct.error, IndexError, ValueError) as error:
            reason = getattr(error, "strerror", None)
            problem = "does not end with the footer of an ArrayRecord file of uncompressed records"
            raise damaged(path, f"cannot be read ({reason})" if reason else problem, AGAIN) from error

    def _bytes(self, start: int, size: int) -> Any:
        """`size` bytes uint8 (size,) from a place in the file, without the headers of blocks; fewer at its end."""
        if start < 0 or size > LIMIT_FOOTER_BYTES:
            raise ValueError("no such place")
        headers = BLOCK_HEADER * (size // (BLOCK - BLOCK_HEADER) + 2)
        found = np.frombuffer(os.pread(self.descriptor, size + headers, start), np.uint8)
        return found[np.arange(start, start + len(found)) % BLOCK >= BLOCK_HEADER][:size]

    def _chunk(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(bytes of the records of a chunk, end of each); all shorter than 128 bytes and not compressed."""
        _, size, _, kind, _ = struct.unpack("<5Q", self._bytes(start, CHUNK_HEADER))
        content, count = self._bytes(start, CHUNK_HEADER + size)[CHUNK_HEADER:], kind >> 8
        (length,), (used,) = varints(content, np.ones(1, np.int64))
        sizes, records = content[1 + used :][:count], content[1 + used + count :]
        ends = np.cumsum(sizes, dtype=np.int64)
        if kind & 0xFF != SIMPLE or content[0] or length != count or (sizes > 127).any() or ends[-1] != len(records):
            raise ValueError("another form of chunk")
        return records, ends

    def _footer(self, size: int) -> np.ndarray:
        """The places int64 (N,) of all chunks in a file of `size` bytes."""
        if size < 2 * BLOCK or size % BLOCK:
            raise ValueError("no whole number of blocks")
        footer, magic = _fields(self._chunk(size - BLOCK)[0], np.zeros(1, np.int64), 2)
        if magic[0] != MAGIC:
            raise ValueError("another magic number")
        records, ends = self._chunk(int(footer[0]))
        chunks, _, counts = _fields(records, ends[:-1], 3)  # the first record describes the file
        if (counts != 1).any() or (np.diff(chunks, append=footer[0]) <= 0).any():
            raise ValueError("chunks of several records, or not one after another")
        return chunks


def read_records(descriptors: Sequence[int], places: Sequence[int], parts: Sequence[Sequence[memoryview]]) -> list[int]:
    """Fill the parts of each record, one after another, from its place in its file on.

    All records have parts of the same sizes. Returns the positions of those that end early.
    """
    short, size = [], sum(map(len, parts[0]))
    inside = BLOCK - size
    # The Python of this loop takes as long as the copying: a record inside one block goes straight through.
    for position, (descriptor, place, row) in enumerate(zip(descriptors, places, parts, strict=True)):
        if 0 < place % BLOCK <= inside:
            wanted, found = size, os.preadv(descriptor, row, place)
        else:
            place += 0 if place % BLOCK else BLOCK_HEADER
            cut = _around_headers(row, place)
            wanted, found = sum(map(len, cut)), os.preadv(descriptor, cut, place)
        if found != wanted:
            short.append(position)
    return short


def _around_headers(parts: Sequence[memoryview], start: int) -> list[memoryview | bytearray]:
    """`parts` to be filled from a place in a file on, cut where the headers of blocks lie, which go elsewhere."""
    room, cut = BLOCK - start % BLOCK, list[memoryview | bytearray]()
    for part in parts:
        while len(part) > room:
            cut += [part[:room], bytearray(BLOCK_HEADER)]
            part, room = part[room:], BLOCK - BLOCK_HEADER
        cut.append(part)
        room -= len(part)
    return cut


def _fields(data: np.ndarray, starts: np.ndarray, count: int) -> list[np.ndarray]:
    """The first `count` numbers of protobuf messages of numbers alone, each int64 (N,)."""
    found = []
    for field in range(1, count + 1):
        if (data[starts] != field << 3).any():
            raise ValueError("another message")
        values, sizes = varints(data, starts + 1)
        starts = starts + 1 + sizes
        found.append(values)
    return found


def varints(data: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, sizes) int64 (N,) of protobuf's varints, 7 bits a byte and the lowest first, at `starts` (N,)."""
    places = np.arange(9)  # of the bytes of a number below 2^63
    parts = np.pad(data, (0, 9))[starts[:, None] + places]
    used = np.logical_and.accumulate(np.pad(parts[:, :-1] >= 0x80, ((0, 0), (1, 0)), constant_values=True), axis=1)
    values = ((parts.astype(np.int64) & 0x7F) << (7 * places) * used) * used
    return values.sum(axis=1), used.sum(axis=1)
