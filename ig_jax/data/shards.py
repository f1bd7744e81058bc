"""Shards of latents: ArrayRecord files that TFDS opens, and the card that describes them.

    DIR/latents-train.array_record-00000-of-00157   fixed number of source images each
    DIR/dataset_info.json, features.json            for tfds.builder_from_directory(DIR)
    DIR/card.json                                   written last: a folder without it is not complete

A record is a tf.train.Example of `moments` (h, w, 2C), mean then standard deviation, or `latent` (h, w, C); of their
counterparts for the mirrored image, `moments_flip` or `latent_flip`, where the card says so; of `label` and of `name`,
the path inside the source. Its fields stand in this order, so that arrays lie at fixed places and nothing needs
TensorFlow.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  registers "bfloat16" with numpy
import numpy as np
from array_record.python import array_record_module as array_record

from ig_jax.base.errors import UserError, check, one_line
from ig_jax.base.files import atomic_file, file_size
from ig_jax.base.schema import bind
from ig_jax.data.spec import FLIPPED, FORMS
from ig_jax.models.latents import LatentScaling

NAME = "latents"  # of the data set, in TFDS and in the names of its files
CARD = "card.json"
FORMAT = 1
OPTIONS = "group_size:1,uncompressed"  # every record is read by itself; latents do not compress
OVERHEAD = 100  # bytes of a label, a name and their share of the file's blocks
LABEL_TAG = b"\x0a\x05label\x12"  # protobuf's name of the label, and
NAME_TAG = b"\x0a\x04name\x12"
LABEL_AT = 15  # bytes from the end of the arrays to its number; sizes up to 127 take one byte each


class RecordLayout:
    """Where the fields of a record stand.

    stage: "moments" or "latents"; shape: (h, w, 2C) or (h, w, C); dtype: "float32" or "bfloat16", little-endian;
    mirrored: whether the mirrored image is there too.
    """

    def __init__(self, stage: str, shape: tuple[int, int, int], dtype: str, mirrored: bool):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.arrays = (FORMS[stage], *([FORMS[stage] + FLIPPED] if mirrored else []))
        self.count = math.prod(shape)
        size = self.bytes = self.count * self.dtype.itemsize
        # An array is the end of its field, so that all in front of it is constant.
        self._prefixes = [_bytes_entry(name, bytes(size))[:-size] for name in self.arrays]
        self.starts: dict[str, int] = {}  # of each array, in bytes after the header of the record
        self.end = 0  # of the last array
        for name, prefix in zip(self.arrays, self._prefixes):
            self.starts[name] = self.end + len(prefix)
            self.end = self.starts[name] + size
        self.size = self.end + OVERHEAD  # bytes of a record on disk, about

    def encode(self, arrays: Mapping[str, np.ndarray], label: int, name: str) -> bytes:
        """The record of one image: `arrays` by the names of self.arrays, each of self.shape, cast to self.dtype."""
        parts = []
        for field, prefix in zip(self.arrays, self._prefixes):
            array = np.ascontiguousarray(arrays[field], self.dtype)
            check(array.shape == self.shape, f"{field}.shape", array.shape, str(self.shape))
            parts += [prefix, array.tobytes()]
        number = _entry("label", _field(3, _field(1, _varint(label))))
        return _field(1, b"".join([*parts, number, _bytes_entry("name", name.encode())]))

    def decode(self, record: bytes) -> tuple[dict[str, np.ndarray], int]:
        """(arrays, label) of a record; the arrays are views of its bytes.

        Raises: ValueError for bytes that `encode` did not write in this layout.
        """
        start = self._start(record)
        arrays = {}
        for field, prefix in zip(self.arrays, self._prefixes):
            at = start + self.starts[field]
            if record[at - len(prefix) : at] != prefix:
                raise ValueError(f"no {field} {self.dtype} {self.shape} at byte {at}")
            arrays[field] = np.frombuffer(record, self.dtype, self.count, at).reshape(self.shape)
        at = start + self.end
        if record[at + 2 : at + 2 + len(LABEL_TAG)] != LABEL_TAG:
            raise ValueError("no label after the arrays")
        return arrays, read_varint(record, at + LABEL_AT)[0]

    def name(self, record: bytes) -> str:
        """The path inside the source of a record.  Raises: ValueError as `decode`."""
        at = record.index(NAME_TAG, self._start(record) + self.end) + len(NAME_TAG) - 1
        for _ in range(3):  # the field of the feature, its BytesList and the value
            size, at = read_varint(record, at + 1)
        if at + size != len(record):
            raise ValueError("no name at the end")
        return record[at:].decode()

    def _start(self, record: bytes) -> int:
        """The size of the header of a record, whose length must be the announced one."""
        size, start = read_varint(record, 1)
        if record[0] != 0x0A or start + size != len(record) or size < self.end + LABEL_AT:
            raise ValueError(f"{len(record)} bytes, expected {self.end} and a label and name")
        return start


@dataclasses.dataclass(frozen=True)
class Card:
    """What a folder of shards holds and how it was made; card.json."""

    autoencoder: dict  # name, digest, factor (pixels per latent position)
    input_range: tuple[float, float]  # of the pixels given to the autoencoder
    stage: str  # "moments" | "latents"
    shape: tuple[int, int, int]  # of each array
    dtype: str
    flip: str  # "both" | "none"
    split: str
    count: int  # images
    class_names: tuple[str, ...]
    synsets: tuple[str, ...]
    class_histogram: tuple[int, ...]  # images of each class
    channel_mean: tuple[float, ...]  # of latents sampled from the moments, not normalised, without the mirrored ones
    channel_std: tuple[float, ...]
    scaling: LatentScaling
    shard_size: int  # source images in one shard, those that could not be decoded included
    shard_lengths: tuple[int, ...]  # records in each shard
    shards: dict[str, str]  # file name -> sha256
    source: str
    versions: dict[str, str]
    spread: str = "std"  # second half of moments: "std" | "logvar"
    # Of images that were encoded here, and not of latents that were copied:
    crop: str = ""  # "centre"
    size: int = 0  # pixels along each side
    compute: str = ""  # dtype of the encoder's convolutions
    broken: tuple[str, ...] = ()  # images that could not be decoded and were left out
    format: int = FORMAT

    @property
    def layout(self) -> RecordLayout:
        """Where the fields of each record stand."""
        return RecordLayout(self.stage, self.shape, self.dtype, self.flip == "both")


def write_card(folder: Path, card: Card) -> None:
    """Complete a folder of shards: TFDS's two files, then card.json.  Raises: UserError when it cannot be written."""
    size = sum(file_size(folder / file) for file in card.shards)
    split = {
        "name": card.split,
        "shardLengths": [str(length) for length in card.shard_lengths],
        "numBytes": str(size),
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {
        "name": NAME,
        "version": "1.0.0",
        "description": f"{card.stage} of {card.source} by the autoencoder {card.autoencoder['name']}; see {CARD}",
        "fileFormat": "array_record",
        "moduleName": "ig_jax.data.shards",
        "splits": [split],
    }
    for file, value in (
        ("features.json", _features(card)),
        ("dataset_info.json", info),
        (CARD, dataclasses.asdict(card)),
    ):
        with atomic_file(folder / file) as opened:
            opened.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_card(folder: Path) -> Card:
    """The card of a complete folder.  Raises: UserError when it is missing, damaged or of another format."""
    try:
        content = json.loads((folder / CARD).read_text())
        found = content["format"]
        check(found == FORMAT, f"{folder / CARD} format", found, str(FORMAT), "encode again, or use another ig_jax")
        lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
        return Card(**content | lists | {"scaling": bind(LatentScaling, content["scaling"], "scaling")})
    except FileNotFoundError as error:
        fix = "run its ig_jax.encode command again to finish it"
        raise UserError(f"{folder} has no {CARD}", name=str(folder), expected=f"a {CARD}", fix=fix) from error
    except (OSError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        problem = f"{folder / CARD} cannot be read ({one_line(error)})"
        raise UserError(problem, name=str(folder / CARD), fix="encode again") from error


def _features(card: Card) -> dict:
    """features.json: the features of a record as TFDS stores them."""
    from tensorflow_datasets import features  # late: the readers of shards do not need TFDS

    arrays = {
        name: features.Tensor(shape=card.shape, dtype=np.dtype(card.dtype), encoding="bytes")
        for name in card.layout.arrays
    }
    # Without names: those of ImageNet's classes are not unique, as TFDS wants them; the card has them.
    label = features.ClassLabel(num_classes=len(card.class_names))
    return features.FeaturesDict(arrays | {"label": label, "name": features.Text()}).to_json()


def shard_file(split: str, index: int, count: int) -> str:
    """The name of shard `index` of `count`, as TFDS writes it."""
    return f"{NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Write one shard, which has its name only when it is complete and on disk.

    Raises: UserError when it cannot be written.
    """
    with atomic_file(path) as file:  # a second handle writes it, and atomic_file flushes what both have written
        writer = array_record.ArrayRecordWriter(file.name, OPTIONS)
        for record in records:
            _written(writer.write, record)
        _written(writer.close)


def _written(write: Callable, *record: bytes) -> None:
    """Call `write`, with its error as the OSError that it stands for."""
    try:
        write(*record)
    except RuntimeError as error:  # of a full disk as of a broken one
        raise OSError(one_line(error)) from error


def read_shard(path: Path) -> Iterator[bytes]:
    """The records of a shard, in order.

    Raises: UserError naming a file that is missing or damaged.
    """
    try:
        path.stat()  # the reader finds no records in a file that is not there
        reader = array_record.ArrayRecordReader(str(path))
        found = reader.num_records()  # 0 where the end of the file is missing
        for start in range(0, found, 256):
            yield from reader.read(start, min(start + 256, found))
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        problem = f"{path} cannot be read ({one_line(error)})"
        raise UserError(problem, name=str(path), fix="remove it and run ig_jax.encode again") from error


def read_record(path: Path, position: int) -> bytes:
    """One record of a shard that has been read in whole before."""
    return array_record.ArrayRecordReader(str(path)).read([position])[0]


def sha256(path: Path) -> str:
    """The checksum of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _varint(number: int) -> bytes:
    """A protobuf varint: 7 bits a byte, the lowest first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, position after it) of the varint at `at`."""
    number = shift = 0
    while at < len(data):
        number |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return number, at
    raise ValueError("a number is cut off")


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field that announces its size."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _entry(name: str, feature: bytes) -> bytes:
    """One entry of the map of an Example's features."""
    return _field(1, _field(1, name.encode()) + _field(2, feature))


def _bytes_entry(name: str, content: bytes) -> bytes:
    return _entry(name, _field(1, _field(1, content)))
