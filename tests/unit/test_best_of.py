"""The best of an answer and further items, against a sort."""

import numpy as np
import pytest

from shardline.shards.core.schema import EMPTY_ID, EMPTY_SCORE, Ranked
from shardline.shards.index.best_of import BestOf, flipped

NAN = np.float32(np.nan)


def ranked(rows: list[list[tuple[int, float]]], k: int) -> Ranked:
    """In the order of answers, with empty slots up to k."""
    full = [sorted(row, key=lambda item: (-item[1], item[0])) for row in rows]
    full = [row[:k] + [(EMPTY_ID, EMPTY_SCORE)] * (k - len(row)) for row in full]
    ids = np.array([[item for item, _ in row] for row in full], np.int64)
    return Ranked(ids, np.array([[score for _, score in row] for row in full], np.float32))


def test_it_is_what_a_sort_gives_ids_0_and_1_and_empty_slots_included() -> None:
    first = [[(0, 0.5), (1, 0.25), (7, 0.25)], [(5, -3.0)], []]
    best = BestOf(ranked(first, 4))
    scores = np.array([[0.4, NAN, 0.25, -1.0], [1.0, -9.0, NAN, 2.0], [NAN] * 4], np.float32)
    ids = np.array([3, 2, 4, 9])
    best.add(scores, flipped(ids))
    more = [
        [(item, float(score)) for item, score in zip(ids.tolist(), row, strict=True)]
        for row in scores
    ]
    everything = [
        row + [each for each in new if not np.isnan(each[1])]
        for row, new in zip(first, more, strict=True)
    ]
    got, expected = best.result(), ranked(everything, 5)
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_array_equal(got.scores, expected.scores)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_a_sort_but_for_those_that_score_as_the_last(seed: int) -> None:
    """Few different scores: of the items with the last one any may be there, in the right order."""
    rng = np.random.default_rng(seed)
    k, queries = int(rng.integers(1, 9)), int(rng.integers(1, 5))
    ids = rng.permutation(200)
    first = [
        [(int(item), float(rng.integers(0, 5))) for item in ids[: rng.integers(0, k + 1)]]
        for _ in range(queries)
    ]
    best, everything = BestOf(ranked(first, k)), [list(row) for row in first]
    for start in (50, 100, 150):
        scores = rng.integers(0, 5, (queries, 40)).astype(np.float32)
        best.add(scores, flipped(ids[start : start + 40]))
        for row, new in zip(everything, scores.tolist(), strict=True):
            row += zip(ids[start : start + 40].tolist(), new, strict=True)
    got, expected = best.result(), ranked(everything, k + 1)
    np.testing.assert_array_equal(got.scores, expected.scores)
    for query, row in enumerate(everything):
        above = expected.scores[query] > expected.scores[query, -1]
        np.testing.assert_array_equal(got.ids[query][above], expected.ids[query][above])
        last = got.ids[query][~above].tolist()
        assert last == sorted(last)
        assert {(item, float(got.scores[query, -1])) for item in last} <= set(row)


def test_the_largest_id_loses_ties_as_any_larger_one_does() -> None:
    largest = 2**63 - 1
    best = BestOf(ranked([[(largest, 1.0), (7, 1.0)], [(3, 1.0)], []], 5))
    best.add(np.full((3, 3), 1.0, np.float32), flipped(np.array([0, largest - 1, 5])))
    ids = best.result().ids.tolist()
    assert ids[0] == [0, 5, 7, largest - 1, largest, EMPTY_ID]
    assert ids[1:] == [[0, 3, 5, largest - 1, -1, -1], [0, 5, largest - 1, -1, -1, -1]]
    every = np.array([0, 1, largest, EMPTY_ID])
    np.testing.assert_array_equal(flipped(flipped(every)), every)


def test_the_least_is_what_has_to_be_exceeded() -> None:
    best = BestOf(ranked([[(1, 5.0), (2, 4.0)], []], 2))
    assert best.least.tolist() == [-np.inf, -np.inf]  # there is one slot more than in the answer
    best.add(np.array([[3.0, 4.5], [1.0, NAN]], np.float32), flipped(np.array([8, 9])))
    assert best.least.tolist() == [4.0, -np.inf]
