"""The life of a query without HTTP: check, encode or look up, fan out, answer.

A query is pinned to one table, encoder and set of connections, and has one deadline, counted from
its arrival. Requests beyond ``max_in_flight`` are refused before any work is done on them.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np

from shardline.router.cache import ResultCache, cache_key
from shardline.router.fanout.coalesce import Found
from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.snapshot import Encoder, TableSnapshot, load_query_encoder
from shardline.router.item_queries import ItemQueries, item_queries
from shardline.router.limits import InFlightLimit, Terms, check_size, terms_of
from shardline.router.query import Coverage, ItemAnswer, SearchAnswer, SearchQuery
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import NotFound, ShardlineError, Unavailable
from shardline.shards.core.messages import RoutingTable, SearchParams
from shardline.shards.core.metrics import (
    CACHE_BYTES,
    CACHE_HITS,
    CACHE_MISSES,
    COVERAGE,
    GENERATION,
    IN_FLIGHT,
    REJECTED,
    REQUEST_MS,
    REQUEST_QUERIES,
    SHARDS_CONNECTED,
    STAGE_MS,
    Recorder,
)
from shardline.shards.core.schema import FloatArray, IdArray, check_ids, check_vectors

LOOK_UP_SHARE = 0.5  # of the time left: a slow shard must leave some for the search itself
STAGES_OF_ONE_IN = 8  # searches whose stages are timed; all have their whole time taken

Top: TypeAlias = tuple[IdArray, FloatArray, Coverage, float]  # (n, k) ids, scores; search_ms last


class SearchService:
    """Answers queries on the newest routing table applied. All methods run in one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        secret: bytes,
        *,
        load_encoder: Callable[[RoutingTable], Encoder | None] = load_query_encoder,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config
        self.recorder = Recorder()
        self._fanout = Fanout(secret, config, rng or random.Random(), self.recorder)
        self._load_encoder = load_encoder
        self._in_flight = InFlightLimit(config.max_in_flight, self.recorder)
        self._searches = 0
        self._cache = ResultCache(config.cache_bytes)

    async def apply(self, table: RoutingTable) -> bool:
        """Switches to a newer table and its encoder in one step; False when not newer.

        Raises:
            ShardlineError: the generation's query encoder does not load; the old table stays.
        """
        current = self._fanout.snapshot
        if current is not None and table.version <= current.table.version:
            return False
        if current is not None and current.table.generation == table.generation:
            encoder = current.encoder
        else:
            encoder = await asyncio.to_thread(self._load_encoder, table)
        applied = await self._fanout.apply(table, encoder)
        if applied and current is not None and current.table.generation != table.generation:
            self._cache.clear()
        return applied

    async def close(self) -> None:
        await self._fanout.close()

    def admit(self) -> InFlightLimit:
        """Around all work on a request; ``InFlightLimit`` says when it raises."""
        return self._in_flight

    async def search(
        self,
        query: SearchQuery,
        *,
        arrived_at: float,
        began_at: float | None = None,
        request_id: str = "",
    ) -> SearchAnswer:
        """The deadline is counted from arrived_at, on the event loop's clock.

        took_ms is counted from began_at, on time.perf_counter's, by default from now: the clock of
        a Serve replica's loop ticks in whole milliseconds.

        Raises:
            InvalidInput: the query breaks a rule; field names where.
            VersionMismatch: the encoder is not of the generation's model.
            DeadlineExceeded, Overloaded, Unavailable: no answer, or too small a coverage.
        """
        began_at = time.perf_counter() if began_at is None else began_at
        try:
            terms = terms_of(query, self.config)
            deadline = arrived_at + terms.timeout_ms / 1000
            with self._fanout.pin() as snapshot:
                top, reasons = await self._top(snapshot, query, terms, deadline, began_at)
                table = snapshot.table
        except ShardlineError as error:
            self.recorder.count(REJECTED, error.code)
            raise
        ids, scores, coverage, search_ms = top
        took_ms = (time.perf_counter() - began_at) * 1000
        self.recorder.observe(REQUEST_MS, took_ms, terms.kind)
        self.recorder.observe(REQUEST_QUERIES, len(ids))
        self.recorder.observe(COVERAGE, coverage.share)
        return SearchAnswer(
            ids=ids,
            scores=scores,
            generation=table.generation,
            model_version=table.model_version,
            coverage=coverage,
            took_ms=took_ms,
            search_ms=search_ms,
            reasons=reasons,
            request_id=request_id,
        )

    async def item(self, item_id: int, *, arrived_at: float) -> ItemAnswer:
        """The stored vector of one item.

        Raises:
            NotFound: no shard holds it, and every shard answered.
            Unavailable: it was not found, but a shard that might hold it did not answer.
        """
        (checked,) = check_ids([item_id], field="item_id")
        deadline = arrived_at + self.config.default_timeout_ms / 1000
        with self._fanout.pin() as snapshot:
            found = await self._fanout.fetch(snapshot, np.array([checked]), deadline=deadline)
            if not found.item_ids.size:
                if found.coverage.degraded:
                    raise Unavailable(
                        "not found in the shards that answered",
                        field="item_id",
                        hint="; ".join(found.coverage.degraded),
                    )
                raise NotFound("no such item", field="item_id", got=str(checked))
            return ItemAnswer(
                item_id=int(found.item_ids[0]),
                vector=found.vectors[0],
                shard=int(found.shards[0]),
                generation=snapshot.table.generation,
                model_version=snapshot.table.model_version,
            )

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Whether queries can be answered now, and why or how completely, for JSON.

        One connected shard is enough: partial answers say so themselves, and taking every router
        out of the load balancer because one shard restarts would turn them into no answers.
        """
        snapshot = self._fanout.snapshot
        if snapshot is None:
            return False, {"ready": False, "reason": "no routing table yet"}
        connected = snapshot.connected_shards > 0
        return connected, {"ready": connected, **snapshot.connectivity()}

    def status(self) -> dict[str, Any]:
        """What is being served, for JSON.

        Raises:
            Unavailable: no routing table has come yet.
        """
        with self._fanout.pin() as snapshot:
            return {
                **snapshot.describe(),
                "in_flight": self._in_flight.taken,
                "cache": asdict(self._cache.stats) if self._cache.enabled else None,
            }

    def refresh_metrics(self) -> None:
        """Sets the gauges, and the counters of what is counted elsewhere, for an export."""
        recorder, stats, snapshot = self.recorder, self._cache.stats, self._fanout.snapshot
        recorder.set(IN_FLIGHT, self._in_flight.taken)
        recorder.set(CACHE_BYTES, stats.bytes)
        recorder.total(CACHE_HITS, stats.hits)
        recorder.total(CACHE_MISSES, stats.misses)
        if snapshot is not None:
            recorder.set(GENERATION, snapshot.table.generation)
            recorder.set(SHARDS_CONNECTED, snapshot.connected_shards)

    # Steps

    async def _top(
        self,
        snapshot: TableSnapshot,
        query: SearchQuery,
        terms: Terms,
        deadline: float,
        began_at: float,
    ) -> tuple[Top, dict[int, str]]:
        """The answer, and why queries that could not be asked were not."""
        self._searches += 1
        is_timed = self._searches % STAGES_OF_ONE_IN == 0
        parsed_at = time.perf_counter()
        items: ItemQueries | None = None
        if terms.kind == "item_ids":
            items = await self._look_up(snapshot, query, deadline, terms.min_coverage)
            vectors = items.vectors
        else:
            values = query.vectors
            if terms.kind == "features":
                assert query.features is not None
                values = await snapshot.encode(query.features)
            table = snapshot.table
            vectors = check_vectors(values, dim=table.dim, metric=table.metric, field=terms.kind)
        check_size(vectors, terms.kind)
        prepared_at = time.perf_counter()
        if items is None:
            found = await self._find(snapshot, vectors, terms.k, terms, query.params, deadline)
            top = found.ids, found.scores, found.coverage, found.search_ms
        else:
            top = await self._neighbours(snapshot, items, terms, query.params, deadline)
        if is_timed:
            self.recorder.observe(STAGE_MS, (parsed_at - began_at) * 1000, "parse")
            self.recorder.observe(STAGE_MS, (prepared_at - parsed_at) * 1000, "prepare")
            self.recorder.observe(STAGE_MS, (time.perf_counter() - prepared_at) * 1000, "find")
        return top, {} if items is None else items.reasons

    async def _look_up(
        self, snapshot: TableSnapshot, query: SearchQuery, deadline: float, min_coverage: float
    ) -> ItemQueries:
        item_ids = check_ids(query.item_ids)
        now = asyncio.get_running_loop().time()
        found = await self._fanout.fetch(
            snapshot,
            np.unique(item_ids),
            deadline=now + LOOK_UP_SHARE * (deadline - now),
            min_coverage=min_coverage,
        )
        return item_queries(item_ids, found, snapshot.table.metric)

    async def _neighbours(
        self,
        snapshot: TableSnapshot,
        items: ItemQueries,
        terms: Terms,
        params: SearchParams,
        deadline: float,
    ) -> Top:
        """Of all items, those that could not be asked being empty."""
        if not items.live.size:
            ids, scores = items.spread(None, terms.k)
            return ids, scores, items.coverage, 0.0
        # one more, because an item-to-item query finds itself; at the limit it gets k - 1
        ask_k = min(terms.k + 1, self.config.max_k)
        found = await self._find(snapshot, items.vectors, ask_k, terms, params, deadline)
        ids, scores = items.spread(found, terms.k)
        coverage = found.coverage
        if items.reasons and items.coverage.degraded:
            coverage = coverage.joined(items.coverage)
        return ids, scores, coverage, found.search_ms

    async def _find(
        self,
        snapshot: TableSnapshot,
        vectors: FloatArray,
        k: int,
        terms: Terms,
        params: SearchParams,
        deadline: float,
    ) -> Found:
        """From the cache, or from the shards."""
        found: Found | None = None
        if self._cache.enabled:
            key = cache_key(snapshot.table.generation, vectors, k, params)
            found = self._cache.get(key)
        if found is None:
            found = await self._fanout.search(
                snapshot,
                vectors,
                k,
                deadline=deadline,
                params=params,
                min_coverage=terms.min_coverage,
            )
            if self._cache.enabled:
                self._cache.put(key, found)
        return found
