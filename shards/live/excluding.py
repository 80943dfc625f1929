"""Searches that leave out items of each query's own.

A query that is searched alone has a selection, and a delta, without its excluded rows. Queries that
are searched together are asked for a few more results than they want; what they exclude is taken
out of these, and only those queries are searched alone that come out short. Either way an answer is
that of a shard which does not have the excluded items.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.excluded import Excluded
from shardline.shards.core.schema import (
    EMPTY_ID,
    EMPTY_SCORE,
    MAX_K,
    FloatArray,
    IdArray,
    Ranked,
)
from shardline.shards.index.selection import Selection
from shardline.shards.live.delta import NOT_HERE, Delta

# Results beyond k that queries which share a search are asked for. More cost all of them; with
# fewer, more of them are searched alone.
MARGIN = 32


class Among(NamedTuple):
    """What is searched: these rows of a main index, None for all, and the live rows of a delta.

    A tuple, because every search makes one.
    """

    selection: Selection | None
    delta: Delta


@dataclass(frozen=True, slots=True, eq=False)
class ExcludedRows:
    """Of n queries: the rows of ``Among`` that each excludes. counts (n,) int32: how many; ids: of
    each the ids that it excludes, ascending, also of items that are not there."""

    counts: NDArray[np.int32]
    ids: Sequence[IdArray]
    of_main: Sequence[IdArray]
    of_delta: Sequence[IdArray]


class Find(Protocol):
    def __call__(self, queries: FloatArray, k: int, among: Among, beyond: int = 0, /) -> Ranked:
        """The k best items; beyond: how many rows that are excluded may be nearer than these."""


def excluded_rows(excluded: Excluded, ids_by_row: IdArray, among: Among) -> ExcludedRows:
    """ids_by_row (rows + 1,) int64: as of ``ShardState``."""
    ends = np.cumsum(excluded.counts)
    bounds = [0, *ends.tolist()]
    rows = np.searchsorted(ids_by_row[:-1], excluded.ids)
    at = np.flatnonzero(ids_by_row[rows] == excluded.ids)
    rows = rows[at]
    if among.selection is not None:
        is_live = among.selection.are_live(rows)
        at, rows = at[is_live], rows[is_live]
    of_main = _per_query(rows, at, bounds)
    of_delta: Sequence[IdArray] = [rows[:0]] * len(of_main)
    if among.delta.num_live:
        rows = among.delta.rows_of(excluded.ids)
        at = np.flatnonzero(rows != NOT_HERE)
        of_delta = _per_query(rows[at], at, bounds)
    counts = [len(main) + len(delta) for main, delta in zip(of_main, of_delta, strict=True)]
    ids = [excluded.ids[start:end] for start, end in itertools.pairwise(bounds)]
    return ExcludedRows(np.array(counts, np.int32), ids, of_main, of_delta)


def _per_query(rows: IdArray, at: IdArray, bounds: list[int]) -> Sequence[IdArray]:
    """rows (m,) of the ids at places ``at`` (m,), ascending; query q has places from bounds[q]."""
    if len(bounds) == 2:
        return [rows]
    cuts = np.searchsorted(at, bounds).tolist()
    return [rows[start:end] for start, end in itertools.pairwise(cuts)]


def search_excluding(
    find: Find,
    queries: FloatArray,
    k: int,
    among: Among,
    excluded: ExcludedRows,
    main_rows: int,
    look: Callable[[], None],
) -> Ranked:
    """The k best items of queries (n, dim) among those that are not excluded. look: called before
    a query is searched alone; what it raises ends the search."""
    if len(queries) == 1:
        return _alone(find, queries, k, _without(among, excluded, 0, main_rows), excluded, 0)
    margin = max(0, min(MARGIN, int(excluded.counts.max()), MAX_K - k))
    found = find(queries, k + margin, among)
    is_excluded = np.zeros(found.ids.shape, np.bool_)
    for query in np.flatnonzero(excluded.counts).tolist():
        is_excluded[query] = _are_in(found.ids[query], excluded.ids[query])
    kept = _kept(found, is_excluded, k)
    # where the last slot is empty, everything that can be found has been
    is_short = (kept.ids[:, -1] == EMPTY_ID) & (found.ids[:, -1] != EMPTY_ID)
    for query in np.flatnonzero(is_short).tolist():
        look()
        some = slice(query, query + 1)
        own = _without(among, excluded, query, main_rows)
        kept.ids[some], kept.scores[some] = _alone(find, queries[some], k, own, excluded, query)
    return kept


def _alone(
    find: Find, query: FloatArray, k: int, own: Among, excluded: ExcludedRows, at: int
) -> Ranked:
    return find(query, k, own, len(excluded.of_main[at]))


def _without(among: Among, excluded: ExcludedRows, query: int, main_rows: int) -> Among:
    """What is left for one query."""
    selection, delta = among.selection, among.delta
    of_main, of_delta = excluded.of_main[query], excluded.of_delta[query]
    if len(of_main):
        whole = selection if selection is not None else _whole(main_rows)
        selection = whole.less(of_main)
    if len(of_delta):
        delta = delta.hiding(of_delta)
    return Among(selection, delta)


@lru_cache(maxsize=2)
def _whole(rows: int) -> Selection:
    """Kept: a copy of its bits takes less time."""
    return Selection.whole(rows)


def _are_in(ids: IdArray, some: IdArray) -> NDArray[np.bool_]:
    """Whether each of ids (w,) is one of ``some`` (m,), ascending and at least one."""
    at = np.searchsorted(some, ids)
    at[at == len(some)] = 0
    found: NDArray[np.bool_] = some[at] == ids
    return found


def _kept(found: Ranked, is_excluded: NDArray[np.bool_], k: int) -> Ranked:
    """(n, k): what is not excluded, in order."""
    order = np.argsort(is_excluded, axis=1, kind="stable")[:, :k]
    ids = np.where(is_excluded, EMPTY_ID, found.ids)
    scores = np.where(is_excluded, EMPTY_SCORE, found.scores)
    return Ranked(np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1))
