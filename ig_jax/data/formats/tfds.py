"""TFDS data sets of labelled images, prepared once as ArrayRecord."""

import contextlib
import difflib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from absl import logging

from ig_jax.base.errors import UserError, check, one_line
from ig_jax.base.files import lock, user_path
from ig_jax.data.dataset import DataConfig
from ig_jax.data.formats.registry import data_format
from ig_jax.data.sources import Arrays, Source
from ig_jax.data.spec import pixels

ELSEWHERE = "set data.folder to another folder, to prepare it anew"  # what was prepared by hand took days


@data_format("tfds")
def open_tfds(config: DataConfig, split: str) -> Source:
    """The TFDS data set config.name with features `image` and `label`, prepared as ArrayRecord the first time.

    The name may carry a config and version ("ds/config:1.0.0"); `split` is any TFDS split ("train[:90%]");
    config.folder "" is TFDS's default directory.
    Raises: UserError for an unknown name or split, a failed download, missing files, or other features.
    """
    name = config.name
    check(name != "", "data.name", name, "a TFDS data set name")
    with _quiet_absl():
        builder = _prepared_builder(name, str(user_path(config.folder)) if config.folder else None)
        image_shape = _image_shape(name, builder)
        class_names = _class_names(name, builder)
        records = _records(name, split, builder)
        identity = f"tfds:{builder.info.full_name.replace('/', ':')}:{split}[{len(records)}]"
        spec = pixels(image_shape, class_names, config.mirrored, identity)
        where, texts = f"{name} in {builder.data_path}", class_names if _has_texts(builder) else ()
        source = Source(spec, len(records), _record_reader(records, where, image_shape, texts))
        first = np.zeros(1, np.int64)  # data that cannot be read are refused here, before anything is compiled
        source.gather(first) if class_names else source.read(first)
    return source


def undecoded(name: str, split: str):
    """TFDS's random-access records of a data set with features `image`, as its encoded bytes, and `label`.

    Raises: UserError as `open_tfds`, and for images that are stored as plain numbers.
    """
    import tensorflow_datasets as tfds

    with _quiet_absl():
        builder = _prepared_builder(name, None)
        features = builder.info.features
        if not {"image", "label"} <= set(features) or not isinstance(features["image"], tfds.features.Image):
            raise _unusable(name, "must have the features image, encoded, and label", f"it has {list(features)}")
        return _records(name, split, builder, {"image": tfds.decode.SkipDecoding()})


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
    # TFDS passes on whatever its builders, the network and the disk raise.
    except Exception as error:
        unwritable = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
        fix = "check the network, or set data.folder to a folder that holds it already prepared"
        fix = "set data.folder to a folder that can be written" if unwritable else fix
        problem = f"could not be downloaded or prepared in {builder.data_path} ({one_line(error)})"
        raise _unusable(name, problem, fix) from error
    if not builder.is_prepared():
        raise _unusable(name, f"is half written in {builder.data_path}", ELSEWHERE)
    return builder


def _builder(name: str, data_dir: str | None):
    """The TFDS builder of `name`.  Raises: UserError that suggests the nearest known names."""
    import tensorflow_datasets as tfds

    import ig_jax.data.digits  # noqa: F401  registers "ig_digits"

    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)  # the community's would be downloaded
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see tfds.list_builders() for the names"
        raise _unusable(name, f"is not known to TFDS and not in {data_dir or 'its default folder'}", hint) from error
    except Exception as error:  # a bad config or version ends in any of several exception types
        problem = f"could not be opened ({one_line(error)})"
        raise _unusable(name, problem, "check its name, config and version") from error


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
    if "://" in str(folder):  # object stores have no locks; TFDS's own temporary folders must suffice
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".prepare.lock", "w") as file:
        lock(file, Path(folder), wait=True)
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


def _image_shape(name: str, builder) -> tuple[int, int, int]:
    """Image shape (H, W, C) of a prepared data set.  Raises: UserError on one of another kind."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    found = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    if not {"image", "label"} <= set(found):
        raise _unusable(name, "must have the features image and label", f"it has {found}")
    image = features["image"]
    fixed = isinstance(image, tfds.features.Image | tfds.features.Tensor) and None not in image.shape
    if not (fixed and len(image.shape) == 3 and np.dtype(image.np_dtype) == np.uint8):
        raise _unusable(name, "must have uint8 images of one fixed shape (H, W, C)", f"its image is {image}")
    return tuple(image.shape)


def _class_names(name: str, builder) -> tuple[str, ...]:
    """The classes of a prepared data set: () for labels that are numbers, and all texts, sorted, for text.

    Raises: UserError for labels of another kind.
    """
    import tensorflow_datasets as tfds

    label = builder.info.features["label"]
    if isinstance(label, tfds.features.ClassLabel) and label.num_classes:
        return tuple(label.names)
    if _has_texts(builder):
        found: set[str] = set()
        for split in builder.info.splits:
            records = _records(name, split, builder)
            for rows in np.array_split(np.arange(len(records)), -(-len(records) // 1024)):
                found |= {_text(example["label"]) for example in records.__getitems__(rows.tolist())}
        return tuple(sorted(found))
    if label.shape == () and np.issubdtype(label.np_dtype, np.integer):
        return ()
    raise _unusable(name, "must have a class, a whole number or a text as label", f"its label is {label}")


def _has_texts(builder) -> bool:
    """Whether the labels are text; a ClassLabel is stored as a number."""
    import tensorflow_datasets as tfds

    return isinstance(builder.info.features["label"], tfds.features.Text)


def _text(label: str | bytes) -> str:
    return label.decode() if isinstance(label, bytes) else str(label)


def _unusable(name: str, problem: str, fix: str) -> UserError:
    return UserError(f"data set {name!r} {problem}", name="data set", value=name, fix=fix)


def _records(name: str, split: str, builder, decoders: dict | None = None):
    """TFDS's random-access records of a split.  Raises: UserError, also where one of its files is missing."""
    try:
        records = builder.as_data_source(split, decoders=decoders)
        files = [instruction.filename for instruction in builder.info.splits[split].file_instructions]
    except NotImplementedError as error:
        problem = f"is stored in {builder.data_path} as {builder.info.file_format.value}, not as array_record"
        raise _unusable(name, problem, ELSEWHERE) from error
    except Exception as error:  # unknown, badly written and empty splits raise different types
        problem = f"split={split!r} of data set {name!r} is not usable ({one_line(error)})"
        fix = f"it has {sorted(builder.info.splits)}"
        raise UserError(problem, name="split", value=split, fix=fix) from error
    missing = [file for file in files if "://" not in str(file) and not os.path.exists(file)]
    if missing:
        raise _unusable(name, f"lacks {missing[0]}", ELSEWHERE)
    return records


def _record_reader(
    records, where: str, image_shape: tuple[int, ...], texts: tuple[str, ...]
) -> Callable[[np.ndarray], Arrays]:
    """A function from rows to their arrays, decoded from TFDS records.  It raises UserError for damaged ones.

    texts: the labels that are text, in the order of their numbers.
    """
    number = {text: index for index, text in enumerate(texts)}

    def read(rows: np.ndarray) -> Arrays:
        try:
            examples = records.__getitems__(rows.tolist())
        except Exception as error:  # array_record, protobuf and the image decoders each raise their own
            problem = f"cannot be read at rows {rows.tolist()[:8]} ({one_line(error)})"
            raise _unusable(where, problem, ELSEWHERE) from error
        images, labels = zip(*((example["image"], example["label"]) for example in examples))
        if texts:
            labels = tuple(number[_text(label)] for label in labels)
        for row, image in zip(rows, images, strict=True):
            name = f"image shape of row {row} of {where}"
            check(image.shape == image_shape, name, image.shape, str(image_shape), "use a data set of one fixed shape")
        return {"image": np.stack(images), "label": np.asarray(labels, np.int32)}

    return read
