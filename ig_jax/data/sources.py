"""Labelled images with random access: any TFDS image data set by name, or MNIST-style IDX files."""

import contextlib
import dataclasses
import difflib
import fcntl
import gzip
import io
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from absl import logging

from ig_jax.errors import UserError, check

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 (B, H, W, C), labels int32 (B,)

IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
MAX_IDX_BYTES = 2**31  # an IDX file is held in memory; a header that asks for more is damaged or hostile


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ImageSource:
    """Random access to labelled images; `identity` names the data the same way in every process and run."""

    identity: str
    length: int
    image_shape: tuple[int, int, int]  # H, W, C
    class_names: tuple[str, ...]
    read: Callable[[np.ndarray], Arrays]  # rows int (B,) -> the arrays of those rows, in that order

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return self.identity

    @property
    def num_classes(self) -> int:
        """How many labels there are: labels are 0..num_classes-1."""
        return len(self.class_names)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """The example {"image": uint8 (H, W, C), "label": int32 ()}. Raises: IndexError outside 0..len-1."""
        if not 0 <= row < self.length:
            raise IndexError(f"row {row} of {self.identity} is outside 0..{self.length - 1}")
        return {name: values[0] for name, values in self.gather(np.asarray([row])).items()}

    def gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The batch {"image": uint8 (B, H, W, C), "label": int32 (B,)} of `rows` int (B,).

        Raises: UserError when a record cannot be read or its label is outside 0..num_classes-1.
        """
        images, labels = self.read(rows)
        bad = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if bad.size:
            raise UserError(f"label={labels[bad[0]]} of row {rows[bad[0]]} of {self.identity} must be in "
                            f"0..{self.num_classes - 1}; choose a split that has labels")
        return {"image": images, "label": labels}


def in_memory(source: ImageSource) -> ImageSource:
    """The same data, read and decoded once into arrays; for sets that fit in memory."""
    images = np.empty((len(source), *source.image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for rows in np.array_split(np.arange(len(source)), math.ceil(len(source) / 1024)):
        batch = source.gather(rows)
        images[rows], labels[rows] = batch["image"], batch["label"]
    return dataclasses.replace(source, read=lambda rows: (images[rows], labels[rows]))


def pad(source: ImageSource, pixels: int) -> ImageSource:
    """The same images with `pixels` zeros added on each of the four sides (28 becomes 32 with 2)."""
    check(isinstance(pixels, int) and pixels >= 0, "pad", pixels, "a whole number of pixels, 0 or more")
    if pixels == 0:
        return source
    height, width, channels = source.image_shape

    def read(rows: np.ndarray) -> Arrays:
        images, labels = source.read(rows)
        return np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0))), labels

    return dataclasses.replace(source, identity=f"{source.identity}:pad{pixels}", read=read,
                               image_shape=(height + 2 * pixels, width + 2 * pixels, channels))


# TFDS


def open_tfds(name: str, split: str, data_dir: str | None) -> ImageSource:
    """Open a TFDS data set with features `image` and `label`, preparing it as ArrayRecord the first time.

    `name` may carry a config and version ("ds/config:1.0.0"); `split` is any TFDS split ("train[:90%]");
    `data_dir` None or "" means TFDS's own default.
    Raises: UserError for an unknown name or split, a failed download, missing files, or other features.
    """
    with _quiet_absl():
        builder = _prepared_builder(name, os.path.expanduser(data_dir) if data_dir else None)
        image_shape, class_names = _image_features(name, builder)
        records = _records(name, split, builder)
        full_name = builder.info.full_name.replace("/", ":")
        source = ImageSource(
            identity=f"tfds:{full_name}:{split}[{len(records)}]", length=len(records),
            image_shape=image_shape, class_names=class_names,
            read=_record_reader(records, f"{name} in {builder.data_path}", image_shape))
        source[0]  # a data set that cannot be read fails here, before anything is compiled
    return source


def _prepared_builder(name: str, data_dir: str | None):
    """The TFDS builder of a data set that is complete on disk; one process at a time prepares it."""
    builder = _builder(name, data_dir)
    if builder.is_prepared():
        return builder
    try:
        with _exclusive(builder.data_path.parent):
            builder = _builder(name, data_dir)  # another process may have prepared it while we waited
            if not builder.is_prepared():
                _prepare(builder)
    # TFDS passes on whatever its builders, the network and the disk raise; all of it means "not prepared".
    except Exception as error:
        raise UserError(f"data set {name!r} could not be downloaded or prepared in {builder.data_path} "
                        f"({_one_line(error)}); check the network, or set data_dir to a writable folder that "
                        f"holds it already prepared") from error
    check(builder.is_prepared(), "data set", name, f"complete in {builder.data_path}",
          "that folder is half written: delete it and run again")
    return builder


def _builder(name: str, data_dir: str | None):
    """The TFDS builder of `name`. Raises: UserError that suggests the nearest known names."""
    import tensorflow_datasets as tfds

    import ig_jax.data.digits  # noqa: F401  registers "ig_digits"

    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)  # that list would come from the network
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see tfds.list_builders() for the names"
        raise UserError(f"data set {name!r} is not known to TFDS and not in data_dir={data_dir!r}; {hint}"
                        ) from error
    except Exception as error:  # a bad config or version ends in any of several exception types
        raise UserError(f"data set {name!r} could not be opened ({_one_line(error)}); "
                        f"check its name, config and version") from error


def _prepare(builder) -> None:
    """Download and write the data set as ArrayRecord; TFDS renames the finished folder into place."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    print(f"preparing data set {builder.info.full_name} in {builder.data_path} (once)", flush=True)
    downloader.MAX_RETRIES = 5  # TFDS's 10 doubling pauses keep a user without a network waiting for 204 s
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download even where there is none
        builder.download_and_prepare(file_format="array_record")


@contextlib.contextmanager
def _exclusive(folder) -> Iterator[None]:
    """Hold the lock of `folder`, made if missing; the system frees it when the process dies."""
    if "://" in str(folder):  # object stores have no locks; TFDS's own temporary folders must do
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".prepare.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Hide TFDS's warnings about folders that do not exist yet and about OpenCV."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _image_features(name: str, builder) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """Image shape (H, W, C) and class names of a prepared data set. Raises: UserError on any other kind."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    found = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    check("image" in found and "label" in found, "data set", name, "one with features image and label",
          f"it has {found}")
    image, label = features["image"], features["label"]
    check(isinstance(image, (tfds.features.Image, tfds.features.Tensor)) and len(image.shape) == 3
          and None not in image.shape and np.dtype(image.np_dtype) == np.uint8,
          "data set", name, "one of uint8 images of one fixed shape (H, W, C)", f"its image is {image}")
    check(isinstance(label, tfds.features.ClassLabel) and label.num_classes, "data set", name,
          "one whose label is a ClassLabel", f"its label is {label}")
    return tuple(image.shape), tuple(label.names)


def _records(name: str, split: str, builder):
    """TFDS's random-access records of a split, all of whose files are there. Raises: UserError."""
    try:
        records = builder.as_data_source(split)
        files = [instruction.filename for instruction in builder.info.splits[split].file_instructions]
    except NotImplementedError as error:
        raise UserError(f"data set {name!r} in {builder.data_path} is stored as "
                        f"{builder.info.file_format.value}, not as array_record; set another data_dir, or "
                        f"delete that folder to prepare it again") from error
    except Exception as error:  # unknown, badly written and empty splits raise different types
        raise UserError(f"split={split!r} of data set {name!r} is not usable ({_one_line(error)}); "
                        f"it has {sorted(builder.info.splits)}") from error
    missing = [file for file in files if "://" not in str(file) and not os.path.exists(file)]
    if missing:
        raise UserError(f"data set {name!r} lacks {missing[0]}; delete {builder.data_path} and run again")
    return records


def _record_reader(records, where: str, image_shape: tuple[int, ...]) -> Callable[[np.ndarray], Arrays]:
    """A function from rows to arrays that decodes TFDS records, and turns damage into UserError."""

    def read(rows: np.ndarray) -> Arrays:
        try:
            examples = records.__getitems__(rows.tolist())
        except Exception as error:  # array_record, protobuf and the image decoders each raise their own
            raise UserError(f"data set {where} cannot be read at rows {rows.tolist()[:8]} "
                            f"({_one_line(error)}); delete that folder and run again to prepare it anew"
                            ) from error
        for row, example in zip(rows, examples, strict=True):
            if example["image"].shape != image_shape:
                raise UserError(f"image shape {example['image'].shape} of row {row} of data set {where} must "
                                f"be {image_shape}; use a data set of one fixed shape")
        return (np.stack([example["image"] for example in examples]),
                np.asarray([example["label"] for example in examples], np.int32))

    return read


def _one_line(error: Exception) -> str:
    """Type and text of an exception without line breaks, cut to 140 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:140]


# IDX files


def open_idx(folder: str, split: str) -> ImageSource:
    """Open MNIST-style gzipped IDX files, split "train" or "test", as uint8 (H, W, 1) held in memory.

    Raises: UserError naming the file that is missing, damaged or does not fit the others.
    """
    check(split in IDX_FILES, "split", split, f"one of {sorted(IDX_FILES)} for IDX files")
    root = Path(folder).expanduser()
    for file in [root / name for names in IDX_FILES.values() for name in names]:
        if not file.is_file():
            raise UserError(f"IDX file {file} is missing; {root} must hold the four .gz files of a data set")
    images_file, labels_file = (root / name for name in IDX_FILES[split])
    images, labels = _read_idx(images_file, rank=3)[..., None], _read_idx(labels_file, rank=1)
    if len(images) != len(labels):
        raise UserError(f"IDX file {images_file} holds {len(images)} images but {labels_file.name} holds "
                        f"{len(labels)} labels; both must come from the same data set")
    # The files do not say how many classes there are: both splits together show every label.
    classes = 1 + max(int(_read_idx(root / names[1], rank=1).max()) for names in IDX_FILES.values())
    checksum = zlib.crc32(labels.tobytes(), zlib.crc32(images.tobytes()))
    labels = labels.astype(np.int32)
    return ImageSource(
        identity=f"idx:{checksum:08x}:{split}[{len(images)}]", length=len(images),
        image_shape=images.shape[1:], class_names=tuple(str(label) for label in range(classes)),
        read=lambda rows: (images[rows], labels[rows]))


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """The uint8 array with `rank` dimensions in a gzipped IDX file, never reading more than it announces.

    Raises: UserError on a bad magic number, impossible sizes, missing or surplus bytes, or broken gzip.
    """
    try:
        with gzip.open(path, "rb") as file:
            shape = _idx_shape(path, file.read(4 * (1 + rank)), rank)
            size = math.prod(shape)
            content = file.read(size + 1)  # one more than announced: also makes gzip verify its checksum
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"IDX file {path} cannot be read ({_one_line(error)}); fetch it again") from error
    if len(content) != size:
        found = f"only {len(content)}" if len(content) < size else "more"
        raise UserError(f"IDX file {path} announces {size} bytes of data and holds {found}; fetch it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _idx_shape(path: Path, header: bytes, rank: int) -> tuple[int, ...]:
    """The sizes in an IDX header: bytes 0, 0, 8 (uint8), rank, then `rank` big-endian uint32."""
    magic = bytes([0, 0, 8, rank])
    if len(header) != 4 * (1 + rank) or header[:4] != magic:
        raise UserError(f"IDX file {path} starts with {header[:4].hex()!r}, expected {magic.hex()!r} and "
                        f"{rank} sizes (uint8 data of {rank} dimensions); fetch it again")
    shape = struct.unpack(f">{rank}I", header[4:])
    if not 0 < math.prod(shape) <= MAX_IDX_BYTES:
        raise UserError(f"IDX file {path} announces sizes {shape}, expected 1 to {MAX_IDX_BYTES} bytes; "
                        f"fetch it again")
    return shape
