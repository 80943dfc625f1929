"""The shard's TCP server, over real sockets: handshake, batches, refusals, faults, clean stop."""

import math
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from shardline.bench.vectors import manifold
from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.messages import (
    ErrorReply,
    FetchReply,
    FetchRequest,
    Hello,
    ReplicaKey,
    SearchOptions,
    SearchParams,
    SearchReply,
    SearchRequest,
    Welcome,
)
from shardline.shards.core.schema import Metric
from shardline.shards.server import answering
from shardline.shards.server import shard_server as server_module
from shardline.shards.server.answering import followed, learned
from shardline.shards.server.shard_server import ShardServer
from shardline.shards.wire.frames import (
    HEADER,
    KEEP_ALIVE,
    MAX_FRAME_BYTES,
    FrameSplitter,
    Message,
    decode_payload,
    encode_frame,
)
from shardline.shards.wire.handshake import check_welcome, prove
from tests.engine import flat_shard
from tests.reference import assert_same_answers, brute_force

ROWS, DIM = 200, 8
SECRET = b"a secret of tests"
IDS = np.arange(ROWS, dtype=np.int64) * 3
VECTORS = manifold(ROWS, DIM, 4, seed=1)
TIMEOUT_S = 10.0


class Client:
    """A blocking client. ``receive`` returns None when the server has closed the connection."""

    def __init__(self, address: tuple[str, int], secret: bytes | None = SECRET) -> None:
        self.address = address
        self.socket = socket.create_connection(address, timeout=TIMEOUT_S)
        self.splitter = FrameSplitter()
        self.waiting: list[tuple[int, Message]] = []
        if secret is not None:
            self.hello = self.greet(secret)

    def greet(self, secret: bytes) -> Hello:
        hello, proof, mac = prove(self.receive()[1], secret, self.address)
        self.send(0, proof)
        answer = self.receive()
        if answer is None:
            raise ProtocolError("closed")
        check_welcome(answer[1], mac)
        return hello

    def send(self, request_id: int, message: Message) -> None:
        self.socket.sendall(encode_frame(request_id, message))

    def receive(self) -> tuple[int, Message] | None:
        while not self.waiting:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            frames = self.splitter.feed(data)
            # without a payload: a sign of life, as on a machine so busy that searches take long
            self.waiting += [(n, decode_payload(payload)) for n, payload in frames if payload]
        return self.waiting.pop(0)

    def ask(self, message: Message) -> Message:
        self.send(5, message)
        request_id, reply = self.receive()
        assert request_id == 5
        return reply

    def close(self) -> None:
        self.socket.close()


class Gate:
    """Wraps a shard: each search waits until the gate is open, and batches are recorded."""

    def __init__(self, shard) -> None:
        self.inner = shard
        self.open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def search_batch(self, requests):
        self.batches.append(len(requests))
        self.entered.set()
        assert self.open.wait(TIMEOUT_S)
        return self.inner.search_batch(requests)


class Watched:
    """Wraps a shard: records which thread searched; each search takes ``slow_s`` longer."""

    def __init__(self, shard, slow_s: float = 0.0) -> None:
        self.inner = shard
        self.slow_s = slow_s
        self.broken = False
        self.threads: list[str] = []

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def search_batch(self, requests):
        self.threads.append(threading.current_thread().name)
        threading.Event().wait(self.slow_s)
        if self.broken:
            raise RuntimeError("a bug")
        return self.inner.search_batch(requests)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


@pytest.fixture
def serve() -> Iterator:
    running: list[ShardServer] = []

    def start(shard=None, **options) -> tuple[str, int]:
        server = ShardServer(shard or flat_shard(VECTORS, IDS), secret=SECRET, **options)
        running.append(server)
        address = server.bind()
        server.start(epoch=9)
        start.server = server
        return address

    yield start
    for server in running:
        server.stop()


def search(queries=VECTORS[:2], k: int = 10, timeout_ms: float = 10_000.0, **params) -> Message:
    return SearchRequest(queries=queries, k=k, timeout_ms=timeout_ms, params=SearchParams(**params))


def test_hello_says_who_answers(serve) -> None:
    with closing(Client(serve())) as client:
        assert (client.hello.key, client.hello.epoch) == (ReplicaKey(7, 0, 0), 9)


def test_search_and_fetch(serve) -> None:
    with closing(Client(serve())) as client:
        reply = client.ask(search())
        assert isinstance(reply, SearchReply)
        expected = brute_force(VECTORS[:2], VECTORS, IDS, 10, Metric.DOT)
        assert_same_answers(reply.ranked, expected)
        assert reply.rows == ROWS
        fetched = client.ask(FetchRequest(item_ids=np.array([3, 4, 0]), timeout_ms=1000.0))
        assert isinstance(fetched, FetchReply)
        assert fetched.item_ids.tolist() == [3, 0]
        np.testing.assert_array_equal(fetched.vectors, VECTORS[[1, 0]])
        nothing = client.ask(FetchRequest(item_ids=np.array([4]), timeout_ms=1000.0))
        assert nothing.vectors.shape == (0, DIM)


def test_many_requests_in_flight_over_many_connections(serve) -> None:
    address = serve()
    clients = [Client(address) for _ in range(5)]
    for number in range(40):
        for client in clients:
            client.send(number, search(VECTORS[number : number + 1], k=1 + number % 3))
    for client in clients:
        replies = dict(client.receive() for _ in range(40))
        for number in range(40):
            expected = brute_force(
                VECTORS[number : number + 1], VECTORS, IDS, 1 + number % 3, Metric.DOT
            )
            assert_same_answers(replies[number].ranked, expected)
        client.close()


def test_whatever_waits_becomes_one_batch(serve) -> None:
    gate = Gate(flat_shard(VECTORS, IDS))
    with closing(Client(serve(gate))) as client:
        client.send(0, search())
        assert gate.entered.wait(TIMEOUT_S)
        for number in range(1, 8):
            client.send(number, search())
        wait_for_depth(serve.server, 8)
        gate.open.set()
        assert sorted(client.receive()[0] for _ in range(8)) == list(range(8))
    assert gate.batches == [1, 7]
    assert serve.server.stats.batches == 2
    assert serve.server.stats.requests == 8


def test_a_batch_is_bounded(serve, monkeypatch) -> None:
    monkeypatch.setattr(server_module, "MAX_BATCH_ROWS", 4)
    gate = Gate(flat_shard(VECTORS, IDS))
    with closing(Client(serve(gate))) as client:
        client.send(0, search(VECTORS[:1]))
        assert gate.entered.wait(TIMEOUT_S)
        for number in range(1, 11):
            client.send(number, search(VECTORS[:1]))
        wait_for_depth(serve.server, 11)
        gate.open.set()
        assert sorted(client.receive()[0] for _ in range(11)) == list(range(11))
    assert gate.batches == [1, 4, 4, 2]


def wait_for_depth(server: ShardServer, depth: int) -> None:
    """Returns once so many requests have been accepted; polls, because sockets take their time."""
    tick = threading.Event()
    for _ in range(5000):
        if server.queue_depth == depth:
            return
        tick.wait(0.002)
    raise AssertionError(f"queue depth {server.queue_depth}, not {depth}")


def test_a_full_queue_refuses_at_once(serve) -> None:
    gate = Gate(flat_shard(VECTORS, IDS))
    with closing(Client(serve(gate, max_queued_requests=3))) as client:
        for number in range(5):
            client.send(number, search())
        refused = [client.receive() for _ in range(2)]
        assert sorted(number for number, _ in refused) == [3, 4]
        for _, reply in refused:
            assert isinstance(reply, ErrorReply)
            assert reply.code == "overloaded"
        gate.open.set()
        assert sorted(client.receive()[0] for _ in range(3)) == [0, 1, 2]
        assert isinstance(client.ask(search()), SearchReply)
    assert serve.server.stats.overloaded == 2


def test_rows_bound_the_queue_too_but_one_large_request_passes(serve, monkeypatch) -> None:
    monkeypatch.setattr(server_module, "MAX_QUEUED_ROWS", 4)
    gate = Gate(flat_shard(VECTORS, IDS))
    with closing(Client(serve(gate))) as client:
        client.send(0, search(VECTORS[:9]))
        client.send(1, search(VECTORS[:1]))
        number, reply = client.receive()
        assert (number, reply.code) == (1, "overloaded")
        gate.open.set()
        assert isinstance(client.receive()[1], SearchReply)


def test_time_that_ran_out_in_the_queue_is_not_searched(serve) -> None:
    gate = Gate(flat_shard(VECTORS, IDS))
    with closing(Client(serve(gate))) as client:
        client.send(0, search())
        assert gate.entered.wait(TIMEOUT_S)
        client.send(1, search(timeout_ms=0.0))
        client.send(2, search(timeout_ms=-5.0))
        client.send(3, FetchRequest(item_ids=IDS[:2], timeout_ms=0.0))
        client.send(4, search())
        wait_for_depth(serve.server, 5)
        gate.open.set()
        replies = dict(client.receive() for _ in range(5))
    assert [replies[n].code for n in (1, 2, 3)] == ["deadline_exceeded"] * 3
    assert isinstance(replies[0], SearchReply)
    assert isinstance(replies[4], SearchReply)
    assert gate.batches == [1, 1]
    assert serve.server.stats.expired == 3


LOOP, SEARCH = "shard-loop", "shard-search"


@pytest.fixture
def any_speed_is_short(monkeypatch) -> None:
    """So that a busy machine cannot make a search of a few rows too long for the loop thread."""
    monkeypatch.setattr(server_module, "INLINE_MS", 60_000.0)


@pytest.mark.usefixtures("any_speed_is_short")
def test_a_few_rows_are_searched_in_the_loop_thread_once_they_are_known_to_be_fast(serve) -> None:
    shard = Watched(flat_shard(VECTORS, IDS))
    with closing(Client(serve(shard))) as client:
        for rows in (1, 1, 8, 9, 1):
            reply = client.ask(search(VECTORS[:rows]))
            expected = brute_force(VECTORS[:rows], VECTORS, IDS, 10, Metric.DOT)
            assert_same_answers(reply.ranked, expected)
    assert shard.threads == [SEARCH, LOOP, LOOP, SEARCH, LOOP]
    assert (serve.server.stats.requests, serve.server.stats.batches) == (5, 5)
    assert serve.server.queue_depth == 0


@pytest.mark.usefixtures("any_speed_is_short")
def test_a_search_under_way_keeps_the_others_out_of_the_loop_thread(serve) -> None:
    gate = Gate(flat_shard(VECTORS, IDS))
    gate.open.set()
    with closing(Client(serve(gate))) as client:
        client.ask(search())
        gate.entered.clear()
        gate.open.clear()
        client.send(1, search(VECTORS[:9]))
        assert gate.entered.wait(TIMEOUT_S)
        client.send(2, search(VECTORS[:1]))
        wait_for_depth(serve.server, 2)  # accepted, so the loop is not the one that waits
        gate.open.set()
        assert sorted(client.receive()[0] for _ in range(2)) == [1, 2]
    assert gate.batches == [1, 1, 1]


def test_a_slow_shard_is_searched_in_the_search_thread(serve) -> None:
    shard = Watched(flat_shard(VECTORS, IDS), slow_s=2 * server_module.INLINE_MS / 1e3)
    with closing(Client(serve(shard))) as client:
        for _ in range(3):
            assert isinstance(client.ask(search(VECTORS[:1])), SearchReply)
    assert shard.threads == [SEARCH] * 3


def test_a_refused_or_failed_request_says_nothing_about_the_speed(serve) -> None:
    shard = Watched(flat_shard(VECTORS, IDS), slow_s=2 * server_module.INLINE_MS / 1e3)
    with closing(Client(serve(shard))) as client:
        assert isinstance(client.ask(search(k=0)), ErrorReply)
        assert serve.server._answerer.ms_per_row == float("inf")
        assert isinstance(client.ask(search(VECTORS[:1])), SearchReply)
        known = serve.server._answerer.ms_per_row
        assert known >= 2 * server_module.INLINE_MS
        shard.slow_s = 0.0
        assert isinstance(client.ask(search(nprobe=10**9)), ErrorReply)
        shard.broken = True
        assert isinstance(client.ask(search()), ErrorReply)
        assert serve.server._answerer.ms_per_row == known
        shard.broken = False
        assert isinstance(client.ask(search(VECTORS[:1])), SearchReply)
    assert shard.threads == [SEARCH] * 5


def test_the_estimate_rises_at_once_and_falls_slowly() -> None:
    ms_per_row = math.inf
    for measured, estimate in [(5.0, 5.0), (1.0, 2.5), (4.2, 4.2), (8.0, 8.0), (0.0, 4.0)]:
        ms_per_row = learned(ms_per_row, measured)
        assert ms_per_row == pytest.approx(estimate)


def test_the_estimate_of_pieces_follows_by_a_factor_of_two() -> None:
    ms_per_row = math.inf
    for measured, estimate in [(1.0, 1.0), (50.0, 2.0), (1.5, 1.5), (0.01, 0.75), (1.4, 1.4)]:
        ms_per_row = followed(ms_per_row, measured)
        assert ms_per_row == pytest.approx(estimate)


@pytest.mark.usefixtures("any_speed_is_short")
def test_refusals_in_the_loop_thread_are_those_of_the_search_thread(serve) -> None:
    shard = Watched(flat_shard(VECTORS, IDS))
    with closing(Client(serve(shard))) as client:
        assert isinstance(client.ask(search()), SearchReply)
        assert client.ask(search(timeout_ms=0.0)).code == "deadline_exceeded"
        late_fetch = FetchRequest(item_ids=IDS[:2], timeout_ms=-1.0)
        assert client.ask(late_fetch).code == "deadline_exceeded"
        assert client.ask(search(k=0)).code == "invalid_input"
        bad_fetch = FetchRequest(item_ids=np.array([-1]), timeout_ms=1000.0)
        assert client.ask(bad_fetch).code == "invalid_input"
        shard.broken = True
        assert client.ask(search()).message == "internal error of the shard"
        shard.broken = False
        assert isinstance(client.ask(search()), SearchReply)
    assert shard.threads == [SEARCH, LOOP, LOOP, LOOP]
    assert (serve.server.stats.expired, serve.server.stats.failed) == (2, 1)
    assert serve.server.queue_depth == 0


@pytest.mark.parametrize(
    ("message", "field", "part"),
    [
        (search(np.zeros((1, DIM + 1), np.float32)), "queries", "wrong dimension"),
        (search(np.zeros((0, DIM), np.float32)), "queries", "empty batch"),
        (search(k=0), "k", "out of range; expected 1 to 2049; got 0"),
        (search(k=2050), "k", "out of range"),
        (search(k=2**32 - 1), None, "would not fit a frame"),
        (search(nprobe=10**9), "params.nprobe", "out of range; expected 1 to 2048"),
        (search(np.zeros((5000, DIM), np.float32), k=2048), None, "would not fit a frame"),
        (FetchRequest(item_ids=np.array([-1]), timeout_ms=1000.0), "item_ids[0]", "negative id"),
        (FetchRequest(item_ids=np.zeros(2_000_000, np.int64), timeout_ms=1e4), None, "not fit a"),
    ],
)
def test_a_wrong_request_gets_an_error_and_the_connection_stays(
    serve, message, field, part
) -> None:
    with closing(Client(serve())) as client:
        reply = client.ask(message)
        assert isinstance(reply, ErrorReply)
        assert reply.code == "invalid_input"
        assert reply.field == field
        assert reply.message.startswith(part) or field is None
        assert part in reply.message
        assert isinstance(client.ask(search()), SearchReply)


def test_queries_that_are_not_numbers_find_nothing(serve) -> None:
    """The router refuses NaN at the door; a shard that meets one all the same stays up."""
    with closing(Client(serve())) as client:
        reply = client.ask(search(np.full((1, DIM), np.nan, np.float32)))
        assert isinstance(reply, SearchReply)
        assert (reply.ranked.ids == -1).all()
        assert np.isneginf(reply.ranked.scores).all()
        assert isinstance(client.ask(search()), SearchReply)


@pytest.mark.parametrize(
    "garbage",
    [
        HEADER.pack(5, 1) + b"\xc1\xc1\xc1\xc1\xc1",
        HEADER.pack(0, 1),
        HEADER.pack(MAX_FRAME_BYTES + 1, 1),
        b"GET / HTTP/1.1\r\n\r\n",
        encode_frame(1, Welcome(mac=b"")),
        encode_frame(1, ErrorReply(code="x", message="y")),
    ],
)
def test_a_broken_frame_closes_its_own_connection_only(serve, garbage) -> None:
    address = serve()
    with closing(Client(address)) as good, closing(Client(address)) as bad:
        bad.socket.sendall(garbage)
        assert bad.receive() is None
        assert isinstance(good.ask(search()), SearchReply)


@pytest.mark.parametrize(
    "first",
    [
        encode_frame(1, search()),
        b"GET / HTTP/1.1\r\n\r\n",
        HEADER.pack(2000, 1),  # nobody unproven may make the server buffer this much
        HEADER.pack(3, 1) + b"\xc1\xc1\xc1",
    ],
)
def test_nothing_is_answered_before_the_proof(serve, first) -> None:
    address = serve()
    with closing(Client(address, secret=None)) as client:
        assert isinstance(client.receive()[1], Hello)
        client.socket.sendall(first)
        assert client.receive() is None
    assert serve.server.stats.requests == 0


def test_a_wrong_secret_is_shut_out(serve) -> None:
    address = serve()
    with (
        closing(Client(address, secret=None)) as stranger,
        pytest.raises(ProtocolError, match="closed"),
    ):
        stranger.greet(b"another secret")
    with closing(Client(address)) as client:
        assert isinstance(client.ask(search()), SearchReply)


def test_a_proof_made_for_another_port_is_shut_out(serve) -> None:
    address = serve()
    with closing(Client(address, secret=None)) as relay:
        relay.address = (address[0], address[1] + 1)
        with pytest.raises(ProtocolError, match="closed"):
            relay.greet(SECRET)
    assert serve.server.stats.requests == 0


def test_a_silent_client_is_shut_out(serve) -> None:
    with closing(Client(serve(handshake_timeout_s=0.05), secret=None)) as client:
        assert isinstance(client.receive()[1], Hello)
        assert client.receive() is None


def test_the_handshake_clock_stops_with_the_proof(serve) -> None:
    with closing(Client(serve())) as client:
        assert isinstance(client.ask(search()), SearchReply)
        (session,) = serve.server.sessions
        assert session._timer.cancelled()


def test_a_client_that_never_reads_is_dropped_and_harms_no_other(
    serve, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("shardline.shards.server.session.UNREAD_S", 0.2)
    address = serve()
    with closing(Client(address)) as deaf, closing(Client(address)) as good:
        frame = encode_frame(1, search(VECTORS, k=ROWS))  # each reply has half a megabyte
        try:
            for _ in range(60):
                deaf.socket.sendall(frame)
        except ConnectionError:
            pass  # dropped already
        for _ in range(5):
            assert isinstance(good.ask(search()), SearchReply)
        tick = threading.Event()
        for _ in range(2000):
            if len(serve.server.sessions) == 1:
                break
            tick.wait(0.005)
    assert "does not read its replies" in caplog.text


def test_replies_that_wait_come_whole_and_in_order_once_they_are_read(serve, monkeypatch) -> None:
    """More than is kept for a client: the requests behind wait, and none is lost or mixed up."""
    monkeypatch.setattr("shardline.shards.server.session.MAX_KEPT_BYTES", 1 << 20)
    asked = [search(VECTORS[row : row + 100], k=ROWS) for row in range(60)]
    with closing(Client(serve())) as client:
        sender = threading.Thread(
            target=lambda: [client.send(number, each) for number, each in enumerate(asked)]
        )
        sender.start()
        answers = dict(client.receive() for _ in asked)
        sender.join()
        assert sorted(answers) == list(range(len(asked)))
        for number, each in list(enumerate(asked))[::20]:
            assert_same_answers(
                answers[number].ranked, brute_force(each.queries, VECTORS, IDS, ROWS, Metric.DOT)
            )
        (session,) = serve.server.sessions
        assert session._taken == 0


def test_time_counts_while_a_request_waits_for_room(serve, monkeypatch) -> None:
    monkeypatch.setattr("shardline.shards.server.session.MAX_KEPT_BYTES", 1)
    gate = Gate(flat_shard(VECTORS, IDS))
    with closing(Client(serve(gate))) as client:
        client.send(1, search())
        assert gate.entered.wait(TIMEOUT_S)
        client.send(2, search(timeout_ms=50.0))
        threading.Event().wait(0.1)  # longer than it may take
        gate.open.set()
        assert isinstance(dict([client.receive(), client.receive()])[2], ErrorReply)


def test_a_client_that_leaves_before_its_reply_harms_nothing(serve) -> None:
    gate = Gate(flat_shard(VECTORS, IDS))
    address = serve(gate)
    leaver = Client(address)
    leaver.send(0, search())
    assert gate.entered.wait(TIMEOUT_S)
    leaver.close()
    with closing(Client(address)) as client:
        gate.open.set()
        assert isinstance(client.ask(search()), SearchReply)
    wait_for_depth(serve.server, 0)


def test_a_bug_in_the_search_costs_its_answers_only(serve, caplog) -> None:
    class Broken(Gate):
        def search_batch(self, requests):
            if not self.open.is_set():
                raise RuntimeError("a secret detail")
            return self.inner.search_batch(requests)

        def fetch_batch(self, requests):
            raise RuntimeError("a secret detail")

    broken = Broken(flat_shard(VECTORS, IDS))
    with closing(Client(serve(broken))) as client:
        for message in (search(), FetchRequest(item_ids=IDS[:1], timeout_ms=1000.0)):
            reply = client.ask(message)
            assert reply == ErrorReply(code="error", message="internal error of the shard")
        broken.open.set()
        assert isinstance(client.ask(search()), SearchReply)
    assert "a secret detail" in caplog.text
    assert serve.server.stats.failed == 2


def test_clients_between_bind_and_start_wait(serve) -> None:
    server = ShardServer(flat_shard(VECTORS, IDS), secret=SECRET)
    address = server.bind()
    with closing(Client(address, secret=None)) as client:
        server.start(epoch=11)
        assert client.greet(SECRET).epoch == 11
        assert isinstance(client.ask(search()), SearchReply)
        server.stop()
        assert client.receive() is None


def test_stop_closes_port_and_connections_and_ends_both_threads() -> None:
    server = ShardServer(flat_shard(VECTORS, IDS), secret=SECRET)
    address = server.bind()
    server.start(epoch=1)
    clients = [Client(address) for _ in range(3)]
    clients[0].send(1, search())
    server.stop()
    server.stop()
    for client in clients:
        while client.receive() is not None:
            pass
        client.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=1.0)
    assert server.sessions == set()
    with closing(socket.create_server(address)):
        pass  # the port is free again


@pytest.mark.parametrize("bound", [False, True])
def test_a_server_that_never_started_stops(bound) -> None:
    server = ShardServer(flat_shard(VECTORS, IDS), secret=SECRET)
    if bound:
        server.bind()
    server.stop()


def test_nagle_is_off(serve) -> None:
    with closing(Client(serve())):
        (session,) = serve.server.sessions
        accepted = session._transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_ipv6(serve) -> None:
    try:
        address = serve(host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with closing(Client(address)) as client:
        assert isinstance(client.ask(search()), SearchReply)


def test_a_long_search_says_that_it_lives(serve, monkeypatch) -> None:
    monkeypatch.setattr("shardline.shards.server.shard_server.KEEP_ALIVE_S", 0.01)
    gate = Gate(flat_shard(VECTORS, IDS))
    address = serve(gate)
    with closing(Client(address)) as asking, closing(Client(address)) as idle:
        asking.send(1, search())
        assert gate.entered.wait(TIMEOUT_S)
        for client in (asking, idle):
            assert client.socket.recv(len(KEEP_ALIVE)) == KEEP_ALIVE
        gate.open.set()
        frames: dict[int, bytes] = {}
        while 1 not in frames:  # the reply comes after however many of them
            frames |= dict(asking.splitter.feed(asking.socket.recv(1 << 16)))
    assert isinstance(decode_payload(frames[1]), SearchReply)


def in_background(queries=VECTORS, k: int = 10, timeout_ms: float = 10_000.0) -> SearchRequest:
    options = SearchOptions(background=True)
    return SearchRequest(queries=queries, k=k, timeout_ms=timeout_ms, options=options)


class Counting(Gate):
    """An open gate that records how many queries each search has."""

    def search_batch(self, requests):
        self.open.set()
        self.batches.append(sum(len(request.queries) for request in requests))
        return self.inner.search_batch(requests)


def test_a_background_search_is_one_answer_made_of_pieces(serve, monkeypatch) -> None:
    monkeypatch.setattr(answering, "PIECE_MS", 0.0)  # a query each
    counting = Counting(flat_shard(VECTORS, IDS))
    with closing(Client(serve(counting))) as client:
        reply = client.ask(in_background(VECTORS[:9]))
        assert counting.batches == [1] * 9
        whole = counting.inner.search(search(VECTORS[:9]))
        assert_same_answers(reply.ranked, whole.ranked)
        assert (reply.rows, reply.others_share) == (ROWS, 0.0)
        assert client.ask(search()).others_share == 0.0
        assert 0 < client.ask(in_background(VECTORS[:1])).others_share < 1
        error = client.ask(in_background(k=0))
        assert (error.code, error.field) == ("invalid_input", "k")


def test_other_searches_are_answered_between_two_pieces(serve, monkeypatch) -> None:
    monkeypatch.setattr(answering, "PIECE_MS", 0.0)
    gate = Gate(flat_shard(VECTORS, IDS))
    with closing(Client(serve(gate))) as client:
        client.send(1, in_background(VECTORS[:20]))
        assert gate.entered.wait(TIMEOUT_S)
        client.send(2, search())
        client.send(3, in_background(VECTORS[:1]))
        client.send(4, search(VECTORS[:4]))
        wait_for_depth(serve.server, 4)
        gate.open.set()
        assert [client.receive()[0] for _ in range(4)] == [2, 4, 1, 3]
    assert gate.batches == [1, 2] + [1] * 20


def test_a_background_search_whose_time_runs_out_is_given_up(serve, monkeypatch) -> None:
    monkeypatch.setattr(answering, "PIECE_MS", 0.0)
    watched = Watched(flat_shard(VECTORS, IDS), slow_s=0.05)
    with closing(Client(serve(watched))) as client:
        reply = client.ask(in_background(timeout_ms=120.0))
        assert (type(reply), reply.code) == (ErrorReply, "deadline_exceeded")
        assert len(watched.threads) < 10
        watched.broken = True
        reply = client.ask(in_background(timeout_ms=10_000.0))
        assert reply == ErrorReply(code="error", message="internal error of the shard")
    stats = serve.server.stats
    assert (stats.requests, stats.expired, stats.failed) == (2, 1, 1)


def test_background_searches_leave_room_in_the_queue(serve) -> None:
    gate = Gate(flat_shard(VECTORS, IDS))
    with closing(Client(serve(gate, max_queued_requests=4))) as client:
        client.send(1, in_background(VECTORS[:1]))
        assert gate.entered.wait(TIMEOUT_S)
        client.send(2, in_background(VECTORS[:1]))
        client.send(3, in_background(VECTORS[:1]))
        request_id, refused = client.receive()
        assert (request_id, refused.code) == (3, "overloaded")
        client.send(4, search())
        wait_for_depth(serve.server, 3)
        gate.open.set()
        assert sorted(client.receive()[0] for _ in range(3)) == [1, 2, 4]
