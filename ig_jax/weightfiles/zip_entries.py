"""The zip file around a torch checkpoint: stored entries, each read at its place in the file.

The zipfile library reads the directory. What it leaves unchecked is checked here: names that repeat or leave the
folder, entries that overlap, are compressed or contradict their own headers.
"""

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from ig_jax.weightfiles.tensor_storage import LIMIT_INDEX_BYTES, OTHER_FILE, SourceFile, shown

_CHUNK_BYTES = 8 << 20
_TORCH_ALIGNMENT = 64  # bytes; torch.save aligns storages so that they can be mapped


@dataclass
class Entry:
    """One stored zip entry: `nbytes` bytes of `source` from `start`, with the CRC-32 that the directory gives."""

    source: SourceFile
    name: str
    start: int
    nbytes: int
    crc32: int
    _checked: bool = field(default=False, init=False)

    def read(self, offset: int = 0, nbytes: int | None = None) -> np.ndarray:
        """A part of the entry as uint8; the first call checks the whole entry.  Raises: UserError."""
        nbytes = self.nbytes - offset if nbytes is None else nbytes
        if min(offset, nbytes) < 0 or offset + nbytes > self.nbytes:
            raise self.source.refusal(f"asks for bytes outside its entry {shown(self.name)}")
        data = self.source.read(self.start + offset, nbytes)
        if not self._checked:
            self._check(data if nbytes == self.nbytes else None)
        return data

    def _check(self, whole: np.ndarray | None) -> None:
        crc = 0
        if whole is not None:
            crc = zlib.crc32(whole.data)
        else:
            for at in range(0, self.nbytes, _CHUNK_BYTES):
                crc = zlib.crc32(self.source.read(self.start + at, min(_CHUNK_BYTES, self.nbytes - at)).data, crc)
        # torch.serialization.set_crc32_options(False) stores zero for every entry.
        if self.crc32 not in (0, crc):
            raise self.source.refusal(f"is damaged: entry {shown(self.name)} fails its CRC-32")
        self._checked = True


class _Bounded(io.FileIO):
    """A file of which zipfile reads no more at once than the largest directory of a torch file."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:  # zipfile asks so for the last bytes alone
            size = LIMIT_INDEX_BYTES
        if size > LIMIT_INDEX_BYTES:
            raise zipfile.BadZipFile(f"{size} bytes")
        return super().read(size)


class ZipEntries:
    """The entries of a zip file of stored (not compressed) entries, as torch.save writes it."""

    def __init__(self, source: SourceFile):
        """Read and check the directory alone.  Raises: UserError."""
        self._source = source
        tail = source.read(max(source.size - 22, 0), min(source.size, 22)).tobytes()
        if tail[:4] != b"PK\x05\x06" or tail[20:] != b"\0\0":
            raise source.refusal("is cut short or has bytes added: it does not end with a zip directory")
        try:
            with _Bounded(source.path) as file, zipfile.ZipFile(file) as archive:
                entries, end = archive.infolist(), archive.start_dir
        # What zipfile raises for bytes that are no directory.
        except (zipfile.BadZipFile, struct.error, ValueError, OSError, NotImplementedError) as error:
            raise source.refusal(f"is cut short or has a damaged zip directory ({error})") from None
        count = struct.unpack_from("<H", tail, 10)[0]
        if count not in (len(entries), 0xFFFF):
            raise source.refusal(f"lists {len(entries)} zip entries where it declares {count}")
        entries.sort(key=lambda entry: entry.header_offset)
        self._entries: dict[str, tuple[zipfile.ZipInfo, int]] = {}  # and where what follows begins
        for entry, following in zip(entries, [e.header_offset for e in entries[1:]] + [end], strict=True):
            self._check_entry(entry, following)
            self._entries[entry.filename] = entry, following

    def _check_entry(self, entry: zipfile.ZipInfo, following: int) -> None:
        name, refusal = entry.orig_filename, self._source.refusal
        parts = name.removesuffix("/").split("/")
        if not name.isprintable() or "\\" in name or "" in parts or ".." in parts:
            raise refusal(f"has a zip entry with the unsafe name {shown(name)}", "do not use this file")
        stored = not entry.compress_type and entry.compress_size == entry.file_size
        # TorchScript compresses its code, which is never read.
        if entry.flag_bits & 1 or not (stored or "/code/" in name):
            sizes = f"{entry.compress_size} bytes for {entry.file_size}"
            what = f"has the compressed or encrypted zip entry {shown(name)} ({sizes}), which torch.save never writes"
            raise refusal(what, OTHER_FILE)
        if name in self._entries:
            raise refusal(f"has the zip entry {shown(name)} twice", "do not use this file")
        if entry.header_offset + 30 + len(name.encode()) + entry.compress_size > following:
            raise refusal(f"has the zip entry {shown(name)} running into the next")

    def names(self) -> list[str]:
        """The names of the entries, in the order of their bytes."""
        return list(self._entries)

    def entry(self, name: str) -> Entry:
        """One entry.  Raises: UserError if it is missing or its own header contradicts the directory."""
        source = self._source
        if name not in self._entries:
            raise source.refusal(f"has no entry {shown(name)}")
        entry, following = self._entries[name]
        header = source.read(entry.header_offset, 30).tobytes()
        signature, method, name_bytes, extra_bytes = struct.unpack("<4s4xH16xHH", header)
        start = entry.header_offset + 30 + name_bytes + extra_bytes
        sound = signature == b"PK\x03\x04" and method == 0 and start + entry.file_size <= following
        if not sound or source.read(entry.header_offset + 30, name_bytes).tobytes() != name.encode():
            raise source.refusal(f"is damaged: entry {shown(name)} contradicts the zip directory")
        return Entry(source, name, start, entry.file_size, entry.CRC)


def write_entry(archive: zipfile.ZipFile, handle: BinaryIO, name: str, data: bytes | memoryview) -> None:
    """Append a stored entry to `archive`, which writes to `handle`, with its data aligned as torch does."""
    entry = zipfile.ZipInfo(name)  # dated 1980: the same weights give the same bytes
    zip64_bytes = 20
    start = handle.tell() + 30 + len(name) + 4 + zip64_bytes
    padding = -start % _TORCH_ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding  # the id torch pads under
    with archive.open(entry, "w", force_zip64=True) as out:
        out.write(data)
