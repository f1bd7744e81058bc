"""Reference files in the forms of the published evaluators, and sets of images; what is damaged is one line."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image
from refusal import refused

from ig_jax.evaluation.image_sets import open_set
from ig_jax.evaluation.reference import read_reference, write_reference
from ig_jax.weightfiles.files import LazyTensor, write_torch

SIZES = {"pool": 6, "spatial": 4}
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(50, 6)).astype(np.float32)
MU, SIGMA = ROWS.mean(0, dtype=np.float64), np.cov(ROWS.astype(np.float64).T)
MU_S, SIGMA_S = MU[:4], SIGMA[:4, :4]
IMAGES = RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def write(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def read(path):
    return read_reference(str(path), sizes=SIZES)


FORMS = {
    "adm.npz": lambda p: write(p, mu=MU.astype(np.float32), sigma=SIGMA, mu_s=MU_S, sigma_s=SIGMA_S, arr_0=IMAGES),
    "edm.npz": lambda p: write(p, mu=MU, sigma=SIGMA.astype(">f8")),
    "meanflow.npz": lambda p: write(p, ref_mu=MU, ref_sigma=SIGMA),
    "fd_loss.npz": lambda p: write(p, mu=MU, sigma=SIGMA, avg_mu=MU_S, avg_sigma=SIGMA_S),
    "edm2.pkl": lambda p: p.write_bytes(
        pickle.dumps({"num_images": 50, "fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": MU_S, "sigma": SIGMA_S}})
    ),
    "stylegan.pkl": lambda p: p.write_bytes(
        pickle.dumps({"num_items": 50, "raw_mean": MU * 50, "raw_cov": SIGMA * 50 + np.outer(MU, MU) * 50}, protocol=2)
    ),
    "fidelity.pt": lambda p: write_torch(p, {"mu": LazyTensor.of(MU), "sigma": LazyTensor.of(SIGMA)}),
    "clean.npz": lambda p: write(p, feats=ROWS),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_statistics_it_holds(name, tmp_path):
    FORMS[name](tmp_path / name)
    found = read(tmp_path / name)
    np.testing.assert_allclose(found.moments["pool"].mean, MU, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.moments["pool"].cov, SIGMA, rtol=1e-6)
    assert found.count == (50 if name in ("edm2.pkl", "stylegan.pkl", "clean.npz") else None)
    assert ("spatial" in found.moments) == (found.images is not None) == (name == "adm.npz")
    expected = dict.fromkeys(("edm.npz", "fd_loss.npz", "fidelity.pt"), ["no_spatial"]) | {"clean.npz": ["resize"]}
    assert [note for note, _ in found.notes] == expected.get(name, [])


ODD, NEGATIVE, NAN = SIGMA.copy(), np.diag([-1.0, 1, 1, 1, 1, 1]), np.full(6, np.nan)
ODD[0, 1] += 0.1


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"mu": NAN, "sigma": SIGMA}, "NaN or infinity"),
        ({"mu": MU[:5], "sigma": SIGMA}, "must be ((6,), (6, 6))"),
        ({"mu": MU, "sigma": ODD}, "not symmetric"),
        ({"mu": MU, "sigma": NEGATIVE}, "negative eigenvalue"),
        ({"mu": MU}, "array sigma='missing'"),
        ({"mu": MU_S, "sigma": SIGMA_S}, "of 6 features"),
        ({"mean": MU, "cov": SIGMA}, "['cov', 'mean'] must be mu and sigma"),
        ({"feats": ROWS[:, :5]}, "features"),
        ({"arr_0": IMAGES / 255}, "must be uint8 in 0..255"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, "arr_0 shape"),
        ({"arr_0": IMAGES[..., 0]}, "arr_0 shape"),
        ({"arr_0": IMAGES[:0]}, "arr_0 shape"),
        ({"arr_0": IMAGES, "arr_1": np.arange(3)}, "arr_1 shape"),
        ({"arr_0": np.array([None, {}])}, "uint8"),
        ({"mu": np.array([None, {}]), "sigma": SIGMA}, "is damaged or no npz"),
    ],
)
def test_what_cannot_be_a_reference_is_refused(arrays, says, tmp_path):
    path = write(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError) as caught:
        read(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_are_refused(tmp_path):
    whole = write(tmp_path / "a.npz", arr_0=IMAGES).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (whole[: len(whole) // 2], b"<html>", b"", bytes(flipped)):
        (tmp_path / "a.npz").write_bytes(content)
        with refused("--reference", str(tmp_path / "a.npz"), says="damaged"):
            list(read(tmp_path / "a.npz").images.read(0))
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil(), 4))
    with refused("--reference arrays", []):
        read(tmp_path / "evil.pkl")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_a_written_reference_is_one_for_adms_evaluator_and_for_this_one(tmp_path):
    images = open_set(str(write(tmp_path / "a.npz", arr_0=IMAGES[..., :1])), "--images")
    arrays = {"mu": MU, "sigma": SIGMA, "mu_s": MU_S, "sigma_s": SIGMA_S, "count": np.array(5), "feats": ROWS[:5]}
    write_reference(tmp_path / "ref.npz", arrays, images, 4, {"size": [8, 8], "inception": "ab"})
    with np.load(tmp_path / "ref.npz") as stored:
        np.testing.assert_array_equal(stored["arr_0"], np.repeat(IMAGES[:4, ..., :1], 3, -1))
    found = read(tmp_path / "ref.npz")
    assert (found.count, found.size, found.net, found.images.count, found.notes) == (5, (8, 8), "ab", 4, ())
    np.testing.assert_array_equal(found.rows, ROWS[:5])


def folder_of(path, images, **made):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:06d}.png")
    if made:
        (path / "recipe.json").write_text(json.dumps(made))
    return path


def test_only_the_samples_of_a_folder_count(tmp_path):
    own = folder_of(tmp_path / "own", IMAGES, num=5, seed=3)
    Image.fromarray(IMAGES[0]).resize((40, 40)).save(own / "grid.png")
    (own / ".000001.png.tmp").write_bytes(b"")
    found = open_set(str(own), "--samples")
    np.testing.assert_array_equal(np.stack(list(found.read(0))), IMAGES)
    assert found.made["seed"] == 3 and not found.notes
    (own / "000004.png").unlink()
    with refused("--samples images", 4, expected="the 5 of its recipe.json"):
        open_set(str(own), "--samples")


def test_images_of_a_folder_are_read_from_any_index_in_batches(tmp_path):
    grey = folder_of(tmp_path / "grey", IMAGES[..., 0])
    (grey / "notes.txt").write_text("not an image")
    found = open_set(str(grey), "--samples")
    parts = list(found.batches(1, 3))
    assert [indices.tolist() for indices, _ in parts] == [[1, 2, 3], [4]]
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts])[..., 2], IMAGES[1:, ..., 0])
    Image.fromarray(IMAGES[0]).resize((9, 9)).save(grey / "000009.jpg")
    other = open_set(str(grey), "--samples")
    assert [name for name, _ in other.notes] == ["jpeg"] and other.digest != found.digest
    with refused(f"{grey / '000009.jpg'} shape", (9, 9, 3), expected="(8, 8, 3)"):
        list(other.read(0))
    with refused("--samples", str(tmp_path)):
        open_set(str(tmp_path), "--samples")


def test_an_npz_is_read_in_either_order_of_memory(tmp_path):
    for order in "CF":
        path = write(tmp_path / f"{order}.npz", arr_0=np.asarray(IMAGES, order=order))
        np.testing.assert_array_equal(np.stack(list(open_set(str(path), "--samples").read(2))), IMAGES[2:])
    with zipfile.ZipFile(tmp_path / "C.npz") as archive:
        assert archive.namelist() == ["arr_0.npy"]
