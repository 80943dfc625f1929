"""The Unix socket beside a shard's port: taken where there is one, and never by strangers."""

import asyncio
import os
import random
import socket
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress

import numpy as np
import pytest
import uvloop

from shardline.router.fanout.connection import ShardConnection
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.messages import FetchRequest, ReplicaKey, ReplicaRoute
from shardline.shards.server.shard_server import ShardServer
from shardline.shards.wire import local_socket
from shardline.shards.wire.frames import decode_payload, encode_frame
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
    route = ReplicaRoute(key=ReplicaKey(GENERATION, 0), epoch=1, address=address)
    connection = ShardConnection(route, secret=SECRET, config=FAST, rng=random.Random(0))
    connection.start()
    try:
        async with asyncio.timeout(5):
            while not connection.connected:
                await asyncio.sleep(0.005)
        reply = asyncio.get_running_loop().create_future()
        frame = encode_frame(1, FetchRequest(item_ids=np.array([2, 7]), timeout_ms=1000.0))
        connection.request(1, frame, reply.set_result)
        found = decode_payload(await asyncio.wait_for(reply, 5))
        family = connection.link._transport.get_extra_info("socket").family
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


@contextmanager
def serving_beside(holder):
    """A server whose name ``holder(listener, port)`` held before it, in a thread of its own."""
    server = ShardServer(flat_shard(VECTORS, IDS), secret=SECRET)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = probe.getsockname()
    listener = local_socket.listen(address, 5)
    listener.settimeout(5)
    thread = threading.Thread(target=holder, args=(listener, address))
    with pytest.MonkeyPatch.context() as patch:
        created = socket.create_server
        patch.setattr(
            socket, "create_server", lambda where, **how: created((where[0], address[1]), **how)
        )
        server.bind()
    assert server.address == address
    assert server._local_socket is None, "the name is held"
    server.start(epoch=1)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(5)
        listener.close()


def says_nothing(listener, _address):
    with listener.accept()[0] as held:
        held.settimeout(5)
        with suppress(OSError):
            while held.recv(1000):
                pass


def passes_on(listener, address):
    """Between the router, which comes by the name, and the server's port."""
    with listener.accept()[0] as router, socket.create_connection(address, timeout=5) as server:
        router.settimeout(0.05)
        server.settimeout(0.05)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            for source, target in ((server, router), (router, server)):
                with suppress(TimeoutError):
                    data = source.recv(65536)
                    if not data:
                        return
                    target.sendall(data)


@pytest.mark.parametrize("holder", [says_nothing, passes_on])
def test_who_holds_the_name_neither_stands_between_nor_in_the_way(holder) -> None:
    with serving_beside(holder) as server:
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


def test_the_short_way_asks_for_the_secret_too(monkeypatch) -> None:
    with serving(secret=b"another secret") as server:

        async def refused():
            families = []
            proven = local_socket.proven_address

            def noted(connection, address):
                families.append(connection.family)
                return proven(connection, address)

            monkeypatch.setattr(local_socket, "proven_address", noted)
            route = ReplicaRoute(key=ReplicaKey(GENERATION, 0), epoch=1, address=server.address)
            connection = ShardConnection(route, secret=SECRET, config=FAST, rng=random.Random(0))
            with pytest.raises(Unavailable, match="lost during the handshake"):
                await connection._connect()
            assert set(families) == {socket.AF_UNIX}

        asyncio.run(refused())
