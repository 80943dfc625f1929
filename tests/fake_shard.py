"""A shard server without an index: brute force over its rows, and faults on demand."""

import asyncio
import contextlib
from dataclasses import dataclass, field, replace

import msgpack
import numpy as np
import pyarrow as pa

from shardline.shards.core.errors import InvalidInput, ProtocolError
from shardline.shards.core.filter_language import read_filter
from shardline.shards.core.messages import (
    NO_FILTER,
    AttributesReply,
    AttributesRequest,
    DeleteRequest,
    ErrorReply,
    FetchReply,
    FetchRequest,
    ReplicaKey,
    ReplicaRoute,
    RoutingTable,
    SearchReply,
    SearchRequest,
    ShardRoute,
    UpsertRequest,
    WriteReply,
)
from shardline.shards.core.partition import Partitioning
from shardline.shards.core.schema import EMPTY_ID, EMPTY_SCORE, Metric, Ranked, in_order
from shardline.shards.filters.bound import bind
from shardline.shards.filters.matching import matches
from shardline.shards.wire.frames import HEADER, decode_payload, encode_frame
from shardline.shards.wire.handshake import new_hello, welcome

SECRET = b"a secret of tests"


@dataclass(eq=False, kw_only=True)
class FakeShard:
    """ids (rows,) int64, vectors (rows, dim) float32, compared by inner product.

    Faults, to be set at any time: ``gate`` cleared holds every answer back; ``garbage`` is sent
    instead of the next answers; ``error`` is answered, to fetches only ``fetch_error``; ``short``
    answers with too few columns; ``answers_as`` is the generation that replies claim;
    ``write_error`` is answered to writes only; ``drops`` so many writes: the connection is reset
    before they are applied, or after it (``drops_after``).

    Writes are applied at once, each to new arrays; a key that came before gets its answer again.
    """

    ids: np.ndarray
    vectors: np.ndarray
    shard: int = 0
    replica: int = 0
    generation: int = 1
    epoch: int = 1
    secret: bytes = SECRET
    garbage: bytes | None = None
    error: ErrorReply | None = None
    fetch_error: ErrorReply | None = None
    short: bool = False
    answers_as: int | None = None
    bad_values: bytes | None = None  # instead of attributes
    seq: int = 0
    attributes: dict = field(default_factory=dict)  # of items that were written: item -> its own
    write_error: ErrorReply | None = None
    drops: int = 0
    drops_after: int = 0
    takes_writes: bool = True  # as its route says
    written: dict = field(default_factory=dict)  # key -> its answer
    requests: list = field(default_factory=list)

    def __post_init__(self):
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        self.greeted = 0  # connections that were told who answers, refused ones included
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task] = set()
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0) -> ReplicaRoute:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.route

    @property
    def key(self) -> ReplicaKey:
        return ReplicaKey(self.generation, self.shard, self.replica)

    @property
    def route(self) -> ReplicaRoute:
        return ReplicaRoute(key=self.key, epoch=self.epoch, address=("127.0.0.1", self.port))

    @property
    def shard_route(self) -> ShardRoute:
        return ShardRoute(
            shard=self.shard,
            rows=len(self.ids),
            replicas=(self.route,),
            primary=self.replica if self.takes_writes else None,
        )

    @property
    def connections(self) -> int:
        return len(self._writers)

    def stop_reading(self) -> None:
        for writer in self._writers:
            writer.transport.pause_reading()

    async def kill(self) -> None:
        """As kill -9 does: the port closes and every connection is reset."""
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader, writer) -> None:
        self._tasks.add(asyncio.current_task())
        self._writers.add(writer)
        try:
            await self._greet(reader, writer)
            while True:
                request_id, message = await read_frame(reader)
                self.requests.append(message)
                self.asked.set()
                self._spawn(self._answer(writer, request_id, message))
        except (OSError, EOFError, ProtocolError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(asyncio.current_task())
            writer.close()

    async def _greet(self, reader, writer) -> None:
        hello = new_hello(self.key, epoch=self.epoch)
        writer.write(encode_frame(0, hello))
        self.greeted += 1
        _, proof = await read_frame(reader)
        answer = welcome(proof, self.secret, hello, ("127.0.0.1", self.port))
        writer.write(encode_frame(0, answer))

    def _spawn(self, work) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, writer, request_id, message) -> None:
        await self.gate.wait()
        is_write = isinstance(message, UpsertRequest | DeleteRequest)
        if is_write and self.drops:
            self.drops -= 1
            writer.transport.abort()
            return
        if is_write and self.drops_after:
            self.drops_after -= 1
            self.reply(message)
            writer.transport.abort()
            return
        if self.garbage is not None:
            writer.write(self.garbage)
        else:
            writer.write(encode_frame(request_id, self.error or self.reply(message)))
        with contextlib.suppress(OSError):
            await writer.drain()

    def write(self, message):
        """Applied at once, and once per key."""
        if self.write_error is not None:
            return self.write_error
        if message.key in self.written:
            return self.written[message.key]
        existed = int(np.isin(message.item_ids, self.ids).sum())
        kept = ~np.isin(self.ids, message.item_ids)
        ids, vectors = self.ids[kept], self.vectors[kept]
        for item in message.item_ids.tolist():
            self.attributes.pop(item, None)
        if isinstance(message, UpsertRequest):
            ids = np.concatenate([ids, message.item_ids])
            vectors = np.concatenate([vectors, message.vectors])
            columns = msgpack.unpackb(message.attributes) if message.attributes else {}
            for row, item in enumerate(message.item_ids.tolist()):
                self.attributes[item] = {name: values[row] for name, values in columns.items()}
        self.ids, self.vectors, self.seq = ids, vectors, self.seq + 1
        reply = WriteReply(
            rows=len(message.item_ids),
            existed=existed,
            generation=self.answers_as or self.generation,
            seq=self.seq,
        )
        self.written[message.key] = reply
        return reply

    def reply(self, message):
        if isinstance(message, UpsertRequest | DeleteRequest):
            return self.write(message)
        if isinstance(message, FetchRequest):
            if self.fetch_error is not None:
                return self.fetch_error
            mine = np.flatnonzero(np.isin(self.ids, message.item_ids))
            return FetchReply(
                item_ids=self.ids[mine],
                vectors=self.vectors[mine],
                generation=self.answers_as or self.generation,
                seq=self.seq,
            )
        if isinstance(message, AttributesRequest):
            if self.fetch_error is not None:
                return self.fetch_error
            mine = self.ids[np.isin(self.ids, message.item_ids)].tolist()
            names = message.names or ("title",)
            values = [
                [self.attributes.get(item, {}).get(name, f"{name} of {item}") for item in mine]
                for name in names
            ]
            return AttributesReply(
                item_ids=np.array(mine, dtype=np.int64),
                names=names,
                values=self.bad_values or b"".join(map(msgpack.packb, values)),
                kinds=("text",) * len(names),
                generation=self.answers_as or self.generation,
                seq=self.seq,
            )
        assert isinstance(message, SearchRequest)
        least = message.options.min_seq[self.shard : self.shard + 1]
        if least and self.seq < least[0]:
            return ErrorReply(code="behind", message="behind")
        try:
            here = self.matching(message.options.filter)
        except InvalidInput as error:
            return ErrorReply(code=error.code, message=error.details, field=error.field)
        ranked = brute_force(message.queries, self.ids[here], self.vectors[here], message.k)
        excluded = None
        if message.excluded is not None:
            ranked, excluded = self.without_excluded(message, here)
        if self.short:
            ranked = Ranked(ranked.ids[:, :-1], ranked.scores[:, :-1])
        return SearchReply(
            ranked=ranked,
            rows=len(self.ids),
            generation=self.answers_as or self.generation,
            seq=self.seq,
            search_ms=0.25,
            matched=int(here.sum()) if message.options.filter else NO_FILTER,
            excluded=excluded,
        )

    def without_excluded(self, message, here):
        """The answer without what each query excludes, and how many rows that is of ``here``."""
        counts, ids = message.excluded
        parts, left_out, start = [], [], 0
        for row, count in enumerate(counts.tolist()):
            is_excluded = np.isin(self.ids, ids[start : start + count])
            start += count
            kept = here & ~is_excluded
            query = message.queries[row : row + 1]
            parts.append(brute_force(query, self.ids[kept], self.vectors[kept], message.k))
            left_out.append(int((here & is_excluded).sum()))
        ranked = Ranked(*(np.concatenate(each) for each in zip(*parts, strict=True)))
        return ranked, np.array(left_out, np.int32)

    def matching(self, packed):
        """(rows,) bool: the rows that match a filter on ``item_id``, the only column."""
        return matches(bind(read_filter(packed), pa.schema([])), pa.table({}), self.ids)


def moved(shard: FakeShard, **changes) -> ShardRoute:
    """The shard's route, its one replica being elsewhere, or of another epoch."""
    route = shard.shard_route
    return replace(route, replicas=(replace(route.replicas[0], **changes),))


async def read_frame(reader: asyncio.StreamReader):
    """The next (request_id, message) of a stream."""
    length, request_id = HEADER.unpack(await reader.readexactly(HEADER.size))
    return request_id, decode_payload(await reader.readexactly(length))


def brute_force(queries, ids, vectors, k) -> Ranked:
    """The k best by inner product."""
    scores = (queries @ vectors.T).astype(np.float32)
    pad = max(0, k - len(ids))
    scores = np.pad(scores, ((0, 0), (0, pad)), constant_values=EMPTY_SCORE)
    rows = np.pad(np.tile(ids, (len(queries), 1)), ((0, 0), (0, pad)), constant_values=EMPTY_ID)
    ranked = in_order(rows, scores)
    return Ranked(ranked.ids[:, :k], ranked.scores[:, :k])


def make_rows(num_rows: int, dim: int, seed: int = 0):
    """ids 0..num_rows-1, and vectors of multiples of 1/2: inner products are exact, ties occur."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-4, 5, (num_rows, dim)).astype(np.float32) / 2
    vectors[:, 0] += 5  # none is zero
    return np.arange(num_rows), vectors


@contextlib.asynccontextmanager
async def running_shards(ids, vectors, num_shards: int, **options):
    """num_shards FakeShards over equal ranges of the rows; killed at the end."""
    shards = [
        FakeShard(ids=part, vectors=rows, shard=number, **options)
        for number, (part, rows) in enumerate(
            zip(np.array_split(ids, num_shards), np.array_split(vectors, num_shards), strict=True)
        )
    ]
    try:
        for shard in shards:
            await shard.start()
        yield shards
    finally:
        for shard in shards:
            await shard.kill()


@contextlib.asynccontextmanager
async def running_replicas(ids, vectors, num_shards: int, copies: int, **options):
    """As ``running_shards``: of each shard a list of ``copies`` FakeShards with the same rows."""
    async with contextlib.AsyncExitStack() as stack:
        each = [
            await stack.enter_async_context(
                running_shards(ids, vectors, num_shards, replica=replica, **options)
            )
            for replica in range(copies)
        ]
        yield [list(replicas) for replicas in zip(*each, strict=True)]


def replicated(replicas) -> ShardRoute:
    """One shard, served by all these FakeShards."""
    routes = tuple(each.route for each in replicas)
    primary = next((each.replica for each in replicas if each.takes_writes), None)
    return ShardRoute(
        shard=replicas[0].shard, rows=len(replicas[0].ids), replicas=routes, primary=primary
    )


def missing(answer) -> list[str]:
    """What an answer says of the shards that it misses."""
    return [str(degraded) for degraded in answer.coverage.degraded]


def make_table(routes, dim: int, **changes) -> RoutingTable:
    """A routing table over FakeShards or ShardRoutes; the boundaries are those of FakeShards."""
    lowest = [r.ids[0] for r in routes[1:] if isinstance(r, FakeShard) and len(r.ids)]
    content = {
        "version": 1,
        "generation": 1,
        "generation_dir": "nowhere",
        "model_version": "m1",
        "dim": dim,
        "metric": Metric.DOT,
        "index": "flat",
        "partitioning": Partitioning.RANGE,
        "boundaries": tuple(int(each) for each in lowest),
        "shards": tuple(r if isinstance(r, ShardRoute) else r.shard_route for r in routes),
    }
    return RoutingTable(**(content | changes))


async def until(condition, timeout: float = 5.0) -> None:
    """Returns when the condition holds; fails the test when it does not come true in time."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.002)
