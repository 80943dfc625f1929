"""The pools of one search: asked for, what is known of their items, and what they come to."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shardline.router.contract import Coverage, Degraded
from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.snapshot import TableSnapshot
from shardline.router.finding import Finder
from shardline.router.query import Merged, Rearranged, ResolvedQuery
from shardline.router.rearrange.pool_items import Chosen, PoolItems, Steps, brought_of
from shardline.router.rearrange.rearrangement import MAX_POOLED
from shardline.shards.core.errors import DeadlineExceeded, InvalidInput, Unavailable
from shardline.shards.core.filter_language import Scalar, narrowed
from shardline.shards.core.messages import RoutingTable
from shardline.shards.core.schema import EMPTY_ID, EMPTY_SCORE, FloatArray, IdArray, Ranked

# Of the time that is left, for what is known of the first items: pools that follow need the rest,
# and vectors as much as attributes do. A shard that hangs is awaited for all of it.
FIRST_SHARE = 0.5
ATTRIBUTES_SHARE = 0.5
GROWTH = 4  # of a pool over the one before
TAKEN_IN_LOOP = 2000  # values of items that are taken in there, a millisecond
IDS_AT_ONCE = 4096  # of one question for attributes, whose answer has a limit
FETCHED_BYTES = 4 << 20  # of vectors in one answer of a shard


@dataclass(slots=True)
class Pool:
    """Of the query at ``row`` ids (m,) and scores (m,), each item once. filter: the query's own,
    packed; next_filter: that of the next pool. is_full: there may be more items that this lets in;
    is_cut: they were given up. is_extended: it is not the first one any more. left_out: the
    values of columns that the last filter left out, besides."""

    row: int
    filter: bytes
    ids: IdArray
    scores: FloatArray
    is_full: bool
    next_filter: bytes = b""
    is_cut: bool = False
    is_extended: bool = False
    left_out: dict[str, list[Scalar]] = field(default_factory=dict)
    chosen: Chosen | None = None

    def add(self, ids: IdArray, scores: FloatArray, is_full: bool) -> bool:
        """The items of the next pool; whether any of them is new."""
        is_new = ~np.isin(ids, self.ids)
        self.ids = np.concatenate([self.ids, ids[is_new]])
        self.scores = np.concatenate([self.scores, scores[is_new]])
        self.is_full = is_full
        return bool(is_new.any())


def choose_all(
    items: PoolItems, pools: Sequence[Pool], can_grow: bool, look: Callable[[], None]
) -> list[Pool]:
    """Makes the answer of each pool; those that are short while there is more to ask for.
    can_grow: whether the next pools may be larger. look: called before each; what it raises ends
    it."""
    short = []
    for pool in pools:
        look()
        pool.chosen = chosen = items.choose(pool.ids, pool.scores)
        # boosted and diverse answers may change: what a value was full with is displaced
        is_reopened = any(
            not set(values).issubset(chosen.full.get(column, ()))
            for column, values in pool.left_out.items()
        )
        if len(chosen.ids) == items.steps.k or not (pool.is_full or is_reopened):
            continue
        # shards evaluate a filter that is new to them in milliseconds: where a larger pool will do
        # by the share of items that caps allow, that costs less
        may_do = can_grow and GROWTH * len(chosen.ids) >= items.steps.k
        left_out = {} if may_do and not pool.is_extended else chosen.full
        pool.is_extended, pool.left_out = True, left_out
        try:
            pool.next_filter = narrowed(pool.filter, left_out)
        except InvalidInput:  # with the caller's own it would be beyond a limit of filters
            pool.is_cut = True
        else:
            short.append(pool)
    return short


@dataclass(slots=True, kw_only=True)
class PoolSearch:
    """vectors (n, dim), at ``positions`` (n,) among the queries; own (n,): of each an item that is
    left out. deadline: on the fan-out's clock. All of it runs in the router's event loop."""

    fanout: Fanout
    finder: Finder
    snapshot: TableSnapshot
    vectors: FloatArray
    positions: IdArray
    own: IdArray | None
    query: ResolvedQuery
    steps: Steps
    deadline: float
    pools: list[Pool] = field(init=False)
    _first: Merged = field(init=False)
    _coverage: Coverage = field(init=False)
    _seq: tuple[int | None, ...] = field(init=False)
    _search_ms: float = field(init=False)
    _asked: int = field(init=False)  # items, of all pools together

    async def begin(self, size: int, until: float) -> None:
        """Asks for the first pools. Raises as ``Fanout.search``."""
        query = self.query
        found = self.finder.find(self.snapshot, self.vectors, size, query, until, self.positions)
        self._first = first = await found
        self._asked = size * len(self.vectors)
        self._coverage, self._seq, self._search_ms = first.coverage, first.seq, first.search_ms
        self.pools = []
        for row, position in enumerate(self.positions.tolist()):
            own_filter = query.filters[position] if query.filters else query.options.filter
            self.pools.append(Pool(row, own_filter, *self._found(first, row, row)))

    async def learn_first(self, items: PoolItems, pools: Sequence[Pool]) -> None:
        """What is known of the items of first pools. A shard that does not bring it counts as one
        that has not answered: its items are left out.

        Raises:
            Unavailable: too small a coverage.
        """
        wanted = np.unique(np.concatenate([each.ids for each in pools]))
        until = self._in_share(FIRST_SHARE, self.deadline)
        missing = await self._learn(items, wanted, self._first.seq, until)
        if missing:
            self._coverage = _without(self._coverage, missing, self.snapshot.table)
            least = self.query.min_coverage
            if self._coverage.share < least or not self._coverage.shards_answered:
                kinds = {each.code for each in missing}
                is_late = kinds == {DeadlineExceeded.code}
                raise (DeadlineExceeded if is_late else Unavailable)(
                    "too few shards brought what caps, boosts and diversity need",
                    expected=f"coverage >= {least:g}",
                    hint="; ".join(map(str, self._coverage.degraded)),
                )

    async def more(self, items: PoolItems, pools: Sequence[Pool], size: int) -> list[Pool]:
        """Adds the next items to pools, and what is known of them; the pools that have new ones.

        Raises:
            Unavailable: not all of it came in time; the pools are as before.
        """
        self._asked += size * len(pools)
        if self._asked > MAX_POOLED:
            raise Unavailable("as many items were asked for as one request may consider")
        rows = np.array([each.row for each in pools])
        filters = list(self.query.filters) or [b""] * (int(self.positions.max()) + 1)
        for each in pools:
            filters[self.positions[each.row]] = each.next_filter
        merged = await self.finder.find(
            self.snapshot,
            self.vectors[rows],
            size,
            replace(self.query, filters=tuple(filters)),
            self.deadline,
            self.positions[rows],
            # nobody else will ask without what this answer is full of
            is_kept=all(each.next_filter == each.filter for each in pools),
        )
        found = [self._found(merged, place, each.row) for place, each in enumerate(pools)]
        wanted = items.unasked(np.concatenate([ids for ids, _, _ in found]))
        if await self._learn(items, wanted, merged.seq, self.deadline):
            raise Unavailable("not all shards brought what is known of their items")
        self._heard(merged)
        return [each for each, part in zip(pools, found, strict=True) if _extended(each, part)]

    def merged(self) -> Merged:
        """The answers to all queries, once they are chosen."""
        count, k = len(self.pools), self.steps.k
        ids, scores = np.full((count, k), EMPTY_ID), np.full((count, k), EMPTY_SCORE)
        considered, refused, is_cut, dropped = (np.zeros(count, np.int64) for _ in range(4))
        for pool in self.pools:
            chosen = pool.chosen
            assert chosen is not None
            ids[pool.row, : len(chosen.ids)] = chosen.ids
            scores[pool.row, : len(chosen.ids)] = chosen.scores
            considered[pool.row] = chosen.considered
            refused[pool.row] = chosen.refused
            is_cut[pool.row] = pool.is_cut and bool(self.steps.caps)
            dropped[pool.row] = len(pool.ids) - chosen.considered
        first, left_out = self._first, None
        if self.own is not None:
            left_out = (first.ranked.ids == self.own[:, None]).any(axis=1).astype(np.int64)
        return replace(
            first,
            ranked=Ranked(ids, scores),
            coverage=self._coverage,
            seq=self._seq,
            search_ms=self._search_ms,
            left_out=left_out,
            rearranged=Rearranged(
                considered=considered, refused=refused, is_cut=is_cut, dropped=dropped
            ),
        )

    def _found(self, merged: Merged, place: int, row: int) -> tuple[IdArray, FloatArray, bool]:
        """Of an answer's row the items and scores, without what is left out, and whether there may
        be more."""
        ids, scores = merged.ranked.ids[place], merged.ranked.scores[place]
        is_full = bool(ids[-1] != EMPTY_ID)
        is_wanted = ids != EMPTY_ID
        if self.own is not None:
            is_wanted &= ids != self.own[row]
        return ids[is_wanted], scores[is_wanted], is_full

    def _heard(self, merged: Merged) -> None:
        """An answer is as old as its oldest part, and covers what the least of them does."""
        self._coverage = self._coverage.joined(merged.coverage)
        self._seq = tuple(
            None if one is None or other is None else min(one, other)
            for one, other in zip(self._seq, merged.seq, strict=True)
        )
        self._search_ms = max(self._search_ms, merged.search_ms)

    def _in_share(self, share: float, until: float) -> float:
        now = self.fanout.clock.time()
        return now + share * (until - now)

    async def _learn(
        self, items: PoolItems, ids: IdArray, seen: tuple[int | None, ...], until: float
    ) -> list[Degraded]:
        """Adds what shards bring of ids (m,); the shards that do not bring it in time. seen: as of
        ``Fanout.attributes``."""
        has_vectors = self.steps.relevance is not None
        first_until = self._in_share(ATTRIBUTES_SHARE, until) if has_vectors else until
        columns, missing = await self._attributes(ids, seen, first_until)
        vectors = None
        if has_vectors:
            vectors, others = await self._vectors(ids, seen, until)
            missing += others

        def take() -> None:
            items.add(ids, brought_of(ids, columns, vectors))

        if len(ids) * max(1, len(columns)) > TAKEN_IN_LOOP:
            await asyncio.to_thread(take)
        else:
            take()
        return missing

    async def _attributes(
        self, ids: IdArray, seen: tuple[int | None, ...], until: float
    ) -> tuple[dict[str, dict[int, Any]], list[Degraded]]:
        names = self.steps.columns
        columns: dict[str, dict[int, Any]] = {name: {} for name in names}
        missing: list[Degraded] = []
        for start in range(0, len(ids) if names else 0, IDS_AT_ONCE):
            part = ids[start : start + IDS_AT_ONCE]
            try:
                found = await self.fanout.attributes(
                    self.snapshot, part, names, deadline=until, seen=seen
                )
            except InvalidInput as error:  # values of such a size
                field = self.steps.by_column[0].field
                raise InvalidInput(error.message, field=field, expected=error.expected) from error
            for name, values in found.values.items():
                columns[name].update(values)
            missing += found.missing
        return columns, missing

    async def _vectors(
        self, ids: IdArray, seen: tuple[int | None, ...], until: float
    ) -> tuple[tuple[IdArray, FloatArray], list[Degraded]]:
        table = self.snapshot.table
        at_once = max(1, FETCHED_BYTES // (4 * table.dim))
        parts, missing = [(ids[:0], np.empty((0, table.dim), np.float32))], []
        for start in range(0, len(ids), at_once):
            part = ids[start : start + at_once]
            found = await self.fanout.fetch(
                self.snapshot,
                part,
                deadline=until,
                min_seq=tuple(seq or 0 for seq in seen),
            )
            parts.append((found.item_ids, found.vectors))
            lacking = table.partition.shard_of(np.setdiff1d(part, found.item_ids))
            missing += [each for each in found.coverage.degraded if each.shard in lacking]
        ids_of, vectors_of = zip(*parts, strict=True)
        return (np.concatenate(ids_of), np.concatenate(vectors_of)), missing


def _extended(pool: Pool, found: tuple[IdArray, FloatArray, bool]) -> bool:
    """Adds them; whether any is new. Full without a new one, there is no way to more."""
    has_new = pool.add(*found)
    pool.is_cut = pool.is_full and not has_new
    return has_new


def _without(coverage: Coverage, missing: Iterable[Degraded], table: RoutingTable) -> Coverage:
    """As if these shards had not answered."""
    known = {each.shard for each in coverage.degraded}
    lost = {each.shard: each for each in missing if each.shard not in known}
    rows = sum(route.rows for route in table.shards if route.shard in lost)
    return replace(
        coverage,
        shards_answered=coverage.shards_answered - len(lost),
        rows_answered=max(0, coverage.rows_answered - rows),
        degraded=(*coverage.degraded, *lost.values()),
    )
