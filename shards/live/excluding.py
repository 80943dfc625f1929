"""Searches that leave out items of each query's own.

Queries are asked for a few more results than they want, and what they exclude is taken out of
these: most exclude few of the items near to them, and a selection of all other rows takes longer to
make than a search. Those that come out short are asked once more together, for as many more as they
exclude. A query that is short even then, or came alone, is searched alone, with a selection and a
delta that lack its excluded rows. Either way an answer is that of a shard which does not have the
excluded items.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.exclusions import Excluded
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

# Results beyond k that queries are asked for. More cost all of them; with fewer, more of them are
# searched alone.
MARGIN = 32
# The same of queries that came out short with MARGIN. A batch of k = 10 takes 4 % longer with 60
# more, and three times as long where each query is searched alone.
LARGEST_MARGIN = 256


class Among(NamedTuple):
    """What is searched: these rows of a main index, None for all, and the live rows of a delta.

    A tuple, because every search makes one.
    """

    selection: Selection | None
    delta: Delta


class Find(Protocol):
    def __call__(
        self, queries: FloatArray, k: int, among: Among, more: int = 0, beyond: int = 0, /
    ) -> Ranked:
        """The k best items, or k + more of what a search for k visits; beyond: how many rows that
        are excluded may be nearer than these."""


@dataclass(frozen=True, slots=True)
class Excluding:
    """Of one state: ids_by_row (rows + 1,) as of ``ShardState``; fewest: how many items of main are
    enough of this shard, if it has as many; look: called before queries are searched once more;
    what it raises ends the search."""

    find: Find
    fewest: int
    ids_by_row: IdArray
    among: Among
    look: Callable[[], None]

    def search(
        self, queries: FloatArray, k: int, excluded: Excluded
    ) -> tuple[Ranked, NDArray[np.int32]]:
        """The k best items of queries (n, dim) among those that are not excluded; and counts (n,)
        int32: of each query with fewer than k, how many items it excludes that could have been
        found, 0 of others."""
        counts = np.zeros(len(queries), np.int32)
        lists = [excluded.ids]
        if len(queries) > 1:
            lists = np.split(excluded.ids, np.cumsum(excluded.counts[:-1]))
        kept = Ranked(
            np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        )
        short = list(range(len(queries)))
        for most in (MARGIN, LARGEST_MARGIN):
            margin = max(0, min(most, max(len(lists[query]) for query in short), MAX_K - k))
            short = self._together(queries, short, lists, margin, kept, counts)
            if len(short) < 2:
                break
            self.look()
        for query in short:
            some = slice(query, query + 1)
            self.look()
            alone, counts[query] = self._alone(queries[some], k, lists[query])
            kept.ids[some], kept.scores[some] = alone
        return kept, counts

    def _together(
        self,
        queries: FloatArray,
        asked: list[int],
        lists: list[IdArray],
        margin: int,
        kept: Ranked,
        counts: NDArray[np.int32],
    ) -> list[int]:
        """Fills ``kept`` (n, k), and counts (n,), of the queries ``asked``; those that came out
        short though there may be more."""
        k, short = kept.ids.shape[1], []
        found = self.find(queries[asked], k, self.among, margin)
        kept.ids[asked], kept.scores[asked] = found.ids[:, :k], found.scores[:, :k]
        for place, query in enumerate(asked):
            own = found.rows(slice(place, place + 1))
            own_kept = kept.rows(slice(query, query + 1))
            is_left = _take_out(lists[query], own, own_kept)
            is_short = own_kept.ids[0, -1] == EMPTY_ID
            if not self._are_enough(own.ids[0], is_left, is_short=bool(is_short)):
                short.append(query)
            elif is_short:
                counts[query] = self._count(lists[query])
        return short

    def _are_enough(self, found: IdArray, is_left: NDArray[np.bool_], *, is_short: bool) -> bool:
        """Whether ``found`` (m,), of which some are left, says what a shard without the excluded
        items would answer; is_short: fewer than k are left.

        If there are more than were asked for, k of them must be left. If not, all that was visited
        is in it, and of main enough must be left, or it is all that there is. Where there is a
        delta, whose items say nothing of main's, these are always looked at.
        """
        if is_left.all():
            return True
        selection, delta = self.among
        is_all = found[-1] == EMPTY_ID
        if not is_all and (is_short or not delta.num_live):
            return not is_short
        in_main = found != EMPTY_ID
        if delta.num_live:
            in_main &= delta.rows_of(found) == NOT_HERE
        if np.count_nonzero(in_main & is_left) >= self.fewest:
            return True
        rows = len(self.ids_by_row) - 1 if selection is None else selection.num_selected
        return bool(is_all and np.count_nonzero(in_main) == rows)

    def _alone(self, query: FloatArray, k: int, ids: IdArray) -> tuple[Ranked, int]:
        """As ``search``, of one query (1, dim) that excludes ids (m,)."""
        selection, delta = self.among
        of_main, of_delta = self._rows_of(ids)
        if len(of_main):
            whole = selection if selection is not None else _whole(len(self.ids_by_row) - 1)
            selection = whole.less(of_main)
        if len(of_delta):
            delta = delta.hiding(of_delta)
        found = self.find(query, k, Among(selection, delta), 0, len(of_main))
        is_short = found.ids[0, -1] == EMPTY_ID
        return found, len(of_main) + len(of_delta) if is_short else 0

    def _count(self, ids: IdArray) -> int:
        return sum(map(len, self._rows_of(ids)))

    def _rows_of(self, ids: IdArray) -> tuple[IdArray, IdArray]:
        """The rows of main and of the delta that are searched, of ids (m,), ascending."""
        selection, delta = self.among
        of_main = rows_of(self.ids_by_row, ids)
        of_main = of_main[of_main != NOT_HERE]
        if selection is not None:
            of_main = of_main[selection.are_live(of_main)]
        of_delta = of_main[:0]
        if delta.num_live:
            of_delta = delta.rows_of(ids)
            of_delta = of_delta[of_delta != NOT_HERE]
        return of_main, of_delta


def rows_of(ids_by_row: IdArray, item_ids: IdArray) -> IdArray:
    """(n,) int64: the row of each of item_ids (n,) int64, NOT_HERE where there is none; ids_by_row
    (rows + 1,) as of ``ShardState``."""
    rows = len(ids_by_row) - 1
    if rows and ids_by_row[rows - 1] - ids_by_row[0] == rows - 1:  # no gaps: nothing to look for
        at = item_ids - ids_by_row[0]
        return np.where((at >= 0) & (at < rows), at, NOT_HERE)
    at = np.searchsorted(ids_by_row[:-1], item_ids)
    at[ids_by_row[at] != item_ids] = NOT_HERE
    return at


@lru_cache(maxsize=2)
def _whole(rows: int) -> Selection:
    """Kept: a copy of its bits takes less time."""
    return Selection.whole(rows)


def _take_out(ids: IdArray, found: Ranked, kept: Ranked) -> NDArray[np.bool_]:
    """Writes to ``kept`` (1, k) the first of ``found`` (1, m), m >= k, which it has already, that
    are not among ids (n,), ascending; which of ``found`` (m,) are not."""
    (of_found,), k = found.ids, kept.ids.shape[1]
    if not len(ids):
        return np.ones(len(of_found), np.bool_)
    at = np.searchsorted(ids, of_found)
    at[at == len(ids)] = 0
    is_left: NDArray[np.bool_] = ids[at] != of_found
    if not is_left[:k].all():
        left = is_left.nonzero()[0][:k]
        kept.ids[:], kept.scores[:] = EMPTY_ID, EMPTY_SCORE
        kept.ids[0, : len(left)] = of_found[left]
        kept.scores[0, : len(left)] = found.scores[0, left]
    return is_left
