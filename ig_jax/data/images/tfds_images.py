"""Labelled images of a TFDS data set as the bytes that it stores, not decoded."""

import functools
from collections.abc import Sequence

from ig_jax.base.errors import UserError, check, damaged, one_line
from ig_jax.base.progress import waiting
from ig_jax.data.formats.tfds import undecoded
from ig_jax.data.images.listing import Images, label_numbers


def open_tfds(name: str, split: str) -> Images:
    """The images of the TFDS data set `name`, with their file names where it has them.

    Raises: UserError for an unknown name or split, other features, missing files, or a label out of range.
    """
    records, source = _records(name, split), f"tfds:{name}"
    feature = records.dataset_info.features["label"]
    names: list[str] = []
    labels: list[int | str] = []
    with waiting(f"reading the labels of {source}"):
        for row in range(len(records)):
            example = records[row]
            file = example.get("file_name", b"")
            names.append(file.decode() if file else f"{split}/{row:08d}")
            label = example["label"]
            labels.append(label.decode() if isinstance(label, bytes) else int(label))
    values, class_names = label_numbers(labels, names, source)
    if getattr(feature, "num_classes", None):
        most = int(values.max())
        check(most < feature.num_classes, f"label of {source}", most, f"below {feature.num_classes}")
        class_names = tuple(feature.names)
    read = functools.partial(read_records, name, split)
    return Images(source, names, values, class_names, class_names, range(len(names)), read)


def read_records(name: str, split: str, rows: Sequence[int]) -> list[bytes]:
    """The encoded images of some records.  Raises: UserError for a damaged one."""
    try:
        return [records[row]["image"] for records in [_records(name, split)] for row in rows]
    except UserError:
        raise
    except Exception as error:  # array_record and protobuf each raise their own
        raise damaged(f"tfds:{name}", f"cannot be read at rows {list(rows)[:8]} ({one_line(error)})", AGAIN) from error


_records = functools.lru_cache(maxsize=2)(undecoded)
AGAIN = "remove it and prepare it again"
