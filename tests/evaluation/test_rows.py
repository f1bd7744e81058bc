"""Precision, recall, KID, MIND and Inception Score against the published evaluators."""

import metric_cases
import numpy as np
import pytest
from refusal import refused

from ig_jax.evaluation import rows
from ig_jax.evaluation.inception_score import InceptionScore

CASES = metric_cases.CASES


@pytest.mark.parametrize("name", CASES["precision_recall"])
def test_precision_and_recall_count_what_the_published_codes_count(name):
    case = CASES["precision_recall"][name]
    samples, reference = (metric_cases.features(*case[key]) for key in ("samples", "reference"))
    assert list(rows.precision_recall(samples, reference)) == case["exact"]
    for k, wanted in zip((1, 5), case["k1_k5"] or []):
        if min(len(samples), len(reference)) > k:
            assert list(rows.precision_recall(samples, reference, k)) == wanted
    half = rows.precision_recall(samples, reference, half=True)
    # In float16 a tie may fall either way: one row of each set.
    assert abs(half.precision - case["adm"][0]) < 1.5 / len(samples)
    assert abs(half.recall - case["adm"][1]) < 1.5 / len(reference)


@pytest.mark.parametrize("name", CASES["kid"])
def test_kid_draws_the_subsets_of_torch_fidelity(name):
    case = CASES["kid"][name]
    x, y = (metric_cases.features(*case[key]) for key in "xy")
    found = rows.kernel_distance(x, y, case["subsets"], case["size"])
    np.testing.assert_allclose(found, case["exact"], rtol=1e-9, atol=1e-13)


def test_mind_of_a_shift_is_three_times_its_square():
    x = metric_cases.features(1, 2, 400, 64, 0.0, 1.0)
    shift = np.linspace(-1, 1, 64, dtype=np.float32)
    assert rows.sliced_distance(x + shift, x) == pytest.approx(3 * (shift**2).sum(), rel=0.1)
    assert rows.sliced_distance(x[::-1], x) == 0
    assert rows.sliced_distance(x, x[:100]) < 0.1 * rows.sliced_distance(x + shift, x[:100])


@pytest.mark.parametrize("name", CASES["inception_score"])
def test_the_inception_score_in_order_is_adms_and_shuffled_torch_fidelitys(name):
    case = CASES["inception_score"][name]
    logits = metric_cases.logits(*case["recipe"])
    count, scores = len(logits), []
    for made in [InceptionScore.in_order] + [InceptionScore.shuffled] * bool(case["shuffled"]):
        first = second = made(count)
        for i, part in enumerate(np.array_split(np.random.default_rng(0).permutation(count), 7)):
            batch = {"logits": logits[part], "index": part}  # batches in any order, on two processes
            first, second = (first.update(batch), second) if i % 2 else (first, second.update(batch))
        scores.append(second.merge(first).compute())
    assert scores[0].mean == pytest.approx(case["in_order"], rel=1e-12)
    if case["shuffled"]:
        np.testing.assert_allclose(scores[1], case["shuffled"], rtol=1e-11)


def test_rows_are_in_the_order_of_the_images_and_finite():
    kept, other = rows.Rows("pool"), rows.Rows("pool")
    kept = kept.update({"pool": np.array([[2.0], [0.0]]), "index": np.array([2, 0])})
    other = other.update({"pool": np.array([[1.0]]), "index": np.array([1])})
    np.testing.assert_array_equal(other.merge(kept).compute(), [[0], [1], [2]])
    with refused("features", expected="finite"):
        kept.update({"pool": np.array([[np.nan]]), "index": np.array([3])})


def test_too_few_rows_are_refused():
    x = np.zeros((3, 8), np.float32)
    with refused("samples count", 3, expected="more than k=3"):
        rows.precision_recall(x, np.zeros((9, 8)))
    with refused("reference count", 3, expected="1000"):
        rows.kernel_distance(np.zeros((1000, 8)), x)
    with refused("count", 0):
        InceptionScore.in_order(4).compute()
    with refused("count", 4, expected="at least 10"):
        InceptionScore.shuffled(4)
