"""Images in parquet files as Hugging Face stores them: `image`, bytes or a struct with them, and `label`."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ig_jax.base.errors import UserError, damaged, one_line
from ig_jax.data.images.listing import Images, label_numbers

LABELS = ("label", "labels", "cls", "class")
IMAGES = ("image", "img", "jpg", "png")


def open_parquet(files: Sequence[Path]) -> Images:
    """The images of parquet files, in the order of the files and their rows.

    Raises: UserError when pyarrow is not installed, for other columns, and naming a damaged file or a bad label.
    """
    names: list[str] = []
    labels: list[int | str] = []
    places: list[tuple[int, int, int]] = []  # number of the file, row group, row in it
    class_names: list[str] = []
    column = ""
    for number, path in enumerate(files):
        opened = _open(path)
        schema = opened.schema_arrow
        image, column = _column(path, schema, IMAGES), _column(path, schema, LABELS)
        class_names = class_names or _class_names(schema, column)
        struct = "path" in _fields(schema, image)
        wanted = [column, f"{image}.path"] if struct else [column]
        for group in range(opened.num_row_groups):
            table = opened.read_row_group(group, wanted).to_pydict()
            paths = [(entry or {}).get("path") for entry in table.get(image, [])] or [None] * len(table[column])
            for row, (label, inside) in enumerate(zip(table[column], paths)):
                if label is None:
                    raise damaged(f"{path} row {len(places)}", f"has no {column}", "choose a labelled split")
                names.append(f"{path.name}/{inside or f'{group}-{row}'}")
                labels.append(label)
                places.append((number, group, row))
    source = str(files[0] if len(files) == 1 else files[0].parent)
    if not names:
        raise damaged(source, "holds no rows", "name the folder of the parquet files")
    values, numbered = label_numbers(labels, names, source)
    if class_names:
        if int(values.max()) >= len(class_names):
            raise UserError(name=f"{column} of {source}", value=int(values.max()), expected=f"below {len(class_names)}")
        numbered = tuple(class_names)
    read = functools.partial(read_rows, tuple(files), image)
    return Images(source, names, values, numbered, numbered, np.asarray(places), read)


def read_rows(files: tuple[Path, ...], image: str, places: Sequence[Sequence[int]]) -> list[bytes]:
    """The encoded images at places (N, 3): number of the file, row group and row.  Raises: UserError as `_group`."""
    groups = [_group(files[number], group, image) for number, group, _ in places]
    return [images[row].as_py() or b"" for images, (_, _, row) in zip(groups, places)]


@functools.lru_cache(maxsize=2)
def _group(path: Path, group: int, image: str):
    """The encoded images of one row group.  Raises: UserError for a damaged file."""
    opened = _open(path)
    struct = "bytes" in _fields(opened.schema_arrow, image)
    try:
        column = opened.read_row_group(group, [f"{image}.bytes" if struct else image]).column(image).combine_chunks()
    except Exception as error:  # of many types
        raise damaged(path, f"cannot be read ({one_line(error)})", "download it again") from error
    return column.field("bytes") if struct else column


def _open(path: Path):
    """A parquet file.  Raises: UserError for a damaged one, and without pyarrow."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        fix = 'python -m pip install -e ".[parquet]"'
        raise damaged(path, "needs pyarrow, which is not installed", fix) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise damaged(path, f"cannot be read ({one_line(error)})", "download it again") from error


def _column(path: Path, schema, names: Sequence[str]) -> str:
    found = [name for name in names if name in schema.names]
    if not found:
        raise damaged(path, f"has the columns {schema.names}", f"one of {', '.join(names)} is needed")
    return found[0]


def _fields(schema, column: str) -> list[str]:
    """The fields of a struct column; none for another column."""
    kind = schema.field(column).type
    return [kind.field(i).name for i in range(kind.num_fields)]


def _class_names(schema, column: str) -> list[str]:
    """The class names that Hugging Face keeps in the metadata of the schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (LookupError, TypeError, ValueError):
        return []
