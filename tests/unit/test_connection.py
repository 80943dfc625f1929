"""One connection to one shard: framing, handshake, loss, reconnection, fencing, bounds."""

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest

from shardline.router.fanout.connection import ShardConnection, backoff_ms
from shardline.router.fanout.link import MAX_UNSENT_BYTES
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import Overloaded, Unavailable
from shardline.shards.core.messages import FetchReply, FetchRequest, ReplicaKey, ReplicaRoute
from shardline.shards.wire.frames import (
    HEADER,
    KEEP_ALIVE,
    MAX_FRAME_BYTES,
    decode_payload,
    encode_frame,
)
from tests.fake_shard import SECRET, FakeShard, make_rows, read_frame, until
from tests.manual_clock import ManualClock

FAST = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, connect_timeout_ms=500)

KEY = ReplicaKey(1, 0)


def make_shard(**options):
    ids, vectors = make_rows(20, 8)
    return FakeShard(ids=ids, vectors=vectors, **options)


def connect(route, *, config=FAST, secret=SECRET, **clocks):
    connection = ShardConnection(
        route, secret=secret, config=config, rng=random.Random(0), **clocks
    )
    connection.start()
    return connection


def ask(connection, request_id, item=3):
    """A future of the reply to a fetch of one item."""
    reply = asyncio.get_running_loop().create_future()

    def on_reply(payload):
        reply.set_result(
            decode_payload(payload) if isinstance(payload, bytes | memoryview) else payload
        )

    frame = encode_frame(request_id, FetchRequest(item_ids=np.array([item]), timeout_ms=1000.0))
    connection.request(request_id, frame, on_reply)
    return reply


def test_backoff_doubles_up_to_its_limit_and_half_of_it_is_random():
    config = RouterConfig(backoff_base_ms=10, backoff_max_ms=100)
    for failures, longest in [(1, 10), (2, 20), (3, 40), (4, 80), (5, 100), (5000, 100)]:
        pauses = [backoff_ms(failures, config, random.Random(seed)) for seed in range(50)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest


async def test_reconnections_are_spaced_by_the_back_off_and_begin_anew_after_an_answer():
    shard = make_shard()
    route = await shard.start()
    await shard.kill()
    pauses = []

    async def noted(seconds):
        pauses.append(seconds * 1000)
        await asyncio.sleep(0)

    config = RouterConfig(backoff_base_ms=10, backoff_max_ms=80)
    connection = connect(route, config=config, sleep=noted)
    await until(lambda: len(pauses) >= 30)
    for number, pause in enumerate(pauses[:30]):
        longest = min(80, 10 * 2**number)
        assert longest / 2 <= pause <= longest
    assert len(set(pauses[3:30])) > 20, "routers do not come back in step"

    await shard.start(route.address[1])
    await until(lambda: connection.connected)
    await ask(connection, 1)
    pauses.clear()
    await shard.kill()
    await until(lambda: len(pauses) >= 2)
    assert 5 <= pauses[0] <= 10 <= pauses[1] <= 20
    await connection.close()


async def test_many_requests_are_in_flight_and_replies_find_their_own():
    shard = make_shard()
    connection = connect(await shard.start())
    await connection.settled()
    assert connection.connected
    assert connection.reason == ""
    shard.gate.clear()
    replies = [ask(connection, request_id, item=request_id) for request_id in range(1, 11)]
    await until(lambda: len(shard.requests) == 10)
    assert shard.connections == 1
    shard.gate.set()
    for request_id, reply in enumerate(await asyncio.gather(*replies), start=1):
        assert isinstance(reply, FetchReply)
        assert reply.item_ids.tolist() == [request_id]
        np.testing.assert_array_equal(reply.vectors[0], shard.vectors[request_id])
    await connection.close()
    await until(lambda: shard.connections == 0)
    await shard.kill()


async def test_a_killed_shard_fails_what_is_pending_at_once_and_is_found_again_on_the_same_port():
    shard = make_shard()
    route = await shard.start()
    connection = connect(route)
    await connection.settled()
    shard.gate.clear()
    pending = [ask(connection, 1), ask(connection, 2)]
    await until(lambda: len(shard.requests) == 2)
    await shard.kill()
    for reply in await asyncio.wait_for(asyncio.gather(*pending), 1):
        assert isinstance(reply, Unavailable)
        assert reply.message == "connection lost"
    with pytest.raises(Unavailable, match="connection"):
        ask(connection, 3)
    assert not connection.connected

    again = make_shard(epoch=2)
    await again.start(route.address[1])
    await until(lambda: connection.connected)
    assert (await ask(connection, 4)).item_ids.tolist() == [3]
    await connection.close()
    await again.kill()


@pytest.mark.parametrize(
    ("shard_options", "route_epoch", "reason"),
    [
        ({"secret": b"another"}, 1, "connection lost during the handshake"),
        ({"epoch": 4}, 5, "an older process of this replica; expected epoch >= 5; got 4"),
        ({"generation": 2}, 1, "wrong replica; expected 1-0-0; got 2-0-0"),
        ({"shard": 7}, 1, "wrong replica; expected 1-0-0; got 1-7-0"),
    ],
)
async def test_the_wrong_process_is_refused(shard_options, route_epoch, reason):
    shard = make_shard(**shard_options)
    address = (await shard.start()).address
    route = ReplicaRoute(key=KEY, epoch=route_epoch, address=address)
    connection = connect(route)
    await until(lambda: reason in connection.reason)
    assert not connection.connected
    with pytest.raises(Unavailable):
        ask(connection, 1)
    await connection.close()
    await shard.kill()


@pytest.mark.parametrize("told", [{}, {"shard": 0}, {"shard": 0, "epoch": 9}])
async def test_a_stranger_that_passes_the_handshake_on_to_another_shard_is_refused(told):
    """It listens where shard 0 is thought to be, and lets shard 0 or 1 prove the secret for it."""

    shard = make_shard(shard=0 if not told else 1)
    await shard.start()

    async def relay(reader, writer):
        there, back = await asyncio.open_connection("127.0.0.1", shard.port)
        _, hello = await read_frame(there)
        writer.write(encode_frame(0, replace(hello, **told)))
        back.write(encode_frame(0, (await read_frame(reader))[1]))
        seen.append(await there.read())
        back.close()
        writer.close()

    seen = []
    stranger = await asyncio.start_server(relay, "127.0.0.1", 0)
    address = stranger.sockets[0].getsockname()[:2]
    once = FAST.model_copy(update={"backoff_base_ms": 1e4, "backoff_max_ms": 1e4})
    route = ReplicaRoute(key=KEY, epoch=1, address=address)
    connection = connect(route, config=once)
    await until(lambda: "connection lost during the handshake" in connection.reason)
    assert not connection.connected
    assert seen == [b""], "the shard closed instead of welcoming it"
    await connection.close()
    stranger.close()
    await shard.kill()
    await until(lambda: len(asyncio.all_tasks()) == 1)


async def test_after_a_higher_epoch_the_lower_one_of_the_table_is_a_zombie():
    newer = make_shard(epoch=3)
    route = await newer.start()
    connection = connect(ReplicaRoute(key=KEY, epoch=1, address=route.address))
    await connection.settled()
    assert connection.connected
    await newer.kill()
    zombie = make_shard(epoch=2)
    await zombie.start(route.address[1])
    await until(lambda: "older process" in connection.reason)
    assert not connection.connected
    await connection.close()
    await zombie.kill()


async def test_a_shard_that_has_yet_to_learn_its_epoch_is_waited_for():
    shard = make_shard(epoch=4)
    address = (await shard.start()).address
    connection = connect(ReplicaRoute(key=KEY, epoch=5, address=address))
    settled = asyncio.create_task(connection.settled())
    await until(lambda: "older process" in connection.reason)
    assert not settled.done()
    shard.epoch = 5
    await asyncio.wait_for(settled, 2)
    assert connection.connected
    await connection.close()
    await shard.kill()


async def test_a_server_that_never_greets_is_given_up_in_time():
    async def wait_for_the_end(reader, writer):
        await reader.read()
        writer.close()

    server = await asyncio.start_server(wait_for_the_end, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()[:2]
    config = RouterConfig(connect_timeout_ms=30, backoff_base_ms=1, backoff_max_ms=5)
    connection = connect(ReplicaRoute(key=KEY, epoch=1, address=address), config=config)
    await connection.settled()
    assert connection.reason == "no connection in time"
    await connection.close()
    server.close()
    await until(lambda: len(asyncio.all_tasks()) == 1)


@pytest.mark.parametrize(
    "garbage",
    [
        HEADER.pack(MAX_FRAME_BYTES + 1, 1),
        b"\xff" * HEADER.size,
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
async def test_garbage_closes_the_connection_and_tells_the_pending(garbage):
    shard = make_shard(garbage=garbage)
    connection = connect(await shard.start())
    await connection.settled()
    reply = await asyncio.wait_for(ask(connection, 1), 1)
    assert isinstance(reply, Unavailable)
    assert reply.message.startswith("broke the protocol")
    shard.garbage = None
    await until(lambda: connection.connected)
    assert isinstance(await ask(connection, 2), FetchReply)
    await connection.close()
    await shard.kill()


async def test_the_late_reply_of_an_abandoned_request_is_dropped():
    shard = make_shard()
    connection = connect(await shard.start())
    await connection.settled()
    shard.gate.clear()
    abandoned = ask(connection, 1, item=1)
    await until(lambda: len(shard.requests) == 1)
    connection.abandon(1)
    shard.gate.set()
    assert (await ask(connection, 2, item=2)).item_ids.tolist() == [2]
    assert not abandoned.done()
    assert connection.connected
    await connection.close()
    await shard.kill()


async def test_more_in_flight_than_allowed_is_refused_at_once():
    shard = make_shard()
    config = FAST.model_copy(update={"shard_max_in_flight": 2})
    connection = connect(await shard.start(), config=config)
    await connection.settled()
    shard.gate.clear()
    pending = [ask(connection, 1), ask(connection, 2)]
    with pytest.raises(Overloaded):
        ask(connection, 3)
    shard.gate.set()
    await asyncio.gather(*pending)
    assert isinstance(await ask(connection, 4), FetchReply)
    await connection.close()
    await shard.kill()


async def test_a_shard_that_does_not_read_is_overloaded_instead_of_buffered_without_bound():
    shard = make_shard()
    connection = connect(await shard.start())
    await connection.settled()
    shard.stop_reading()
    big = encode_frame(1, FetchRequest(item_ids=np.arange(2_000_000), timeout_ms=1.0))
    refused = 0
    for request_id in range(1, 20):
        try:
            connection.request(request_id, big, lambda _reply: None)
        except Overloaded:
            refused += 1
        await asyncio.sleep(0)
    assert refused >= 10
    unsent = connection.link._transport.get_write_buffer_size()
    assert MAX_FRAME_BYTES < unsent <= MAX_UNSENT_BYTES + len(big)
    await connection.close()
    await shard.kill()


@pytest.mark.parametrize("size", [100_000, MAX_FRAME_BYTES])
async def test_one_frame_of_any_size_is_no_overload(size):
    shard = make_shard()
    connection = connect(await shard.start())
    await connection.settled()
    shard.stop_reading()
    connection.request(1, HEADER.pack(size, 1) + bytes(size), lambda _reply: None)
    await asyncio.sleep(0)
    if size == MAX_FRAME_BYTES:  # more than the kernel takes
        assert connection.link._transport.get_write_buffer_size() > MAX_FRAME_BYTES / 2
    ask(connection, 2)
    await connection.close()
    await shard.kill()


async def test_a_silent_shard_is_dropped_once_a_deadline_is_missed():
    shard = make_shard()
    config = FAST.model_copy(update={"stall_timeout_ms": 20.0})
    clock = ManualClock()
    connection = connect(await shard.start(), config=config, clock=clock)
    await connection.settled()
    shard.gate.clear()
    first, second = ask(connection, 1), ask(connection, 2)
    connection.abandon(1)
    assert connection.connected  # a missed deadline alone is no reason
    await clock.advance(0.03)
    connection.abandon(1)
    assert (await asyncio.wait_for(second, 1)).message == "gone silent"
    assert not first.done()
    await connection.close()
    await shard.kill()


async def test_close_tells_the_pending_and_leaves_no_task():
    shard = make_shard()
    connection = connect(await shard.start())
    await connection.settled()
    shard.gate.clear()
    pending = ask(connection, 1)
    await connection.close()
    assert isinstance(await pending, Unavailable)
    await shard.kill()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_shard_at_work_is_not_taken_for_one_that_hangs():
    config = FAST.model_copy(update={"late_after_ms": 100.0, "stall_timeout_ms": 200.0})
    shard = make_shard()
    clock = ManualClock()
    connection = connect(await shard.start(), config=config, clock=clock)
    await connection.settled()
    shard.gate.clear()
    first = ask(connection, 1)
    await until(lambda: len(shard.requests) == 1)
    (writer,) = shard._writers
    for _ in range(10):  # far beyond both limits in all
        await clock.advance(0.03)
        writer.write(KEEP_ALIVE)
        await until(lambda: connection.link.stalled_for() == 0.0)
        connection.abandon(99)
    second = ask(connection, 2)
    shard.gate.set()
    assert isinstance(await asyncio.wait_for(first, 1), FetchReply)
    assert isinstance(await asyncio.wait_for(second, 1), FetchReply)
    await connection.close()
    await shard.kill()
