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
    FloatArray,
    IdArray,
    Metric,
    Ranked,
)
from shardline.shards.live.delta import Delta

# of a batch, so many scores are made at once: with the vectors they fit a core's cache
BLOCK_QUERIES, BLOCK_ROWS = 128, 1024
# Entering rows are collected up to so many per query. More enter only while answers have empty
# slots; merged early, they raise what the next rows have to reach.
COLLECTED = 64
COMPARED = 1 << 22  # pairs of an entering row and a result that are compared at once
DIFFERENCES = 1 << 20  # numbers of which squared distances are made at once
EPSILON = float(np.finfo(np.float32).eps)
LARGEST = 1e37  # of squares whose sums and products float32 still holds


def enter_delta(delta: Delta, queries: FloatArray, ranked: Ranked) -> Ranked:
    """The best k of ``ranked`` (n, k), none of whose items is in the delta, and of the delta's
    live rows, for queries (n, dim) float32.
    """
    if not delta.num_live:
        return ranked
    with np.errstate(over="ignore", invalid="ignore"):  # as faiss: a score may be infinite
        if len(queries) == 1:
            return _enter_one(delta, queries[0], ranked)
        parts = []
        for start in range(0, len(queries), BLOCK_QUERIES):
            part = slice(start, start + BLOCK_QUERIES)
            parts.append(_enter_block(delta, queries[part], ranked.rows(part)))
    if len(parts) == 1:
        return parts[0]
    return Ranked(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _enter_one(delta: Delta, query: FloatArray, ranked: Ranked) -> Ranked:
    """As ``enter_delta`` for query (dim,) and ranked (1, k)."""
    ids, scores = ranked.ids[0], ranked.scores[0]
    rows, theirs = _reaching(delta, query, float(scores[-1]))
    if not rows.size:
        return ranked
    one = _merge_one(ids, scores, delta.item_ids[rows], theirs)
    return Ranked(one.ids[None], one.scores[None])


def _reaching(delta: Delta, query: FloatArray, least: float) -> tuple[IdArray, FloatArray]:
    """Live rows that score ``least`` or more for query (dim,), and their scores."""
    scores: FloatArray = np.dot(delta.vectors, query)
    if delta.metric is Metric.L2:
        _, rows, distances = _near(delta, query[None], slice(0, delta.rows), scores[None], least)
        return rows, distances
    (rows,) = (scores >= least).nonzero()
    if not rows.size:
        return rows, scores[:0]
    rows = _live(delta, rows)
    return rows, scores[rows]


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
        collected.append((at, delta.item_ids[rows], scores))
        count += rows.size
        if count > COLLECTED * len(queries):
            ranked = _merge(ranked, *_joined(collected))
            collected.clear()
            count = 0
    return _merge(ranked, *_joined(collected)) if collected else ranked


def _joined(
    parts: list[tuple[IdArray, IdArray, FloatArray]],
) -> tuple[IdArray, IdArray, FloatArray]:
    at, ids, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
    return at, ids, scores


def _block_reaching(
    delta: Delta, queries: FloatArray, part: slice, least: FloatArray, memory: FloatArray
) -> tuple[IdArray, IdArray, FloatArray]:
    """Of some rows the pairs that reach least (n,): queries (m,), rows (m,), scores (m,)."""
    shape = len(queries), part.stop - part.start
    scores = memory[: shape[0] * shape[1]].reshape(shape)
    np.dot(queries, delta.vectors[part].T, out=scores)
    if delta.metric is Metric.L2:
        return _near(delta, queries, part, scores, least)
    at, rows = _live_pairs(delta, scores >= least[:, None], part)
    return at, rows, scores[at, rows - part.start]


def _near(
    delta: Delta,
    queries: FloatArray,
    part: slice,
    products: FloatArray,
    least: FloatArray | float,
) -> tuple[IdArray, IdArray, FloatArray]:
    """As ``_block_reaching`` for l2, of products (n, rows of ``part``), which are overwritten.

    A squared distance from a product and two squares is off by their rounding. So pairs that come
    near ``least`` are found by it, and their distances made of differences, as faiss does: a copy
    of a query has distance zero.
    """
    squares = np.vecdot(queries, queries)
    margins = 4 * queries.shape[1] * EPSILON * (squares + delta.largest)
    products *= 2
    products -= delta.squares[part]
    reaches = products >= (least + squares - margins)[:, None]
    reaches[squares + delta.largest > LARGEST] = True
    at, rows = _live_pairs(delta, reaches, part)
    distances = np.empty(len(at), np.float32)
    step = max(1, DIFFERENCES // queries.shape[1])
    for start in range(0, len(at), step):
        some = slice(start, start + step)
        away = delta.vectors[rows[some]] - queries[at[some]]
        distances[some] = -np.vecdot(away, away)
    kept = distances >= np.broadcast_to(least, len(queries))[at]
    return at[kept], rows[kept], distances[kept]


def _live_pairs(delta: Delta, reaches: NDArray[np.bool_], part: slice) -> tuple[IdArray, IdArray]:
    """Queries and rows of the True ones of (n, rows of ``part``), query by query."""
    at, rows = np.divmod(np.flatnonzero(reaches), reaches.shape[1])
    rows += part.start
    if delta.num_live == delta.rows:
        return at, rows
    is_live = delta.live[rows]
    return at[is_live], rows[is_live]


def _live(delta: Delta, rows: IdArray) -> IdArray:
    return rows if delta.num_live == delta.rows else rows[delta.live[rows]]


def _merge_one(ids: IdArray, scores: FloatArray, more: IdArray, theirs: FloatArray) -> Ranked:
    """(k,) each: the best of an answer (k,) and of further items (m,) with their scores."""
    all_ids, all_scores = np.concatenate((ids, more)), np.concatenate((scores, theirs))
    # an empty slot, whose id is the lowest, stays before an item of score -inf, as in MainIndex
    order = np.lexsort((all_ids, -all_scores))[: len(ids)]
    return Ranked(all_ids[order], all_scores[order])


def _merge(ranked: Ranked, at: IdArray, ids: IdArray, scores: FloatArray) -> Ranked:
    """``ranked`` (n, k) with further items: at (m,) says which query's each is."""
    order = np.lexsort((ids, -scores, at))
    at, ids, scores = at[order], ids[order], scores[order]
    counts = np.bincount(at, minlength=len(ranked.ids))
    starts = counts.cumsum() - counts
    merged = Ranked(ranked.ids.copy(), ranked.scores.copy())
    if len(at) * ranked.ids.shape[1] <= COMPARED:
        _insert(ranked, at, ids, scores, np.arange(len(at)) - starts[at], merged)
        return merged
    for query in np.flatnonzero(counts).tolist():
        part = slice(starts[query], starts[query] + counts[query])
        one = _merge_one(ranked.ids[query], ranked.scores[query], ids[part], scores[part])
        merged.ids[query], merged.scores[query] = one
    return merged


def _insert(
    ranked: Ranked,
    at: IdArray,
    ids: IdArray,
    scores: FloatArray,
    nth: IdArray,
    merged: Ranked,
) -> None:
    """Writes to ``merged`` (n, k) what ``_merge`` makes, by counting instead of sorting: an item's
    place is the number of better results plus that of better items, which is ``nth`` (m,).
    """
    k = ranked.ids.shape[1]
    theirs = ranked.scores[at]
    better = (theirs > scores[:, None]).sum(axis=1)
    tied = np.flatnonzero((theirs == scores[:, None]).any(axis=1))
    if tied.size:
        is_tied = theirs[tied] == scores[tied, None]
        better[tied] += (is_tied & (ranked.ids[at[tied]] < ids[tied, None])).sum(axis=1)
    is_touched = np.bincount(at, minlength=len(ranked.ids)) > 0
    touched, which = np.flatnonzero(is_touched), (is_touched.cumsum() - 1)[at]
    # a result moves back by the items that come before it
    moved = np.bincount(which * (k + 1) + better, minlength=len(touched) * (k + 1))
    places = moved.reshape(len(touched), k + 1)[:, :k].cumsum(axis=1) + np.arange(k)
    rows, columns = np.nonzero(places < k)
    to = touched[rows], places[rows, columns]
    merged.ids[to] = ranked.ids[touched[rows], columns]
    merged.scores[to] = ranked.scores[touched[rows], columns]
    place = better + nth
    inside = place < k
    merged.ids[at[inside], place[inside]] = ids[inside]
    merged.scores[at[inside], place[inside]] = scores[inside]
