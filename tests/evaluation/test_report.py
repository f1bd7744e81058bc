"""The table, its notes, and a conclusion that states no more than the numbers show."""

import pytest
from refusal import refused

from ig_jax.evaluation import report


def row(setting, **changes):
    return {
        "kind": "none",
        "setting": setting,
        "fd_cnn": 4.321,
        "agreement": 0.9875,
        "count": 2000,
        "reference_count": 1437,
        "fd_cnn_at_floor_n": 6.789,
        "classifier": "ab" * 32,
        "classifier_accuracy": 0.9917,
        "num_classes": 10,
        **changes,
    }


def real(**changes):
    return row("real test images", count=360, **changes)


def test_a_table_is_narrow_and_compares_equal_numbers_of_images():
    rows = [row("none"), row("IG w=2 on (0.3, 1]" * 8, fd_cnn=12345.678), real()]
    lines = report.table(rows).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["setting", "FD-CNN", "at", "n=360", "agreement", "%", "n"]
    assert lines[2].split() == ["none", "4.32", "6.79", "98.8", "2,000"]
    assert lines[4].split() == ["real", "test", "images", "4.32", "4.32", "98.8", "360"]
    assert len({len(line) for line in lines}) == 1  # columns line up


def test_a_summary_says_how_to_read_it():
    text = report.summary([row("none"), row("IG 2", kind="IG", fd_cnn=3.0)], real())
    assert max(map(len, text.splitlines())) <= 110
    for words in (
        "1,437 real training images",
        "not FID",
        "99.2 %",
        "(sha256 abababab)",
        "n differs",
        "were chosen by",
    ):
        assert words in text
    assert "lowers FD-CNN from 4.32 to 3.00 (IG 2)" in text
    steps = [row("none", step=5, ema="0.9"), row("IG 2", kind="IG", fd_cnn=3.0, step=5, ema="0.9")]
    steps = [one | {"step": at, "checkpoint": at, "fd_cnn": one["fd_cnn"] * at} for at in (20, 3) for one in steps]
    steps[0]["fd_cnn"] = 10.0  # the best without guidance is of another step
    text = report.summary(steps, real())
    assert "\nstep 20: none " in text and text.count("\n* step 3: IG 2 ") == 2  # in both tables
    assert "lowers FD-CNN from 12.96 to 9.00 (step 3: IG 2)" in text and "EMA" not in text
    assert "n differs" not in report.summary([row("none")], row("real test images"))
    assert "nternal guidance" not in report.summary([row("none"), row("CFG 1.5", kind="CFG")], real())


@pytest.mark.parametrize(
    "plain, guided, test, words",
    [
        ({}, dict(fd_cnn=3.0), {}, "lowers FD-CNN from 4.32 to 3.00"),
        ({}, dict(fd_cnn=5.0), {}, "does not lower FD-CNN here: 4.32 without guidance, 5.00 at best"),
        ({}, dict(fd_cnn=4.321), {}, "does not lower"),
        ({}, dict(fd_cnn=3.0, agreement=0.08), {}, "Not trained yet: the CNN finds the label of 8.0% of the samples"),
        ({}, dict(fd_cnn=3.0), dict(agreement=0.12), "No conclusion: the CNN finds the label of 12.0% of the real"),
        ({}, dict(fd_cnn=3.0, agreement=0.2), {}, "lowers"),  # twice the chance
    ],
)
def test_a_conclusion_claims_no_more_than_the_numbers_show(plain, guided, test, words):
    assert words in report.conclusion(row("none", **plain), row("IG 2", **guided), real(**test))


def test_rows_that_cannot_be_compared_are_refused():
    with refused("classifier"):
        report.table([row("none"), row("IG", classifier="cd" * 32)])
    with refused("reference_count"):
        report.table([row("none"), row("IG", reference_count=360)])
    with refused("rows"):
        report.table([])
