"""Exact search of a delta, on top of what the main index has found.

A row of the delta enters an answer only if it reaches the answer's last score. So scores are made
by products of matrices, one per tile, and compared with that; what reaches it goes to a heap per
query (``BestOf``). All of that is done for some queries at once: what it costs is mostly the number
of calls. Scores are those of ``MainIndex``: inner products, or minus the squared distance. As
there, single queries and batches are summed in different orders, so the same pair may differ in the
last bit.
"""

import numpy as np

from shardline.shards.core.schema import (
    EMPTY_SCORE,
    FloatArray,
    IdArray,
    Metric,
    Ranked,
)
from shardline.shards.index.best_of import BestOf
from shardline.shards.live.delta import Delta

# Of a batch so many at once, and so many scores: these fit a core's cache beside a tile.
BLOCK_QUERIES, BLOCK_SCORES = 128, 1 << 17
PRODUCT_QUERIES = 8  # in one product of matrices: see TILE_ROWS
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
        if len(queries) <= BLOCK_QUERIES:
            return _enter_block(delta, queries, ranked)
        parts = []
        for start in range(0, len(queries), BLOCK_QUERIES):
            part = slice(start, start + BLOCK_QUERIES)
            parts.append(_enter_block(delta, queries[part], ranked.rows(part)))
    return Ranked(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _enter_block(delta: Delta, queries: FloatArray, ranked: Ranked) -> Ranked:
    """As ``enter_delta``, for a few queries."""
    k = ranked.ids.shape[1]
    best: BestOf | None = None
    least = ranked.scores[:, -1]
    step = _tiles_at_once(delta, len(queries))
    memory = np.empty((step, len(queries), delta.buffer.tile_rows), np.float32)
    for first in range(0, len(delta.tiles), step):
        scores = memory[: min(step, len(delta.tiles) - first)]
        _score(delta, queries, first, scores, least)
        if not (scores >= least[:, None]).any():
            continue
        if best is None:
            best = BestOf(ranked)  # with room for k + 1: see _with_ties
        _add(best, delta, first, scores)
        least = best.least
    if best is None:
        return ranked
    ids, scores = best.result()
    found, last, next_one = Ranked(ids[:, :k], scores[:, :k]), scores[:, k - 1], scores[:, k]
    tied = ((last == next_one) & (last > EMPTY_SCORE)).nonzero()[0]
    return _with_ties(delta, queries, ranked, found, tied) if tied.size else found


def _tiles_at_once(delta: Delta, queries: int) -> int:
    """Under l2 one: what is near is known the better, the more has been added."""
    if delta.metric is Metric.L2:
        return 1
    return min(len(delta.tiles), max(1, BLOCK_SCORES // (queries * delta.buffer.tile_rows)))


def _add(best: BestOf, delta: Delta, first: int, scores: FloatArray) -> None:
    """The rows of some tiles, with their scores (tiles, n, rows per tile)."""
    tile_rows = delta.buffer.tile_rows
    numbers = delta.buffer.numbers[first * tile_rows : (first + len(scores)) * tile_rows]
    if scores.shape[1] == 1:  # of one query they lie in memory as those of one tile
        best.add(scores.reshape(1, -1), numbers)
        return
    for of_tile, of_its_rows in zip(scores, numbers.reshape(-1, tile_rows), strict=True):
        best.add(of_tile, of_its_rows)


def _score(
    delta: Delta, queries: FloatArray, first: int, scores: FloatArray, least: FloatArray
) -> None:
    """Fills scores (tiles, n, rows per tile); nan for hidden rows, and, under l2, for those that
    are known to score less than ``least`` (n,)."""
    for number, of_tile in enumerate(scores, first):
        for start in range(0, len(queries), PRODUCT_QUERIES):
            some = slice(start, start + PRODUCT_QUERIES)
            np.dot(queries[some], delta.tiles[number], out=of_tile[some])
        if delta.hides[number]:
            np.copyto(of_tile, np.nan, where=delta.hidden[number])
        if delta.metric is Metric.L2:
            _to_distances(delta, queries, number, of_tile, least)


def _to_distances(
    delta: Delta, queries: FloatArray, tile: int, scores: FloatArray, least: FloatArray
) -> None:
    """Turns products (n, rows of the tile) into what ``_score`` says.

    A squared distance from a product and two squares is off by their rounding. So pairs that come
    near ``least`` are found by it, and their distances made of differences, as faiss does: a copy
    of a query has distance zero.
    """
    first_row = tile * delta.buffer.tile_rows
    squares = np.vecdot(queries, queries)
    margins = 4 * queries.shape[1] * EPSILON * (squares + delta.largest)
    scores *= 2
    scores -= delta.buffer.squares[first_row : first_row + scores.shape[1]]
    reaches = scores >= (least + squares - margins)[:, None]
    reaches[squares + delta.largest > LARGEST] = True
    reaches[:, delta.hidden[tile]] = False
    at, columns = reaches.nonzero()
    scores.fill(np.nan)
    step = max(1, DIFFERENCES // queries.shape[1])
    for start in range(0, len(at), step):
        some = slice(start, start + step)
        away = delta.tiles[tile][:, columns[some]].T - queries[at[some]]
        scores[at[some], columns[some]] = -np.vecdot(away, away)


def _with_ties(
    delta: Delta, queries: FloatArray, ranked: Ranked, found: Ranked, tied: IdArray
) -> Ranked:
    """``found`` (n, k), where the last score of the queries ``tied`` (m,) belongs to more items
    than there are slots: of those the ones with the lowest ids.

    They are scored again in the products that they were scored in: another one might sum in another
    order, and a score be off by its last bit.
    """
    last = found.scores[:, -1].copy()
    products = tied // PRODUCT_QUERIES
    for product in np.unique(products).tolist():
        start = product * PRODUCT_QUERIES
        some = slice(start, start + PRODUCT_QUERIES)
        scores = np.empty((len(delta.tiles), len(last[some]), delta.buffer.tile_rows), np.float32)
        _score(delta, queries[some], 0, scores, last[some])
        for query in tied[products == product].tolist():
            of_rows = scores[:, query - start].reshape(-1)
            (rows,) = (of_rows >= last[query]).nonzero()
            ids = np.concatenate((ranked.ids[query], delta.item_ids[rows]))
            all_scores = np.concatenate((ranked.scores[query], of_rows[rows]))
            # an empty slot, whose id is the lowest, stays before an item of score -inf, as in
            # MainIndex
            order = np.lexsort((ids, -all_scores))[: found.ids.shape[1]]
            found.ids[query], found.scores[query] = ids[order], all_scores[order]
    return found
