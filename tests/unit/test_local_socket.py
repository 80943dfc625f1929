"""The Unix socket beside a shard's port: taken where there is one, and never by strangers."""

import asyncio
import os
import random
import socket
import sys
from contextlib import closing, contextmanager

import numpy as np
import pytest
import uvloop

from router.config import RouterConfig
from router.connection import ShardConnection
from shards import local_socket
from shards.errors import Unavailable
from shards.server import ShardServer
from shards.types import FetchRequest, ShardRoute
from shards.wire import decode_payload, encode_frame
from tests.engine import flat_shard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract names")

SECRET = b"a secret of tests"
IDS = np.arange(5, dtype=np.int64)
VECTORS = np.eye(5, dtype=np.float32)
GENERATION = 7  # of tests.engine's shards
FAST = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, connect_timeout_ms=500)


@contextmanager
def serving(secret=SECRET):
    server = ShardServer(flat_shard(VECTORS, IDS), secret=secret)
    server.bind()
    server.start(epoch=1)
    try:
        yield server
    finally:
        server.stop()


async def fetched_over(address):
    """The family of the router's connection, and the ids it got over it."""
    route = ShardRoute(shard=0, rows=5, epoch=1, address=address)
    connection = ShardConnection(
        route, GENERATION, secret=SECRET, config=FAST, rng=random.Random(0)
    )
    connection.start()
    try:
        await asyncio.wait_for(connection.settled(), 5)
        assert connection.connected, connection.reason
        reply = asyncio.get_running_loop().create_future()
        frame = encode_frame(1, FetchRequest(item_ids=np.array([2, 7]), timeout_ms=1000.0))
        connection.request(1, frame, reply.set_result)
        found = decode_payload(await asyncio.wait_for(reply, 5))
        family = connection._link._transport.get_extra_info("socket").family
        return family, found.item_ids.tolist()
    finally:
        await connection.close()


def over(address, new_loop=None):
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(fetched_over(address))


@pytest.mark.parametrize("new_loop", [None, uvloop.new_event_loop])
def test_a_router_on_the_same_machine_takes_the_short_way(new_loop) -> None:
    with serving() as server:
        assert over(server.address, new_loop) == (socket.AF_UNIX, [2])


def test_where_the_name_is_taken_there_is_tcp(monkeypatch) -> None:
    monkeypatch.setattr(local_socket, "_name", lambda address: f"\0shardline-test-{os.getpid()}")
    with closing(local_socket.listen(("127.0.0.1", 1), 1)), serving() as server:
        monkeypatch.undo()
        assert over(server.address) == (socket.AF_INET, [2])


def test_a_process_of_another_user_is_not_spoken_to(monkeypatch) -> None:
    with serving() as server:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert local_socket.connect(server.address) is None
        assert over(server.address) == (socket.AF_INET, [2])


def test_elsewhere_than_on_linux_there_is_tcp_alone(monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with serving() as server:
        assert server._local_socket is None
        monkeypatch.undo()
        assert over(server.address) == (socket.AF_INET, [2])
    monkeypatch.setattr(sys, "platform", "darwin")
    assert local_socket.connect(server.address) is None


def test_the_name_goes_with_the_server() -> None:
    with serving() as server:
        connection = local_socket.connect(server.address)
        assert connection is not None
        connection.close()
    assert local_socket.connect(server.address) is None
    with closing(local_socket.listen(server.address, 1)):
        pass  # it is free again


def test_the_short_way_asks_for_the_secret_too() -> None:
    with serving(secret=b"another secret") as server:

        async def refused():
            route = ShardRoute(shard=0, rows=5, epoch=1, address=server.address)
            connection = ShardConnection(
                route, GENERATION, secret=SECRET, config=FAST, rng=random.Random(0)
            )
            with pytest.raises(Unavailable, match="lost during the handshake"):
                await connection._connect()

        asyncio.run(refused())
