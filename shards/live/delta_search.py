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

# Of a batch so many at once, and so many scores: these fit a core's cache beside a tile.
BLOCK_QUERIES, BLOCK_SCORES = 128, 1 << 17
PRODUCT_QUERIES = 8  # in one product of matrices: see TILE_ROWS
# Entering rows are collected up to so many per query. More enter only while answers have empty
# slots; merged early, they raise what the next rows have to reach.
COLLECTED = 64
SINGLY = 8  # answers that change: up to so many are merged one by one
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
        if len(queries) <= BLOCK_QUERIES:
            return _enter_block(delta, queries, ranked)
        parts = []
        for start in range(0, len(queries), BLOCK_QUERIES):
            part = slice(start, start + BLOCK_QUERIES)
            parts.append(_enter_block(delta, queries[part], ranked.rows(part)))
    return Ranked(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _enter_one(delta: Delta, query: FloatArray, ranked: Ranked) -> Ranked:
    """As ``enter_delta`` for query (dim,) and ranked (1, k)."""
    rows, theirs = _reaching(delta, query, ranked.scores[0, -1])
    if not rows.size:
        return ranked
    one = _merge_one(ranked.ids[0], ranked.scores[0], delta.item_ids[rows], theirs)
    return Ranked(one.ids[None], one.scores[None])


def _reaching(delta: Delta, query: FloatArray, least: np.float32) -> tuple[IdArray, FloatArray]:
    """Live rows that score ``least`` or more for query (dim,), and their scores."""
    if delta.metric is Metric.L2:
        memory = np.empty((len(delta.tiles), 1, delta.buffer.tile_rows), np.float32)
        _, rows, theirs = _tiles_reaching(delta, query[None], 0, memory, np.array([least]))
        return rows, theirs
    tile_rows = delta.buffer.tile_rows
    scores: FloatArray = np.empty(len(delta.tiles) * tile_rows, np.float32)
    for number, tile in enumerate(delta.tiles):
        np.dot(query, tile, out=scores[number * tile_rows : (number + 1) * tile_rows])
    (rows,) = (scores[: delta.rows] >= least).nonzero()
    if delta.num_live < delta.rows:
        rows = rows[delta.live[rows]]
    return rows, scores[rows]


def _enter_block(delta: Delta, queries: FloatArray, ranked: Ranked) -> Ranked:
    """As ``enter_delta``, for a few queries."""
    tile_rows, tiles = delta.buffer.tile_rows, len(delta.tiles)
    step = max(1, BLOCK_SCORES // (len(queries) * tile_rows))
    memory = np.empty((min(step, tiles), len(queries), tile_rows), np.float32)
    collected: list[tuple[IdArray, IdArray, FloatArray]] = []
    count = 0
    for first in range(0, tiles, step):
        scores = memory[: min(step, tiles - first)]
        at, rows, theirs = _tiles_reaching(delta, queries, first, scores, ranked.scores[:, -1])
        if not rows.size:
            continue
        collected.append((at, delta.item_ids[rows], theirs))
        count += rows.size
        if count > COLLECTED * len(queries):
            ranked = _merge(ranked, *_joined(collected))
            collected.clear()
            count = 0
    return _merge(ranked, *_joined(collected)) if collected else ranked


def _joined(
    parts: list[tuple[IdArray, IdArray, FloatArray]],
) -> tuple[IdArray, IdArray, FloatArray]:
    if len(parts) == 1:
        return parts[0]
    at, ids, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
    return at, ids, scores


def _tiles_reaching(
    delta: Delta, queries: FloatArray, first: int, scores: FloatArray, least: FloatArray
) -> tuple[IdArray, IdArray, FloatArray]:
    """Of some tiles the pairs that reach least (n,): queries (m,), rows (m,), scores (m,).

    scores (tiles, n, rows per tile) is memory to work in.
    """
    for number, of_tile in enumerate(scores, first):
        _multiply(queries, delta.tiles[number], delta.rows - number * scores.shape[2], of_tile)
    if delta.metric is Metric.L2:
        return _near(delta, queries, first, scores, least)
    at, rows, which = _live_pairs(delta, first, scores >= least[:, None])
    return at, rows, scores.reshape(-1)[which]


def _multiply(queries: FloatArray, tile: FloatArray, rows: int, scores: FloatArray) -> None:
    """Fills scores (n, rows per tile); nan behind the tile's last row."""
    for start in range(0, len(queries), PRODUCT_QUERIES):
        some = slice(start, start + PRODUCT_QUERIES)
        np.dot(queries[some], tile, out=scores[some])  # of a part of a tile numpy makes a copy
    scores[:, rows:] = np.nan


def _near(
    delta: Delta, queries: FloatArray, first: int, products: FloatArray, least: FloatArray
) -> tuple[IdArray, IdArray, FloatArray]:
    """As ``_tiles_reaching`` for l2, of products (tiles, n, rows per tile), which are overwritten.

    A squared distance from a product and two squares is off by their rounding. So pairs that come
    near ``least`` are found by it, and their distances made of differences, as faiss does: a copy
    of a query has distance zero.
    """
    tiles, _, tile_rows = products.shape
    squares = np.vecdot(queries, queries)
    margins = 4 * queries.shape[1] * EPSILON * (squares + delta.largest)
    products *= 2
    theirs = delta.buffer.squares[first * tile_rows : (first + tiles) * tile_rows]
    products -= theirs.reshape(tiles, 1, tile_rows)
    reaches = products >= (least + squares - margins)[:, None]
    reaches[:, squares + delta.largest > LARGEST] = True
    at, rows, _ = _live_pairs(delta, first, reaches)
    distances = np.empty(len(at), np.float32)
    step = max(1, DIFFERENCES // queries.shape[1])
    for start in range(0, len(at), step):
        some = slice(start, start + step)
        away = delta.vectors_of(rows[some]) - queries[at[some]]
        distances[some] = -np.vecdot(away, away)
    kept = distances >= least[at]
    return at[kept], rows[kept], distances[kept]


def _live_pairs(
    delta: Delta, first: int, reaches: NDArray[np.bool_]
) -> tuple[IdArray, IdArray, IdArray]:
    """Queries, live rows and positions of the True ones of (tiles, n, rows per tile)."""
    _, queries, tile_rows = reaches.shape
    which = np.flatnonzero(reaches)
    if not which.size:
        return which, which, which
    lines, rows = np.divmod(which, tile_rows)
    tiles, at = np.divmod(lines, queries)
    rows += (tiles + first) * tile_rows
    kept = rows < delta.rows  # behind the last row a tile holds anything
    kept[kept] = delta.live[rows[kept]]
    return at[kept], rows[kept], which[kept]


def _merge_one(ids: IdArray, scores: FloatArray, more: IdArray, theirs: FloatArray) -> Ranked:
    """(k,) each: the best of an answer (k,) and of further items (m,) with their scores."""
    all_ids, all_scores = np.concatenate((ids, more)), np.concatenate((scores, theirs))
    # an empty slot, whose id is the lowest, stays before an item of score -inf, as in MainIndex
    order = np.lexsort((all_ids, -all_scores))[: len(ids)]
    return Ranked(all_ids[order], all_scores[order])


def _merge(ranked: Ranked, at: IdArray, ids: IdArray, scores: FloatArray) -> Ranked:
    """``ranked`` (n, k) with further items: at (m,) says which query's each is."""
    counts = np.bincount(at, minlength=len(ranked.ids))
    touched = np.flatnonzero(counts)
    merged = Ranked(ranked.ids.copy(), ranked.scores.copy())
    if len(touched) > SINGLY and len(at) * ranked.ids.shape[1] <= COMPARED:
        order = np.lexsort((ids, -scores, at))
        at, ids, scores = at[order], ids[order], scores[order]
        starts = counts.cumsum() - counts
        _insert(ranked, at, ids, scores, np.arange(len(at)) - starts[at], merged)
        return merged
    order = np.argsort(at, kind="stable")
    ends = counts.cumsum()
    for query in touched.tolist():
        part = order[ends[query] - counts[query] : ends[query]]
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
