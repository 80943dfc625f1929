"""The items nearest to vectors: from the cache, or from the shards by one frame to each.

Queries with filters of their own are asked in groups of one filter each.
"""

import asyncio
from dataclasses import replace

import numpy as np

from shardline.router.cache import CacheStats, ResultCache, cache_key
from shardline.router.excluded import num_excluded, of_queries, off_loop
from shardline.router.fanout.coalesce import LaneKey
from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.snapshot import TableSnapshot
from shardline.router.filter_groups import FILTERS_AT_ONCE, at_query, groups_of, joined
from shardline.router.freshness import Freshness
from shardline.router.query import Merged, ResolvedQuery
from shardline.router.recall_watch import RecallWatch
from shardline.shards.core.errors import InvalidInput, Unavailable
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray, Ranked


class Finder:
    """All methods run in the router's event loop. cache_bytes 0: no answer is kept."""

    def __init__(self, fanout: Fanout, watch: RecallWatch, cache_bytes: int) -> None:
        self._fanout = fanout
        self._watch = watch
        self._cache = ResultCache(cache_bytes)
        self._freshness = Freshness(None)

    @property
    def keeps_answers(self) -> bool:
        return self._cache.enabled

    @property
    def stats(self) -> CacheStats:
        """Of the answers that are kept."""
        return self._cache.stats

    def serves(self, generation: int) -> None:
        """A table of this generation is in use from now on: answers of others are forgotten."""
        if self._freshness.generation != generation:
            self._cache.clear()
            self._freshness = Freshness(generation)

    def wrote(self, generation: int, shard: int, seq: int) -> None:
        """A write of this router's was acknowledged."""
        if self._freshness.generation == generation:
            self._freshness.wrote(shard, seq)

    async def find(
        self,
        snapshot: TableSnapshot,
        vectors: FloatArray,
        k: int,
        query: ResolvedQuery,
        deadline: float,
        positions: IdArray | None = None,
        *,
        is_kept: bool = True,
    ) -> Merged:
        """The k best of each of vectors (n, dim); k as the shards are asked. positions (n,): those
        of vectors among the queries, None where they are all of them. is_kept: whether the answers
        may be asked for again.

        Raises: as ``Fanout.search``.
        """
        if query.excluded and positions is not None:
            query = replace(query, excluded=of_queries(query.excluded, positions))
        if not query.filters:
            return await self._find_alike(snapshot, vectors, k, query, deadline, is_kept)
        if positions is None:
            positions = np.arange(len(vectors))
        return await self._find_each(snapshot, vectors, k, query, positions, deadline, is_kept)

    async def _find_alike(
        self,
        snapshot: TableSnapshot,
        vectors: FloatArray,
        k: int,
        query: ResolvedQuery,
        deadline: float,
        is_kept: bool,
    ) -> Merged:
        """From the cache, or from the shards; k as the shards are asked. ``query.excluded`` is of
        these vectors."""
        merged: Merged | None = None
        freshness = self._freshness
        # a query that began before another generation went live is answered by the old one's shards
        is_current = freshness.generation == snapshot.table.generation
        # the many answers of a background search would push out those that others ask for again
        is_cached = self._cache.enabled and is_kept and is_current and not query.options.background
        if is_cached:
            num_ids, generation = num_excluded(query.excluded), snapshot.table.generation
            key = await off_loop(num_ids, cache_key, generation, vectors, k, query)
            asked_at = asyncio.get_running_loop().time()
            merged = self._cache.get(key, freshness.seq_at(asked_at))
        if merged is None:
            lane = LaneKey(
                snapshot=snapshot,
                k=k,
                min_coverage=query.min_coverage,
                params=query.params,
                options=query.options,
            )
            merged = await self._fanout.search(
                vectors, lane, deadline=deadline, excluded=query.excluded
            )
            if may_be_filled(lane) and not query.excluded:
                merged = await self._filled(vectors, lane, merged, deadline)
            if not query.excluded:
                self._watch.offer(lane, vectors, merged, query.assignment)
            if is_cached:
                is_newest = freshness.heard(merged.seq, asked_at)
                if is_newest and freshness is self._freshness:  # else another generation is live
                    self._cache.put(key, merged)
        return merged

    async def _filled(
        self, vectors: FloatArray, lane: LaneKey, merged: Merged, deadline: float
    ) -> Merged:
        """With what every row scored finds, for queries that came out short though there are more
        items: each shard has found twice its share of k, and most of these shards may be empty by
        now, or away. Where that cannot be had in time, as they are; the answer says why."""
        wanted = min(lane.k, merged.coverage.rows_answered)
        ids = merged.ranked.ids
        # one number is looked at in a tenth of the time of an array
        least = ids.item(wanted - 1) if len(ids) == 1 else ids[:, wanted - 1].min(initial=0)
        if not wanted or least != EMPTY_ID:
            return merged
        short = np.flatnonzero(ids[:, wanted - 1] == EMPTY_ID)
        exactly = lane._replace(options=replace(lane.options, exact=True))
        try:
            more = await self._fanout.search(vectors[short], exactly, deadline=deadline)
        except Unavailable:  # or one of its kinds: too late, too busy
            return merged
        ids, scores = ids.copy(), merged.ranked.scores.copy()
        ids[short], scores[short] = more.ranked
        seq = (
            None if one is None or other is None else min(one, other)
            for one, other in zip(merged.seq, more.seq, strict=True)
        )
        return replace(
            merged,
            ranked=Ranked(ids, scores),
            coverage=merged.coverage.joined(more.coverage),
            seq=tuple(seq),
            search_ms=merged.search_ms + more.search_ms,
        )

    async def _find_each(
        self,
        snapshot: TableSnapshot,
        vectors: FloatArray,
        k: int,
        query: ResolvedQuery,
        positions: IdArray,
        deadline: float,
        is_kept: bool,
    ) -> Merged:
        """As ``find``, for queries of several filters: ``query.filters`` has that of each of
        vectors (n, dim), at positions (n,), and ``query.excluded``, if any, is of these vectors."""
        is_free = asyncio.Semaphore(FILTERS_AT_ONCE)
        refused: list[InvalidInput] = []

        async def find(packed: bytes, rows: IdArray) -> tuple[IdArray, Merged]:
            own = replace(
                query,
                options=replace(query.options, filter=packed),
                filters=(),
                excluded=of_queries(query.excluded, rows),
            )
            async with is_free:
                if refused:  # nobody would get what is found now
                    raise refused[0]
                try:
                    merged = await self._find_alike(
                        snapshot, vectors[rows], k, own, deadline, is_kept
                    )
                    return rows, merged
                except InvalidInput as error:
                    refused.append(at_query(error, int(positions[rows[0]])))
                    raise refused[-1] from error

        groups = groups_of([query.filters[position] for position in positions.tolist()])
        # all of them end before the table that they use is let go
        found = await asyncio.gather(
            *(find(packed, rows) for packed, rows in groups.items()), return_exceptions=True
        )
        parts = []
        for each in found:
            if isinstance(each, BaseException):
                raise each
            parts.append(each)
        return joined(parts)


def may_be_filled(lane: LaneKey) -> bool:
    """Whether shards find no more than their share of k: parameters that say how much is visited
    are the caller's word, and with a filter, or exactly, each shard finds k."""
    options, params = lane.options, lane.params
    return not (options.exact or options.filter or params.nprobe or params.ef_search)
