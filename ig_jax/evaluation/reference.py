"""Reference files of the published evaluators, read as they are."""

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ig_jax.base.copies import local_copy
from ig_jax.base.errors import check
from ig_jax.base.files import atomic_file
from ig_jax.evaluation import frechet
from ig_jax.evaluation.image_sets import DAMAGE, ImageSet, of_npz, open_set, sha256, unreadable
from ig_jax.models.inception import FEATURES, SPATIAL
from ig_jax.weightfiles.files import LazyTensor, read_pickle, read_torch
from ig_jax.weightfiles.tensor_storage import SourceFile

SIZES = {"pool": FEATURES, "spatial": 17 * 17 * SPATIAL}
# Where each form keeps (mean, covariance, number of images or "") of pool features, and of spatial ones.
POOL = (("mu", "sigma", "count"), ("ref_mu", "ref_sigma", ""), ("fid.mu", "fid.sigma", "num_images"))
STATISTICS = {"pool": POOL, "spatial": (("mu_s", "sigma_s", "count"),)}
SUMS = ("raw_mean", "raw_cov", "num_items")  # of StyleGAN, with divisor N
ROWS = ("feats", "features")
FORMS = "mu and sigma, ref_mu and ref_sigma, fid/mu and fid/sigma, raw_mean and raw_cov, feats, or images arr_0"


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D), float64."""

    mean: np.ndarray
    cov: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reference:
    """What is known of the reference images."""

    name: str
    digest: str  # sha256 of the file, or of the names and sizes in a folder
    moments: Mapping[str, Moments]  # by feature; what is missing is measured from the images
    rows: np.ndarray | None = None  # pool features (M, 2048)
    images: ImageSet | None = None
    count: int | None = None  # images behind the moments
    size: tuple[int, int] | None = None  # pixels (H, W)
    net: str | None = None  # digest of the feature net, where the file names it
    notes: tuple[tuple[str, str], ...] = ()


def read_reference(text: str, flag: str = "--reference", sizes: Mapping[str, int] = SIZES) -> Reference:
    """The reference that a file or a folder of images holds.

    sizes: of the features; those of Inception.  Raises: UserError for what is damaged, unknown, or of other features.
    """
    path = local_copy(text, flag)
    check(path.exists(), flag, text, "an existing npz, pkl or pt file, or a folder of images")
    if path.is_dir():
        found = open_set(text, flag)
        return Reference(str(path), found.digest, {}, None, found, found.count, found.shape[:2], None, found.notes)
    arrays = _arrays(path, flag)
    moments, count = _moments(arrays, path)
    checked = {name: _checked(found, sizes[name], f"{path} {name}") for name, found in moments.items()}
    rows = next((arrays[key] for key in ROWS if key in arrays), None)
    images = of_npz(path, flag) if "arr_0" in arrays else None
    known = bool(moments) or rows is not None or images is not None
    check(known, f"{flag} arrays", sorted(arrays)[:8], FORMS, f"{path} holds none of these")
    if rows is not None:
        sound = rows.ndim == 2 and rows.shape[1] == sizes["pool"] and bool(np.isfinite(rows).all())
        check(sound, f"{path} features", rows.shape, f"finite, (M, {sizes['pool']})")
        if not moments:
            stats, count = frechet.GaussianStats.empty(sizes["pool"]).add(rows), len(rows)
            checked = {"pool": Moments(stats.mean, stats.cov)}
    elif images and not moments:
        count = images.count
    recipe = arrays.get("recipe") or {}
    size = recipe.get("size") or (images and images.shape[:2])
    pixels, notes = (size[0], size[1]) if size else None, _notes(path, arrays)
    return Reference(str(path), sha256(path), checked, rows, images, count, pixels, recipe.get("inception"), notes)


def _moments(arrays: Mapping[str, Any], path: Path) -> tuple[dict[str, Moments], int | None]:
    """The statistics by feature, and how many images are behind them where the file says so."""
    moments, count = {}, arrays.get("count")
    for feature, places in STATISTICS.items():
        place = next((place for place in places if place[0] in arrays or place[1] in arrays), None)
        if place is not None:
            for key in place[:2]:
                check(
                    key in arrays, f"{path} array {key}", "missing", f"there: {place[0]} and {place[1]} belong together"
                )
            moments[feature], count = Moments(arrays[place[0]], arrays[place[1]]), arrays.get(place[2], count)
    if set(SUMS) <= arrays.keys():
        count = arrays["num_items"]
        mean = arrays["raw_mean"] / count
        moments["pool"] = Moments(mean, arrays["raw_cov"] / count - np.outer(mean, mean))
    return moments, None if count is None else int(count)


def _notes(path: Path, arrays: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What may make a number another one."""
    notes = []
    if "mu" in arrays and "mu_s" not in arrays:
        notes.append(("no_spatial", f"{path} has no mu_s and sigma_s: no sFID"))
    if any(getattr(arrays.get(key), "dtype", None) == np.float32 for key in ("sigma", "sigma_s")):
        notes.append(("float32_reference", f"the covariance of {path} is float32: FID may differ by 1e-4"))
    if "_clean_" in path.name or {"feats", "count"} & arrays.keys() == {"feats"} and path.suffix == ".npz":
        notes.append(("resize", f"{path.name} looks like clean-fid's, whose images are resized by another rule"))
    return tuple(notes)


def _checked(found: Moments, size: int, name: str) -> Moments:
    """Moments in float64.  Raises: UserError for other features, NaN, and what is no covariance."""
    mean, cov = (np.asarray(array, np.float64) for array in found)
    expected = f"(({size},), ({size}, {size})), of {size} features"
    check((mean.shape, cov.shape) == ((size,), (size, size)), f"{name} shapes", (mean.shape, cov.shape), expected)
    finite = bool(np.isfinite(mean).all() and np.isfinite(cov).all())
    check(finite, f"{name} statistics", "NaN or infinity", "finite", "download or copy the file again")
    frechet.factor(cov, f"{name} covariance")
    return Moments(mean, (cov + cov.T) / 2)


def _arrays(path: Path, flag: str) -> dict[str, Any]:
    """The arrays and numbers of a file by name, nested ones with dots; images are left where they are."""
    if path.suffix in (".pkl", ".pickle", ".pt", ".pth"):
        source = SourceFile(path)
        top = read_torch(source) if path.suffix in (".pt", ".pth") else read_pickle(source)
        found = {"feats": top} if isinstance(top, LazyTensor) else _flat(top) if isinstance(top, dict) else {}
        return {name: value.read() if isinstance(value, LazyTensor) else value for name, value in found.items()}
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            names = archive.files
            found = {name: archive[name] for name in names if name not in ("arr_0", "arr_1")}
            if "recipe" in found:
                found["recipe"] = json.loads(str(found["recipe"]))
    except (*DAMAGE, AttributeError) as error:
        raise unreadable(path, flag, error) from error
    return found | {name: None for name in names if name not in found}


def _flat(tree: dict, place: str = "") -> dict[str, Any]:
    """Numbers and arrays of nested dicts."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{place}{key}.")
        elif isinstance(value, (LazyTensor, int, float)) and not isinstance(value, bool):
            found[f"{place}{key}"] = value
    return found


def write_reference(path: Path, arrays: Mapping[str, np.ndarray], images: ImageSet, kept: int, recipe: dict) -> None:
    """Write statistics and the first `kept` images in ADM's form, with the recipe of both.

    Raises: UserError if the file cannot be written, or the images change meanwhile.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (kept, *images.shape[:2], 3)}
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in {**arrays, "recipe": np.array(json.dumps(recipe))}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for _, batch in images.batches(0, 64, kept):
                member.write(np.broadcast_to(batch, (*batch.shape[:3], 3)).tobytes())
