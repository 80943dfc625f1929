"""A real router behind a real HAProxy: what strangers may do there without harm to others."""

import json
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from shardline.router.client.sync_client import Client
from shardline.router.contract import Unauthenticated
from shardline.router.http.api_keys import Key, Scope
from shardline.router.http.body import LINGER_S
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import Unavailable
from tests.haproxy_in_front import LIMITS, Front, haproxy_before
from tests.live_router import DIM
from tests.router_process import router_process

STRANGERS = 500
KEY = Key(Scope.SEARCH, "k" * 40)
WRONG = "w" * 40
QUERY = {"item_ids": [1], "k": 3, "timeout_ms": 9000}
CONFIG = RouterConfig(max_in_flight=64)
BUFFER = 16 << 10  # HAProxy keeps so much of a body while it waits for the rest
MIB = 1 << 20
PROBLEM = "application/problem+json"


@dataclass(frozen=True)
class Edge:
    front: Front
    direct: str  # the router's own address

    def others(self, for_s: float = 0.3) -> Counter[int]:
        """What a client with a key is answered meanwhile: small requests, and one of two MiB."""
        until, statuses = time.monotonic() + for_s, Counter[int]()
        large = json.dumps(QUERY).encode() + b" " * (2 * MIB)
        headers = {"authorization": f"Bearer {KEY.secret}", "content-type": "application/json"}
        with httpx.Client(base_url=self.front.url, headers=headers, timeout=30) as http:
            while time.monotonic() < until or not statuses:
                statuses[http.post("/v1/search", json=QUERY).status_code] += 1
            statuses[http.post("/v1/search", content=large).status_code] += 1
        return statuses

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.front.port), timeout=30)


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    limits = replace(LIMITS, max_in_flight=CONFIG.max_in_flight, max_timeout_ms=100)
    folder = tmp_path_factory.mktemp("haproxy")
    with (
        router_process(CONFIG, KEY.secret) as port,
        haproxy_before(folder, [port], limits) as front,
    ):
        yield Edge(front, f"http://127.0.0.1:{port}")


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, soft + 4 * STRANGERS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def head(path: str, length: int | None, key: str | None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    lines += ["Transfer-Encoding: chunked"] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([*lines, "\r\n"]).encode()


@dataclass(frozen=True)
class Slow:
    """A client that announces a body, sends some of it, and no more, or a byte now and then."""

    key: str | None
    length: int | None
    sent: int
    trickles: bool = False
    path: str = "/v1/search"

    def begins(self) -> bytes:
        body = b"x" * self.sent
        if self.length is None:
            body = b"%x\r\n%s\r\n" % (self.sent, body) if self.sent else b""
        return head(self.path, self.length, self.key) + body


SLOW = [
    *(Slow(None, length, 0) for length in (1000, MIB, 31 * MIB)),
    *(Slow(None, length, 2 * BUFFER) for length in (MIB, None)),
    *(Slow(WRONG, length, 0) for length in (1000, MIB, 31 * MIB, None)),
    *(Slow(WRONG, length, 2 * BUFFER) for length in (MIB, 31 * MIB, None)),
    Slow(WRONG, 31 * MIB, 2 * BUFFER, trickles=True),
    Slow(WRONG, 1000, 1, trickles=True),
    Slow(KEY.secret, 1000, 1, trickles=True),
    Slow(None, MIB, 2 * BUFFER, path="/healthz"),
    Slow(None, None, 1, path="/docs"),
]


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("slow", SLOW, ids=str)
def test_those_who_do_not_send_their_bodies_are_in_nobodys_way(edge: Edge, slow: Slow) -> None:
    with ExitStack() as stack:
        strangers = [stack.enter_context(edge.connect()) for _ in range(STRANGERS)]
        for each in strangers:
            each.sendall(slow.begins())
        stop = threading.Event()

        def trickle() -> None:
            while not stop.wait(0.2):
                for each in strangers:
                    try:
                        each.sendall(b"x")
                    except OSError:  # refused and closed on
                        continue

        thread = threading.Thread(target=trickle if slow.trickles else stop.wait)
        thread.start()
        try:
            statuses = edge.others()
        finally:
            stop.set()
            thread.join()
    assert set(statuses) == {200}, statuses


@pytest.mark.usefixtures("many_files")
def test_uploads_with_a_key_that_stall_hold_up_uploads_at_most(edge: Edge) -> None:
    """As many at once as the router works on; small requests beside them are answered."""
    with ExitStack() as stack:
        slow = Slow(KEY.secret, 31 * MIB, 2 * BUFFER)
        opened = [stack.enter_context(edge.connect()) for _ in range(3 * CONFIG.max_in_flight)]
        for each in opened:
            each.sendall(slow.begins())
        headers = {"authorization": f"Bearer {KEY.secret}"}
        with httpx.Client(base_url=edge.front.url, headers=headers, timeout=30) as http:
            statuses = Counter(http.post("/v1/search", json=QUERY).status_code for _ in range(20))
    assert statuses == {200: 20}


@pytest.mark.parametrize("length", [MIB, 31 * MIB, None])
def test_the_place_of_a_wrong_key_is_free_at_once(edge: Edge, length: int | None) -> None:
    with edge.connect() as opened:
        started = time.monotonic()
        opened.sendall(Slow(WRONG, length, 2 * BUFFER).begins())
        answer = b""
        while part := opened.recv(4096):
            answer += part
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert time.monotonic() - started < LINGER_S + 2, "closed, though nothing more was sent"


@pytest.mark.parametrize("key", [None, WRONG])
@pytest.mark.parametrize("size", [100, BUFFER, 100_000, 3 * MIB])
def test_who_sends_a_body_without_a_good_key_is_told_so(
    edge: Edge, key: str | None, size: int
) -> None:
    vectors = [[0.5] * DIM] * (size // (6 * DIM) + 1)
    for _ in range(5):
        with Client(edge.front.url, key=key) as client, pytest.raises(Unauthenticated):
            client.search(vectors=vectors, k=3)


def test_a_body_that_is_late_is_a_problem_of_haproxys(tmp_path: Path, edge: Edge) -> None:
    port = int(edge.direct.rpartition(":")[2])
    with haproxy_before(tmp_path, [port], replace(LIMITS, body_timeout_ms=300)) as front:
        with socket.create_connection(("127.0.0.1", front.port), timeout=10) as opened:
            started = time.monotonic()
            opened.sendall(Slow(KEY.secret, 1000, 1).begins())
            answer = opened.recv(4096)
        assert 0.25 < time.monotonic() - started < 3
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in answer


@pytest.mark.parametrize("request_id", [None, 'a"b\\c', "x" * 128, "x" * 129, "with space"])
def test_haproxys_refusal_of_a_keyless_request_is_the_routers(
    edge: Edge, request_id: str | None
) -> None:
    given = {} if request_id is None else {"X-Request-ID": request_id}
    for method, path in (("POST", "/v1/search"), ("GET", "/v1/items/5"), ("DELETE", "/x")):
        ours, routers = (
            httpx.request(method, url + path, headers=given)
            for url in (edge.front.url, edge.direct)
        )
        problems = [ours.json(), routers.json()]
        ids = [problem.pop("request_id") for problem in problems]
        assert problems[0] == problems[1]
        assert ours.status_code == routers.status_code == 401
        for name in ("content-type", "www-authenticate", "cache-control"):
            assert ours.headers[name] == routers.headers[name]
        assert ids == [ours.headers["x-request-id"], routers.headers["x-request-id"]]
        assert (ids[0] == request_id) == (ids[1] == request_id)
        assert [len(each) for each in ids] == [len(ids[0])] * 2
    assert httpx.head(f"{edge.front.url}/v1/status").content == b""


def test_open_paths_need_no_key_and_insecure_ones_none(tmp_path: Path, edge: Edge) -> None:
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json", "/"):
        assert httpx.get(edge.front.url + path).status_code in (200, 307)
    with (
        router_process(RouterConfig()) as port,
        haproxy_before(tmp_path, [port], replace(LIMITS, insecure=True)) as front,
    ):
        assert httpx.post(f"{front.url}/v1/search", json=QUERY).status_code == 200


def test_a_long_body_where_none_belongs_is_refused(edge: Edge) -> None:
    for method in ("GET", "POST"):
        request = head("/healthz", MIB, None).replace(b"POST", method.encode())
        answer = answer_to(edge, request + b"x" * 2 * BUFFER)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert PROBLEM.encode() in answer
    assert httpx.request("GET", f"{edge.front.url}/healthz", content=b"short").status_code == 200


def answer_to(edge: Edge, request: bytes, *, half_close: bool = False) -> bytes:
    with edge.connect() as opened:
        opened.sendall(request)
        if half_close:
            opened.shutdown(socket.SHUT_WR)
        return opened.recv(4096)


@pytest.mark.parametrize(
    "request_line",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",  # HTTP/2 with prior knowledge
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nX: y\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /healthz HTTP/9.9\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_not_http_1_with_a_host_is_refused(edge: Edge, request_line: bytes) -> None:
    assert answer_to(edge, request_line).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET /healthz HTTP/1.0\r\n\r\n",  # which knew no Host
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://x/healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        # an upgrade that is offered may be ignored
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
        b"Connection: Upgrade, HTTP2-Settings\r\n\r\n",
    ],
)
def test_what_is_http_1_is_answered_in_it(edge: Edge, request_line: bytes) -> None:
    assert answer_to(edge, request_line).startswith(b"HTTP/1.1 200 ")


def test_a_connection_shut_down_before_the_answer_is_a_client_that_has_left(edge: Edge) -> None:
    """It looks the same, and the work of one who has left is not done; said in SECURITY.md."""
    request = head("/v1/search", len(json.dumps(QUERY)), KEY.secret) + json.dumps(QUERY).encode()
    assert answer_to(edge, request).startswith(b"HTTP/1.1 200 ")
    refused = answer_to(edge, request, half_close=True)
    assert refused.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 "))


def test_an_upload_may_take_longer_than_a_router_may_take_to_answer(edge: Edge) -> None:
    """``timeout server`` is 2.1 s here."""
    body = json.dumps(QUERY).encode()
    with edge.connect() as opened:
        opened.sendall(head("/v1/search", len(body) + 2 * BUFFER, KEY.secret) + b" " * BUFFER)
        for _ in range(8):
            opened.sendall(b" " * (BUFFER // 8))
            time.sleep(0.35)
        opened.sendall(body)
        assert opened.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_router_that_does_not_answer_is_given_up_after_its_own_limit(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        limits = replace(LIMITS, max_timeout_ms=100, insecure=True)
        with haproxy_before(tmp_path, [silent.getsockname()[1]], limits) as front:
            started = time.monotonic()
            response = httpx.post(f"{front.url}/v1/search", json=QUERY, timeout=30)
            assert time.monotonic() - started < 4
    assert response.status_code in (502, 503, 504)
    assert response.headers["content-type"] == PROBLEM
    assert response.json()["code"] in (Unavailable.code, "deadline_exceeded")
