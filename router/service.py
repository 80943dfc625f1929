"""The life of a query without HTTP: check, encode or look up, fan out, answer.

A query is pinned to one table, encoder and set of connections, and has one deadline, counted from
its arrival. Requests beyond ``max_in_flight`` are refused before any work is done on them.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from shardline.router.asked_seq import pinned_with
from shardline.router.contract import ItemAnswer, Reason
from shardline.router.encoder.item_encoder import ItemEncoder
from shardline.router.encoder_loading import EncoderLoader
from shardline.router.excluded import (
    history_names,
    num_excluded,
    off_loop,
    with_history,
    without_own,
)
from shardline.router.experiments.arm_outcomes import ArmOutcomes
from shardline.router.experiments.assignment import Experiments
from shardline.router.experiments.event_log import EventLog
from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.snapshot import (
    Encoder,
    TableSnapshot,
    load_item_encoder,
    load_query_encoder,
)
from shardline.router.finding import Finder
from shardline.router.item_queries import ItemQueries, item_queries
from shardline.router.limits import InFlightLimit, check_size, check_timeout_ms, default_timeout_ms
from shardline.router.lists.list_paths import lists_folder
from shardline.router.lists.list_service import Lists
from shardline.router.one_item import read_item
from shardline.router.past_items import encoded
from shardline.router.query import (
    Merged,
    QueryKind,
    ResolvedQuery,
    SearchAnswer,
)
from shardline.router.readiness import Readiness
from shardline.router.rearrange.rearranger import Rearranger
from shardline.router.recall_watch import RecallWatch
from shardline.router.returned import bring_returned
from shardline.router.router_config import RouterConfig
from shardline.router.shortfall import shortfall_reasons
from shardline.router.text.query_texts import with_vectors
from shardline.router.text.text_encoding import TextEncoding
from shardline.router.write_service import WriteService
from shardline.shards.core.errors import (
    ShardlineError,
)
from shardline.shards.core.messages import Absence, RoutingTable
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
from shardline.shards.core.schema import (
    EMPTY_ID,
    check_ids,
    query_vectors,
)

logger = logging.getLogger(__name__)

SEARCH_SHARE = 0.8  # of the whole time, where attributes are to be fetched after the search
LOOK_UP_SHARE = 0.5  # of the time left: a slow shard must leave some for the search itself
STAGES_OF_ONE_IN = 8  # searches whose stages are timed; all have their whole time taken


def _share_of(deadline: float, share: float) -> float:
    """The moment, on the event loop's clock, at which this share of the time left is used up."""
    now = asyncio.get_running_loop().time()
    return now + share * (deadline - now)


class SearchService:
    """Answers queries on the newest routing table applied. All methods run in one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        secret: bytes,
        *,
        load_encoder: Callable[[RoutingTable], Encoder | None] = load_query_encoder,
        load_items: Callable[[RoutingTable], ItemEncoder | None] = load_item_encoder,
        rng: random.Random | None = None,
        wall: Callable[[], float] = time.time,
        events_folder: Path | None = None,
    ) -> None:
        """wall: seconds since 1970, for the ages of dates that boosts name. events_folder: where
        events are stored; None: they are not."""
        self.config = config
        self.recorder = Recorder()
        rng = rng or random.Random()
        self._fanout = Fanout(secret, config, rng, self.recorder)
        self.experiments = Experiments(config.experiments)
        self.events = EventLog(events_folder, config.events_mib << 20, self.recorder)
        self._outcomes = ArmOutcomes(self.recorder, self.events, config.event_share)
        self.watch = RecallWatch(
            self._fanout,
            self.recorder,
            config.watch_interval_s,
            rng,
            arms=self.experiments.all_arms,
            on_sample=self._outcomes.watched,
        )
        self._encoders = EncoderLoader(
            load_encoder, lambda table: table.encoder_checksum, "query encoder"
        )
        self._item_encoders = EncoderLoader(
            load_items, lambda table: table.item_encoder_checksum, "item encoder"
        )
        self._in_flight = InFlightLimit(config.max_in_flight, self.recorder)
        # why the controller publishes no newer table; None: nothing hinders it
        self.controller_trouble: Absence | None = None
        # what the index needs, by what the controller has heard of all routers and shards
        self.repairs: tuple[Absence, ...] = ()
        # around bodies that come in pieces: slow ones must not count as requests in flight
        self.arriving = InFlightLimit(config.max_in_flight, self.recorder)
        self._searches = 0
        self.lists = Lists(config, self.recorder, self._lists_root)
        self._readiness = Readiness(self._fanout)
        self._finder = Finder(self._fanout, self.watch, config.cache_bytes)
        self._rearranger = Rearranger(self._fanout, self._finder, config.max_k, wall)
        self.texts = TextEncoding(
            config.text_encoder,
            max_waiting=config.text_max_waiting,
            threads=config.text_threads,
        )
        self.writes = WriteService(config, self._fanout, self.recorder, self._finder.wrote)

    async def apply(self, table: RoutingTable) -> bool:
        """Switches to a newer table and its encoders in one step; False when not newer.

        An encoder that does not load keeps no table from being served: queries, or writes, by
        features fail.
        """
        self.texts.begin()
        current = self._fanout.snapshot
        if current is not None and table.version <= current.table.version:
            return False
        if current is not None and current.table.generation == table.generation:
            encoder, items = current.encoder, current.items
        else:
            before = current.table if current else None
            encoder, items = await asyncio.gather(
                self._encoders.of_next(before, current.encoder if current else None, table),
                self._item_encoders.of_next(before, current.items if current else None, table),
            )
        applied = await self._fanout.apply(table, encoder, items)
        if applied:
            self._finder.serves(table.generation)
        return applied

    async def mend_encoder(self) -> bool:
        """Loads encoders that did not load, whose files may have been restored meanwhile, and those
        that are still another generation's; whether there is nothing to mend now."""
        snapshot = self._fanout.snapshot
        if snapshot is None:
            return True
        encoder = await self._encoders.mended(snapshot.encoder, snapshot.table)
        items = await self._item_encoders.mended(snapshot.items, snapshot.table)
        current = self._fanout.snapshot
        if current is not None and current.table.generation == snapshot.table.generation:
            current.encoder, current.items = encoder, items
        return self._encoders.is_whole(encoder, snapshot.table) and self._item_encoders.is_whole(
            items, snapshot.table
        )

    async def close(self) -> None:
        await self.watch.close()
        await self.texts.close()
        await self.lists.close()
        await self._fanout.close()
        await self._readiness.ended()
        await self.events.close()

    def admit(self) -> InFlightLimit:
        """Around all work on a request; ``InFlightLimit`` says when it raises."""
        return self._in_flight

    async def search(
        self,
        query: ResolvedQuery,
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
            Behind: no shard, or not this router, is as new as ``min_seq``.
            DeadlineExceeded, Overloaded, Unavailable: no answer, or too small a coverage.
        """
        began_at = time.perf_counter() if began_at is None else began_at
        deadline = arrived_at + query.timeout_ms / 1000
        try:
            if query.exclude_lists:
                query = await self.lists.excluding(query, _share_of(deadline, LOOK_UP_SHARE))
            pin = self._fanout.pin()
            if query.options.min_seq:
                pin, query = await pinned_with(self._fanout, query, deadline)
            with pin as snapshot:
                table, returned = snapshot.table, None
                wants_more = bool(query.returned or query.original_ids)
                until = deadline
                if wants_more:
                    until = arrived_at + SEARCH_SHARE * (deadline - arrived_at)
                merged, reasons = await self._answer(snapshot, query, until, began_at)
                if wants_more:
                    returned = await bring_returned(
                        self._fanout, self.recorder, snapshot, merged, query, deadline
                    )
        except ShardlineError as error:
            self.count_rejected(error)
            if query.assignment is not None:
                self._outcomes.failed(query.assignment, error.code)
            raise
        took_ms = (time.perf_counter() - began_at) * 1000
        self.recorder.observe(REQUEST_MS, took_ms, query.kind)
        self.recorder.observe(REQUEST_QUERIES, len(merged.ranked.ids))
        self.recorder.observe(COVERAGE, merged.coverage.share)
        if query.assignment is not None:
            ids = merged.ranked.ids
            shape = len(ids), query.k, int((ids != EMPTY_ID).sum())
            self._outcomes.answered(
                query.assignment, request_id=request_id, took_ms=took_ms, shape=shape
            )
        return SearchAnswer(
            ranked=merged.ranked,
            seq=merged.seq,
            generation=table.generation,
            table_version=table.version,
            model_version=table.model_version,
            coverage=merged.coverage,
            took_ms=took_ms,
            search_ms=merged.search_ms,
            reasons=reasons,
            request_id=request_id,
            returned=returned,
            others_share=merged.others_share if query.options.background else None,
            considered=None if merged.rearranged is None else merged.rearranged.considered,
            arms=() if query.assignment is None else query.assignment.arms,
        )

    def count_rejected(self, error: ShardlineError) -> None:
        """One query more that was not answered; whoever refuses a body counts it here too."""
        self.recorder.count(REJECTED, error.code)

    async def item(
        self, item_id: int, *, arrived_at: float, timeout_ms: float | None = None
    ) -> ItemAnswer:
        """The stored vector and the attributes of one item; timeout_ms None stands for the default.

        Raises:
            InvalidInput: timeout_ms is out of range.
            NotFound, Unavailable: as ``read_item``.
        """
        (checked,) = check_ids([item_id], field="item_id")
        if timeout_ms is None:
            timeout_ms = default_timeout_ms(self.config, 1)
        else:
            check_timeout_ms(self.config, timeout_ms)
        deadline = arrived_at + timeout_ms / 1000
        with self._fanout.pin() as snapshot:
            return await read_item(self._fanout, snapshot, int(checked), deadline)

    async def heard_ready(self) -> tuple[bool, dict[str, Any]]:
        """``ready``, after shards were asked whether they answer."""
        await self._readiness.hear()
        return self.ready()

    @property
    def cluster_id(self) -> str | None:
        """Of the cluster whose routing table is served; None: none has come yet."""
        snapshot = self._fanout.snapshot
        return None if snapshot is None else snapshot.table.cluster_id

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Whether queries can be answered now, and why or how completely, for JSON.

        One shard that answers is enough: partial answers say so themselves, and taking every router
        out of the load balancer because one shard restarts would turn them into no answers.
        """
        snapshot = self._fanout.snapshot
        if snapshot is None:
            return False, {"ready": False, "reason": "no routing table yet"}
        connected = snapshot.connected_shards > 0
        cluster_id = snapshot.table.cluster_id
        return connected, {"ready": connected, "cluster_id": cluster_id, **snapshot.connectivity()}

    def status(self) -> dict[str, Any]:
        """What is being served, for JSON.

        Raises:
            Unavailable: no routing table has come yet.
        """
        with self._fanout.pin() as snapshot:
            described = snapshot.describe()
            if self.controller_trouble is not None:
                trouble = {"about": "controller", **asdict(self.controller_trouble)}
                described["warnings"].append(trouble)
            wanted = getattr(snapshot.encoder, "text_encoders", {})
            if (missing := self.texts.trouble(set(wanted.values()))) is not None:
                described["warnings"].append({"about": "text_encoder", **asdict(missing)})
            quality = self.watch.quality()
            return {
                **described,
                "text_encoder": self.texts.describe(),
                "quality": None if quality is None else asdict(quality),
                "experiments": [
                    {"experiment": name, "arm": arm, "quality": found and asdict(found)}
                    for (name, arm), found in self.watch.arm_qualities().items()
                ],
                "repairs": [asdict(repair) for repair in self.repairs],
                "in_flight": self._in_flight.taken,
                "cache": asdict(self._finder.stats) if self._finder.keeps_answers else None,
            }

    def refresh_metrics(self) -> None:
        """Sets the gauges, and the counters of what is counted elsewhere, for an export."""
        recorder, stats, snapshot = self.recorder, self._finder.stats, self._fanout.snapshot
        recorder.set(IN_FLIGHT, self._in_flight.taken)
        recorder.set(CACHE_BYTES, stats.bytes)
        recorder.total(CACHE_HITS, stats.hits)
        recorder.total(CACHE_MISSES, stats.misses)
        self.watch.refresh_metrics()
        if snapshot is not None:
            recorder.set(GENERATION, snapshot.table.generation)
            recorder.set(SHARDS_CONNECTED, snapshot.connected_shards)

    def _lists_root(self) -> Path:
        """Raises Unavailable: no routing table has come yet."""
        with self._fanout.pin() as snapshot:
            return lists_folder(snapshot.table.generation_dir)

    # Steps

    async def _answer(
        self, snapshot: TableSnapshot, query: ResolvedQuery, deadline: float, began_at: float
    ) -> tuple[Merged, tuple[Reason, ...]]:
        """The answer, and why queries that could not be asked were not."""
        self._searches += 1
        is_timed = self._searches % STAGES_OF_ONE_IN == 0
        parsed_at = time.perf_counter()
        items: ItemQueries | None = None
        if query.kind is QueryKind.ITEM_IDS:
            items = await self._look_up(snapshot, query, deadline)
            vectors = items.vectors
            if query.excluded:
                num_ids, own = num_excluded(query.excluded), check_ids(query.values)
                query = await off_loop(num_ids, without_own, query, own)
        else:
            values = query.values
            if query.kind is not QueryKind.VECTORS:
                query = await with_vectors(self.texts, snapshot, query, deadline)
                values = await encoded(self._fanout, snapshot, query, deadline)
                if query.exclude_history:
                    query = await _without_history(snapshot, query)
            table = snapshot.table
            vectors = query_vectors(values, dim=table.dim, metric=table.metric, field=query.kind)
        check_size(vectors, query.kind, num_excluded(query.excluded))
        prepared_at = time.perf_counter()
        if items is not None:
            merged = await self._neighbours(snapshot, items, query, deadline)
        elif query.rearrange is not None:
            merged = await self._rearranger.find(snapshot, vectors, query.k, query, deadline)
        else:
            merged = await self._finder.find(snapshot, vectors, query.k, query, deadline)
        if is_timed:
            self.recorder.observe(STAGE_MS, (parsed_at - began_at) * 1000, "parse")
            self.recorder.observe(STAGE_MS, (prepared_at - parsed_at) * 1000, "prepare")
            self.recorder.observe(STAGE_MS, (time.perf_counter() - prepared_at) * 1000, "find")
        if items is None:
            return merged, shortfall_reasons(merged, query.k)
        unanswered = {reason.query for reason in items.reasons}
        return merged, items.reasons + shortfall_reasons(merged, query.k, unanswered)

    async def _look_up(
        self, snapshot: TableSnapshot, query: ResolvedQuery, deadline: float
    ) -> ItemQueries:
        item_ids = check_ids(query.values)
        found = await self._fanout.fetch(
            snapshot,
            np.unique(item_ids),
            deadline=_share_of(deadline, LOOK_UP_SHARE),
            min_coverage=query.min_coverage,
            min_seq=query.options.min_seq,
        )
        return item_queries(item_ids, found, snapshot.table.metric)

    async def _neighbours(
        self, snapshot: TableSnapshot, items: ItemQueries, query: ResolvedQuery, deadline: float
    ) -> Merged:
        """Of all items, those that could not be asked being empty."""
        merged: Merged | None = None
        if items.live.size:
            # one more, because an item-to-item query finds itself
            k, live = query.k + 1, items.live
            if query.rearrange is None:
                merged = await self._finder.find(snapshot, items.vectors, k, query, deadline, live)
            else:
                merged = await self._rearranger.find(
                    snapshot, items.vectors, query.k, query, deadline, live, items.own
                )
        return items.spread(merged, query.k)


async def _without_history(snapshot: TableSnapshot, query: ResolvedQuery) -> ResolvedQuery:
    """A query by features that the snapshot's encoder has taken, with its histories excluded.

    Raises:
        InvalidInput: the encoder has no history.
    """
    features = getattr(snapshot.encoder, "features", ())
    named = history_names(features)
    num_ids = sum(len(values[name] or ()) for values in query.values for name in named)
    num_ids += num_excluded(query.excluded)  # which each query's history is put together with
    found: ResolvedQuery = await off_loop(num_ids, with_history, query, features)
    return found
