"""Connections and retries of both clients: kept, stale, shared, refused, never through a proxy."""

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shardline.router.client import async_client
from shardline.router.client.async_client import AsyncClient
from shardline.router.client.http1 import Server
from shardline.router.client.retries import Retry
from shardline.router.client.sync_client import Client
from shardline.router.contract import PayloadTooLarge
from shardline.shards.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    Overloaded,
    ProtocolError,
    Unavailable,
)
from tests.client_pair import KINDS, BlockingTwin, slept_into
from tests.scripted_server import CLOSE, ECHO, HANG, LATE, OK, answer, scripted

ONCE = Retry(attempts=1)
PROBLEM = "content-type: application/problem+json"


def problem(status: int, code: str, *headers: str) -> bytes:
    body = b'{"code": "%s", "detail": "what"}' % code.encode()
    return answer(status, body, PROBLEM, *headers)


BUSY = problem(429, "overloaded", "retry-after: 1")
AWAY = problem(503, "unavailable")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_one_connection_serves_sequential_calls(kind: Any) -> None:
    with scripted() as server, kind(server.url) as client:
        assert [client.status() for _ in range(5)] == [{}] * 5
        assert server.connections == 1


def test_a_server_that_closes_each_time_is_connected_to_each_time(kind: Any) -> None:
    closing = answer(200, b"{}", "connection: close")
    with scripted(closing, closing) as server, kind(server.url, retry=ONCE) as client:
        assert [client.status(), client.status()] == [{}, {}]
        assert server.connections == 2


def test_a_kept_connection_that_has_ended_is_no_failure(kind: Any) -> None:
    """The server closes it when the next request arrives, which the client cannot see before."""
    with scripted(OK, CLOSE, OK) as server, kind(server.url, retry=ONCE) as client:
        assert [client.status(), client.status()] == [{}, {}]
        assert (server.connections, len(server.requests)) == (2, 3)


def test_a_new_connection_that_ends_is_a_failure_and_tried_again(kind: Any) -> None:
    with (
        scripted(CLOSE) as server,
        kind(server.url, retry=ONCE) as client,
        pytest.raises(Unavailable, match="closed before the answer"),
    ):
        client.status()
    with scripted(CLOSE, CLOSE, OK) as server, kind(server.url) as client:
        slept_into(client, pauses := [])
        assert client.status() == {}
        assert (len(server.requests), len(pauses)) == (3, 2)


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 101 X\r\nupgrade: x\r\n\r\n"])
def test_who_does_not_speak_http_is_unavailable(kind: Any, said: bytes) -> None:
    with (
        scripted(said) as server,
        kind(server.url, retry=ONCE, timeout=2) as client,
        pytest.raises(Unavailable),
    ):
        client.status()


@pytest.mark.parametrize("status", [429, 502, 503])
def test_what_may_pass_is_tried_again_after_growing_pauses(kind: Any, status: int) -> None:
    with (
        scripted(*[answer(status)] * 3) as server,
        kind(server.url, uniform=lambda low, high: high - low) as client,
    ):
        slept_into(client, pauses := [])
        assert client.status() == {}
        assert pauses == [0.1, 0.2, 0.4]
        assert server.connections == 1


def test_retry_after_comes_on_top_and_pauses_have_a_limit(kind: Any) -> None:
    retry = Retry(attempts=4, first_pause_s=1.0, longest_pause_s=1.5)
    with (
        scripted(*[BUSY] * 3) as server,
        kind(server.url, retry=retry, uniform=lambda low, high: high) as client,
    ):
        slept_into(client, pauses := [])
        assert client.status() == {}
        assert pauses == [2.0, 2.5, 2.5]


def test_attempts_are_bounded_and_the_last_error_is_raised(kind: Any) -> None:
    with scripted(*[AWAY] * 2, *[BUSY] * 9) as server, kind(server.url) as client:
        slept_into(client, [])
        with pytest.raises(Overloaded, match="what"):
            client.status()
        assert len(server.requests) == 4


def test_a_pause_that_ends_after_the_time_is_not_begun(kind: Any) -> None:
    now = [100.0]
    with (
        scripted(AWAY, problem(503, "unavailable", "retry-after: 20")) as server,
        kind(
            server.url, timeout=20, clock=lambda: now[0], uniform=lambda low, high: high
        ) as client,
    ):
        slept_into(client, pauses := [])
        with pytest.raises(Unavailable):
            client.status()
        assert pauses == [0.1]
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (problem(400, "invalid_input"), InvalidInput),
        (problem(404, "not_found"), NotFound),
        (problem(504, "deadline_exceeded"), DeadlineExceeded),
        (answer(302, b"", "location: http://127.0.0.1:1/"), Unavailable),
        (answer(500), Unavailable),
    ],
)
def test_what_will_not_pass_is_asked_once(kind: Any, reply: bytes, error: type) -> None:
    with scripted(reply) as server, kind(server.url) as client:
        with pytest.raises(error):
            client.status()
        assert len(server.requests) == 1


def test_probes_ask_once(kind: Any) -> None:
    with scripted(AWAY, AWAY) as server, kind(server.url) as client:
        assert not client.ready()
        assert not client.healthy()
        assert client.ready()
        assert len(server.requests) == 3


def test_no_answer_in_time_is_a_missed_deadline_asked_once(kind: Any) -> None:
    with scripted(HANG, OK) as server, kind(server.url, timeout=0.5) as client:
        with pytest.raises(DeadlineExceeded, match="in time"):
            client.status()
        server.release.set()
        assert client.status() == {}
        assert (server.connections, len(server.requests)) == (2, 2), "its late answer is not read"


@pytest.mark.parametrize(
    "value", ["http://{proxy}", "socks5h://{proxy}", "{proxy}", "http://[::1", ":::", "\udcff"]
)
def test_no_proxy_of_the_environment_sees_a_connection(
    kind: Any, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy, scripted() as server:
        proxy.setblocking(False)
        url = value.format(proxy=f"127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.setenv(name, url)
            monkeypatch.setenv(name.upper(), url)
        with kind(server.url, key="k" * 43) as client:
            assert client.status() == {}
        with pytest.raises(BlockingIOError):
            proxy.accept()
        assert b"authorization: Bearer " + b"k" * 43 in server.requests[0]


def test_a_refusal_before_the_body_is_sent_is_read(kind: Any) -> None:
    """The server answers the head of a large request, and closes with the rest unread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(problem(413, "payload_too_large", "connection: close"))
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 20):
                    pass

        thread = threading.Thread(target=refuse)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with kind(url, retry=ONCE) as client, pytest.raises(PayloadTooLarge):
            client.search(vectors=np.zeros((3000, 1000), np.float32))
        thread.join(10)


def test_a_closed_client_asks_nothing(kind: Any) -> None:
    with scripted() as server, kind(server.url) as client:
        client.close()
        with pytest.raises(RuntimeError, match="the client is closed"):
            client.status()
        assert server.connections == 0


def test_a_forked_child_has_connections_of_its_own() -> None:
    with scripted() as server, Client(server.url) as client:
        client.status()
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if client.status() == {} else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert server.connections == 2
        client.status()
        assert (server.connections, len(server.requests)) == (2, 3), "the parent keeps its own"


def test_an_event_loop_in_a_forked_child_has_connections_of_its_own() -> None:
    with scripted() as server, BlockingTwin(server.url) as twin:
        twin.status()
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if asyncio.Runner().run(twin.client.status()) == {} else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert server.connections == 2
        twin.status()
        assert (server.connections, len(server.requests)) == (2, 3)


PROCESSES, CALLS = 8, 250


def test_processes_that_were_forked_get_their_own_answers() -> None:
    """The parent has connections open, and goes on with them meanwhile."""
    with scripted(ECHO) as server, Client(server.url) as client:
        assert mixed_up(client, range(3)) == 0
        children = [forked(lambda n=n: mixed_up(client, calls_of(n))) for n in range(PROCESSES)]
        assert mixed_up(client, calls_of(PROCESSES)) == 0
        assert [exit_code(child) for child in children] == [0] * PROCESSES
        assert len(server.requests) == 3 + (PROCESSES + 1) * CALLS


def test_event_loops_of_forked_processes_get_their_own_answers() -> None:
    with scripted(ECHO) as server, BlockingTwin(server.url) as twin:
        asked = twin._send(twin.client._get_call("/0"))
        assert asked == {"path": "/0"}

        def ask(numbers: range) -> int:
            with asyncio.Runner() as runner:
                return runner.run(mixed_up_at_once(twin.client, numbers))

        children = [forked(lambda n=n: ask(calls_of(n))) for n in range(PROCESSES)]
        assert [exit_code(child) for child in children] == [0] * PROCESSES
        assert len(server.requests) == 1 + PROCESSES * CALLS


def calls_of(process: int) -> range:
    return range(process * CALLS, (process + 1) * CALLS)


def mixed_up(client: Client, numbers: range) -> int:
    """Calls that got the answer to another one."""
    paths = [f"/{number}" for number in numbers]
    return sum(client._send(client._get_call(path)) != {"path": path} for path in paths)


async def mixed_up_at_once(client: AsyncClient, numbers: range) -> int:
    paths = [f"/{number}" for number in numbers]
    answers = await asyncio.gather(*(client._send(client._get_call(path)) for path in paths))
    return sum(found != {"path": path} for path, found in zip(paths, answers, strict=True))


def forked(work: Callable[[], int]) -> int:
    """The pid of a child that ends with what ``work`` returns, at most 99; 100 if it raises."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(min(work(), 99))
        finally:
            os._exit(100)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def echo(number: int) -> bytes:
    return answer(200, b'{"number": %d}' % number)


def test_threads_share_a_client() -> None:
    numbers = range(200)
    with (
        scripted(*map(echo, numbers)) as server,
        Client(server.url) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        found = sorted(pool.map(lambda _: client.status()["number"], numbers))
    assert found == list(numbers)
    assert server.connections <= 8


def test_coroutines_share_a_client_up_to_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_client, "MAX_CONNECTIONS", 3)

    async def ask(url: str) -> list[int]:
        async with AsyncClient(url) as client:
            answers = await asyncio.gather(*(client.status() for _ in range(50)))
            return sorted(each["number"] for each in answers)

    with scripted(*map(echo, range(50))) as server:
        assert asyncio.run(ask(server.url)) == list(range(50))
        assert server.most_open == server.connections == 3


async def test_a_cancelled_call_leaves_no_answer_to_the_next() -> None:
    with scripted(HANG, echo(2)) as server:
        async with AsyncClient(server.url) as client:
            call = asyncio.create_task(client.status())
            while not server.requests:
                await asyncio.sleep(0.001)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            server.release.set()
            assert await client.status() == {"number": 2}
            assert server.connections == 2


def test_an_async_client_keeps_no_connection_of_a_loop_that_it_has_left() -> None:
    with scripted(LATE) as server:
        client = AsyncClient(server.url)

        async def enter() -> None:
            client._enter_loop()

        async def ask_in_another_loop_meanwhile() -> None:
            call = asyncio.create_task(client.status())
            while not server.requests:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(asyncio.run, enter())
            server.release.set()
            await call
            await asyncio.sleep(0)

        asyncio.run(ask_in_another_loop_meanwhile())
        assert not client._idle


def test_an_async_client_goes_on_in_another_event_loop() -> None:
    with scripted() as server:
        client = AsyncClient(server.url)

        async def ask(last: bool) -> dict[str, Any]:
            found = await client.status()
            client._idle[0]._transport.close()  # a loop that ends should find nothing open
            if last:
                await client.close()
            await asyncio.sleep(0)
            return found

        assert [asyncio.run(ask(last)) for last in (False, True)] == [{}, {}]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a key and a certificate for localhost, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[Any]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with scripted(OK, OK, CLOSE, tls=context) as server:
        yield server


def test_https_with_a_certificate_that_is_trusted(
    kind: Any, tls_server: Any, certificate: Path
) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate))
    with kind(tls_server.url, tls=trusting, retry=ONCE) as client:
        assert [client.status() for _ in range(3)] == [{}, {}, {}]
        assert tls_server.connections == 2, "one kept, one after a stale one"


def test_https_with_a_certificate_of_a_stranger(kind: Any, tls_server: Any) -> None:
    with kind(tls_server.url, retry=ONCE) as client, pytest.raises(Unavailable, match="verif"):
        client.status()
    assert tls_server.requests == []


def test_ipv6(kind: Any) -> None:
    with scripted(host="::1") as server, kind(f"http://[::1]:{server.port}/") as client:
        assert client.status() == {}
        assert f"host: [::1]:{server.port}".encode() in server.requests[0]


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("http://localhost:8000", "localhost", 8000, "/v1/status"),
        ("http://localhost", "localhost", 80, "/v1/status"),
        ("https://search.example/", "search.example", 443, "/v1/status"),
        ("http://gateway:81/shardline/", "gateway", 81, "/shardline/v1/status"),
        ("http://[::1]:8000", "::1", 8000, "/v1/status"),
    ],
)
def test_urls(url: str, host: str, port: int, path: str) -> None:
    server = Server.of(url, None)
    assert (server.host, server.port, server.is_tls) == (host, port, url.startswith("https"))
    assert server.message("GET", "/v1/status").startswith(f"GET {path} HTTP/1.1\r\n".encode())


@pytest.mark.parametrize(
    "url",
    [
        *("here", "ftp://h", "http://", "http://h:0", "http://h:99999", "http://h:x"),
        *("http://[::1", "http://me:secret@h", "http://h?q=1", "http://h#f", "http://é"),
        *("http://h/a b", "http://h/\r\nx: y"),
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"base_url: .*expected http://HOST:PORT") as caught:
        Client(url)
    assert "secret" not in str(caught.value)


def test_no_attempt_at_all_is_refused() -> None:
    with pytest.raises(InvalidInput, match="attempts"):
        Retry(attempts=0)


def test_the_request_of_a_search_is_complete(kind: Any) -> None:
    with (
        scripted() as server,
        kind(server.url, retry=ONCE) as client,
        pytest.raises(ProtocolError, match="not a search answer"),
    ):
        client.search(vectors=[[1.0, 2.0]], k=np.int64(3))
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /v1/search HTTP/1.1"
    assert {b"content-type: application/msgpack", b"content-length: %d" % len(body)} <= set(lines)
    array = {"dtype": "<f4", "shape": [1, 2], "data": np.array([1, 2], "<f4").tobytes()}
    assert msgpack.unpackb(body) == {"vectors": array, "k": 3}
