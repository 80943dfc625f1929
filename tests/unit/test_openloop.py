"""The load generator against a real HTTP server: schedule, latencies, failures apart."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench.openloop import Request, run_open_loop


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
