"""The cluster exposed: keys, slow and rude clients, strangers on its ports."""

import os
import re
import resource
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from shardline.cluster.serving.deployment import shard_reports
from shardline.cluster.serving.serving_keys import add_key, remove_key
from shardline.router.client.sync_client import Client
from shardline.router.contract import Forbidden, Unauthenticated
from shardline.router.http.api_keys import Key, Scope, read_keys
from shardline.router.http.auth import RELOAD_S
from shardline.router.serve.haproxy import HEADER_TIMEOUT_S
from shardline.shards.core.errors import InvalidInput
from tests.integration.conftest import Cluster

SOON_S = 20.0
IDLE_CONNECTIONS = 1000
QUERY = {"item_ids": [1], "k": 3}


@pytest.fixture(scope="module")
def keys(cluster: Cluster) -> dict[Scope, str]:
    assert cluster.endpoint.key_file is not None
    return {key.scope: key.secret for key in read_keys(Path(cluster.endpoint.key_file))}


@pytest.fixture(scope="module")
def http(cluster: Cluster) -> Iterator[httpx.Client]:
    """Without a key."""
    with httpx.Client(base_url=cluster.endpoint.url, timeout=30) as http:
        yield http


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def address_of(cluster: Cluster) -> tuple[str, int]:
    url = httpx.URL(cluster.endpoint.url)
    return url.host, url.port or 80


@contextmanager
def connection(cluster: Cluster) -> Iterator[socket.socket]:
    with socket.create_connection(address_of(cluster), timeout=30) as opened:
        yield opened


def answer_on(opened: socket.socket) -> bytes:
    """The next answer on the connection, whole; TimeoutError where none has begun in time."""
    data = opened.recv(4096)
    opened.settimeout(30)
    while b"\r\n\r\n" not in data:
        data += opened.recv(4096)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += opened.recv(4096)
    return head + b"\r\n\r\n" + body


def until(condition, timeout_s: float = SOON_S) -> float:
    """Seconds until the condition holds; each look at it is a request, whose answer is awaited."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s"
    return time.monotonic() - started


# Keys


def test_only_keys_of_the_cluster_open_it(http: httpx.Client, keys: dict[Scope, str]) -> None:
    for headers in ({}, bearer("x" * 43), {"authorization": f"Basic {keys[Scope.SEARCH]}"}):
        for method, path in (("POST", "/v1/search"), ("GET", "/v1/status"), ("GET", "/v1/items/1")):
            response = http.request(method, path, headers=headers)
            assert (response.status_code, response.json()["code"]) == (401, "unauthenticated")
            assert response.headers["www-authenticate"] == 'Bearer realm="shardline"'
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert http.get(path).status_code == 200
    for key in keys.values():
        response = http.post("/v1/search", json=QUERY, headers=bearer(key))
        assert response.status_code == 200
        assert response.json()["coverage"]["degraded"] == []


def test_a_search_key_may_not_write(http: httpx.Client, keys: dict[Scope, str]) -> None:
    for method, path, status in (("PUT", "/v1/items", 415), ("POST", "/v1/admin/publish", 404)):
        response = http.request(method, path, headers=bearer(keys[Scope.SEARCH]))
        assert (response.status_code, response.json()["code"]) == (403, "forbidden")
        response = http.request(method, path, headers=bearer(keys[Scope.ADMIN]))
        assert response.status_code == status, "let in; no media type, or no such route"


def test_the_client_says_what_is_wrong_with_its_key(cluster: Cluster) -> None:
    with Client(cluster.endpoint.url) as client, pytest.raises(Unauthenticated, match="is needed"):
        client.search(**QUERY)
    with Client(cluster.endpoint.url, key="x" * 43) as client, pytest.raises(Unauthenticated):
        client.status()
    with pytest.raises(InvalidInput, match="not an API key"):
        Client(cluster.endpoint.url, key="x\r\nhost: elsewhere")
    assert issubclass(Forbidden, InvalidInput), "exit code 2 on the command line"


def test_keys_are_replaced_while_it_serves(cluster: Cluster, http: httpx.Client) -> None:
    path = Path(cluster.endpoint.key_file or "")

    def status(key: Key) -> int:
        return http.get("/v1/status", headers=bearer(key.secret)).status_code

    old = read_keys(path)[0]
    new = Key(Scope.SEARCH, add_key(path, Scope.SEARCH).secret)
    assert until(lambda: status(new) == 200) < RELOAD_S + 5
    assert status(old) == 200
    remove_key(path, new.fingerprint)
    until(lambda: status(new) == 401)


def test_no_key_shows_on_a_command_line_or_in_a_log(
    cluster: Cluster, keys: dict[Scope, str]
) -> None:
    lines = []
    for process in psutil.process_iter():
        try:
            lines.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    assert not [line for line in lines for key in keys.values() if key in line]
    session = session_of(cluster)
    for path in session.rglob("*"):
        if path.is_file() and path.stat().st_size < 64 << 20:
            content = path.read_bytes()
            assert not any(key.encode() in content for key in keys.values()), path


# Rude clients, through HAProxy


def test_headers_that_trickle_are_cut_off_and_so_are_bodies(
    cluster: Cluster, http: httpx.Client, keys: dict[Scope, str]
) -> None:
    """A byte a second: HAProxy ends the first, the router the second."""
    head = f"Host: x\r\nAuthorization: Bearer {keys[Scope.SEARCH]}\r\n"
    with connection(cluster) as headers, connection(cluster) as body:
        headers.sendall(f"POST /v1/search HTTP/1.1\r\n{head}X-Slow: ".encode())
        content = "Content-Type: application/json\r\nContent-Length: 4000\r\n\r\n"
        body.sendall(f"POST /v1/search HTTP/1.1\r\n{head}{content}".encode())
        started = time.monotonic()
        answers: dict[str, tuple[float, bytes]] = {}
        opened = {"headers": headers, "body": body}
        while opened and time.monotonic() - started < HEADER_TIMEOUT_S + SOON_S:
            for name, each in list(opened.items()):
                each.settimeout(0.5)
                try:
                    each.sendall(b"a")
                    answers[name] = (time.monotonic() - started, answer_on(each))
                except TimeoutError:
                    continue
                del opened[name]
        assert http.get("/healthz").status_code == 200
    for name in ("headers", "body"):
        after_s, answer = answers[name]
        assert answer.startswith(b"HTTP/1.1 408 "), answer
        assert after_s == pytest.approx(HEADER_TIMEOUT_S, abs=5)
    assert b"body_timeout" in answers["body"][1]


def test_a_thousand_idle_connections_hold_nobody_up(
    cluster: Cluster, http: httpx.Client, keys: dict[Scope, str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, soft + 2 * IDLE_CONNECTIONS), hard))
    try:
        with ExitStack() as stack:
            idle = [stack.enter_context(connection(cluster)) for _ in range(IDLE_CONNECTIONS)]
            for each in idle:
                each.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            for each in idle:
                assert answer_on(each).startswith(b"HTTP/1.1 200 ")
            took = []
            for _ in range(20):
                started = time.perf_counter()
                response = http.post("/v1/search", json=QUERY, headers=bearer(keys[Scope.SEARCH]))
                took.append(time.perf_counter() - started)
                assert response.status_code == 200
            print(f"beside {IDLE_CONNECTIONS} idle connections: {sorted(took)[10] * 1e3:.1f} ms")
            for each in idle:  # and they are still there
                each.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert answer_on(each).startswith(b"HTTP/1.1 200 ")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def search_request(key: str) -> bytes:
    """A search of ten seconds at most, as it goes over a socket."""
    body = b'{"item_ids": [1], "k": 3, "timeout_ms": 10000}'
    head = (
        f"POST /v1/search HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def in_flight(http: httpx.Client, key: str) -> int:
    found: int = http.get("/v1/status", headers=bearer(key)).json()["in_flight"]
    return found


def test_a_client_that_leaves_takes_its_work_along(
    cluster: Cluster, http: httpx.Client, keys: dict[Scope, str]
) -> None:
    key, victim = keys[Scope.SEARCH], shard_reports()[2]["pid"]
    before = in_flight(http, key)
    os.kill(victim, signal.SIGSTOP)
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(connection(cluster)) for _ in range(5)]
            for each in opened:
                each.sendall(search_request(key))
            until(lambda: in_flight(http, key) == before + 5)
        left = until(lambda: in_flight(http, key) == before)
        print(f"{len(opened)} clients left; their work was dropped after {left * 1e3:.0f} ms")
        assert left < 5, "long before the deadline of ten seconds"
    finally:
        os.kill(victim, signal.SIGCONT)
    headers = bearer(key)
    until(
        lambda: (
            not http.post("/v1/search", json=QUERY, headers=headers).json()["coverage"]["degraded"]
        )
    )


def test_more_than_there_is_room_for_is_refused_at_once_and_all_is_well_after(
    cluster: Cluster, http: httpx.Client, keys: dict[Scope, str]
) -> None:
    """Three times as many as a replica takes, while a shard that does not answer keeps them."""
    key, victim = keys[Scope.SEARCH], shard_reports()[2]["pid"]
    limit = cluster.config.router.max_in_flight
    before = in_flight(http, key)
    with ExitStack() as stack:
        opened = [stack.enter_context(connection(cluster)) for _ in range(3 * limit)]
        os.kill(victim, signal.SIGSTOP)
        try:
            started = time.monotonic()
            for each in opened:
                each.sendall(search_request(key))
            refused: dict[socket.socket, bytes] = {}
            while len(refused) < len(opened) - limit:  # those the others leave no room
                waiting = [each for each in opened if each not in refused]
                ready, _, _ = select.select(waiting, [], [], SOON_S)
                assert ready, f"only {len(refused)} were answered"
                refused |= {each: answer_on(each) for each in ready}
            took_s = time.monotonic() - started
        finally:
            os.kill(victim, signal.SIGCONT)
        for answer in refused.values():
            assert answer.startswith(b"HTTP/1.1 429 "), answer
            assert b"\r\nretry-after: 1\r\n" in answer.lower()
            assert b'"code":"overloaded"' in answer
        assert took_s < 5, "long before the deadline of ten seconds"
        answers = [answer_on(each) for each in opened if each not in refused]
        assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
    recovered = until(
        lambda: (
            in_flight(http, key) == before
            and not http.post("/v1/search", json=QUERY, headers=bearer(key)).json()["coverage"][
                "degraded"
            ]
        )
    )
    print(
        f"{len(refused)} of {len(opened)} refused within {took_s * 1e3:.0f} ms, {len(answers)} "
        f"answered, whole again after {recovered * 1e3:.0f} ms"
    )


def test_requests_reach_our_app_before_serves_own_layer(http: httpx.Client) -> None:
    """Serve's layer repeats any id that a client sends; ours replaces one not fit to log."""
    unfit = "a" * 200
    (answered,) = http.get("/healthz", headers={"X-Request-ID": unfit}).headers.get_list(
        "x-request-id"
    )
    assert len(answered) == 16


def test_websockets_are_refused(cluster: Cluster, keys: dict[Scope, str]) -> None:
    admin = f"Authorization: Bearer {keys[Scope.ADMIN]}\r\n"
    for line, status in (("", 401), (admin, 403)):
        with connection(cluster) as opened:
            opened.sendall(
                f"GET /v1/search HTTP/1.1\r\nHost: x\r\n{line}Upgrade: websocket\r\n"
                "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
            )
            assert opened.recv(4096).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_a_body_too_large_is_refused_before_all_of_it_was_sent(
    cluster: Cluster, keys: dict[Scope, str], announced: bool
) -> None:
    limit = cluster.config.router.max_body_bytes
    framing = f"Content-Length: {10 * limit}" if announced else "Transfer-Encoding: chunked"
    chunk = b" " * (1 << 20)
    piece = chunk if announced else b"100000\r\n" + chunk + b"\r\n"
    sent = 0
    with connection(cluster) as opened:
        opened.sendall(
            f"POST /v1/search HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {keys[Scope.SEARCH]}\r\n"
            f"Content-Type: application/json\r\n{framing}\r\n\r\n".encode()
        )
        opened.settimeout(0.01)
        answer = b""
        while not answer and sent < 4 * limit:
            try:
                answer = answer_on(opened)
            except TimeoutError:
                opened.settimeout(30)
                try:
                    opened.sendall(piece)
                except (BrokenPipeError, ConnectionResetError):
                    answer = answer_on(opened)
                opened.settimeout(0.01)
                sent += len(chunk)
    assert answer.startswith(b"HTTP/1.1 413 "), answer
    assert b"payload_too_large" in answer
    assert sent < 2 * limit


@pytest.mark.parametrize(
    ("content_type", "encoding", "body", "status"),
    [
        ("text/plain", None, b"{}", 415),
        ("application/json", "gzip", b"\x1f\x8b" + b"\0" * 100, 415),
        ("application/json", None, b'{"item_ids": [1], "k": 2147483648}', 400),
        ("application/json", None, b"\0" * 1_000_000, 400),
        ("application/msgpack", None, b"\x81\xa1k\xd6\x04\0\0\0\0", 400),
    ],
)
def test_bodies_that_are_not_ours(
    http: httpx.Client, keys: dict[Scope, str], content_type, encoding, body, status
) -> None:
    headers = bearer(keys[Scope.SEARCH]) | {"content-type": content_type}
    if encoding:
        headers["content-encoding"] = encoding
    response = http.post("/v1/search", content=body, headers=headers)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"


# Ports


def session_of(cluster: Cluster) -> Path:
    """The folder of the Ray session of this process."""
    found = re.compile(rf"(/\S*shardline-{os.getpid()}-[^/\s]+)/")
    for process in psutil.Process().children(recursive=True):
        match = found.search(" ".join(process.cmdline()))
        if match:
            return Path(match[1])
    raise AssertionError("no session of ours")


def listening(pid: int) -> list[tuple[str, int]]:
    connections = psutil.Process(pid).net_connections("tcp")
    return [tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN]


def test_haproxy_listens_on_the_loopback_interface_only(cluster: Cluster) -> None:
    found = [p for p in psutil.Process().children(recursive=True) if p.name() == "haproxy"]
    assert found
    ports = [address for process in found for address in listening(process.pid)]
    assert address_of(cluster) in ports
    assert len(set(ports)) == 3, "HTTP, metrics, statistics"
    assert {host for host, _ in ports} == {"127.0.0.1"}
    sockets = [path for path in session_of(cluster).rglob("a") if path.is_socket()]
    assert [path.stat().st_mode & 0o777 for path in sockets] == [0o600]


def test_shards_listen_where_the_configuration_says(cluster: Cluster) -> None:
    for report in shard_reports():
        assert report["address"][0] == cluster.config.cluster.shard_host == "127.0.0.1"
        assert tuple(report["address"]) in listening(report["pid"])


def test_a_stranger_on_a_shard_port_gets_a_challenge_and_no_answer(
    cluster: Cluster, http: httpx.Client, keys: dict[Scope, str]
) -> None:
    report = shard_reports()[0]
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\0" * 1000):
        with socket.create_connection(tuple(report["address"]), timeout=10) as stranger:
            stranger.sendall(garbage)
            received = b""
            try:
                while more := stranger.recv(4096):
                    received += more
            except ConnectionResetError:
                pass
            assert len(received) < 200, "its greeting at most"
    response = http.post("/v1/search", json=QUERY, headers=bearer(keys[Scope.SEARCH]))
    assert response.json()["coverage"]["degraded"] == []
