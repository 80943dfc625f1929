"""The load generator against a real HTTP server: schedule, in a row, latencies, failures apart."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from shardline.bench.load.openloop import LoadResult, Request, run_in_a_row, run_open_loop
from tests.unit.fake_endpoint import FakeEndpoint, running


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(500 if body == b"fail" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_request_leaves_on_its_schedule_and_keeps_its_answer(url: str) -> None:
    started = time.perf_counter()
    result = run_open_loop(
        url,
        lambda number: Request("POST", "/", str(number).encode()),
        rate=200,
        count=40,
        warm_up=10,
        connections=4,
        keep_bodies=True,
    )
    assert time.perf_counter() - started >= 49 / 200
    assert result.failures == {}
    assert len(result.latencies_ms) == 40
    assert (result.latencies_ms > 0).all()
    assert result.bodies == {number: str(number + 10).encode() for number in range(40)}


def test_failures_are_counted_apart(url: str) -> None:
    result = run_open_loop(
        url,
        lambda number: Request("POST", "/", b"fail" if number % 2 else b"fine"),
        rate=500,
        count=20,
        connections=2,
    )
    assert result.failures == {"HTTP 500": 10}
    assert len(result.latencies_ms) == 10


def test_a_server_that_is_not_there_is_a_failure_not_a_latency() -> None:
    result = run_open_loop(
        "http://127.0.0.1:9", lambda number: Request("GET", "/"), rate=500, count=4, connections=1
    )
    assert result.failures == {"ConnectionRefusedError": 4}
    assert result.latencies_ms.size == 0


def test_the_rate_held_counts_the_schedule_and_what_came_late() -> None:
    result = LoadResult(
        latencies_ms=np.arange(1.0, 100.0),
        failures={"HTTP 429": 2, "timeout": 1},
        seconds=4.0,
        late_ms=0.25,
        bodies={},
    )
    assert result.requests == 102
    assert result.summary() == {
        "requests": 102,
        "answered": 99,
        "failures": {"HTTP 429": 2, "timeout": 1},
        "rate_held": 24.75,
        "p50_ms": 50.0,
        "p90_ms": 89.2,
        "p99_ms": 98.02,
        "p99_9_ms": 98.902,
        "max_ms": 99.0,
        "client_late_p99_ms": 0.25,
    }


def test_an_open_loop_that_keeps_up_holds_its_rate(url: str) -> None:
    result = run_open_loop(
        url,
        lambda number: Request("POST", "/", b"fine"),
        rate=100,
        count=20,
        warm_up=5,
        connections=2,
    )
    assert result.seconds >= 20 / 100
    assert result.summary()["rate_held"] == pytest.approx(20 / result.seconds, abs=0.01)


def test_in_a_row_one_connection_asks_again_as_soon_as_it_is_answered() -> None:
    fake = FakeEndpoint()
    with running(fake) as (host, port):
        result = run_in_a_row(
            f"http://{host}:{port}",
            lambda number: Request("POST", "/", b"number %d" % number),
            seconds=0.2,
            warm_up=7,
        )
    assert fake.bodies == [b"number %d" % number for number in range(7 + result.requests)]
    assert fake.most_connections == 1
    assert result.requests > 20
    assert result.failures == {}
    assert len(result.latencies_ms) == result.requests
    # nothing happens between two requests: their latencies add up to the time it took
    assert result.seconds >= 0.2
    assert result.latencies_ms.sum() / 1e3 <= result.seconds
    assert result.summary()["client_late_p99_ms"] is None


def test_in_a_row_the_time_counts_the_requests_and_a_stall_is_one_latency() -> None:
    fake = FakeEndpoint(stall_at=3, stall_s=0.3)
    with running(fake) as (host, port):
        result = run_in_a_row(
            f"http://{host}:{port}", lambda number: Request("POST", "/", b"fine"), seconds=0.2
        )
    assert result.requests == 4, "the stall outlasts the time; the request under way is waited for"
    assert (result.latencies_ms > 200).tolist() == [False, False, False, True]
    assert result.summary()["rate_held"] == pytest.approx(4 / result.seconds, abs=0.01)


def test_in_a_row_failures_are_counted_apart_and_the_connection_is_opened_again() -> None:
    bodies = [b"fine", b"500", b"close", b"garbage"]
    fake = FakeEndpoint()
    with running(fake) as (host, port):
        result = run_in_a_row(
            f"http://{host}:{port}",
            lambda number: Request("POST", "/", bodies[number % 4]),
            seconds=0.1,
        )
    assert set(result.failures) == {"HTTP 500", "ConnectionResetError", "IndexError"}
    assert result.requests == len(result.latencies_ms) + sum(result.failures.values())
    assert abs(len(result.latencies_ms) - result.requests / 4) <= 1


def test_in_a_row_asks_at_least_once() -> None:
    result = run_in_a_row("http://127.0.0.1:9", lambda number: Request("GET", "/"), seconds=0)
    assert result.failures == {"ConnectionRefusedError": 1}
    assert result.latencies_ms.size == 0
