"""Our shards read without TensorFlow: the stored bytes in any order, and the file and index of every fault."""

import json
import subprocess
import sys

import latent_shards
import numpy as np
import pytest
import toy
from array_record.python import array_record_module as array_record
from latent_folders import every, opened
from refusal import refused

from ig_jax.data import pipeline, record_file
from ig_jax.data.shards import CARD, OPTIONS, RecordLayout, shard_file


@pytest.mark.parametrize(
    "form",
    [
        {},
        dict(dtype="bfloat16", flip="none"),
        dict(stage="latents"),
        dict(side=32, dtype="bfloat16", lengths=(30, 30)),  # records of 32 KB: every second one lies across blocks
        dict(side=64, lengths=(5, 2)),  # records of 128 KB, each across two or more headers of blocks
        dict(classes=1000, label=lambda row: (0, 127, 128, 999)[row % 4]),  # labels of one byte and of two
    ],
    ids=["default", "bfloat16", "latents", "across-blocks", "across-headers", "labels"],
)
def test_what_was_written_is_read_in_any_order(tmp_path, form):
    arrays, labels = latent_shards.write(tmp_path, **form)
    source = opened(tmp_path, side=form.get("side", 8), classes=form.get("classes", 10))
    rows = np.random.default_rng(1).permutation(np.repeat(np.arange(len(source)), 2))
    batch = source.gather(rows)
    assert batch["label"].dtype == np.int32 and batch["label"].tolist() == labels[rows].tolist()
    assert batch.keys() == arrays.keys() | {"label"}
    for name, values in arrays.items():
        assert batch[name].dtype == values.dtype and batch[name].flags.c_contiguous
        np.testing.assert_array_equal(batch[name].view(np.uint8), values[rows].view(np.uint8))
    assert (source.spec.holds, source.spec.dtype) == (form.get("stage", "moments"), form.get("dtype", "float32"))
    assert source.spec.mirrored == (form.get("flip") != "none")


def test_records_are_found_where_array_record_finds_them(tmp_path):
    """Of sizes about the edges of blocks, where chunks begin at, before and after a header."""
    path = tmp_path / "sizes.array_record"
    rng = np.random.default_rng(0)
    sizes = [65_536 - 64 - 45, 100, 1, 30_000, 35_000 - 90, 20, 200_000, *rng.integers(1, 70_000, 60)]
    writer = array_record.ArrayRecordWriter(str(path), OPTIONS)
    for size in sizes:
        writer.write(rng.integers(0, 256, size, np.uint8).tobytes())
    writer.close()
    file, reader = record_file.RecordFile(path), array_record.ArrayRecordReader(str(path))
    assert len(file.places) == len(sizes) and (file.places % record_file.BLOCK == 0).any()
    for row, size in enumerate(sizes):
        found = bytearray(record_file.CHUNK_HEADER + 2 + (int(size).bit_length() + 6) // 7 + size)
        view = memoryview(found)
        assert not record_file.read_records([file.descriptor], [file.places[row]], [[view[:7], view[7:]]])
        assert bytes(found[-size:]) == reader.read([row])[0]


def test_a_name_may_change_the_size_of_a_record_across_a_power_of_two(tmp_path):
    """Sizes of 127 and 128 bytes are written in one byte and in two: what stands before the arrays moves."""
    form = dict(lengths=(60,), side=2, stage="latents", flip="none", dtype="bfloat16")
    arrays, labels = latent_shards.write(tmp_path, name=lambda row: "x" * row, **form)
    records = array_record.ArrayRecordReader(str(tmp_path / shard_file("train", 0, 1))).read_all()
    assert {len(record) < 128 for record in records} == {True, False}
    batch = every(opened(tmp_path, side=2, classes=10))
    np.testing.assert_array_equal(batch["latent"].view(np.uint8), arrays["latent"].view(np.uint8))
    assert batch["label"].tolist() == labels.tolist()


def test_mirror_images_are_left_unread_where_the_config_wants_none(tmp_path):
    arrays, labels = latent_shards.write(tmp_path)
    batch = every(opened(tmp_path, side=8, classes=10, mirrored=False))
    assert batch.keys() == {"moments", "label"} and batch["label"].tolist() == labels.tolist()
    np.testing.assert_array_equal(batch["moments"], arrays["moments"])
    latent_shards.write(tmp_path / "plain", flip="none")
    with refused("data.mirrored", True, expected="False, as in shards:"):
        opened(tmp_path / "plain", side=8, classes=10, mirrored=True)


def test_classes_without_images_are_known_from_the_card(tmp_path):
    latent_shards.write(tmp_path, label=lambda row: row % 3)
    assert opened(tmp_path, side=8, classes=10).empty_classes() == ["3", "4", "5", "6", "7", "8", "9"]


def test_a_folder_that_is_not_whole_is_refused_by_the_name_of_the_file(tmp_path):
    latent_shards.write(tmp_path)
    first, second, _ = (tmp_path / shard_file("train", index, 3) for index in range(3))
    open_it = lambda: opened(tmp_path, side=8, classes=10)
    whole, other = first.read_bytes(), second.read_bytes()
    open_it()
    second.unlink()
    with refused(str(second), says="is missing"):
        open_it()
    second.write_bytes(other)
    surplus = tmp_path / shard_file("train", 3, 4)
    surplus.write_bytes(other)
    with refused(str(surplus), says="is not one of the 3 shards"):
        open_it()
    surplus.unlink()
    for damage in (whole[:-1], whole[: len(whole) // 2], b"", whole[:-65_536], bytes(len(whole))):
        first.write_bytes(damage)
        with refused(str(first), says="does not end with the footer"):
            open_it()
    first.write_bytes(other)
    with refused(str(first), says="has 4 records, card.json says 5"):
        open_it()
    first.write_bytes(whole)
    (tmp_path / CARD).rename(tmp_path / "card")
    with refused(str(tmp_path), expected=CARD):
        open_it()
    with refused("split", "validation"):
        (tmp_path / "card").rename(tmp_path / CARD)
        opened(tmp_path, side=8, classes=10, split="validation")


def test_a_record_of_another_form_is_named_when_it_is_read(tmp_path):
    arrays, _ = latent_shards.write(tmp_path)
    path = tmp_path / shard_file("train", 1, 3)
    layout = RecordLayout("moments", (8, 8, 8), "float32", mirrored=True)
    good = layout.encode({name: values[0] for name, values in arrays.items()}, 1, "a")
    small = RecordLayout("moments", (4, 8, 16), "float32", mirrored=False)
    bad = small.encode({"moments": np.zeros((4, 8, 16), np.float32)}, 1, "a" * (len(good) // 2 - 20))
    writer = array_record.ArrayRecordWriter(str(path), OPTIONS)
    for record in (good, bad, good, layout.encode({n: v[0] for n, v in arrays.items()}, 10, "b")):
        writer.write(record)
    writer.close()
    with refused(f"{path}, index 1", says="is no such record"):
        opened(tmp_path, side=8, classes=10)


def test_a_label_out_of_range_is_named_when_it_is_read(tmp_path):
    latent_shards.write(tmp_path, classes=1000, label=lambda row: 999 if row == 6 else 1)
    card = json.loads((tmp_path / CARD).read_text())
    card["class_names"], card["class_histogram"] = list("0123456789"), [0, 12, *[0] * 8]
    (tmp_path / CARD).write_text(json.dumps(card))
    with refused("label", 999, expected="in 0..9", says="00001-of-00003, index 1"):
        opened(tmp_path, side=8, classes=10)


def test_changed_bytes_are_refused_or_at_least_no_other_record(tmp_path):
    """Bits flipped in what stands around the arrays; those of the arrays themselves are checked by the card's sums."""
    arrays, labels = latent_shards.write(tmp_path, lengths=(4,))
    source = opened(tmp_path, side=8, classes=10)
    path = tmp_path / shard_file("train", 0, 1)
    whole = bytearray(path.read_bytes())
    start = int(record_file.RecordFile(path).places[2])
    prefix = whole.index(b"moments", start)
    for at in (start + 24, start + 25, start + 40, prefix + 1, whole.index(b"moments_flip", start) + 9):
        damaged = whole.copy()
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with refused(f"{path}, index 2"):
            source.gather(np.asarray([0, 2]))
        np.testing.assert_array_equal(source.gather(np.asarray([3]))["moments"], arrays["moments"][3:])
    path.write_bytes(whole)
    assert source.gather(np.asarray([2]))["label"] == labels[2]


def test_reading_needs_no_tensorflow(tmp_path):
    latent_shards.write(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(toy.ROOT / "tests")!r})
for name in ("tensorflow", "tensorflow_datasets"):
    sys.modules[name] = None
from latent_folders import every, opened
print(len(every(opened({str(tmp_path)!r}, "shards", side=8, classes=10))["label"]))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=toy.ROOT) == "12\n"


def test_every_image_is_seen_once_an_epoch_by_any_number_of_processes(tmp_path):
    """30 images in batches of 8: epochs end inside a batch, and the processes change on the way."""
    _, labels = latent_shards.write(tmp_path, lengths=(11, 12, 7), classes=30, label=lambda row: row)
    source = opened(tmp_path, side=8, classes=30)

    def global_batches(first, count, processes):
        shares = []
        for index in range(processes):
            with pipeline.batches(
                source,
                seed=5,
                global_batch=8,
                start_step=first,
                rows=range(index * 8 // processes, (index + 1) * 8 // processes),
            ) as stream:
                shares.append([next(stream) for _ in range(count)])
        return [np.concatenate([share[step]["label"] for share in shares]) for step in range(count)]

    alone = np.concatenate(global_batches(0, 15, 1))
    for epoch in alone.reshape(4, 30):
        assert sorted(epoch) == labels.tolist()
    changing = global_batches(0, 3, 4) + global_batches(3, 5, 2) + global_batches(8, 4, 8) + global_batches(12, 3, 1)
    np.testing.assert_array_equal(np.concatenate(changing), alone)
    assert (np.concatenate(global_batches(0, 15, 4)) == alone).all()
