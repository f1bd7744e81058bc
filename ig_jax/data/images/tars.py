"""Images inside tar files, read in place: ImageNet's raw tars and webdataset shards."""

import array
import functools
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ig_jax.base.errors import damaged, one_line
from ig_jax.data.images import imagenet
from ig_jax.data.images.listing import SYNSET, Images, classes, is_image, label_numbers, numbered

BLOCK = 512  # bytes; a tar ends with at least one block of zeros
AGAIN = "download it again"


class Member(NamedTuple):
    """A file inside a tar: its name, and where its bytes are in the outermost file."""

    name: str
    start: int
    size: int


def open_imagenet_train(files: Sequence[Path]) -> Images:
    """The training images of ILSVRC2012_img_train.tar, a tar of one tar for each synset, or of those inner tars.

    Raises: UserError naming a damaged tar, or a member that is not what it should be.
    """
    # By synset: names, and for each number of the file, start and size, not as three objects for a million images.
    found: dict[str, tuple[list[str], array.array]] = {}
    ignored = []
    for number, path in enumerate(files):
        with path.open("rb") as file:
            whole = Member(path.name, 0, path.stat().st_size)
            inner = [whole] if SYNSET.fullmatch(path.stem) else members(file, whole, path)
            for tar in inner:
                synset = tar.name.removesuffix(".tar")
                if not SYNSET.fullmatch(synset):
                    raise damaged(f"{path}:{tar.name}", "is not the tar of a synset", "name the training tar")
                names, places = found.setdefault(synset, ([], array.array("q")))
                for member in members(file, tar, path):
                    name = f"{synset}/{member.name}"
                    if is_image(name):
                        names.append(name)
                        places.extend((number, member.start, member.size))
                    else:
                        ignored.append(name)
    found = {synset: found[synset] for synset in sorted(found) if found[synset][0]}
    orders = [sorted(range(len(names)), key=names.__getitem__) for names, _ in found.values()]
    synsets, class_names = classes(found, imagenet.class_words(files[0].parent))
    return Images(
        source=str(files[0] if len(files) == 1 else files[0].parent),
        names=[names[row] for order, (names, _) in zip(orders, found.values()) for row in order],
        labels=np.repeat(np.arange(len(found)), [len(order) for order in orders]),
        class_names=class_names,
        synsets=synsets,
        places=np.concatenate(
            [np.asarray(places).reshape(-1, 3)[order] for order, (_, places) in zip(orders, found.values())]
            or [np.zeros((0, 3), np.int64)]
        ),
        read=functools.partial(read_ranges, tuple(files)),
        ignored=tuple(ignored),
    )


def open_imagenet_validation(path: Path) -> Images:
    """The images of ILSVRC2012_img_val.tar, with labels from the devkit or Kaggle's solution next to it.

    Raises: UserError for a damaged tar or missing labels.
    """
    with path.open("rb") as file:
        found = sorted(members(file, Member(path.name, 0, path.stat().st_size), path))
    images = [member for member in found if is_image(member.name)]
    of_image, all_synsets = imagenet.validation_synsets(path.parent)
    unknown = next((member.name for member in images if Path(member.name).stem not in of_image), None)
    if unknown is not None:
        raise damaged(f"{path}:{unknown}", "has no label in the list of the validation images", AGAIN)
    synsets, class_names = classes(all_synsets, imagenet.class_words(path.parent))
    return Images(
        source=str(path),
        names=[member.name for member in images],
        labels=numbered(synsets, (of_image[Path(member.name).stem] for member in images)),
        class_names=class_names,
        synsets=synsets,
        places=np.asarray([(0, member.start, member.size) for member in images]),
        read=functools.partial(read_ranges, (path,)),
        ignored=tuple(member.name for member in found if not is_image(member.name)),
    )


def open_webdataset(files: Sequence[Path]) -> Images:
    """The images of webdataset tars in their order; labels from `.cls`, or `label` of `.json`: numbers or names.

    Raises: UserError naming a damaged tar, or an image without a label.
    """
    names, places, labels = [], [], []
    for number, path in enumerate(files):
        with path.open("rb") as file:
            samples: dict[str, dict[str, Member]] = {}
            for member in members(file, Member(path.name, 0, path.stat().st_size), path):
                folder, _, base = member.name.rpartition("/")
                key, _, kind = base.partition(".")
                samples.setdefault(f"{folder}/{key}", {})[kind.lower()] = member
            for sample in samples.values():
                image = next((member for kind, member in sample.items() if is_image(f".{kind}")), None)
                if image is None:
                    first = next(iter(sample.values()))
                    raise damaged(f"{path}:{first.name}", "belongs to no image", "take it away")
                names.append(f"{path.name}/{image.name}")
                places.append((number, image.start, image.size))
                labels.append(_webdataset_label(file, sample, f"{path}:{image.name}"))
    read = functools.partial(read_ranges, tuple(files))
    source = str(files[0] if len(files) == 1 else files[0].parent)
    values, class_names = label_numbers(labels, names, source)
    return Images(source, names, values, class_names, class_names, np.asarray(places), read)


def _webdataset_label(file: BinaryIO, sample: dict[str, Member], where: str) -> int | str:
    for kind in ("cls", "json"):
        if kind not in sample:
            continue
        file.seek(sample[kind].start)
        text = file.read(sample[kind].size).decode(errors="replace").strip()
        try:
            label = json.loads(text)["label"] if kind == "json" else text
            return int(label) if isinstance(label, int) or label.lstrip("-").isdigit() else label
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise damaged(where, f"has an unreadable label {text[:40]!r}", "write it again") from error
    raise damaged(where, "has no label (.cls or .json)", "choose a labelled set")


def first_member(path: Path) -> str:
    """The name of the first file in a tar, "" for none.  Raises: UserError for what is no tar."""
    with path.open("rb") as file:
        return next(members(file, Member(path.name, 0, path.stat().st_size), path), Member("", 0, 0)).name


def members(file: BinaryIO, tar: Member, path: Path) -> Iterator[Member]:
    """The files of a tar that lies at `tar` inside an open file.  Raises: UserError for one that is cut or damaged."""
    end = tar.start
    where = path if tar.start == 0 else f"{path}:{tar.name}"
    try:
        file.seek(tar.start)
        with tarfile.open(fileobj=_Window(file, tar), mode="r:") as archive:  # type: ignore[call-overload]
            for info in archive:
                archive.members = []  # it keeps every member it has seen
                end = tar.start + info.offset_data + -(-info.size // BLOCK) * BLOCK
                if info.isfile():
                    yield Member(info.name.removeprefix("./"), tar.start + info.offset_data, info.size)
        file.seek(end)
        if end + BLOCK > tar.start + tar.size or file.read(BLOCK).strip(b"\0"):
            raise tarfile.ReadError("it ends in the middle")
    except (tarfile.TarError, OSError) as error:
        raise damaged(where, f"is a damaged tar ({one_line(error)})", AGAIN) from error


class _Window:
    """A part of an open file as a file of its own, for tarfile."""

    def __init__(self, file: BinaryIO, part: Member):
        self._file, self._part, self._at = file, part, 0

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        self._at = position

    def read(self, size: int) -> bytes:
        self._file.seek(self._part.start + self._at)
        data = self._file.read(max(min(size, self._part.size - self._at), 0))
        self._at += len(data)
        return data


def read_ranges(files: tuple[Path, ...], places: np.ndarray) -> list[bytes]:
    """The bytes at places int (N, 3): number of the file, start and size.  Raises: UserError for a cut file."""
    contents = []
    for number, start, size in np.asarray(places).tolist():
        with files[number].open("rb") as file:
            file.seek(start)
            contents.append(file.read(size))
        if len(contents[-1]) != size:
            raise damaged(files[number], f"ends before byte {start + size}", AGAIN)
    return contents
