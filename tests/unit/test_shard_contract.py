"""What a shard promises on the wire, asked of the fake that other tests use and of the real one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
import pytest

from shardline.shards.core.messages import (
    FetchReply,
    FetchRequest,
    ReplicaKey,
    SearchReply,
    SearchRequest,
)
from shardline.shards.core.schema import Metric
from shardline.shards.server.shard_server import ShardServer
from shardline.shards.wire.frames import HEADER, Message, decode_payload, encode_frame
from shardline.shards.wire.handshake import check_welcome, prove
from tests.engine import flat_shard
from tests.fake_shard import SECRET, FakeShard, make_rows
from tests.reference import assert_answer_order, assert_same_answers, brute_force

KEY = ReplicaKey(7, 0)
EPOCH = 3
IDS, VECTORS = make_rows(40, 8)


class Connection:
    """A router's end, by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def receive(self) -> tuple[int, Message]:
        length, request_id = HEADER.unpack(await self.reader.readexactly(HEADER.size))
        return request_id, decode_payload(await self.reader.readexactly(length))

    async def ask(self, request: Message, request_id: int = 1) -> Message:
        self.writer.write(encode_frame(request_id, request))
        answered, reply = await asyncio.wait_for(self.receive(), 5)
        assert answered == request_id
        return reply


@contextlib.asynccontextmanager
async def fake() -> AsyncIterator[tuple[str, int]]:
    shard = FakeShard(ids=IDS, vectors=VECTORS, generation=7, epoch=EPOCH)
    await shard.start()
    try:
        yield "127.0.0.1", shard.port
    finally:
        await shard.kill()


@contextlib.asynccontextmanager
async def real() -> AsyncIterator[tuple[str, int]]:
    server = ShardServer(flat_shard(VECTORS, IDS), secret=SECRET)
    address = server.bind()
    server.start(EPOCH)
    try:
        yield address
    finally:
        server.stop()


@contextlib.asynccontextmanager
async def connected(kind, secret: bytes = SECRET) -> AsyncIterator[Connection]:
    async with kind() as address:
        connection = Connection(*await asyncio.open_connection(*address))
        try:
            _, greeting = await connection.receive()
            hello, proof, welcome_mac = prove(greeting, secret, address)
            assert (hello.key, hello.epoch) == (KEY, EPOCH)
            check_welcome(await connection.ask(proof, request_id=0), welcome_mac)
            yield connection
        finally:
            connection.writer.close()


pytestmark = pytest.mark.parametrize("kind", [fake, real])


@pytest.mark.parametrize("k", [1, 5, 60])
async def test_a_search_is_answered_with_the_best_rows_in_order(kind, k) -> None:
    request = SearchRequest(queries=VECTORS[:3], k=k, timeout_ms=1000.0)
    async with connected(kind) as connection:
        reply = await connection.ask(request)
    assert isinstance(reply, SearchReply)
    assert_same_answers(reply.ranked, brute_force(VECTORS[:3], VECTORS, IDS, k, Metric.DOT))
    assert_answer_order(reply.ranked)
    assert (reply.rows, reply.generation, reply.seq) == (40, 7, 0)


async def test_a_fetch_returns_what_is_there(kind) -> None:
    request = FetchRequest(item_ids=np.array([3, 999, 7]), timeout_ms=1000.0)
    async with connected(kind) as connection:
        reply = await connection.ask(request)
    assert isinstance(reply, FetchReply)
    assert set(reply.item_ids.tolist()) == {3, 7}
    by_id = dict(zip(reply.item_ids.tolist(), reply.vectors, strict=True))
    np.testing.assert_array_equal(by_id[3], VECTORS[3])
    assert (reply.generation, reply.seq) == (7, 0)


async def test_many_requests_are_in_flight_and_each_reply_carries_its_request_id(kind) -> None:
    async with connected(kind) as connection:
        for number in range(10):
            request = SearchRequest(queries=VECTORS[number, None], k=1, timeout_ms=1000.0)
            connection.writer.write(encode_frame(100 + number, request))
        replies = dict([await asyncio.wait_for(connection.receive(), 5) for _ in range(10)])
    assert set(replies) == set(range(100, 110))
    for number in range(10):
        expected = brute_force(VECTORS[number, None], VECTORS, IDS, 1, Metric.DOT)
        np.testing.assert_array_equal(replies[100 + number].ranked.ids, expected.ids)


async def test_whoever_does_not_know_the_secret_is_disconnected(kind) -> None:
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        async with connected(kind, secret=b"another"):
            pass


async def test_garbage_ends_the_connection(kind) -> None:
    async with connected(kind) as connection:
        connection.writer.write(HEADER.pack(3, 1) + b"\xc1\xc1\xc1")
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await asyncio.wait_for(connection.receive(), 5)
