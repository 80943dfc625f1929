"""Recall by score: which results are as good as the exact ones, ties included.

Comparing ids is wrong where scores tie: any k of a hundred equal copies are a right answer. So a
result is a hit when its exact score reaches the k-th exact one. Index scores are not compared:
those of compressed codes are estimates. Every recall against an exact answer is counted here, in
builds, budgets and benchmarks; recall of relevant items is ``training.evaluation.ranking_metrics``.
"""

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import (
    EMPTY_ID,
    EMPTY_SCORE,
    FloatArray,
    IdArray,
    Metric,
    Ranked,
)

SCORE_TOLERANCE = 1e-5  # of the largest exact score: what float32 sums in another order differ by


def exact_scores(
    queries: FloatArray, vectors: FloatArray, rows: IdArray, metric: Metric
) -> FloatArray:
    """(n, k) float32 scores of rows (n, k) of vectors (m, d) for queries (n, d); -inf for row -1.

    Cosine expects unit vectors on both sides.
    """
    scores = np.full(rows.shape, EMPTY_SCORE, np.float32)
    for at, query in enumerate(queries):
        filled = rows[at] != EMPTY_ID
        picked = vectors[rows[at, filled]]
        if metric is Metric.L2:
            scores[at, filled] = -np.square(picked - query).sum(axis=1)
        else:
            scores[at, filled] = picked @ query
    return scores


def without_repeats(ids: IdArray) -> IdArray:
    """ids (n, k) with -1 in place of each that stands earlier in its row: a result counts once."""
    order = np.argsort(ids, axis=1, kind="stable")
    ascending = np.take_along_axis(ids, order, axis=1)
    repeats = np.zeros(ids.shape, np.bool_)
    np.put_along_axis(repeats, order[:, 1:], ascending[:, 1:] == ascending[:, :-1], axis=1)
    return np.where(repeats, EMPTY_ID, ids)


def hits(found: FloatArray, exact: FloatArray) -> NDArray[np.bool_]:
    """(n, m) bool: which of ``found`` (n, m) reach the lowest of ``exact`` (n, k), in any order.

    Both are exact scores; -inf marks an empty slot, which is never a hit.
    """
    kth = np.where(np.isneginf(exact), np.inf, exact).min(axis=1, keepdims=True)
    finite = np.where(np.isfinite(exact), np.abs(exact), 0)
    tolerance = SCORE_TOLERANCE * finite.max(axis=1, keepdims=True)
    reached: NDArray[np.bool_] = found >= kth - tolerance
    return reached


def count_hits(found: FloatArray, exact: FloatArray) -> int:
    """Hits of all queries, as ``hits``; of one query at most as many as it has exact scores."""
    wanted = np.isfinite(exact).sum(axis=1)
    return int(np.minimum(hits(found, exact).sum(axis=1), wanted).sum())


def count_matches(found: Ranked, exact: Ranked) -> tuple[int, int]:
    """Hits and how many there could be, of answers (n, m) with scores of the index and of exact
    ones (n, k), of the same rows.

    For where only the index has the vectors. A result is a hit that is among the exact ones, or
    whose score reaches their lowest: the index scores as the exact search does, but for rounding,
    which for a large distance may exceed the tolerance of ``hits``.
    """
    wanted = np.isfinite(exact.scores).sum(axis=1)
    is_hit = hits(found.scores, exact.scores)
    for at, ids in enumerate(exact.ids):
        is_hit[at] |= np.isin(found.ids[at], ids[ids != EMPTY_ID])
    return int(np.minimum(is_hit.sum(axis=1), wanted).sum()), int(wanted.sum())


def recall_at_k(found: FloatArray, exact: FloatArray) -> float:
    """Share of all exact top k (n, k) that answers (n, m), m below or above k, match; 0 to 1.

    Both are exact scores (``exact_scores``) of different rows, -inf in empty slots. A query has as
    many hits as its answers reach the lowest exact score, at most k; where fewer than k rows exist,
    their number stands for k.
    """
    return count_hits(found, exact) / max(int(np.isfinite(exact).sum()), 1)
