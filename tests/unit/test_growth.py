"""Garbage takes memory in proportion to its size while it is read, and none once it is refused."""

import asyncio
import gc
import json
import logging
import random
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardline.router.fanout.coalesce import LaneKey
from shardline.router.fanout.fanout import Fanout
from shardline.router.http.api import create_app
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.messages import FetchRequest
from shardline.shards.core.metrics import Recorder
from shardline.shards.server.shard_server import ShardServer
from shardline.shards.wire.frames import HEADER, FrameSplitter, decode_payload, encode_frame
from shardline.shards.wire.handshake import prove
from shardline.shards.wire.search_layout import REPLY, REQUEST
from tests.engine import flat_shard
from tests.fake_shard import make_rows, make_table, running_shards

SECRET = b"a secret of tests"
FEW, MANY = 40, 240  # rounds before the memory is looked at, and until it is looked at again
KEPT_BYTES = 32 << 10  # for 200 rounds: caches of the interpreter, far below one object a round
PEAK_BYTES = 32 << 10  # of reading a small frame
PEAK_FACTOR = 16  # and for each byte of a large one


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def kept_by(work: Callable[[int], None]) -> int:
    """Bytes held after MANY rounds beyond those held after FEW."""
    for number in range(FEW):
        work(number)
    before = held()
    for number in range(FEW, MANY):
        work(number)
    return held() - before


def held() -> int:
    """Bytes that Python's objects hold now."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def peak_of(payload: bytes) -> int:
    """Bytes taken at most while a payload is decoded, or found to be none."""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    with suppress(ProtocolError):
        decode_payload(payload)
    return tracemalloc.get_traced_memory()[1] - before


@pytest.mark.usefixtures("traced")
@given(st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_random_frames_take_little_memory(payload: bytes) -> None:
    peak_of(payload)  # the first error of its kind fills caches
    assert peak_of(payload) <= PEAK_BYTES


LARGE = 1 << 20


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"\xdd\xff\xff\xff\xff" + bytes(64), id="claims four billion items"),
        pytest.param(b"\xdf\xff\xff\xff\xff" + bytes(64), id="claims four billion pairs"),
        pytest.param(b"\xc6\xff\xff\xff\xff" + bytes(64), id="claims four gigabytes"),
        pytest.param(b"\x91" * LARGE, id="nested"),
        pytest.param(b"\xdd" + struct.pack(">I", LARGE) + b"\x80" * LARGE, id="empty maps"),
        pytest.param(b"\xdd" + struct.pack(">I", LARGE) + b"\x90" * LARGE, id="empty arrays"),
        pytest.param(msgpack.packb([6, bytes(LARGE), 1.0]), id="bytes for an array"),
        pytest.param(msgpack.packb([6, ["<i8", [9], bytes(LARGE)], 1.0]), id="sizes"),
        pytest.param(REQUEST.pack(4, *[2**32 - 1] * 3, 1.0, *[0] * 6), id="a request's sizes"),
        pytest.param(
            REPLY.pack(5, 2**32 - 1, 2**32 - 1, 0, 1, 0, 1, 1.0, 0.0, -1, 0, 0),
            id="a reply's sizes",
        ),
    ],
)
def test_what_a_frame_claims_is_not_allocated(payload: bytes) -> None:
    assert peak_of(payload) <= PEAK_BYTES + PEAK_FACTOR * len(payload)


@pytest.mark.usefixtures("traced")
def test_frames_that_were_refused_leave_nothing() -> None:
    rng = random.Random(0)
    good = encode_frame(1, FetchRequest(item_ids=np.arange(50), timeout_ms=5.0))

    def refuse(_number: int) -> None:
        frame = bytearray(good)
        for _ in range(4):
            frame[rng.randrange(HEADER.size, len(frame))] = rng.randrange(256)
        splitter = FrameSplitter()
        for _, payload in [*splitter.feed(frame), (0, rng.randbytes(200))]:
            with suppress(ProtocolError):
                decode_payload(payload)

    assert kept_by(refuse) <= KEPT_BYTES


def _wait_gone(server: ShardServer) -> None:
    """Until the server has noticed that every client has left."""
    give_up = time.monotonic() + 10
    while server.sessions:
        assert time.monotonic() < give_up, "a session outlives its connection"
        time.sleep(0.001)


def altered(frame: bytes) -> bytes:
    """A proof that is wrong in one bit."""
    return frame[:-1] + bytes([frame[-1] ^ 1])


@pytest.mark.usefixtures("traced")
def test_strangers_on_a_shards_port_leave_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(
        logging.CRITICAL, logger="shardline.shards.server.session"
    )  # lines that pytest would keep
    vectors = np.eye(8, dtype=np.float32)
    server = ShardServer(flat_shard(vectors, np.arange(8)), secret=SECRET)
    address = server.bind()
    server.start(epoch=1)
    rng = random.Random(0)

    def intrude(number: int) -> None:
        with socket.create_connection(address, timeout=10) as stranger:
            ((_, hello),) = FrameSplitter().feed(stranger.recv(4096))
            _, proof, _ = prove(decode_payload(hello), SECRET, address)
            stranger.sendall(
                (
                    rng.randbytes(500),
                    HEADER.pack(1 << 30, 1),
                    altered(encode_frame(0, proof)),
                    encode_frame(0, proof) + HEADER.pack(40, 7) + rng.randbytes(40),
                    encode_frame(0, proof) + HEADER.pack(1 << 20, 7) + bytes(1000),  # and leaves
                )[number % 5]
            )
            if number % 5 < 4:
                with suppress(ConnectionResetError):
                    while stranger.recv(4096):
                        pass
        _wait_gone(server)  # what a session holds while it lives is no leak

    try:
        assert kept_by(intrude) <= KEPT_BYTES
        assert server.queue_depth == 0
        assert server.stats.requests == 0
    finally:
        server.stop()
    assert server.sessions == set()


@pytest.mark.usefixtures("traced")
def test_bad_requests_leave_nothing() -> None:
    config = RouterConfig(max_body_bytes=4096, max_in_flight=1)  # a place not given back: 429
    service = SearchService(config, SECRET)
    app = create_app(service, config)
    rng = random.Random(0)
    statuses: set[int] = set()

    def body(number: int) -> tuple[bytes, bytes]:
        content = {"vectors": [[rng.random()] * rng.randrange(9)] * 2, "k": rng.choice([0, 2**31])}
        return (
            (b"application/json", rng.randbytes(300)),
            (b"application/msgpack", rng.randbytes(300)),
            (b"application/json", json.dumps(content).encode()),
            (b"application/msgpack", msgpack.packb(content | {"x": msgpack.ExtType(3, b"abc")})),
            (b"application/json", bytes(5000)),
            (b"text/plain", b"{}"),
        )[number % 6]

    async def ask(number: int) -> None:
        media, content = body(number)
        messages = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive():
            return messages.pop()

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.add(message["status"])

        headers = [(b"content-type", media)]
        scope = {"type": "http", "method": "POST", "path": "/v1/search", "headers": headers}
        await app(scope, receive, send)

    with asyncio.Runner() as runner:
        assert kept_by(lambda number: runner.run(ask(number))) <= KEPT_BYTES
    assert statuses == {400, 413, 415}


@pytest.mark.usefixtures("traced")
async def test_queries_beside_a_stalled_shard_leave_nothing() -> None:
    config = RouterConfig(late_after_ms=20.0, stall_timeout_ms=60_000.0)
    ids, vectors = make_rows(60, 8)
    batch = np.tile(vectors[:16], (16, 1))  # 8 KiB a query, of which one each would be noticed
    degraded: set[tuple[str, ...]] = set()
    recorder = Recorder()

    async def ask(fanout: Fanout) -> None:
        deadline = asyncio.get_running_loop().time() + 0.2
        with fanout.pin() as snapshot:
            key = LaneKey(snapshot=snapshot, k=5, min_coverage=0.0)
            answer = await fanout.search(batch, key, deadline=deadline)
        degraded.add(tuple(map(str, answer.coverage.degraded)))
        list(recorder.drain())  # as its exporter does

    async with running_shards(ids, vectors, 2) as shards:
        fanout = Fanout(SECRET, config, random.Random(0), recorder)
        await fanout.apply(make_table(shards, 8), None)
        shards[1].gate.clear()
        shards[1].stop_reading()
        for _ in range(FEW):
            await ask(fanout)
        shards[0].requests.clear()  # the fake's own notes
        before = held()
        for _ in range(MANY):
            await ask(fanout)
        shards[0].requests.clear()
        assert held() - before <= KEPT_BYTES
        assert degraded <= {
            ("shard 1: deadline exceeded",),
            ("shard 1: silent, though it owes answers",),
        }
        await fanout.close()
