"""Two ways to ask over HTTP: on a fixed schedule (open loop), and in a row (closed loop).

A closed loop waits for an answer before it asks again, so a slow server slows the questions and
hides its own queue: it says what one client sees that has the server to itself, with every cache
warm, and nothing of a queue. In the open loop requests leave on their schedule whatever the answers
do, and a latency counts from the moment a request was *meant* to leave. Either way failures are
counted apart and never appear among the latencies.
"""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

SPIN_S = 0.001  # a sleep wakes up to this late; the rest is spun, so the schedule is kept


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request, ready to send: method, path, body, headers."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class LoadResult:
    """latencies_ms (answered,) float64 in the order asked; failures by kind; bodies if kept.

    seconds: what the requests counted took, from when the first was due to the last answer, and no
    less than their schedule. late_ms None: in a row there is no schedule to be late for.
    """

    latencies_ms: NDArray[np.float64]
    failures: dict[str, int]
    seconds: float
    late_ms: float | None
    bodies: dict[int, bytes]

    @property
    def requests(self) -> int:
        """Those sent and counted, answered or not."""
        return int(self.latencies_ms.size) + sum(self.failures.values())

    def percentile(self, q: float) -> float:
        """Milliseconds; NaN when nothing was answered."""
        return float(np.percentile(self.latencies_ms, q)) if self.latencies_ms.size else np.nan

    def summary(self) -> dict[str, object]:
        """Ready for JSON; rate_held is in answers a second."""
        return {
            "requests": self.requests,
            "answered": int(self.latencies_ms.size),
            "failures": self.failures,
            "rate_held": round(self.latencies_ms.size / self.seconds, 2),
            "p50_ms": round(self.percentile(50), 3),
            "p90_ms": round(self.percentile(90), 3),
            "p99_ms": round(self.percentile(99), 3),
            "p99_9_ms": round(self.percentile(99.9), 3),
            "max_ms": round(self.percentile(100), 3),
            "client_late_p99_ms": None if self.late_ms is None else round(self.late_ms, 3),
        }


def run_open_loop(
    url: str,
    request_of: Callable[[int], Request],
    *,
    rate: float,
    count: int,
    connections: int = 8,
    warm_up: int = 0,
    keep_bodies: bool = False,
    timeout_s: float = 30.0,
    headers: tuple[tuple[str, str], ...] = (),
) -> LoadResult:
    """Sends ``warm_up + count`` requests at ``rate`` a second; the warm-up is not counted.

    ``headers`` go with every request, beside its own.

    ``late_ms`` of the result is how late the client itself was at p99: when it is not small beside
    the latencies, the client was the bottleneck and the figures are not the server's.
    """
    state = _State(warm_up + count)
    start = time.perf_counter() + 0.1
    workers = [
        threading.Thread(
            target=_work,
            args=(state, url, request_of, start, rate, timeout_s, keep_bodies, headers),
        )
        for _ in range(connections)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    counted = slice(warm_up, None)
    latencies = state.latencies_ms[counted]
    late = state.late_ms[counted]
    last = max(float(state.done[counted].max()), start + state.total / rate)
    return LoadResult(
        latencies_ms=latencies[~np.isnan(latencies)],
        failures=dict(Counter(kind for number, kind in state.failures if number >= warm_up)),
        seconds=last - (start + warm_up / rate),
        late_ms=float(np.percentile(late, 99)),
        bodies={
            number - warm_up: body
            for number, body in sorted(state.bodies.items())
            if number >= warm_up
        },
    )


def run_in_a_row(
    url: str,
    request_of: Callable[[int], Request],
    *,
    seconds: float,
    warm_up: int = 0,
    timeout_s: float = 30.0,
    headers: tuple[tuple[str, str], ...] = (),
) -> LoadResult:
    """One client, one connection: sends ``warm_up`` requests that are not counted, then the next
    as soon as the one before is answered, for ``seconds``; at least one.

    A latency counts from the moment its own request leaves. ``headers`` as in ``run_open_loop``.
    """
    connection = _Connection(url, timeout_s, headers)
    for number in range(warm_up):
        connection.ask(connection.encode(request_of(number)))
    latencies: list[float] = []
    failures: Counter[str] = Counter()
    number, start = warm_up, time.perf_counter()
    done = start
    while number == warm_up or done < start + seconds:
        message = connection.encode(request_of(number))
        sent = time.perf_counter()
        failure, _ = connection.ask(message)
        done = time.perf_counter()
        if failure:
            failures[failure] += 1
        else:
            latencies.append((done - sent) * 1e3)
        number += 1
    connection.close()
    return LoadResult(
        latencies_ms=np.array(latencies),
        failures=dict(failures),
        seconds=done - start,
        late_ms=None,
        bodies={},
    )


class _State:
    """Shared by the workers; each number is taken, and each slot written, by one of them."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.latencies_ms = np.full(total, np.nan)
        self.late_ms = np.zeros(total)
        self.done = np.zeros(total)
        self.failures: list[tuple[int, str]] = []
        self.bodies: dict[int, bytes] = {}
        self._next = 0
        self._lock = threading.Lock()

    def take(self) -> int | None:
        with self._lock:
            if self._next == self.total:
                return None
            self._next += 1
            return self._next - 1


def _work(
    state: _State,
    url: str,
    request_of: Callable[[int], Request],
    start: float,
    rate: float,
    timeout_s: float,
    keep_bodies: bool,
    headers: tuple[tuple[str, str], ...],
) -> None:
    connection = _Connection(url, timeout_s, headers)
    while (number := state.take()) is not None:
        message = connection.encode(request_of(number))
        intended = start + number / rate
        _wait_until(intended)
        state.late_ms[number] = (time.perf_counter() - intended) * 1e3
        failure, body = connection.ask(message)
        state.done[number] = time.perf_counter()
        if failure:
            state.failures.append((number, failure))
            continue
        state.latencies_ms[number] = (state.done[number] - intended) * 1e3
        if keep_bodies:
            state.bodies[number] = body
    connection.close()


class _Connection:
    """Just enough HTTP/1.1, kept alive: the standard library's client takes longer to read a
    header than the server takes to answer, on cores that both share."""

    def __init__(
        self, url: str, timeout_s: float, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._headers = headers
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None

    def encode(self, request: Request) -> bytes:
        host = f"{self._address[0]}:{self._address[1]}"
        length = ("Content-Length", str(len(request.body)))
        fields = [("Host", host), length, *self._headers, *request.headers]
        lines = [f"{request.method} {request.path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields)]
        return "\r\n".join([*lines, "", ""]).encode() + request.body

    def ask(self, message: bytes) -> tuple[str, bytes]:
        """("", body of the 200), or the kind of failure and no body; what broke is closed."""
        try:
            status, body = self.send(message)
        except (OSError, ValueError, IndexError) as error:
            self.close()
            return type(error).__name__, b""
        return ("", body) if status == 200 else (f"HTTP {status}", b"")

    def send(self, message: bytes) -> tuple[int, bytes]:
        """(status, body). OSError: the connection broke; ValueError, IndexError: no HTTP answer."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address, self._timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(message)
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._receive()
        head = data[:end].lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        while len(data) < end + 4 + length:
            data += self._receive()
        if b"connection: close" in head:
            self.close()
        return int(head.split(b" ", 2)[1]), data[end + 4 : end + 4 + length]

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _receive(self) -> bytes:
        assert self._socket is not None
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError("closed by the server")
        return data


def _wait_until(moment: float) -> None:
    remaining = moment - time.perf_counter()
    if remaining > SPIN_S:
        time.sleep(remaining - SPIN_S)
    while time.perf_counter() < moment:
        pass
