"""The routing table in use, the connections it runs on, and searches and look-ups over them.

``apply`` replaces the table in one step; a query that has begun ends on the table, encoder and
connections it began with. How one question is asked is in ``ask``, who shares it in ``coalesce``.
"""

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from typing import Any

import msgpack
import numpy as np

from shardline.router.contract import Degraded
from shardline.router.encoder.item_encoder import ItemEncoder
from shardline.router.excluded import by_shard, num_excluded, off_loop
from shardline.router.fanout.ask import Ask, Hearing
from shardline.router.fanout.attempts import Redundancy
from shardline.router.fanout.choice import Chooser, Replicas
from shardline.router.fanout.clock import Attention, Clock, running_clock
from shardline.router.fanout.coalesce import Coalescer, LaneKey
from shardline.router.fanout.connection import ShardConnection
from shardline.router.fanout.hedging import Paces
from shardline.router.fanout.snapshot import (
    Encoder,
    TableSnapshot,
    UnusableEncoder,
)
from shardline.router.query import FoundAttributes, FoundItems, Merged
from shardline.router.router_config import RouterConfig
from shardline.shards.core.attribute_kinds import AttributeKind
from shardline.shards.core.errors import DeadlineExceeded, Unavailable, too_much_returned
from shardline.shards.core.messages import (
    MAX_RETURNED_BYTES,
    AttributesReply,
    AttributesRequest,
    FetchReply,
    FetchRequest,
    ReplicaRoute,
    RoutingTable,
)
from shardline.shards.core.metrics import Recorder
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.wire.frames import encode_frame

logger = logging.getLogger(__name__)

LATE_MS = 50.0  # beyond the time after which a shard is late, when it is asked whether it answers
# How long a table of another generation waits, beyond ``switch_wait_ms``, for connections that the
# table in use still has: far below the minute for which the generation before lives on.
GENERATION_WAIT_S = 10.0
LOOK_S = 0.02  # between two looks at them
_KINDS = frozenset(AttributeKind)
IDS_AT_A_TIME = 1024  # of a question for attributes: a millisecond or so of a shard for each name


class Fanout:
    """All methods run in one event loop. ``rng`` spreads reconnections of many routers."""

    def __init__(
        self,
        secret: bytes,
        config: RouterConfig,
        rng: random.Random,
        recorder: Recorder | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._secret = secret
        self._config = config
        self._rng = rng
        self._given_clock = clock
        self._snapshot: TableSnapshot | None = None
        self._attention: Attention | None = None
        self._redundancy: Redundancy | None = None
        self._recorder = recorder or Recorder()
        self._holders: Counter[ShardConnection] = Counter()
        self._request_ids = itertools.count(1)
        self._coalescer = Coalescer(self._request_ids, self._recorder, clock)
        self._applying = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def snapshot(self) -> TableSnapshot | None:
        return self._snapshot

    async def apply(
        self,
        table: RoutingTable,
        encoder: Encoder | UnusableEncoder | None,
        items: ItemEncoder | UnusableEncoder | None = None,
    ) -> bool:
        """Switches to a table of a higher version; False when the one in use is as new.

        New connections get ``switch_wait_ms`` to come up while the old table still serves; those to
        another generation longer, GENERATION_WAIT_S, as long as fewer of its rows can be asked.
        Connections to an unchanged address and epoch are kept.
        """
        async with self._applying:
            if self._snapshot is not None and table.version <= self._snapshot.table.version:
                return False
            shards = self._connect(table)
            snapshot = TableSnapshot(table, encoder, shards, self._redundancy, items=items)
            self._holders.update(snapshot.all_connections)
            try:
                await self._wait_settled(snapshot)
                await self._wait_covering(snapshot)
            except BaseException:
                self._release(snapshot)
                raise
            old, self._snapshot = self._snapshot, snapshot
            if old is not None and old.running == 0:
                self._release(old)
        logger.info(
            "routing table %d: generation %d, %d shards, %d rows",
            *(table.version, table.generation, len(table.shards), table.rows),
        )
        return True

    def pin(self) -> "Pin":
        """A context: what a query must use for all it does, kept alive until the block ends.

        Raises:
            Unavailable: no routing table has come yet.
        """
        snapshot = self._snapshot
        if snapshot is None:
            raise Unavailable("no routing table yet", hint="no generation has been published")
        return Pin(self, snapshot)

    def unpin(self, snapshot: TableSnapshot) -> None:
        """One query fewer runs on it."""
        snapshot.running -= 1
        if snapshot.running == 0 and snapshot is not self._snapshot:
            self._release(snapshot)

    async def search(
        self,
        queries: FloatArray,
        key: LaneKey,
        *,
        deadline: float,
        excluded: Sequence[IdArray] = (),
    ) -> Merged:
        """queries (n, dim) float32, checked; deadline on the clock. excluded: as of
        ``ResolvedQuery``.

        Raises:
            InvalidInput: a shard says that the caller's request is wrong.
            DeadlineExceeded, Overloaded, Unavailable: no answer, or less coverage than asked for.
        """
        self._remaining_ms(deadline)
        if not excluded:
            return await self._coalescer.search(queries, key, deadline)
        num_ids, partition = num_excluded(excluded), key.snapshot.table.partition
        parts = await off_loop(num_ids, by_shard, excluded, partition)
        return await self._coalescer.search(queries, key, deadline, parts, num_ids)

    async def fetch(
        self,
        snapshot: TableSnapshot,
        item_ids: IdArray,
        *,
        deadline: float,
        min_coverage: float = 0.0,
        min_seq: tuple[int, ...] = (),
    ) -> FoundItems:
        """The stored vectors of those of item_ids (n,) int64 that some shard holds.

        min_coverage holds when some item is not found: what is found is whole in any case.
        min_seq: as of ``SearchOptions``.

        Raises:
            DeadlineExceeded, Overloaded, Behind, Unavailable: no answer, or less coverage than
                asked for.
        """
        dim = snapshot.table.dim
        request = FetchRequest(
            item_ids=item_ids, timeout_ms=self._remaining_ms(deadline), min_seq=min_seq
        )
        ask = await self._asked(snapshot, [request], deadline)
        answered, coverage = ask.collect(
            FetchReply, lambda r: r.vectors.shape == (len(r.item_ids), dim)
        )
        found = [reply.item_ids for _, reply in answered]
        is_whole = bool(found) and bool(np.isin(item_ids, np.concatenate(found)).all())
        ask.require(coverage, 0.0 if is_whole else min_coverage)
        return FoundItems(
            item_ids=np.concatenate(found),
            vectors=np.concatenate([reply.vectors for _, reply in answered]),
            shards=np.concatenate(
                [np.full(len(reply.item_ids), route.shard) for route, reply in answered]
            ),
            coverage=coverage,
            seq=tuple(ask.seq),
        )

    async def hear(self, snapshot: TableSnapshot, heard: asyncio.Event) -> None:
        """Asks every shard for nothing, so that those that are silent are known to be.

        Sets ``heard`` with the first answer. Returns when all have answered, or are late: after
        ``late_after_ms`` and LATE_MS.
        """
        wait_ms = self._config.late_after_ms + LATE_MS
        request = FetchRequest(item_ids=np.empty(0, np.int64), timeout_ms=wait_ms)
        kind = partial(Hearing, heard=heard)
        await self._asked(snapshot, [request], self.clock.time() + wait_ms / 1000, kind)

    async def attributes(
        self,
        snapshot: TableSnapshot,
        item_ids: IdArray,
        names: tuple[str, ...],
        *,
        deadline: float,
        seen: tuple[int | None, ...] = (),
    ) -> FoundAttributes:
        """The named attributes of those of item_ids (n,) int64 that their shards bring in time; no
        names stand for all.

        seen: of each shard, as of ``Merged``, the writes of what the items were found in. No older
        state answers, on whichever replica.

        Some ids at a time, so that a large answer does not hold up the searches of others.

        Raises:
            InvalidInput: no such attribute, or more than MAX_RETURNED_BYTES.
        """
        values: dict[str, dict[int, Any]] = {name: {} for name in names}
        missing: dict[Degraded, None] = {}
        held: list[IdArray] = [item_ids[:0]]
        min_seq = tuple(seq or 0 for seq in seen)
        homes, size = snapshot.table.partition.shard_of(item_ids), 0
        seq: tuple[int | None, ...] = ()
        kinds: dict[str, AttributeKind] = {}

        def taken(reply: AttributesReply) -> bool:
            nonlocal size
            columns = _columns_of(reply, len(reply.names))
            if names and reply.names != names:
                return False
            if len(reply.kinds) != len(reply.names) or not _KINDS.issuperset(reply.kinds):
                return False
            kinds.update(zip(reply.names, map(AttributeKind, reply.kinds), strict=True))
            for name, column in zip(reply.names, columns or (), strict=columns is not None):
                found = zip(reply.item_ids.tolist(), column, strict=True)
                values.setdefault(name, {}).update(found)
            size += len(reply.values)
            held.append(reply.item_ids)
            return columns is not None

        for start in range(0, max(1, len(item_ids)), IDS_AT_A_TIME):
            part = slice(start, start + IDS_AT_A_TIME)
            try:
                timeout_ms = self._remaining_ms(deadline)
            except DeadlineExceeded as error:
                late = np.unique(homes[start:]).tolist()
                why = {"code": error.code, "text": error.message}
                missing |= {Degraded(shard=shard, **why): None for shard in late}
                break
            requests = [
                AttributesRequest(
                    item_ids=item_ids[part][homes[part] == route.shard],
                    names=names,
                    timeout_ms=timeout_ms,
                    min_seq=min_seq,
                )
                for route in snapshot.table.shards
            ]
            ask = await self._asked(snapshot, requests, deadline)
            _, coverage = ask.collect(AttributesReply, taken)
            seq = tuple(ask.seq)
            asked = set(homes[part].tolist())
            missing |= {each: None for each in coverage.degraded if each.shard in asked}
            if size > MAX_RETURNED_BYTES:
                raise too_much_returned(MAX_RETURNED_BYTES)
        return FoundAttributes(
            item_ids=np.concatenate(held),
            values=values,
            size=size,
            missing=tuple(missing),
            seq=seq,
            kinds=kinds,
        )

    async def _asked(
        self,
        snapshot: TableSnapshot,
        requests: Sequence[FetchRequest] | Sequence[AttributesRequest],
        deadline: float,
        kind: Callable[..., Ask] = Ask,
    ) -> Ask:
        """A question of one caller: a request to each shard, or one that all get. Nobody's answer
        is awaited any longer."""
        request_id = next(self._request_ids)
        done: asyncio.Event = asyncio.Event()
        ask = kind(snapshot, request_id, deadline=deadline, clock=self.clock, on_done=done.set)
        frames = [encode_frame(request_id, request) for request in requests]
        ask.send(frames, requests[0])
        try:
            await done.wait()
        finally:
            ask.close()  # for a caller that was cancelled
        return ask

    async def close(self) -> None:
        """Drops every connection; queries still running end as unavailable."""
        if self._attention is not None:
            self._attention.stop()
            self._attention = self._redundancy = None
        self._snapshot = None
        await asyncio.gather(*(connection.close() for connection in list(self._holders)))
        self._holders.clear()
        await asyncio.gather(*self._closing)

    @property
    def clock(self) -> Clock:
        """Deadlines are on it."""
        return self._given_clock or running_clock()

    def next_request_id(self) -> int:
        """Of a frame, and unique among all that this router sends."""
        return next(self._request_ids)

    def _remaining_ms(self, deadline: float) -> float:
        """Raises DeadlineExceeded when nothing remains."""
        remaining = deadline - self.clock.time()
        if remaining <= 0:
            raise DeadlineExceeded("deadline exceeded before the shards were asked")
        return remaining * 1000

    # Connections

    def _connect(self, table: RoutingTable) -> tuple[Replicas, ...]:
        """Of every shard, the connections to its replicas; those to unchanged routes are kept."""
        current = {connection.route: connection for connection in self._holders}
        if self._attention is None:
            self._attention = Attention(self.clock)
            self._redundancy = self._new_redundancy(self._attention)
        attention = self._attention

        def connect(route: ReplicaRoute) -> ShardConnection | None:
            if route.address is None or route in current:
                return current.get(route)
            connection = ShardConnection(
                route,
                secret=self._secret,
                config=self._config,
                rng=self._rng,
                clock=attention,
            )
            connection.start()
            return connection

        return tuple(tuple(map(connect, shard.replicas)) for shard in table.shards)

    def _new_redundancy(self, clock: Attention) -> Redundancy:
        config = self._config
        return Redundancy(
            chooser=Chooser(config.silent_after_ms / 1000, self._rng),
            paces=Paces(config.hedge_share, config.hedge_min_ms / 1000),
            recorder=self._recorder,
            time=clock.time,
        )

    async def _wait_settled(self, snapshot: TableSnapshot) -> None:
        waits = (connection.settled() for connection in snapshot.all_connections)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.switch_wait_ms / 1000):
                await asyncio.gather(*waits)  # ends its tasks with itself, cancelled or late

    async def _wait_covering(self, snapshot: TableSnapshot) -> None:
        """On a busy machine, or where an attempt to connect has failed, searches would find nobody
        to ask, though the generation before still answers all of them."""
        old, ends_at = self._snapshot, self.clock.time() + GENERATION_WAIT_S
        if old is None or old.table.generation == snapshot.table.generation:
            return
        while snapshot.share_connected < old.share_connected and self.clock.time() < ends_at:
            await asyncio.sleep(LOOK_S)
        if snapshot.share_connected < old.share_connected:
            logger.error(
                "generation %d is served with %s connected, after %g s",
                *(snapshot.table.generation, f"{snapshot.share_connected:.0%}", GENERATION_WAIT_S),
            )

    def _release(self, snapshot: TableSnapshot) -> None:
        """Closes the connections that no other table holds."""
        for connection in snapshot.all_connections:
            if connection not in self._holders:
                continue
            self._holders[connection] -= 1
            if self._holders[connection] == 0:
                del self._holders[connection]
                task = asyncio.create_task(connection.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)


def _columns_of(reply: AttributesReply, num_names: int) -> list[list[Any]] | None:
    """A list of values per name, or None where the reply holds something else."""
    wanted = len(reply.item_ids)
    columns: list[list[Any]] = [[]]
    try:
        for values in msgpack.Unpacker(BytesIO(reply.values), strict_map_key=False):
            if len(columns[-1]) >= wanted and values:
                columns.append([])
            columns[-1] += values
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
    if not wanted or (not num_names and columns == [[]]):  # no attributes: no values either
        return [[] for _ in range(num_names)]
    is_whole = len(columns) == num_names and all(len(column) == wanted for column in columns)
    return columns if is_whole else None


class Pin:
    """What ``Fanout.pin`` returns. A class: every query passes here, and a generator costs more."""

    __slots__ = ("_fanout", "_snapshot")

    def __init__(self, fanout: Fanout, snapshot: TableSnapshot) -> None:
        self._fanout = fanout
        self._snapshot = snapshot

    @property
    def table(self) -> RoutingTable:
        return self._snapshot.table

    def __enter__(self) -> TableSnapshot:
        self._snapshot.running += 1
        return self._snapshot

    def __exit__(self, *_: object) -> None:
        self._fanout.unpin(self._snapshot)
