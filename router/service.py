"""The life of a query without HTTP: check, encode or look up, fan out, answer.

A query is pinned to one table, encoder and set of connections, and has one deadline, counted from
its arrival. Requests beyond ``max_in_flight`` are refused before any work is done on them.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from router.cache import ResultCache, cache_key
from router.coalesce import Found
from router.config import RouterConfig
from router.fanout import Fanout
from router.limits import Terms, check_size, terms_of
from router.messages import Coverage, ItemAnswer, SearchAnswer, SearchQuery
from router.serving import Encoder, Serving, load_query_encoder
from shards.errors import (
    InvalidInput,
    NotFound,
    Overloaded,
    ShardlineError,
    Unavailable,
    VersionMismatch,
)
from shards.metrics import (
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
from shards.schema import (
    EMPTY_ID,
    EMPTY_SCORE,
    FloatArray,
    IdArray,
    Metric,
    check_ids,
    check_vectors,
    normalise,
)
from shards.types import RoutingTable, SearchParams

# Rows encoded in the event loop, a few milliseconds; more go to a thread so that other requests,
# health checks among them, are not held up.
ENCODE_IN_LOOP = 64
LOOK_UP_SHARE = 0.5  # of the time left: a slow shard must leave some for the search itself
STAGES_OF_ONE_IN = 8  # searches whose stages are timed; all have their whole time taken


@dataclass(slots=True, kw_only=True)
class _Prepared:
    """Vectors ready to be asked, one per live query; ``own`` are items to drop from answers.

    ``coverage`` is that of looking the items up.
    """

    vectors: FloatArray
    live: IdArray
    num_queries: int
    own: IdArray | None = None
    coverage: Coverage | None = None
    reasons: dict[int, str] = field(default_factory=dict)


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
        self._in_flight = 0
        self._searches = 0
        self._cache = ResultCache(config.cache_bytes)

    async def apply(self, table: RoutingTable) -> bool:
        """Switches to a newer table and its encoder in one step; False when not newer.

        Raises:
            ShardlineError: the generation's query encoder does not load; the old table stays.
        """
        current = self._fanout.serving
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

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Around all work on a request.

        Raises:
            Overloaded: as many requests as allowed are being worked on.
        """
        if self._in_flight >= self.config.max_in_flight:
            self.recorder.count(REJECTED, Overloaded.code)
            raise Overloaded(
                "too many requests at once",
                expected=f"<= {self.config.max_in_flight} in flight",
                hint="try again after the time in Retry-After",
            )
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

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
            answer, kind = await self._search(query, arrived_at, began_at, request_id)
        except ShardlineError as error:
            self.recorder.count(REJECTED, error.code)
            raise
        self.recorder.observe(REQUEST_MS, answer.took_ms, kind)
        self.recorder.observe(REQUEST_QUERIES, len(answer.ids))
        self.recorder.observe(COVERAGE, answer.coverage.share)
        return answer

    async def _search(
        self, query: SearchQuery, arrived_at: float, began_at: float, request_id: str
    ) -> tuple[SearchAnswer, str]:
        terms = terms_of(query, self.config)
        deadline = arrived_at + terms.timeout_ms / 1000
        self._searches += 1
        is_timed = self._searches % STAGES_OF_ONE_IN == 0
        with self._fanout.pin() as serving:
            parsed_at = time.perf_counter()
            prepared = await self._prepare(serving, query, terms, deadline)
            check_size(prepared.vectors, terms.kind)
            prepared_at = time.perf_counter()
            found = await self._ask(serving, prepared, terms, query.params, deadline)
            table = serving.table
        if is_timed:
            self.recorder.observe(STAGE_MS, (parsed_at - began_at) * 1000, "parse")
            self.recorder.observe(STAGE_MS, (prepared_at - parsed_at) * 1000, "prepare")
            self.recorder.observe(STAGE_MS, (time.perf_counter() - prepared_at) * 1000, "find")
        ids, scores, coverage, search_ms = found
        answer = SearchAnswer(
            ids=ids,
            scores=scores,
            generation=table.generation,
            model_version=table.model_version,
            coverage=coverage,
            took_ms=(time.perf_counter() - began_at) * 1000,
            search_ms=search_ms,
            reasons=prepared.reasons,
            request_id=request_id,
        )
        return answer, terms.kind

    async def item(self, item_id: int, *, arrived_at: float) -> ItemAnswer:
        """The stored vector of one item.

        Raises:
            NotFound: no shard holds it, and every shard answered.
            Unavailable: it was not found, but a shard that might hold it did not answer.
        """
        (checked,) = check_ids([item_id], field="item_id")
        deadline = arrived_at + self.config.default_timeout_ms / 1000
        with self._fanout.pin() as serving:
            found = await self._fanout.fetch(serving, np.array([checked]), deadline=deadline)
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
                generation=serving.table.generation,
                model_version=serving.table.model_version,
            )

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Whether queries can be answered now, and why or how completely, for JSON.

        One connected shard is enough: partial answers say so themselves, and taking every router
        out of the load balancer because one shard restarts would turn them into no answers.
        """
        serving = self._fanout.serving
        if serving is None:
            return False, {"ready": False, "reason": "no routing table yet"}
        connected = serving.connected_shards > 0
        return connected, {"ready": connected, **serving.connectivity()}

    def status(self) -> dict[str, Any]:
        """What is being served, for JSON.

        Raises:
            Unavailable: no routing table has come yet.
        """
        with self._fanout.pin() as serving:
            return {
                **serving.describe(),
                "in_flight": self._in_flight,
                "cache": asdict(self._cache.stats) if self._cache.enabled else None,
            }

    def refresh_metrics(self) -> None:
        """Sets the gauges, and the counters of what is counted elsewhere, for an export."""
        recorder, stats, serving = self.recorder, self._cache.stats, self._fanout.serving
        recorder.set(IN_FLIGHT, self._in_flight)
        recorder.set(CACHE_BYTES, stats.bytes)
        recorder.total(CACHE_HITS, stats.hits)
        recorder.total(CACHE_MISSES, stats.misses)
        if serving is not None:
            recorder.set(GENERATION, serving.table.generation)
            recorder.set(SHARDS_CONNECTED, serving.connected_shards)

    # Steps

    async def _prepare(
        self, serving: Serving, query: SearchQuery, terms: Terms, deadline: float
    ) -> _Prepared:
        table, kind = serving.table, terms.kind
        if kind == "item_ids":
            item_ids = check_ids(query.item_ids)
            return await self._look_up(serving, item_ids, deadline, terms.min_coverage)
        if kind == "features":
            assert query.features is not None
            values: Any = await _encode(_encoder_of(serving), query.features)
        else:
            values = query.vectors
        vectors = check_vectors(values, dim=table.dim, metric=table.metric, field=kind)
        return _Prepared(vectors=vectors, live=np.arange(len(vectors)), num_queries=len(vectors))

    async def _look_up(
        self, serving: Serving, item_ids: IdArray, deadline: float, min_coverage: float
    ) -> _Prepared:
        """Items' vectors as queries; the unknown ones get a reason instead."""
        now = asyncio.get_running_loop().time()
        found = await self._fanout.fetch(
            serving,
            np.unique(item_ids),
            deadline=now + LOOK_UP_SHARE * (deadline - now),
            min_coverage=min_coverage,
        )
        order = np.argsort(found.item_ids)
        held = found.item_ids[order]
        live = np.flatnonzero(np.isin(item_ids, held))
        missing = np.setdiff1d(np.arange(len(item_ids)), live)
        degraded = found.coverage.degraded
        where = f" in the shards that answered ({'; '.join(degraded)})" if degraded else ""
        vectors = found.vectors[order[np.searchsorted(held, item_ids[live])]]
        if live.size and serving.table.metric is Metric.COSINE:
            # an index without exact copies gives approximations, whose length is not quite one
            vectors = normalise(vectors, field="item_ids")
        return _Prepared(
            vectors=vectors,
            live=live,
            num_queries=len(item_ids),
            own=item_ids[live],
            coverage=found.coverage,
            reasons={int(row): f"item {item_ids[row]} not found{where}" for row in missing},
        )

    async def _ask(
        self,
        serving: Serving,
        prepared: _Prepared,
        terms: Terms,
        params: SearchParams,
        deadline: float,
    ) -> tuple[IdArray, FloatArray, Coverage, float]:
        """(n, k) ids and scores of all queries, those that could not be asked being empty."""
        k = terms.k
        if not prepared.live.size:
            assert prepared.coverage is not None
            ids, scores = _empty(prepared.num_queries, k)
            return ids, scores, prepared.coverage, 0.0
        # one more, because an item-to-item query finds itself; at the limit it gets k - 1
        ask_k = k if prepared.own is None else min(k + 1, self.config.max_k)
        answer = await self._find(serving, prepared.vectors, ask_k, terms, params, deadline)
        if prepared.own is None:
            return answer.ids, answer.scores, answer.coverage, answer.search_ms
        ids, scores = _empty(prepared.num_queries, k)
        own_ids, own_scores = drop_own(answer.ids, answer.scores, prepared.own)
        width = min(k, own_ids.shape[1])
        ids[prepared.live, :width] = own_ids[:, :width]
        scores[prepared.live, :width] = own_scores[:, :width]
        coverage = answer.coverage
        if prepared.reasons and prepared.coverage is not None and prepared.coverage.degraded:
            coverage = coverage.joined(prepared.coverage)
        return ids, scores, coverage, answer.search_ms

    async def _find(
        self,
        serving: Serving,
        vectors: FloatArray,
        k: int,
        terms: Terms,
        params: SearchParams,
        deadline: float,
    ) -> Found:
        """From the cache, or from the shards."""
        found: Found | None = None
        if self._cache.enabled:
            key = cache_key(serving.table.generation, vectors, k, params)
            found = self._cache.get(key)
        if found is None:
            found = await self._fanout.search(
                serving,
                vectors,
                k,
                deadline=deadline,
                params=params,
                min_coverage=terms.min_coverage,
            )
            if self._cache.enabled:
                self._cache.put(key, found)
        return found


def drop_own(ids: IdArray, scores: FloatArray, own: IdArray) -> tuple[IdArray, FloatArray]:
    """Both (n, k), with item own[i] taken out of row i and the rest moved up; new arrays."""
    is_own = ids == own[:, None]
    ids = np.where(is_own, EMPTY_ID, ids)
    scores = np.where(is_own, EMPTY_SCORE, scores)
    order = np.argsort(is_own, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _encoder_of(serving: Serving) -> Encoder:
    encoder, table = serving.encoder, serving.table
    if encoder is None:
        raise InvalidInput(
            "this generation has no query encoder",
            field="features",
            hint="its vectors were imported; send vectors or item_ids",
        )
    if encoder.model_version != table.model_version:
        raise VersionMismatch(
            "the query encoder is of another model than the index",
            expected=table.model_version,
            got=encoder.model_version,
            hint="build and publish a generation from one model",
        )
    return encoder


async def _encode(encoder: Encoder, features: list[dict[str, Any]]) -> FloatArray:
    if len(features) <= ENCODE_IN_LOOP:
        return encoder.encode(features)
    return await asyncio.to_thread(encoder.encode, features)


def _empty(n: int, k: int) -> tuple[IdArray, FloatArray]:
    return np.full((n, k), EMPTY_ID), np.full((n, k), EMPTY_SCORE)
