"""The pipeline: one global order for any number of processes, exact resume, and failed reads."""

import dataclasses
import json

import numpy as np
import pytest
from refusal import refused

from ig_jax.base.errors import UserError
from ig_jax.data import pipeline
from ig_jax.data.sources import Source
from ig_jax.data.spec import pixels

LENGTH = 50


def _source(length=LENGTH, identity="test:numbers"):
    """Images 2x2x1 of a source in which image and label of row i both say i."""
    images = np.broadcast_to(np.arange(length, dtype=np.uint8)[:, None, None, None], (length, 2, 2, 1))
    labels = np.arange(length, dtype=np.int32)
    return Source(
        spec=pixels((2, 2, 1), tuple(map(str, range(length))), identity=identity),
        length=length,
        read=lambda rows: {"image": images[rows], "label": labels[rows]},
    )


def _changed(**changes):
    """The source with another specification."""
    return dataclasses.replace(_source(), spec=dataclasses.replace(_source().spec, **changes))


def _open(source=None, **changes):
    arguments = dict(seed=3, global_batch=12, start_step=0, rows=range(12))
    arguments |= {"rows": range(changes.get("global_batch", 12))} | changes
    return pipeline.batches(source or _source(), **arguments)


def _share(index, count):
    """The rows of process `index` of `count`."""
    return range(index * 12 // count, (index + 1) * 12 // count)


def _labels(steps, **changes):
    """Labels (steps, local batch) of the first `steps` batches."""
    with _open(**changes) as stream:
        return np.stack([next(stream)["label"] for _ in range(steps)])


def test_a_batch_holds_the_images_of_its_labels():
    with _open() as stream:
        for _ in range(8):
            batch = next(stream)
            assert batch["image"].shape == (12, 2, 2, 1) and batch["image"].dtype == np.uint8
            assert batch["label"].shape == (12,) and batch["label"].dtype == np.int32
            np.testing.assert_array_equal(batch["image"][:, 1, 0, 0], batch["label"])


def test_every_epoch_is_another_permutation():
    epochs = _labels(100).reshape(-1, LENGTH)[:24]  # batches of 12 straddle the epochs of 50
    for epoch in epochs:
        assert sorted(epoch) == list(range(LENGTH))
    assert len({tuple(epoch) for epoch in epochs}) == 24
    assert not any((epoch == np.arange(LENGTH)).all() for epoch in epochs)
    # every row comes first, in the middle and last about as often: no row keeps its place
    assert (epochs == epochs[0]).mean() < 0.15


@pytest.mark.parametrize("length", [1, 2, 50, 1000])
def test_any_stretch_of_the_order_is_a_stretch_of_whole_epochs(length):
    whole = np.concatenate([pipeline.order(length, 3, range(e * length, (e + 1) * length)) for e in range(4)])
    assert all(sorted(epoch) == list(range(length)) for epoch in whole.reshape(4, length))
    for first, last in ((0, 1), (length - 1, length + 1), (length // 2, 2 * length), (3 * length, 4 * length)):
        np.testing.assert_array_equal(pipeline.order(length, 3, range(first, last)), whole[first:last])


def test_the_order_is_the_one_that_checkpoints_were_written_with():
    """Known rows: another version of numpy that draws others would change resumed runs."""
    assert pipeline.order(1_281_167, 7, range(1_281_165, 1_281_169)).tolist() == [410025, 346763, 993602, 648864]


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    plain = _labels(20)
    np.testing.assert_array_equal(plain, _labels(20, threads=1))
    np.testing.assert_array_equal(plain, _labels(20, threads=4))
    assert (plain != _labels(20, seed=4)).any()
    np.testing.assert_array_equal(plain.ravel(), _labels(10, global_batch=24).ravel())


@pytest.mark.parametrize("count", [2, 4, 12])
def test_processes_share_out_the_same_global_batches(count):
    shares = [_labels(15, rows=_share(index, count)) for index in range(count)]
    assert shares[0].shape == (15, 12 // count)
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), _labels(15))


@pytest.mark.parametrize("index, count", [(0, 1), (1, 2)])
def test_a_resumed_stream_goes_on_exactly(index, count):
    whole = _labels(40, rows=_share(index, count))
    for step in (0, 1, 7, 25, 39):
        rest = _labels(40 - step, rows=_share(index, count), start_step=step)
        np.testing.assert_array_equal(rest, whole[step:])


def test_a_step_far_away_is_reached_at_once():
    assert sorted(_labels(1, start_step=10**9, global_batch=LENGTH)[0]) == list(range(LENGTH))


def test_resuming_with_another_number_of_processes_changes_nothing():
    resumed = [_labels(10, rows=_share(index, 3), start_step=10) for index in range(3)]
    np.testing.assert_array_equal(np.concatenate(resumed, axis=1), _labels(20)[10:])


def test_a_failed_read_surfaces_at_its_step_and_ends_the_stream():
    good = _source()
    bad_row = int(_labels(4)[3, 2])  # in the first epoch, so it is first met at step 3

    def read(rows):
        if bad_row in rows:
            raise UserError(f"row {bad_row} is damaged", name="row", value=bad_row)
        return good.read(rows)

    with _open(dataclasses.replace(good, read=read)) as stream:
        seen = []
        with refused("row", bad_row, says="is damaged"):
            for batch in stream:
                seen.append(batch["label"])
        np.testing.assert_array_equal(seen, _labels(3))
        with pytest.raises(ValueError, match="closed"):
            next(stream)


def test_a_label_outside_the_classes_is_refused():
    opened, refusal = (
        _open(_changed(class_names=("a", "b"))),
        refused("label", expected="in 0..1", says="of test:numbers"),
    )
    with opened as stream, refusal:
        next(stream)


def test_a_closed_stream_gives_nothing_more():
    stream = _open()
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


@pytest.mark.parametrize(
    "changes, needle",
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"global_batch": 0}, "global_batch=0"),
        ({"global_batch": LENGTH + 1}, "global_batch=51 must be in [1, 50]"),
        ({"rows": range(0)}, "rows=[]"),
        ({"rows": [11, 12]}, "rows=[11, 12] must be in [0, 12)"),
        ({"rows": [-1]}, "rows=[-1]"),
        ({"start_step": -1}, "start_step=-1"),
    ],
)
def test_impossible_numbers_are_refused_at_once(changes, needle):
    with refused(needle.split("=")[0], says=needle):
        _open(**changes)


def test_fingerprint_is_plain_json_and_the_same_again():
    saved = pipeline.fingerprint(_source(), 3, 12)
    assert json.loads(json.dumps(saved)) == saved == pipeline.fingerprint(_source(), 3, 12)
    pipeline.check_fingerprint(json.loads(json.dumps(saved)), saved)
    # the order written down is the order that the stream has
    other = pipeline.fingerprint(_source(), 4, 12)
    assert other["order"] != saved["order"]


@pytest.mark.parametrize(
    "field, current",
    [
        ("source", lambda: pipeline.fingerprint(_source(identity="test:others"), 3, 12)),
        ("examples", lambda: pipeline.fingerprint(_source(length=49), 3, 12)),
        ("arrays", lambda: pipeline.fingerprint(_changed(latent_shape=(4, 4, 1)), 3, 12)),
        ("mirrored", lambda: pipeline.fingerprint(_changed(mirrored=True), 3, 12)),
        ("num_classes", lambda: pipeline.fingerprint(_changed(class_names=("a",)), 3, 12)),
        ("seed", lambda: pipeline.fingerprint(_source(), 4, 12)),
        ("global_batch", lambda: pipeline.fingerprint(_source(), 3, 24)),
        ("order", lambda: {**pipeline.fingerprint(_source(), 3, 12), "order": "00000000"}),
    ],
)
def test_a_differing_fingerprint_names_field_and_both_values(field, current):
    saved, current = pipeline.fingerprint(_source(), 3, 12), current()
    with refused(field, current[field], expected=repr(saved[field]), fix="set it back"):
        pipeline.check_fingerprint(saved, current)


def test_a_fingerprint_of_another_version_is_refused_both_ways():
    whole = pipeline.fingerprint(_source(), 3, 12)
    partial = {field: value for field, value in whole.items() if field != "order"}
    with refused("order", expected="nothing"):
        pipeline.check_fingerprint(partial, whole)
    with refused("order", "nothing"):
        pipeline.check_fingerprint(whole, partial)
