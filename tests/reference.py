"""Slow, obvious versions of what the engine does fast. Nothing here is shared with the code."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from shardline.shards.core.schema import Metric, Ranked


def score(query: np.ndarray, vector: np.ndarray, metric: Metric) -> float:
    """Higher is better. Cosine expects unit vectors, as the engine does after the boundary."""
    if metric is Metric.L2:
        return -float(sum((float(a) - float(b)) ** 2 for a, b in zip(query, vector, strict=True)))
    return math.fsum(float(a) * float(b) for a, b in zip(query, vector, strict=True))


def brute_force(
    queries: np.ndarray,
    vectors: np.ndarray,
    ids: np.ndarray,
    k: int,
    metric: Metric,
    excluded: Sequence[int] = (),
) -> Ranked:
    """All scores, sorted by score descending, then id ascending; the first k of each query."""
    out_scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    out_ids = np.full((len(queries), k), -1, dtype=np.int64)
    gone = {int(item) for item in excluded}
    for at, query in enumerate(queries):
        found = [
            (-np.float32(score(query, vector, metric)), int(item))
            for vector, item in zip(vectors, ids, strict=True)
            if int(item) not in gone
        ]
        for slot, (negated, item) in enumerate(sorted(found)[:k]):
            out_scores[at, slot] = -negated
            out_ids[at, slot] = item
    return Ranked(out_ids, out_scores)


def merge(parts: Sequence[Ranked], k: int) -> Ranked:
    """The k best of several answers, each (n, k_i), in answer order."""
    queries = len(parts[0].ids)
    out_scores = np.full((queries, k), -np.inf, dtype=np.float32)
    out_ids = np.full((queries, k), -1, dtype=np.int64)
    for at in range(queries):
        found = [
            (-value, int(item))
            for part_ids, part_scores in parts
            for value, item in zip(part_scores[at], part_ids[at], strict=True)
            if item >= 0
        ]
        for slot, (negated, item) in enumerate(sorted(found)[:k]):
            out_scores[at, slot] = -negated
            out_ids[at, slot] = item
    return Ranked(out_ids, out_scores)


def assert_same_answers(
    got: Ranked,
    expected: Ranked,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> None:
    """The two agree: scores within the tolerance, ids wherever scores differ by more.

    Where the last score of an answer is shared with the items that just missed it, either may have
    been kept, so ids are compared as sets within groups of scores that are equal to the tolerance,
    and the last group only for its size.
    """
    got_ids, got_scores = got
    expected_ids, expected_scores = expected
    np.testing.assert_array_equal(got_ids >= 0, expected_ids >= 0)
    filled = expected_ids >= 0
    np.testing.assert_allclose(got_scores[filled], expected_scores[filled], rtol=rtol, atol=atol)
    for row in range(len(expected_ids)):
        values = expected_scores[row][filled[row]].astype(np.float64)
        if values.size == 0:
            continue
        gaps = values[:-1] - values[1:] > 2 * (rtol * np.abs(values[1:]) + atol)
        starts = [0, *(np.flatnonzero(gaps) + 1), values.size]
        for start, stop in itertools.pairwise(starts):
            is_cut = stop == values.size == expected_ids.shape[1]
            if not is_cut:
                assert set(got_ids[row, start:stop]) == set(expected_ids[row, start:stop])


def assert_answer_order(ranked: Ranked) -> None:
    """Score descending, then id ascending; empty slots (-1, -inf) last; no id twice."""
    for row_ids, row_scores in zip(*ranked, strict=True):
        filled = row_ids >= 0
        count = int(filled.sum())
        assert filled[:count].all()
        assert np.isneginf(row_scores[count:]).all()
        assert len(set(row_ids[:count].tolist())) == count
        keys = list(zip((-row_scores[:count]).tolist(), row_ids[:count].tolist(), strict=True))
        assert keys == sorted(keys)


def recall_by_ids(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of the exact top-k ids that were found; both (n, k), -1 marks an empty slot.

    For data without ties: where scores tie, two right answers differ.
    """
    hits = sum(
        np.intersect1d(row_found, row_exact[row_exact != -1]).size
        for row_found, row_exact in zip(found, exact, strict=True)
    )
    return float(hits / max(int((exact != -1).sum()), 1))
