"""Images in the forms in which people hold ImageNet: which images, labels and bytes each form gives.

tests/golden/photographs holds twelve photographs in class folders, and the same ones in the tars and parquet files of
published writers, with oddities of ImageNet among them.
"""

import hashlib
import io
import json
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusal import refused

from ig_jax.data.images.opening import open_images

PHOTOGRAPHS = Path(__file__).parents[2] / "golden" / "photographs"
ARCHIVES = PHOTOGRAPHS / "archives"
SYNSETS = ("n01440764", "n02105855", "n02447366")
EXPECTED = json.loads((PHOTOGRAPHS / "archives.json").read_text())
FILES = json.loads((PHOTOGRAPHS / "crops.json").read_text())["files"]


def sums(images) -> list[str]:
    return [hashlib.sha256(data).hexdigest() for data in images.read(images.places)]


@pytest.mark.parametrize("source", ["train", ".", "archives/ILSVRC2012_img_train.tar", "archives"])
def test_folders_and_the_raw_tar_give_the_same_images(source):
    images = open_images(str(PHOTOGRAPHS / source), "train")
    assert images.names == sorted(FILES) and images.synsets == SYNSETS
    assert images.labels.tolist() == [FILES[name]["label"] for name in images.names]
    assert sums(images) == [FILES[name]["file_sha256"] for name in images.names]
    assert images.histogram().tolist() == [4, 4, 4]


def test_class_names_come_from_the_devkit():
    assert open_images(str(ARCHIVES), "train").class_names[::2] == ("tench, Tinca tinca", "badger")
    assert open_images(str(PHOTOGRAPHS / "train"), "train").class_names == SYNSETS


@pytest.mark.parametrize("source", ["archives/ILSVRC2012_img_val.tar", "archives"])
def test_the_validation_tar_takes_its_labels_from_the_devkit(source):
    images = open_images(str(PHOTOGRAPHS / source), "validation")
    expected = EXPECTED["ILSVRC2012_img_val.tar"]["images"]
    assert images.names == sorted(expected)
    assert [images.synsets[label] for label in images.labels] == [expected[name]["synset"] for name in images.names]
    ranks = [expected[name]["index_among_devkit_leaves_sorted"] for name in images.names]
    assert images.labels.tolist() == ranks
    assert sums(images) == [expected[name]["file_sha256"] for name in images.names]


def test_parquet_keeps_the_order_of_its_rows():
    images = open_images(str(ARCHIVES / "hf"), "train")
    expected = EXPECTED["hf/data"]
    assert images.labels.tolist() == [row["label"] for row in expected]
    assert images.names == [f"{row['file']}/{row['path']}" for row in expected]
    assert sums(images) == [row["file_sha256"] for row in expected]
    assert images.class_names == ("tench, Tinca tinca", "Shetland sheepdog, Shetland sheep dog, Shetland", "badger")


def test_webdataset_keeps_the_order_of_its_tar():
    images = open_images(str(ARCHIVES / "imagenet1k-train-*.tar"), "train")
    expected = EXPECTED["webdataset"]
    assert images.labels.tolist() == [sample["label"] for sample in expected]
    assert images.names == [f"{sample['shard']}/{sample['key']}.jpg" for sample in expected]
    assert sums(images) == [sample["file_sha256"] for sample in expected]


def test_other_files_are_listed_and_names_sort_as_text():
    images = open_images(str(PHOTOGRAPHS / "untidy"), "train")
    assert images.names == ["n01440764/n01440764_10.JPEG", "n01440764/n01440764_2.JPEG", "n02447366/n02447366_1.jpg"]
    assert images.labels.tolist() == [0, 0, 1] and images.ignored == ("README.txt", "n01440764/.DS_Store")


def test_an_empty_class_folder_is_a_class_and_a_stray_image_is_refused(tmp_path):
    shutil.copytree(PHOTOGRAPHS / "untidy", tmp_path / "images")
    (tmp_path / "images" / "n02000000").mkdir()
    images = open_images(str(tmp_path / "images"), "train")
    assert images.labels.tolist() == [0, 0, 2] and images.histogram().tolist() == [2, 0, 1]
    stray = tmp_path / "images" / "stray.png"
    stray.write_bytes(b"")
    with refused(str(stray), says="beside the class folders"):
        open_images(str(tmp_path / "images"), "train")


@pytest.fixture
def kaggle(tmp_path):
    """A Kaggle download: class folders for training, a flat folder for validation, its labels four folders above."""
    parts = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(PHOTOGRAPHS / "train", parts / "train")
    (parts / "val").mkdir()
    with tarfile.open(ARCHIVES / "ILSVRC2012_img_val.tar") as archive:
        archive.extractall(parts / "val", filter="data")
    of_image = {name: entry["synset"] for name, entry in EXPECTED["ILSVRC2012_img_val.tar"]["images"].items()}
    rows = [f"{Path(name).stem},{synset} 1 2 3 4 {synset} 5 6 7 8 " for name, synset in of_image.items()]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    return tmp_path, of_image


@pytest.mark.parametrize("below", [".", "ILSVRC", "ILSVRC/Data/CLS-LOC", "ILSVRC/Data/CLS-LOC/val"])
def test_kaggles_flat_validation_folder(kaggle, below):
    root, of_image = kaggle
    images = open_images(str(root / below), "validation")
    assert images.names == sorted(of_image) and images.synsets == tuple(sorted(of_image.values()))
    assert [images.synsets[label] for label in images.labels] == [of_image[name] for name in images.names]
    words = "n01751748 sea snake\nn02105855 Shetland sheepdog, collie\nn04263257 soup bowl\nn09193705 alp\nn9 x\n"
    (root / "LOC_synset_mapping.txt").write_text(words)
    images = open_images(str(root / below), "validation")
    assert images.class_names == ("sea snake", "Shetland sheepdog, collie", "soup bowl", "alp", "x")


def test_extracted_folders_come_before_the_tars_next_to_them(tmp_path):
    shutil.copytree(ARCHIVES, tmp_path, dirs_exist_ok=True)
    shutil.copytree(PHOTOGRAPHS / "untidy", tmp_path / "train")
    assert len(open_images(str(tmp_path), "train")) == 3 and len(open_images(str(tmp_path), "validation")) == 4


def test_kaggles_training_folder_and_what_its_validation_may_lack(kaggle):
    root, of_image = kaggle
    assert open_images(str(root), "train").names == sorted(FILES)
    # Both splits number the classes alike where the validation images are of the training classes.
    solution = root / "LOC_val_solution.csv"
    solution.write_text(solution.read_text().replace("n01751748", SYNSETS[0]).replace("n0426325", "n0244736"))
    text = solution.read_text().replace("n02447367", SYNSETS[2]).replace("n09193705", SYNSETS[2])
    solution.write_text(text)
    assert open_images(str(root), "validation").synsets == SYNSETS
    validation = root / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    (validation / "ILSVRC2012_val_00000009.JPEG").write_bytes(b"")
    with refused(str(validation / "ILSVRC2012_val_00000009.JPEG"), says="no label"):
        open_images(str(root), "validation")
    solution.unlink()
    with refused(str(validation), fix="LOC_val_solution.csv"):
        open_images(str(root), "validation")


def cut_tar(path: Path, size: int) -> None:
    path.write_bytes((ARCHIVES / "ILSVRC2012_img_train.tar").read_bytes()[:size])


@pytest.mark.parametrize("size", [200, 512, 100_000, 150_528, 327_000])
def test_a_cut_tar_is_refused(tmp_path, size):
    """Wherever it is cut, even between two files, where a plain reader sees only its end."""
    path = tmp_path / "ILSVRC2012_img_train.tar"
    cut_tar(path, size)
    with pytest.raises(ValueError, match="damaged tar|is not the tar") as caught:
        open_images(str(path), "train")
    assert str(path) in str(caught.value)


def test_the_tars_of_single_synsets_are_read_too(tmp_path):
    with tarfile.open(ARCHIVES / "ILSVRC2012_img_train.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    images = open_images(str(tmp_path), "train")
    assert images.names == sorted(FILES)
    assert sums(images) == [FILES[name]["file_sha256"] for name in images.names]


def webdataset(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            for kind, content in sample.items():
                info = tarfile.TarInfo(f"./{number:04d}.{kind}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_text_labels_and_missing_labels_of_webdatasets(tmp_path):
    path = tmp_path / "a.tar"
    webdataset(path, [{"png": b"1", "json": b'{"label": "zebra"}'}, {"cls": b"ant", "png": b"2"}])
    images = open_images(str(path), "train")
    assert images.class_names == ("ant", "zebra") and images.labels.tolist() == [1, 0]
    webdataset(path, [{"png": b"1", "cls": b"3"}, {"png": b"2"}])
    with refused(f"{path}:0001.png", says="no label"):
        open_images(str(path), "train")
    webdataset(path, [{"png": b"1", "cls": b"-1"}])
    with refused("label of a.tar/0000.png", -1):
        open_images(str(path), "train")
    webdataset(path, [{"png": b"1", "json": b"{"}])
    with refused(f"{path}:0000.png", says="unreadable label"):
        open_images(str(path), "train")


def test_parquet_without_labels_or_damaged_is_refused(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "test-00000-of-00001.parquet"
    parquet.write_table(arrow.table({"image": [b"x", b"y"], "label": [0, -1]}), path)
    with refused(f"label of {path.name}/0-1", -1):
        open_images(str(path), "train")
    parquet.write_table(arrow.table({"image": [b"x", b"y"], "label": ["b", "a"]}), path)
    images = open_images(str(path), "train")
    assert images.class_names == ("a", "b") and images.read(images.places) == [b"x", b"y"]
    parquet.write_table(arrow.table({"picture": [b"x"], "label": [0]}), path)
    with refused(str(path), fix="image"):
        open_images(str(path), "train")
    path.write_bytes(path.read_bytes()[:-20])
    with refused(str(path), says="cannot be read"):
        open_images(str(path), "train")


def test_a_split_is_chosen_by_the_names_of_the_files(tmp_path):
    for split, label in (("train", b"0"), ("val", b"1")):
        webdataset(tmp_path / f"set-{split}-0000.tar", [{"png": b"", "cls": label}])
    assert open_images(str(tmp_path), "validation").labels.tolist() == [1]
    assert open_images(str(tmp_path / "*.tar"), "train").labels.tolist() == [0]
    (tmp_path / "set-val-0000.tar").unlink()
    with refused(str(tmp_path), says="validation"):
        open_images(str(tmp_path), "validation")
    with refused(str(PHOTOGRAPHS / "archives/hf/data"), says="validation"):
        open_images(str(PHOTOGRAPHS / "archives" / "hf"), "validation")


def test_what_is_no_source_is_refused(tmp_path):
    with refused("--images", str(tmp_path / "nothing")):
        open_images(str(tmp_path / "nothing"), "train")
    with refused(str(tmp_path), says="no class folders"):
        open_images(str(tmp_path), "train")
    (tmp_path / "a.txt").write_text("")
    with refused(str(tmp_path / "a.txt"), says="no form of images"):
        open_images(str(tmp_path / "a.txt"), "train")


def test_fewer_images_are_spread_over_the_classes():
    images = open_images(str(PHOTOGRAPHS / "train"), "train").some(6)
    assert images.names == sorted(FILES)[::2] and images.histogram().tolist() == [2, 2, 2]
    assert sums(images) == [FILES[name]["file_sha256"] for name in images.names]


def register_photographs() -> None:
    """Let TFDS know a data set of two stored PNGs of different sizes."""
    import tensorflow_datasets as tfds  # reads the folder of this session at its import

    class EncodedPhotographs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
            label = tfds.features.ClassLabel(names=["cat", "dog", "eel"])
            features = tfds.features.FeaturesDict({"image": image, "label": label, "file_name": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            del dl_manager
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, (size, label) in enumerate([((3, 2), "eel"), ((4, 5), "cat")]):
                encoded = io.BytesIO()
                Image.new("RGB", size, (number, 2, 3)).save(encoded, "PNG")
                encoded.seek(0)
                yield number, {"image": encoded, "label": label, "file_name": f"{number}.png"}


def test_tfds_gives_its_stored_bytes():
    register_photographs()
    images = open_images("tfds:encoded_photographs", "train")
    assert images.names == ["0.png", "1.png"] and images.class_names == ("cat", "dog", "eel")
    assert images.labels.tolist() == [2, 0] and images.histogram().tolist() == [1, 0, 1]
    for number, data in enumerate(images.read(images.places)):
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "PNG" and np.asarray(image)[0, 0].tolist() == [number, 2, 3]
    with refused("split", "validation"):
        open_images("tfds:encoded_photographs", "validation")
    with refused("data set", "ig_digits", says="encoded"):
        open_images("tfds:ig_digits", "train")


def test_the_list_of_the_raw_tars_takes_little_memory(tmp_path):
    """Under 300 bytes an image: 0.4 GB for the 1,281,167 of ImageNet, in the order of their names."""
    count, path = 2000, tmp_path / "ILSVRC2012_img_train.tar"
    with tarfile.open(path, "w") as outer:
        for synset in ("n00000002", "n00000001"):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for number in range(count):
                    archive.addfile(tarfile.TarInfo(f"{synset}_{number * 7 % count:05d}.JPEG"))
            info = tarfile.TarInfo(f"{synset}.tar")
            info.size = inner.tell()
            inner.seek(0)
            outer.addfile(info, inner)
    tracemalloc.start()
    try:
        images = open_images(str(path), "train")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert images.names == sorted(images.names) and images.histogram().tolist() == [count, count]
    assert peak < 300 * len(images)
