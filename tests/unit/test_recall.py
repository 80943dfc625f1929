"""Recall by score against recall by ids, where both are right, and where only scores are."""

import numpy as np
import pytest

from shardline.shards.core.recall import (
    count_hits,
    exact_scores,
    hits,
    recall_at_k,
    without_repeats,
)
from shardline.shards.core.schema import Metric, normalise
from shardline.shards.index.exact import exact_top_k
from tests.reference import brute_force, recall_by_ids, score

EMPTY = -np.inf


def corpus(rows: int = 400, dim: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    vectors = normalise(rng.standard_normal((rows, dim)).astype(np.float32))
    return vectors, normalise(rng.standard_normal((9, dim)).astype(np.float32))


@pytest.mark.parametrize("metric", list(Metric))
def test_exact_scores_are_the_slow_ones(metric: Metric) -> None:
    vectors, queries = corpus()
    rows = np.random.default_rng(0).integers(-1, 400, (9, 20))
    got = exact_scores(queries, vectors, rows, metric)
    for query, row_scores, own in zip(queries, got, rows, strict=True):
        for value, row in zip(row_scores, own, strict=True):
            expected = EMPTY if row < 0 else score(query, vectors[row], metric)
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("k", [7, 1000])
def test_the_exact_answer_is_brute_force(metric: Metric, k: int) -> None:
    vectors, queries = corpus()
    rows, scores = exact_top_k(queries, vectors, k, metric)
    width = min(k, 400)
    assert scores.shape == rows.shape == (9, width)
    _, expected = brute_force(queries, vectors, np.arange(400), width, metric)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", list(Metric))
def test_without_ties_both_recalls_agree(metric: Metric) -> None:
    vectors, queries = corpus()
    best, exact = exact_top_k(queries, vectors, 20, metric)
    found = np.random.default_rng(1).permuted(best, axis=1)
    found[:, 13:] = -1  # thirteen of twenty, in another order
    found[0, 13] = np.setdiff1d(np.arange(400), best[0])[0]  # and one that is wrong
    scores = exact_scores(queries, vectors, found, metric)
    assert recall_at_k(scores, exact) == pytest.approx(13 / 20)
    assert recall_by_ids(found, best) == pytest.approx(13 / 20)


def test_any_of_equal_rows_is_a_hit() -> None:
    vectors, queries = corpus(100)
    copies = np.tile(vectors, (300, 1))  # row r and r + 100 n are equal
    _, exact = exact_top_k(queries, copies, 100, Metric.COSINE)
    best = [int(np.argmax(vectors @ query)) for query in queries]
    others = np.array([[row + 100 * n for n in range(200, 300)] for row in best])
    assert recall_at_k(exact_scores(queries, copies, others, Metric.COSINE), exact) == 1.0
    wrong = (others + 1) % len(copies)
    assert recall_at_k(exact_scores(queries, copies, wrong, Metric.COSINE), exact) == 0.0


def test_empty_slots_and_more_hits_than_k() -> None:
    exact = np.array([[3.0, 2.0, EMPTY], [1.0, 1.0, 1.0]], np.float32)
    found = np.array([[2.0, EMPTY, EMPTY, 1.9], [1.0, 1.0, 1.0, 1.0]], np.float32)
    assert hits(found, exact).tolist() == [[True, False, False, False], [True] * 4]
    assert recall_at_k(found, exact) == pytest.approx((1 + 3) / 5)
    nothing = np.full((2, 3), EMPTY, np.float32)
    assert not hits(nothing, nothing).any()
    assert recall_at_k(nothing, nothing) == 0.0


def test_hits_are_counted_by_query_and_capped_by_what_exists() -> None:
    exact = np.array([[2.0, 1.0], [3.0, EMPTY]], np.float32)
    assert count_hits(np.float32([[1.0, 0.5], [1.0, EMPTY]]), exact) == 1
    assert count_hits(np.float32([[2.0, 2.0, 2.0], [3.0, 3.0, 3.0]]), exact) == 2 + 1


def test_a_tie_within_rounding_is_a_hit_and_a_lower_score_is_none() -> None:
    exact = np.float32([[100.0, 80.0], [-1.0, -5.0]])  # the second as for squared distances
    for below, share in ((1e-6, 1.0), (1e-3, 0.5)):
        lower = exact - below * np.float32([[0, 80], [0, 5]])
        assert recall_at_k(lower, exact) == share


def test_a_result_counts_once() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 12, (50, 9))
    for row, kept in zip(ids.tolist(), without_repeats(ids).tolist(), strict=True):
        assert kept == [-1 if item in row[:at] else item for at, item in enumerate(row)]
    assert without_repeats(np.empty((2, 0), np.int64)).shape == (2, 0)


def test_exact_results_may_tie_among_themselves() -> None:
    """Forty copies of ten vectors: the exact hundred are two whole groups and half of a third."""
    vectors, queries = corpus(10)
    copies = np.repeat(vectors, 40, axis=0)
    rows, exact = exact_top_k(queries, copies, 100, Metric.COSINE)
    order = np.argsort(-(queries @ vectors.T), axis=1)
    for first in (0, 20):  # either half of the third group
        answer = [
            [40 * g + c for g in groups[:2] for c in range(40)]
            + [40 * groups[2] + first + c for c in range(20)]
            for groups in order.tolist()
        ]
        found = exact_scores(queries, copies, np.array(answer), Metric.COSINE)
        assert recall_at_k(found, exact) == 1.0
    half = rows.copy()
    half[:, 50:] = 40 * order[:, 5:6]  # a row of the sixth group, none of the best
    found = exact_scores(queries, copies, half, Metric.COSINE)
    assert recall_at_k(found, exact) == pytest.approx(0.5)
