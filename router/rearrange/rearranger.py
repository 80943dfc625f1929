"""Searches with caps, boosts or diversity: pools are asked for, put into order, and cut to k.

Caps are exact. A pool is the best P of all items that match. Where caps leave fewer than k of it
though there are more, a larger one is asked for; if that will not do, with a filter that leaves out
the values of which the answer has as many as it may. Without boosts and diversity, choosing from
all pools together is choosing from all items there are, as far down as the last item of the last
pool: an item above that, in no pool, has one of those values; the items that made the value full
rank above it, so going down the whole ranking refuses it too; and what is refused changes nothing
that follows. So it goes on until there are k, or a pool is not full: then every item that is in
none has a value that is full.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.snapshot import TableSnapshot
from shardline.router.finding import Finder
from shardline.router.query import Merged, ResolvedQuery
from shardline.router.rearrange.attribute_columns import kinds_of
from shardline.router.rearrange.pool_items import PoolItems, Steps
from shardline.router.rearrange.pool_search import GROWTH, Pool, PoolSearch, choose_all
from shardline.router.rearrange.rearrangement import check_kinds
from shardline.shards.core.errors import DeadlineExceeded, InvalidInput, Unavailable
from shardline.shards.core.schema import FloatArray, IdArray

MAX_POOLS = 16  # of one query, each larger than the last, up to the largest k
POOL_SHARE = 0.6  # of the time, for the first pools: what is known of the items is asked for then
ITEMS_AT_ONCE = 1 << 14  # of pools whose items' attributes and vectors are in memory together
# What is chosen in the event loop, within a millisecond: items of pools, pairs of similar ones,
# bytes of filters
CHOSEN_IN_LOOP = 2000
COMPARED_IN_LOOP = 10_000
FILTERED_IN_LOOP = 8 << 10


class Rearranger:
    """All methods run in the router's event loop. wall: seconds since 1970, for ages of dates."""

    def __init__(
        self,
        fanout: Fanout,
        finder: Finder,
        max_k: int,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._fanout = fanout
        self._finder = finder
        self._max_k = max_k
        self._wall = wall

    async def find(
        self,
        snapshot: TableSnapshot,
        vectors: FloatArray,
        k: int,
        query: ResolvedQuery,
        deadline: float,
        positions: IdArray | None = None,
        own: IdArray | None = None,
    ) -> Merged:
        """As ``Finder.find``, of a query with ``rearrange``. own (n,): of each query an item that
        is left out.

        Raises:
            InvalidInput: a column that does not exist, or is of a wrong kind.
            DeadlineExceeded, Overloaded, Unavailable: as ``Fanout.search``; also where too few
                shards bring what is known of their items.
        """
        asked, now = query.rearrange, self._fanout.clock.time()
        assert asked is not None
        check_kinds(asked, await kinds_of(self._fanout, snapshot, asked, deadline))
        steps = Steps.of(asked, k, snapshot.table.metric, self._wall())
        search = PoolSearch(
            fanout=self._fanout,
            finder=self._finder,
            snapshot=snapshot,
            vectors=vectors,
            positions=np.arange(len(vectors)) if positions is None else positions,
            own=own,
            query=query,
            steps=steps,
            deadline=deadline,
        )
        size = self._size(asked.pool, search)
        await search.begin(size, now + POOL_SHARE * (deadline - now))
        together = max(1, ITEMS_AT_ONCE // size)
        for start in range(0, len(vectors), together):
            await self._answer(search, search.pools[start : start + together], asked.pool)
        return search.merged()

    def _size(self, pool: int, search: PoolSearch) -> int:
        """Of a pool as shards are asked for it: an item that is left out comes on top."""
        return pool + (search.own is not None)

    async def _answer(self, search: PoolSearch, pools: Sequence[Pool], pool: int) -> None:
        """The answers of some queries, from as many pools as they take."""
        clock = self._fanout.clock  # of this thread's event loop

        def look() -> None:
            if clock.time() > search.deadline:
                raise DeadlineExceeded("the request's time ran out while results were put in order")

        items = PoolItems(search.steps)
        await search.learn_first(items, pools)
        for number in range(MAX_POOLS):
            if number:
                pool = min(GROWTH * pool, self._max_k)
                try:
                    pools = await search.more(items, pools, self._size(pool, search))
                except (Unavailable, InvalidInput):  # too late, or too large values: there is
                    break  # an answer, though a short one
            choose = partial(choose_all, items, pools, can_grow=pool < self._max_k, look=look)
            try:
                pools = await asyncio.to_thread(choose) if _takes_long(search, pools) else choose()
            except DeadlineExceeded:
                if any(each.chosen is None for each in pools):
                    raise
                break  # as above
            if not pools:
                return
        for each in pools:
            each.is_cut = True


def _takes_long(search: PoolSearch, pools: Sequence[Pool]) -> bool:
    steps = search.steps
    items = sum(len(each.ids) for each in pools)
    compared = items * steps.k if steps.relevance is not None else 0
    filters = sum(len(each.filter) for each in pools) if steps.caps else 0
    return items > CHOSEN_IN_LOOP or compared > COMPARED_IN_LOOP or filters > FILTERED_IN_LOOP
