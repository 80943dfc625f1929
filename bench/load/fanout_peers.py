"""The other ends of ``bench.load.fanout_bench``: bare shard servers and echoes, as processes."""

import asyncio
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

import numpy as np
import uvloop

from shardline.bench.load.fleet import children
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.messages import (
    ReplicaKey,
    ReplicaRoute,
    SearchReply,
    SearchRequest,
    ShardRoute,
)
from shardline.shards.core.schema import Ranked
from shardline.shards.process.memory import prepare_memory
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer

ROWS = 1000  # of a shard, as it says; it holds none


class PreparedShard(Shard):
    """Answers every search with the same k rows per query, without looking for them."""

    def __init__(self, shard: int, *, dim: int, k: int, shards: int) -> None:
        self.shard = shard
        self.generation = 1
        self._dim = dim
        rng = np.random.default_rng(shard)
        self._ids = np.sort(rng.choice(ROWS, (1, k), replace=False)) * shards + shard
        self._scores = -np.sort(-rng.random((1, k), dtype=np.float32))
        self._replies: dict[int, SearchReply] = {}

    @property
    def rows(self) -> int:
        return ROWS

    @property
    def dim(self) -> int:
        return self._dim

    def search_batch(self, requests: Sequence[SearchRequest]) -> list[SearchReply | ShardlineError]:
        """The same reply to each, as many rows as it has queries."""
        return [self.reply(len(request.queries)) for request in requests]

    def reply(self, queries: int) -> SearchReply:
        """ids and scores (queries, k)."""
        if queries not in self._replies:
            self._replies[queries] = SearchReply(
                ranked=Ranked(
                    np.repeat(self._ids, queries, axis=0), np.repeat(self._scores, queries, axis=0)
                ),
                rows=ROWS,
                generation=self.generation,
                seq=0,
                search_ms=0.0,
            )
        return self._replies[queries]


def _route(shard: int, port: int) -> ShardRoute:
    route = ReplicaRoute(key=ReplicaKey(1, shard), epoch=1, address=("127.0.0.1", port))
    return ShardRoute(shard=shard, rows=ROWS, replicas=(route,))


@contextmanager
def shard_processes(
    shards: int, dim: int, k: int
) -> Iterator[tuple[tuple[ShardRoute, ...], bytes]]:
    """Routes to that many shard servers, each in a process, and the secret they ask for."""
    secret = secrets.token_bytes(32)
    given = [(s, shards, dim, k, secret) for s in range(shards)]
    with children(_serve_shard, given) as pipes:
        ports = [pipe.recv() for pipe in pipes]
        yield (
            tuple(_route(shard, port) for shard, port in enumerate(ports)),
            secret,
        )


@contextmanager
def echo_processes(count: int, request: int, reply: int) -> Iterator[list[int]]:
    """Ports of processes that send ``reply`` bytes for every ``request`` bytes."""
    with children(_serve_echo, [(request, reply)] * count) as pipes:
        yield [pipe.recv() for pipe in pipes]


def _serve_shard(
    pipe: Connection, shard: int, shards: int, dim: int, k: int, secret: bytes
) -> None:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # as Ray does in an actor
    server = ShardServer(PreparedShard(shard, dim=dim, k=k, shards=shards), secret=secret)
    _, port = server.bind()
    server.start(epoch=1)
    prepare_memory(huge_pages=True)  # as a shard actor does
    pipe.send(port)
    _wait_closed(pipe)
    server.stop()


def _serve_echo(pipe: Connection, request: int, reply: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answer, got = bytes(reply), 0
    with connection:
        while data := connection.recv(request - got):
            got += len(data)
            if got == request:
                got = 0
                connection.sendall(answer)


def _wait_closed(pipe: Connection) -> None:
    with suppress(EOFError):
        pipe.recv()
