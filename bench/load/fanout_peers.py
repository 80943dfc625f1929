"""The other ends of ``fanout_bench`` and ``hedging_bench``, as processes.

Shard servers without an index, replicas that stall, and echoes.
"""

import asyncio
import random
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

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


class StallingShard(PreparedShard):
    """Searches for ``search_s``; a share of ``stall_share`` of its batches takes ``stall_s``."""

    def __init__(
        self, shard: int, shards: int, dim: int, k: int, search_s: float, stall_s: float
    ) -> None:
        super().__init__(shard, dim=dim, k=k, shards=shards)
        self.stall_share = 0.0
        self._search_s = search_s
        self._stall_s = stall_s
        self._random = random.Random(shard).random

    def search_batch(self, requests: Sequence[SearchRequest]) -> list[SearchReply | ShardlineError]:
        stalls = self.stall_share > 0 and self._random() < self.stall_share
        if stalls or self._search_s:
            time.sleep(self._stall_s if stalls else self._search_s)
        return super().search_batch(requests)


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


@dataclass(slots=True)
class Peers:
    """The replicas' processes."""

    routes: list[list[ReplicaRoute]]  # of each shard
    secret: bytes
    pipes: list[Connection]

    def stall(self, share: float) -> None:
        """From now on the first replica of the first shard stalls in that share of its batches."""
        self.pipes[0].send(share)
        self.pipes[0].recv()


@contextmanager
def stalling_processes(
    shards: int, copies: int, dim: int, k: int, *, search_s: float, stall_s: float
) -> Iterator[Peers]:
    """``copies`` replicas of each shard, each in a process, and none of them stalling yet."""
    secret = secrets.token_bytes(32)
    places = [(shard, copy) for shard in range(shards) for copy in range(copies)]
    given = [(copy, secret, shard, shards, dim, k, search_s, stall_s) for shard, copy in places]
    with children(_serve_replica, given) as pipes:
        found = [pipe.recv() for pipe in pipes]
        routes = [found[n : n + copies] for n in range(0, len(found), copies)]
        yield Peers(routes, secret, pipes)


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


def _serve_replica(pipe: Connection, replica: int, secret: bytes, *given: Any) -> None:
    """A replica's process; ``pipe`` sets the share of its batches that stall."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # as Ray does in an actor
    shard = StallingShard(*given)
    server = ShardServer(shard, secret=secret, replica=replica)
    address = server.bind()
    server.start(epoch=1)
    prepare_memory(huge_pages=True)  # as a shard actor does
    pipe.send(ReplicaRoute(key=ReplicaKey(1, shard.shard, replica), epoch=1, address=address))
    with suppress(EOFError):
        while True:
            shard.stall_share = pipe.recv()
            pipe.send(None)
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
