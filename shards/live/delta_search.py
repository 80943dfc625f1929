"""Exact search of a delta, on top of what the main index has found.

A row of the delta enters an answer only if it reaches the answer's last score. So scores are
compared with that first, by one matrix product and one comparison, and only where something
enters are answers merged. Scores are those of ``MainIndex``: inner products, or minus the squared
distance. As there, single queries and batches are summed in different orders, so the same pair may
differ in the last bit.
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
    in_order,
)
from shardline.shards.live.delta import Delta

# of a batch, so many scores are made at once: with the vectors they fit a core's cache
BLOCK_QUERIES, BLOCK_ROWS = 128, 1024
# Entering rows are collected up to so many per query. More enter only while answers have empty
# slots; merged early, they raise what the next rows have to reach.
COLLECTED = 64
PADDING = 4  # times the entering rows: queries are merged together if filling up costs no more
EPSILON = float(np.finfo(np.float32).eps)
LARGEST = 1e38  # beyond, squares of float32 are not to be relied on


def enter_delta(delta: Delta, queries: FloatArray, ranked: Ranked) -> Ranked:
    """The best k of ``ranked`` (n, k), none of whose items is in the delta, and of the delta's
    live rows, for queries (n, dim) float32.
    """
    if not delta.num_live:
        return ranked
    if len(queries) == 1:
        rows, scores = _reaching(delta, queries[0], float(ranked.scores[0, -1]))
        if not rows.size:
            return ranked
        return _merge_one(ranked, 0, delta.item_ids[rows], scores)
    parts = [
        _enter_block(delta, queries[part], ranked.rows(part))
        for part in (
            slice(start, start + BLOCK_QUERIES) for start in range(0, len(queries), BLOCK_QUERIES)
        )
    ]
    if len(parts) == 1:
        return parts[0]
    return Ranked(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _reaching(delta: Delta, query: FloatArray, least: float) -> tuple[IdArray, FloatArray]:
    """Live rows that score ``least`` or more for query (dim,), and their scores."""
    scores: FloatArray = np.dot(delta.vectors, query)
    if delta.metric is not Metric.L2:
        rows = _live(delta, np.flatnonzero(scores >= least))
        return rows, scores[rows]
    square = float(np.dot(query, query))
    bound = least + square - _margin(delta, square)
    if abs(bound) < LARGEST or bound == -np.inf:
        scores *= 2
        scores -= delta.squares
        rows = np.flatnonzero(scores >= bound)
    else:
        rows = np.arange(delta.rows)
    rows = _live(delta, rows)
    exact = _distances(delta.vectors[rows], query)
    reaches = exact >= least
    return rows[reaches], exact[reaches]


def _enter_block(delta: Delta, queries: FloatArray, ranked: Ranked) -> Ranked:
    """As ``enter_delta``, for a few queries."""
    memory = np.empty(len(queries) * min(BLOCK_ROWS, delta.rows), np.float32)
    collected: list[tuple[IdArray, IdArray, FloatArray]] = []
    count = 0
    for start in range(0, delta.rows, BLOCK_ROWS):
        part = slice(start, min(start + BLOCK_ROWS, delta.rows))
        at, rows, scores = _block_reaching(delta, queries, part, ranked.scores[:, -1], memory)
        if not rows.size:
            continue
        collected.append((at, rows, scores))
        count += rows.size
        if count > COLLECTED * len(queries):
            ranked = _merge(delta, ranked, collected)
            collected, count = [], 0
    return _merge(delta, ranked, collected) if collected else ranked


def _block_reaching(
    delta: Delta, queries: FloatArray, part: slice, least: FloatArray, memory: FloatArray
) -> tuple[IdArray, IdArray, FloatArray]:
    """Of some rows the pairs that reach least (n,): queries (m,), rows (m,), scores (m,)."""
    shape = len(queries), part.stop - part.start
    scores = memory[: shape[0] * shape[1]].reshape(shape)
    np.dot(queries, delta.vectors[part].T, out=scores)
    if delta.metric is not Metric.L2:
        at, rows = _pairs(scores >= least[:, None])
        is_live = delta.live[part][rows]
        at, rows = at[is_live], rows[is_live]
        return at, rows + part.start, scores[at, rows]
    squares = np.array([np.dot(query, query) for query in queries])
    bounds = least + squares - np.array([_margin(delta, square) for square in squares.tolist()])
    is_unsure = ~(np.abs(bounds) < LARGEST) & ~(bounds == -np.inf)
    scores *= 2
    scores -= delta.squares[part]
    reaches = scores >= bounds[:, None]
    reaches[is_unsure] = True
    at, rows = _pairs(reaches)
    is_live = delta.live[part][rows]
    at, rows = at[is_live], rows[is_live] + part.start
    exact = _distances(delta.vectors[rows], queries[at])
    kept = exact >= least[at]
    return at[kept], rows[kept], exact[kept]


def _pairs(reaches: NDArray[np.bool_]) -> tuple[IdArray, IdArray]:
    """Queries and rows of the True ones of (n, m), query by query."""
    at, rows = np.divmod(np.flatnonzero(reaches), reaches.shape[1])
    return at, rows


def _live(delta: Delta, rows: IdArray) -> IdArray:
    return rows if delta.num_live == delta.rows else rows[delta.live[rows]]


def _margin(delta: Delta, square: float) -> float:
    """What a squared distance may be wrong by that is made of a product and two squares."""
    dim: int = delta.vectors.shape[1]
    return 4 * dim * EPSILON * (square + delta.largest)


def _distances(vectors: FloatArray, queries: FloatArray) -> FloatArray:
    """(m,) float32, minus the squared distances of vectors (m, dim) and queries (m, dim) or (dim,).

    By differences, as faiss computes them: a copy of a query has distance zero.
    """
    with np.errstate(over="ignore"):
        away = vectors - queries
        distances: FloatArray = -np.vecdot(away, away)
    return distances


def _merge_one(ranked: Ranked, at: int, ids: IdArray, scores: FloatArray) -> Ranked:
    """(1, k), the best of query ``at``'s answer and of further items."""
    k = ranked.ids.shape[1]
    all_ids = np.concatenate((ranked.ids[at], ids))
    all_scores = np.concatenate((ranked.scores[at], scores))
    # an empty slot, whose id is the lowest, stays before an item of score -inf, as in MainIndex
    order = np.lexsort((all_ids, -all_scores))[:k]
    return Ranked(all_ids[order][None], all_scores[order][None])


def _merge(
    delta: Delta, ranked: Ranked, collected: list[tuple[IdArray, IdArray, FloatArray]]
) -> Ranked:
    """``ranked`` (n, k) with collected pairs: queries, rows of the delta, scores (m,) each."""
    at, rows, scores = (np.concatenate(each) for each in zip(*collected, strict=True))
    order = np.argsort(at, kind="stable")
    at, ids, scores = at[order], delta.item_ids[rows[order]], scores[order]
    counts = np.bincount(at, minlength=len(ranked.ids))
    touched, starts = np.flatnonzero(counts), np.cumsum(counts) - counts
    merged = Ranked(ranked.ids.copy(), ranked.scores.copy())
    k, widest = ranked.ids.shape[1], int(counts.max())
    if len(touched) * widest > PADDING * (len(at) + len(touched) * k):
        for query in touched.tolist():
            part = slice(starts[query], starts[query] + counts[query])
            one = _merge_one(ranked, query, ids[part], scores[part])
            merged.ids[query], merged.scores[query] = one.ids[0], one.scores[0]
        return merged
    wide_ids = np.full((len(touched), k + widest), EMPTY_ID)
    wide_scores = np.full(wide_ids.shape, EMPTY_SCORE)
    wide_ids[:, :k], wide_scores[:, :k] = ranked.ids[touched], ranked.scores[touched]
    places = np.searchsorted(touched, at), k + np.arange(len(at)) - starts[at]
    wide_ids[places], wide_scores[places] = ids, scores
    best = in_order(wide_ids, wide_scores)
    merged.ids[touched], merged.scores[touched] = best.ids[:, :k], best.scores[:, :k]
    return merged
