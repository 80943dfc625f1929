"""What the Python clients cost per call, beside a raw socket: `shardline bench client`.

A process on this machine answers every request with the same bytes, a search of k = 100, so what
differs between the three is the client alone: a blocking socket that sends a finished request and
looks for the answer's end, ``Client`` and ``AsyncClient``. They are interleaved call by call, so
that a busy moment of the machine meets all three alike.
"""

import asyncio
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np

from shardline.bench.load.http_bytes import HEAD_END, read_head
from shardline.router.client.async_client import AsyncClient
from shardline.router.client.calls import search_body
from shardline.router.client.http1 import Server
from shardline.router.client.sync_client import Client
from shardline.router.contract import MSGPACK_TYPE, pack_array
from shardline.shards.core.schema import FloatArray

K, DIM = 100, 128
WARM_UP = 200  # calls of each, not counted
BUDGET_MS = 0.25  # beyond the raw socket
RAW, SYNC, ASYNC = "raw socket", "Client", "AsyncClient"


def measure(calls: int) -> dict[str, Any]:
    """Per client p50 and p99 in milliseconds, and the p50's difference to the raw socket's."""
    vector = np.random.default_rng(0).standard_normal((1, DIM)).astype(np.float32)
    samples: dict[str, list[float]] = {RAW: [], SYNC: [], ASYNC: []}
    with canned_server() as port, asyncio.Runner() as runner, Client(_url(port)) as sync:
        raw = RawClient(port, vector)
        twin = AsyncClient(_url(port))
        asks: dict[str, Callable[[], object]] = {
            RAW: raw.search,
            SYNC: lambda: sync.search(vectors=vector, k=K),
        }
        for number in range(WARM_UP + calls):
            for name, ask in asks.items():
                began = time.perf_counter()
                ask()
                samples[name].append(time.perf_counter() - began)
            samples[ASYNC].append(runner.run(_timed(twin, vector)))
            if number == WARM_UP - 1:
                samples = {name: [] for name in samples}
        runner.run(twin.close())
        raw.close()
    return {"calls": calls, "k": K, "dim": DIM, "budget_ms": BUDGET_MS, "clients": figures(samples)}


def lines_of(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    rows = [
        f"{name:>12}  p50 {figures['p50_ms']:.3f} ms  p99 {figures['p99_ms']:.3f} ms  "
        f"p50 beyond the raw socket's {figures['beyond_raw_ms']:+.3f} ms"
        for name, figures in report["clients"].items()
    ]
    calls = f"{report['calls']} calls of each, interleaved"
    return [*rows, f"budget: {BUDGET_MS} ms beyond the raw socket; {calls}"]


def figures(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Milliseconds of seconds."""
    floor = float(np.median(samples[RAW]))
    return {
        name: {
            "p50_ms": round(float(np.median(seconds)) * 1e3, 4),
            "p99_ms": round(float(np.percentile(seconds, 99)) * 1e3, 4),
            "beyond_raw_ms": round((float(np.median(seconds)) - floor) * 1e3, 4),
        }
        for name, seconds in samples.items()
    }


async def _timed(twin: AsyncClient, vector: FloatArray) -> float:
    began = time.perf_counter()
    await twin.search(vectors=vector, k=K)
    return time.perf_counter() - began


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


class RawClient:
    """The least that a call can cost in Python: no encoding, no decoding, no time limit."""

    def __init__(self, port: int, vector: FloatArray) -> None:
        body = search_body(vectors=vector, k=K)
        self._message = Server.of(_url(port), None).message("POST", "/v1/search", body)
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def search(self) -> bytes:
        self._socket.sendall(self._message)
        return _receive(self._socket)

    def close(self) -> None:
        self._socket.close()


def _receive(connection: socket.socket) -> bytes:
    """One message with its head; empty at the end of the stream."""
    data = connection.recv(1 << 16)
    while data and ((head := read_head(data)) is None or len(data) < head.total):
        data += connection.recv(1 << 16)
    return data


@contextmanager
def canned_server() -> Iterator[int]:
    """The port of a process that answers whatever it is asked with ``canned_answer``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(listener,), daemon=True
        )
        serving.start()
        try:
            yield listener.getsockname()[1]
        finally:
            serving.kill()
            serving.join()


def canned_answer() -> bytes:
    """An HTTP response with a search's answer of k = 100, head included."""
    answer = {
        "ids": np.arange(K, dtype=np.int64)[None],
        "scores": np.linspace(1, 0, K, dtype=np.float32)[None],
        "generation": 1,
        "model_version": "m1",
        "coverage": dict.fromkeys(
            ("shards_asked", "shards_answered", "rows_asked", "rows_answered"), 4
        )
        | {"degraded": []},
        "took_ms": 1.0,
        "search_ms": 0.5,
        "request_id": "0" * 16,
    }
    body: bytes = msgpack.packb(answer, default=pack_array)
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\ncontent-type: {MSGPACK_TYPE}\r\n\r\n"
    return head.encode() + body


def _serve(listener: socket.socket) -> None:
    answer = canned_answer()
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_answer, args=(connection, answer), daemon=True).start()


def _answer(connection: socket.socket, answer: bytes) -> None:
    received = b""
    while data := connection.recv(1 << 16):
        received += data
        end = received.find(HEAD_END)
        if end < 0:
            continue
        length = int(received.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(received) >= end + len(HEAD_END) + length:
            received = b""
            connection.sendall(answer)
