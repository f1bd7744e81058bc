"""Recognition of the form in which images are held."""

import glob
import re
from pathlib import Path

from ig_jax.base.copies import local_copy
from ig_jax.base.errors import UserError, damaged
from ig_jax.data.images import folders, parquet, tars
from ig_jax.data.images.listing import SPLITS, SYNSET, Images, names_of

FORMS = "class folders, ImageNet's tars, parquet files, webdataset tars, or tfds:NAME"
RAW = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}


def open_images(text: str, split: str) -> Images:
    """The images that `text` names: a folder, a tar or parquet file, a pattern of such files, or tfds:NAME.

    Raises: UserError for something else, for a source that is damaged or has no such split, and for no images.
    """
    if text.startswith("tfds:"):
        from ig_jax.data.images.tfds_images import open_tfds  # late: it brings TFDS

        images = open_tfds(text.removeprefix("tfds:"), split)
    else:
        path = local_copy(text, "--images")
        files = sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(text) and not path.exists() else [path]
        if not files or not files[0].exists():
            raise UserError(name="--images", value=text, expected=f"an existing source: {FORMS}")
        images = _open_folder(path, split) if path.is_dir() else _open_files(files, split)
    if not len(images):
        raise damaged(text, "holds no images", f"name {FORMS}")
    return images


def _open_folder(root: Path, split: str) -> Images:
    """The files of a folder, or the folder itself as one of images."""
    if folders.find_part(root, split) is None:
        for pattern in ("*.parquet", "data/*.parquet", "*.tar", "data/*.tar"):  # Hugging Face keeps them in data/
            if files := sorted(root.glob(pattern)):
                return _open_files([file for file in files if file.name in RAW.values()] or files, split)
    return folders.open_folder(root, split)


def _open_files(files: list[Path], split: str) -> Images:
    files = _of_split(files, split)
    suffixes = {file.suffix for file in files}
    if suffixes == {".parquet"}:
        return parquet.open_parquet(files)
    if suffixes != {".tar"}:
        raise damaged(files[0], "is no form of images", f"name {FORMS}")
    if files[0].name == RAW["validation"]:
        return tars.open_imagenet_validation(files[0])
    if all(SYNSET.fullmatch(file.stem) for file in files) or tars.first_member(files[0]).endswith(".tar"):
        return tars.open_imagenet_train(files)
    return tars.open_webdataset(files)


def _of_split(files: list[Path], split: str) -> list[Path]:
    """The files whose names carry the split; all of them where none names a split."""
    found = [file for file in files if _carries(file, split)]
    if not found and any(_carries(file, part) for file in files for part in SPLITS):
        raise damaged(files[0].parent, f"has no files of the split {split}", "choose another split")
    return found or files


def _carries(file: Path, split: str) -> bool:
    return bool(re.search(rf"(^|[-_.])({'|'.join(names_of(split))})([-_.]|$)", file.name))
