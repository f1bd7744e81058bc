"""The zip file around a torch checkpoint: stored entries, located without believing their directory."""

import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from ig_jax.interop.tensor_storage import (
    LIMIT_INDEX_BYTES,
    SAVE_AGAIN,
    SourceFile,
    shown,
)

_CHUNK_BYTES = 8 << 20
_TORCH_ALIGNMENT = 64  # bytes; torch.save aligns storages so that they can be mapped


@dataclass
class Record:
    """One stored zip entry: `nbytes` bytes of `source` from `start`, with the CRC-32 the archive recorded."""

    source: SourceFile
    name: str
    start: int
    nbytes: int
    crc32: int
    _checked: bool = field(default=False, init=False)

    def read(self, offset: int = 0, nbytes: int | None = None) -> np.ndarray:
        """Return a part of the record as uint8; the first call checks the whole record. Raises: UserError."""
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
            crc = zlib.crc32(whole)
        else:
            for at in range(0, self.nbytes, _CHUNK_BYTES):
                part = self.source.read(self.start + at, min(_CHUNK_BYTES, self.nbytes - at))
                crc = zlib.crc32(part, crc)
        # torch.serialization.set_crc32_options(False) records zero for every entry.
        if self.crc32 not in (0, crc):
            raise self.source.refusal(f"is damaged: entry {shown(self.name)} fails its CRC-32")
        self._checked = True


@dataclass(frozen=True)
class _Entry:
    """What the zip directory says of one entry."""

    header: int
    name: str
    nbytes: int
    crc32: int


class ZipRecords:
    """The entries of a zip file of stored (not compressed) entries, as torch.save writes it."""

    def __init__(self, source: SourceFile):
        """Read and check the directory alone. Raises: UserError."""
        self._source = source
        count, nbytes, start, end = self._directory_place()
        if nbytes > LIMIT_INDEX_BYTES or not 0 <= start <= start + nbytes <= end:
            raise source.refusal(f"has an impossible zip directory ({nbytes} bytes at {start})")
        try:
            entries = self._parse(source.read(start, nbytes).tobytes(), count)
        except (struct.error, UnicodeDecodeError):
            raise source.refusal("has a damaged zip directory") from None
        self._entries, self._ends = self._laid_out(entries, start)

    def names(self) -> list[str]:
        """Return the entry names, in the order of their bytes."""
        return list(self._entries)

    def record(self, name: str) -> Record:
        """Return one entry. Raises: UserError if it is missing or its own header says otherwise."""
        source = self._source
        entry = self._entries.get(name)
        if entry is None:
            raise source.refusal(f"has no entry {shown(name)}")
        header = source.read(entry.header, 30).tobytes()
        signature, method, name_bytes, extra_bytes = struct.unpack("<4s4xH16xHH", header)
        start = entry.header + 30 + name_bytes + extra_bytes
        sound = signature == b"PK\x03\x04" and method == 0 and start + entry.nbytes <= self._ends[name]
        if not sound or source.read(entry.header + 30, name_bytes).tobytes() != name.encode():
            raise source.refusal(f"is damaged: entry {shown(name)} contradicts the zip directory")
        return Record(source, name, start, entry.nbytes, entry.crc32)

    def _directory_place(self) -> tuple[int, int, int, int]:
        """Return the directory's (entries, bytes, start) and the place where what follows it begins."""
        source, end = self._source, self._source.size - 22
        tail = source.read(end, 22).tobytes() if end >= 0 else b""
        if tail[:4] != b"PK\x05\x06" or tail[20:] != b"\0\0":
            raise source.refusal("is cut short or has bytes added: it does not end with a zip directory")
        count, nbytes, start = struct.unpack("<10xHII2x", tail)
        if end >= 20 and (locator := source.read(end - 20, 20).tobytes())[:4] == b"PK\x06\x07":
            end = struct.unpack("<8xQ4x", locator)[0]
            large = source.read(end, 56).tobytes()
            if large[:4] != b"PK\x06\x06":
                raise source.refusal("has a damaged zip64 directory")
            count, nbytes, start = struct.unpack("<32xQQQ", large)
        return count, nbytes, start, end

    def _parse(self, data: bytes, count: int) -> list[_Entry]:
        entries, at = [], 0
        while at < len(data):
            fixed = struct.unpack_from("<4s4xHH4xIIIHHH8xI", data, at)
            (
                signature,
                flags,
                method,
                crc32,
                packed,
                nbytes,
                name_bytes,
                extra_bytes,
                comment_bytes,
                header,
            ) = fixed
            name = data[at + 46 : at + 46 + name_bytes].decode()
            extra = data[at + 46 + name_bytes : at + 46 + name_bytes + extra_bytes]
            at += 46 + name_bytes + extra_bytes + comment_bytes
            if signature != b"PK\x01\x02" or at > len(data):
                raise self._source.refusal("has a damaged zip directory")
            nbytes, packed, header = _wide(extra, nbytes, packed, header)
            self._check_entry(name, flags, method, packed, nbytes)
            entries.append(_Entry(header, name, nbytes, crc32))
        if len(entries) != count:
            raise self._source.refusal(f"lists {len(entries)} zip entries where it claims {count}")
        return entries

    def _check_entry(self, name: str, flags: int, method: int, packed: int, nbytes: int) -> None:
        parts = name.removesuffix("/").split("/")
        if not name.isprintable() or "\\" in name or "" in parts or ".." in parts:
            raise self._source.refusal(
                f"has a zip entry with the unsafe name {shown(name)}", "do not use this file"
            )
        if method or flags & 1 or packed != nbytes:
            raise self._source.refusal(
                f"has the compressed or encrypted zip entry {shown(name)} ({packed} bytes for {nbytes}), "
                "which torch.save never writes",
                SAVE_AGAIN,
            )

    def _laid_out(self, entries: list[_Entry], end: int) -> tuple[dict[str, _Entry], dict[str, int]]:
        """Return the entries and their ends by name, once they neither repeat nor overlap."""
        entries = sorted(entries, key=lambda entry: entry.header)
        by_name, ends = {}, {}
        for entry, following in zip(entries, [entry.header for entry in entries[1:]] + [end], strict=True):
            if entry.name in by_name:
                raise self._source.refusal(
                    f"has the zip entry {shown(entry.name)} twice", "do not use this file"
                )
            if entry.header + 30 + len(entry.name.encode()) + entry.nbytes > following:
                raise self._source.refusal(f"has the zip entry {shown(entry.name)} running into the next")
            by_name[entry.name], ends[entry.name] = entry, following
        return by_name, ends


def _wide(extra: bytes, *fields: int) -> list[int]:
    """Return `fields` with each 0xFFFFFFFF replaced from the zip64 extra field, in zip's order."""
    values, at = list(fields), 0
    wide = [i for i, value in enumerate(values) if value == 0xFFFFFFFF]
    while wide and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            for k, i in enumerate(wide):
                values[i] = struct.unpack_from("<Q", extra, at + 4 + 8 * k)[0]
            break
        at += 4 + length
    return values


def write_entry(archive: zipfile.ZipFile, handle: BinaryIO, name: str, data: bytes | memoryview) -> None:
    """Append a stored entry to `archive`, which writes to `handle`, with its data aligned as torch does."""
    entry = zipfile.ZipInfo(name)  # dated 1980: the same weights give the same bytes
    zip64_bytes = 20
    start = handle.tell() + 30 + len(name) + 4 + zip64_bytes
    padding = -start % _TORCH_ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding  # the id torch pads under
    with archive.open(entry, "w", force_zip64=True) as out:
        out.write(data)
