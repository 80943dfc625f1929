"""What a shard has under way for one connection: what flows together, what waits, who overtakes."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import closing

import msgpack
import pyarrow as pa
import pytest

from shardline.shards.core.messages import (
    MAX_RETURNED_BYTES,
    AttributesReply,
    AttributesRequest,
    ErrorReply,
    SearchReply,
)
from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.live.state import ShardState
from shardline.shards.server import session as session_module
from shardline.shards.server.session import Session
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from tests.engine import build_main
from tests.unit.test_server import IDS, ROWS, SECRET, TIMEOUT_S, VECTORS, Client, search

LENGTHS = {"title": 40, "text": 4_000, "page": 40_000, "book": 100_000}  # of each value, in bytes


class Gate:
    """Wraps a shard: nothing is answered until the gate is open; records limits of attributes."""

    def __init__(self, shard: Shard) -> None:
        self.inner = shard
        self.dim = shard.dim
        self.open = threading.Event()
        self.limits: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def search_batch(self, requests):
        assert self.open.wait(TIMEOUT_S)
        return self.inner.search_batch(requests)

    def attributes_batch(self, requests, limits):
        assert self.open.wait(TIMEOUT_S)
        self.limits += limits
        return self.inner.attributes_batch(requests, limits)


@pytest.fixture
def gate() -> Gate:
    table = pa.table({name: ["x" * size] * ROWS for name, size in LENGTHS.items()})
    state = ShardState.of(build_main(VECTORS, kind="flat"), IDS, ItemAttributes(table))
    return Gate(Shard(shard=0, generation=7, state=state))


@pytest.fixture
def server(gate) -> Iterator[ShardServer]:
    made = ShardServer(gate, secret=SECRET)
    made.bind()
    made.start(epoch=1)
    yield made
    gate.open.set()
    made.stop()


@pytest.fixture
def client(server) -> Iterator[Client]:
    with closing(Client(server.address)) as made:
        yield made


def attributes(*names: str) -> AttributesRequest:
    return AttributesRequest(item_ids=IDS, names=names, timeout_ms=10_000.0)


def of(server: ShardServer) -> Session:
    (session,) = server.sessions
    return session


def wait_until(condition) -> None:
    tick = threading.Event()
    for _ in range(int(TIMEOUT_S / 0.005)):
        if condition():
            return
        tick.wait(0.005)
    assert condition()


def test_attributes_and_searches_of_one_connection_are_under_way_together(
    server, client, gate
) -> None:
    asked = [*[attributes("title")] * 20, search()]
    for number, message in enumerate(asked):
        client.send(number, message)
    wait_until(lambda: server.queue_depth == len(asked))
    gate.open.set()
    answers = dict(client.receive() for _ in asked)
    assert isinstance(answers[20], SearchReply)
    assert isinstance(answers[0], AttributesReply)
    wait_until(lambda: of(server)._taken == 0)


@pytest.mark.parametrize(("name", "attempts"), [("title", 1), ("text", 2), ("page", 3)])
def test_attributes_larger_than_most_come_whole_and_are_counted_before(
    server, client, gate, name, attempts
) -> None:
    """A reply never has more than was counted for it, so one that would is made again."""
    gate.open.set()
    reply = client.ask(attributes(name))
    unpacker = msgpack.Unpacker()
    unpacker.feed(reply.values)
    assert list(itertools.chain.from_iterable(unpacker)) == ["x" * LENGTHS[name]] * ROWS
    assert len(gate.limits) == attempts
    assert len(reply.values) <= gate.limits[-1] <= MAX_RETURNED_BYTES
    wait_until(lambda: (of(server)._taken, of(server)._waiting_bytes) == (0, 0))
    assert server.queue_depth == 0


def test_attributes_beyond_the_limit_are_refused(client, gate) -> None:
    gate.open.set()
    reply = client.ask(attributes("book"))
    assert isinstance(reply, ErrorReply)
    assert reply.field == "return"


@pytest.mark.parametrize("name", ["text", "page"])
def test_several_large_replies_wait_for_each_other_and_all_come(server, client, gate, name) -> None:
    asked = [*[attributes(name)] * 6, search()]
    for number, message in enumerate(asked):
        client.send(number, message)
    gate.open.set()
    answers = dict(client.receive() for _ in asked)
    assert isinstance(answers[6], SearchReply)
    assert [number for number in answers if number != 6] == list(range(6))  # who came first
    assert all(len(answers[number].values) > ROWS * LENGTHS[name] for number in range(6))
    wait_until(lambda: (of(server)._taken, of(server)._waiting_bytes) == (0, 0))


@pytest.mark.parametrize("overtake_s", [60.0, 0.0])
def test_a_small_request_overtakes_one_that_has_no_room_for_a_while(
    server, client, gate, monkeypatch, overtake_s
) -> None:
    monkeypatch.setattr(session_module, "MAX_KEPT_BYTES", 1 << 16)
    monkeypatch.setattr(session_module, "OVERTAKE_S", overtake_s)
    client.send(0, search())
    wait_until(lambda: server.queue_depth == 1)
    client.send(1, search(VECTORS, k=ROWS))
    wait_until(lambda: len(of(server)._waiting) == 1)
    client.send(2, search())
    if overtake_s:
        wait_until(lambda: server.queue_depth == 2)
        assert [work.request_id for work in of(server)._waiting] == [1]
    else:
        wait_until(lambda: len(of(server)._waiting) == 2)
        assert server.queue_depth == 1
    gate.open.set()
    assert {client.receive()[0] for _ in range(3)} == {0, 1, 2}


def test_a_peer_is_not_read_while_many_of_its_requests_wait(
    server, client, gate, monkeypatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_KEPT_BYTES", 1)
    monkeypatch.setattr(session_module, "MAX_WAITING", 4)
    client.send(0, search())
    wait_until(lambda: server.queue_depth == 1)
    for number in range(1, 5):
        client.send(number, search())
    wait_until(lambda: len(of(server)._waiting) == 4)
    wait_until(lambda: not of(server)._transport.is_reading())
    for number in range(5, 40):
        client.send(number, search())
    gate.open.set()
    assert sorted(client.receive()[0] for _ in range(40)) == list(range(40))
    assert of(server)._transport.is_reading()
