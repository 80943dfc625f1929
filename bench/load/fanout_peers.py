"""The other ends of ``bench.load.fanout_bench``: bare shard servers and echoes, as processes."""

import asyncio
import multiprocessing
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import uvloop

from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.messages import SearchReply, SearchRequest, ShardRoute
from shardline.shards.process.memory import prepare_memory
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer

ROWS = 1000  # of a shard, as it says; it holds none
END_S = 5.0  # for a process whose pipe has closed


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
                ids=np.repeat(self._ids, queries, axis=0),
                scores=np.repeat(self._scores, queries, axis=0),
                rows=ROWS,
                search_ms=0.0,
            )
        return self._replies[queries]


@contextmanager
def shard_processes(
    shards: int, dim: int, k: int
) -> Iterator[tuple[tuple[ShardRoute, ...], bytes]]:
    """Routes to that many shard servers, each in a process, and the secret they ask for."""
    secret = secrets.token_bytes(32)
    with _processes(_serve_shard, [(s, shards, dim, k, secret) for s in range(shards)]) as ports:
        yield (
            tuple(
                ShardRoute(shard=s, rows=ROWS, epoch=1, address=("127.0.0.1", port))
                for s, port in enumerate(ports)
            ),
            secret,
        )


@contextmanager
def echo_processes(count: int, request: int, reply: int) -> Iterator[list[int]]:
    """Ports of processes that send ``reply`` bytes for every ``request`` bytes."""
    with _processes(_serve_echo, [(request, reply)] * count) as ports:
        yield ports


@contextmanager
def _processes(work: Callable[..., None], given: Sequence[tuple[Any, ...]]) -> Iterator[list[int]]:
    """Each says its port, and ends when its pipe closes."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for each in given:
            here, there = spawn.Pipe()
            process = spawn.Process(target=work, args=(there, *each), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        yield [pipe.recv() for pipe in pipes]
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(END_S)
            process.kill()


def _serve_shard(
    pipe: Connection, shard: int, shards: int, dim: int, k: int, secret: bytes
) -> None:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # as Ray does in an actor
    server = ShardServer(PreparedShard(shard, dim=dim, k=k, shards=shards), secret=secret)
    _, port = server.bind()
    server.start(epoch=1)
    prepare_memory()  # as a shard actor does
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
