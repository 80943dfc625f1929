"""Asking every shard at once: one frame, one deadline, whatever came by then, and its coverage.

Also the home of the routing table: ``apply`` replaces it in one step, and a query that has begun
ends on the table, encoder and connections it began with.
"""

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from router.config import RouterConfig
from router.connection import ShardConnection
from router.merge import merge_top_k
from router.messages import Coverage
from router.serving import Encoder, Serving
from shards.errors import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    ProtocolError,
    Unavailable,
)
from shards.schema import FloatArray, IdArray
from shards.types import (
    ErrorReply,
    FetchReply,
    FetchRequest,
    RoutingTable,
    SearchParams,
    SearchReply,
    SearchRequest,
    ShardRoute,
)
from shards.wire import Message, decode_payload, encode_frame

logger = logging.getLogger(__name__)

# Elements sorted in the event loop, about 10 ms; a larger merge goes to a thread so that other
# requests, health checks among them, are not held up.
MERGE_IN_LOOP = 200_000
DEGRADED_IN_HINT = 8  # shards named in an error; coverage names them all

R = TypeVar("R", SearchReply, FetchReply)


@dataclass(frozen=True, slots=True, kw_only=True)
class FanoutAnswer:
    """ids (n, k) int64 and scores (n, k) float32 in answer order, and what they are based on."""

    ids: IdArray
    scores: FloatArray
    coverage: Coverage
    generation: int
    model_version: str
    search_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchAnswer:
    """The items that were found, in no order: item_ids (m,), vectors (m, dim), shards (m,)."""

    item_ids: IdArray
    vectors: FloatArray
    shards: IdArray
    coverage: Coverage


class Gather:
    """One undecoded reply per shard, or why there is none; ``done`` resolves with the last."""

    __slots__ = ("done", "expired", "missing", "replies")

    def __init__(self, num_shards: int) -> None:
        self.replies: list[bytes | Unavailable | None] = [None] * num_shards
        self.missing = num_shards
        self.expired = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put(self, position: int, reply: bytes | Unavailable) -> None:
        if self.replies[position] is not None:
            return
        self.replies[position] = reply
        self.missing -= 1
        if self.missing == 0 and not self.done.done():
            self.done.set_result(None)

    def expire(self) -> None:
        """Whoever has not answered by now is left out."""
        self.expired = True
        for position, reply in enumerate(self.replies):
            if reply is None:
                self.put(position, DeadlineExceeded("deadline exceeded"))


class Fanout:
    """All methods run in one event loop. ``rng`` spreads reconnections of many routers."""

    def __init__(self, secret: bytes, config: RouterConfig, rng: random.Random) -> None:
        self._secret = secret
        self._config = config
        self._rng = rng
        self._serving: Serving | None = None
        self._holders: Counter[ShardConnection] = Counter()
        self._request_ids = itertools.count(1)
        self._applying = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> Serving | None:
        return self._serving

    async def apply(self, table: RoutingTable, encoder: Encoder | None) -> bool:
        """Switches to a table of a higher version; False when the one in use is as new.

        New connections get ``switch_wait_ms`` to come up while the old table still serves.
        Connections to an unchanged address and epoch are kept.
        """
        async with self._applying:
            if self._serving is not None and table.version <= self._serving.table.version:
                return False
            serving = Serving(table, encoder, tuple(self._connect(table)))
            self._holders.update(c for c in serving.connections if c is not None)
            try:
                await self._wait_settled(serving)
            except BaseException:
                self._release(serving)
                raise
            old, self._serving = self._serving, serving
            if old is not None and old.running == 0:
                self._release(old)
        logger.info(
            "routing table %d: generation %d, %d shards, %d rows",
            *(table.version, table.generation, len(table.shards), table.rows),
        )
        return True

    @contextmanager
    def pin(self) -> Iterator[Serving]:
        """What a query must use for all it does, kept alive until the block ends.

        Raises:
            Unavailable: no routing table has come yet.
        """
        serving = self._serving
        if serving is None:
            raise Unavailable("no routing table yet", hint="no generation has been published")
        serving.running += 1
        try:
            yield serving
        finally:
            serving.running -= 1
            if serving.running == 0 and serving is not self._serving:
                self._release(serving)

    async def search(
        self,
        serving: Serving,
        queries: FloatArray,
        k: int,
        *,
        deadline: float,
        params: SearchParams,
        min_coverage: float = 0.0,
    ) -> FanoutAnswer:
        """queries (n, dim) float32, checked; deadline on the event loop's clock.

        Raises:
            InvalidInput: a shard says that the caller's request is wrong.
            DeadlineExceeded, Overloaded, Unavailable: no answer, or less coverage than asked for.
        """
        request = SearchRequest(
            queries=queries, k=k, timeout_ms=_remaining_ms(deadline), params=params
        )
        shape = (len(queries), k)
        gather = await self._ask(serving, request, deadline)
        answered, coverage = self._collect(
            serving, gather, SearchReply, lambda r: r.ids.shape == r.scores.shape == shape
        )
        _require(coverage, min_coverage, gather)
        scores = [reply.scores for _, reply in answered]
        ids = [reply.ids for _, reply in answered]
        if len(answered) * len(queries) * k > MERGE_IN_LOOP:
            top_scores, top_ids = await asyncio.to_thread(merge_top_k, scores, ids, k)
        else:
            top_scores, top_ids = merge_top_k(scores, ids, k)
        return FanoutAnswer(
            ids=top_ids,
            scores=top_scores,
            coverage=coverage,
            generation=serving.table.generation,
            model_version=serving.table.model_version,
            search_ms=max(reply.search_ms for _, reply in answered),
        )

    async def fetch(
        self,
        serving: Serving,
        item_ids: IdArray,
        *,
        deadline: float,
        min_coverage: float = 0.0,
    ) -> FetchAnswer:
        """The stored vectors of those of item_ids (n,) int64 that some shard holds.

        min_coverage holds when some item is not found: what is found is whole in any case.

        Raises:
            DeadlineExceeded, Overloaded, Unavailable: no answer, or less coverage than asked for.
        """
        dim = serving.table.dim
        request = FetchRequest(item_ids=item_ids, timeout_ms=_remaining_ms(deadline))
        gather = await self._ask(serving, request, deadline)
        answered, coverage = self._collect(
            serving, gather, FetchReply, lambda r: r.vectors.shape == (len(r.item_ids), dim)
        )
        found = [reply.item_ids for _, reply in answered]
        is_whole = bool(found) and bool(np.isin(item_ids, np.concatenate(found)).all())
        _require(coverage, 0.0 if is_whole else min_coverage, gather)
        return FetchAnswer(
            item_ids=np.concatenate(found),
            vectors=np.concatenate([reply.vectors for _, reply in answered]),
            shards=np.concatenate(
                [np.full(len(reply.item_ids), route.shard) for route, reply in answered]
            ),
            coverage=coverage,
        )

    async def close(self) -> None:
        """Drops every connection; queries still running end as unavailable."""
        self._serving = None
        await asyncio.gather(*(connection.close() for connection in list(self._holders)))
        self._holders.clear()
        await asyncio.gather(*self._closing)

    # Connections

    def _connect(self, table: RoutingTable) -> Iterator[ShardConnection | None]:
        current = {_identity(c.route, c.generation): c for c in self._holders}
        for route in table.shards:
            if route.address is None:
                yield None
                continue
            connection = current.get(_identity(route, table.generation))
            if connection is None:
                connection = ShardConnection(
                    route,
                    table.generation,
                    secret=self._secret,
                    config=self._config,
                    rng=self._rng,
                )
                connection.start()
            yield connection

    async def _wait_settled(self, serving: Serving) -> None:
        waits = [asyncio.create_task(c.settled()) for c in serving.connections if c is not None]
        if waits:
            _, late = await asyncio.wait(waits, timeout=self._config.switch_wait_ms / 1000)
            for task in late:
                task.cancel()

    def _release(self, serving: Serving) -> None:
        """Closes the connections that no other table holds."""
        for connection in serving.connections:
            if connection is None or connection not in self._holders:
                continue
            self._holders[connection] -= 1
            if self._holders[connection] == 0:
                del self._holders[connection]
                task = asyncio.create_task(connection.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    # One question to all shards

    async def _ask(
        self, serving: Serving, request: SearchRequest | FetchRequest, deadline: float
    ) -> Gather:
        request_id = next(self._request_ids)
        frame = encode_frame(request_id, request)  # once: the same bytes for every shard
        gather = Gather(len(serving.connections))
        asked = []
        for position, connection in enumerate(serving.connections):
            if connection is None:
                gather.put(position, Unavailable("no process serves it"))
                continue
            try:
                connection.request(request_id, frame, partial(gather.put, position))
            except Unavailable as error:
                gather.put(position, error)
            else:
                asked.append(connection)
        if gather.missing:
            timer = asyncio.get_running_loop().call_at(deadline, gather.expire)
            try:
                await gather.done
            finally:
                timer.cancel()
                if gather.expired or gather.missing:  # missing: the caller itself was cancelled
                    for connection in asked:
                        connection.abandon(request_id)
        return gather

    def _collect(
        self, serving: Serving, gather: Gather, kind: type[R], well_formed: Callable[[R], bool]
    ) -> tuple[list[tuple[ShardRoute, R]], Coverage]:
        """The replies worth using with their routes, and the coverage they amount to."""
        answered: list[tuple[ShardRoute, R]] = []
        degraded = []
        rows_asked = rows_answered = 0
        for position, route in enumerate(serving.table.shards):
            reply = _decoded(gather.replies[position])
            rows = reply.rows if isinstance(reply, SearchReply) else route.rows
            if isinstance(reply, kind) and well_formed(reply):
                answered.append((route, reply))
                rows_answered += rows
                rows_asked += rows
                continue
            error = _as_error(reply, serving.connections[position])
            gather.replies[position] = error
            degraded.append(f"shard {route.shard}: {error.message}")
            rows_asked += route.rows
        return answered, Coverage(
            shards_asked=len(serving.table.shards),
            shards_answered=len(answered),
            rows_asked=rows_asked,
            rows_answered=rows_answered,
            degraded=degraded,
        )


def _decoded(reply: bytes | Unavailable | None) -> Message | Unavailable:
    if not isinstance(reply, bytes):
        assert reply is not None, "every shard has answered or expired"
        return reply
    try:
        return decode_payload(reply)
    except ProtocolError as error:
        return _BadReply(f"broke the protocol ({error.message})")


class _BadReply(Unavailable):
    """A payload that is no message: the link it came by is to be dropped."""


def _as_error(reply: Message | Unavailable, connection: ShardConnection | None) -> Unavailable:
    """Why this reply is not part of the answer; drops a link that sent nonsense."""
    if not isinstance(reply, Unavailable | ErrorReply):
        reply = _BadReply("broke the protocol (wrong reply)")
    if isinstance(reply, _BadReply):
        assert connection is not None
        connection.fail(reply.message)
    if isinstance(reply, Unavailable):
        return reply
    if reply.code == InvalidInput.code:
        raise InvalidInput(reply.message, field=reply.field)
    if reply.code == DeadlineExceeded.code:
        return DeadlineExceeded("deadline exceeded")
    if reply.code == Overloaded.code:
        return Overloaded("overloaded")
    logger.warning("a shard failed a request: %s: %s", reply.code, reply.message)
    return Unavailable(f"failed ({reply.code})")


def _identity(route: ShardRoute, generation: int) -> tuple[int, int, int, tuple[str, int] | None]:
    return generation, route.shard, route.epoch, route.address


def _remaining_ms(deadline: float) -> float:
    """Raises DeadlineExceeded when nothing remains."""
    remaining = deadline - asyncio.get_running_loop().time()
    if remaining <= 0:
        raise DeadlineExceeded("deadline exceeded before the shards were asked")
    return remaining * 1000


def _require(coverage: Coverage, min_coverage: float, gather: Gather) -> None:
    """Raises what best describes too small a coverage."""
    if coverage.shards_answered and coverage.share >= min_coverage:
        return
    kinds = {type(reply) for reply in gather.replies if isinstance(reply, Unavailable)}
    kind = kinds.pop() if len(kinds) == 1 else Unavailable
    raise kind(
        "too few rows answered" if coverage.shards_answered else "no shard answered",
        expected=f"coverage >= {min_coverage:g}" if min_coverage else "an answer from any shard",
        got=f"{coverage.rows_answered} of {coverage.rows_asked} rows",
        hint="; ".join(coverage.degraded[:DEGRADED_IN_HINT]),
    )
