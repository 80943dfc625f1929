"""One client process: sends requests on schedule over as many connections as it takes.

One thread and one epoll, no waiting for answers: a request leaves at its intended time although
earlier ones are unanswered. Latency counts from the intended time, so a server that stalls is
charged for every request that should have left meanwhile. What the client itself was late by is
recorded beside it (``sent_s`` - ``intended_s``).

A closed loop (``closed_s``) sends whenever a connection is free. Over one connection it is
sequential: what one client sees that has the server to itself, with every cache warm. Over many it
finds the peak. A slow server slows its questions, so its latencies leave out the wait in a queue.
"""

import errno
import resource
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardline.bench.load.http_bytes import Head, coverage_of, problem_of, read_head
from shardline.bench.load.schedule import FloatTimes
from shardline.shards.core.schema import IdArray

SPIN_S = 0.0001  # a timer of Linux wakes up to this late; spun, so that the schedule is kept
IDLE_S = 0.05  # longest sleep while nothing is due; an answer ends it
RECEIVE_BYTES = 1 << 18
OK = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """What one process sends; plain data, crosses to it by pickling.

    messages: whole HTTP requests; order (n,) says which of them each request sends; intended_s
    (n,) are seconds from the start; kept (n,) bool: whose bodies come back. With closed_s the
    times are not used: requests are sent in order for that many seconds.
    """

    address: tuple[str, int]
    messages: tuple[bytes, ...]
    order: IdArray
    intended_s: FloatTimes
    kept: NDArray[np.bool_]
    max_connections: int = 512
    timeout_s: float = 10.0
    closed_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Records:
    """What became of each request, in order: arrays (n,), seconds from the start.

    sent_s is NaN where it was never sent, done_s where there was no whole answer; status is the
    HTTP status, 0 without one; coverage is the share of rows an answer saw, NaN where it says
    none. errors: number -> what came instead of an answer.
    """

    intended_s: FloatTimes
    sent_s: FloatTimes
    done_s: FloatTimes
    status: NDArray[np.int16]
    coverage: NDArray[np.float64]
    errors: dict[int, str]
    bodies: dict[int, bytes]
    cpu_share: float
    connections: int

    @classmethod
    def empty(cls, intended_s: FloatTimes) -> "Records":
        """Nothing sent yet."""
        count = len(intended_s)
        return cls(
            intended_s=intended_s.copy(),
            sent_s=np.full(count, np.nan),
            done_s=np.full(count, np.nan),
            status=np.zeros(count, dtype=np.int16),
            coverage=np.full(count, np.nan),
            errors={},
            bodies={},
            cpu_share=0.0,
            connections=0,
        )


class _Connection:
    """A socket and the request it is busy with (None: idle)."""

    def __init__(self, address: tuple[str, int]) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.number: int | None = None
        self.unsent = memoryview(b"")
        self.received = bytearray()
        self.head: Head | None = None
        code = self.socket.connect_ex(address)
        self.connecting = code == errno.EINPROGRESS
        self.error = 0 if self.connecting else code
        self.wants_out = self.connecting  # whether epoll is to say when it can take more


class LoadClient:
    """Carries one job out. ``run`` once."""

    def __init__(self, job: LoadJob) -> None:
        self._job = job
        self._records = Records.empty(job.intended_s)
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._idle: list[_Connection] = []
        self._expiry: deque[tuple[float, _Connection, int]] = deque()
        self._next = 0
        self._busy = 0
        self._start = 0.0

    def run(self, start: float) -> Records:
        """Begins at ``start`` on time.monotonic's clock; returns when nothing is outstanding."""
        began, cpu = time.monotonic(), _cpu_seconds()
        self._start = start
        try:
            self._loop()
        finally:
            for connection in list(self._connections.values()):
                self._close(connection)
            self._epoll.close()
        elapsed = time.monotonic() - max(began, start)
        self._records.cpu_share = (_cpu_seconds() - cpu) / max(elapsed, 1e-9)
        return self._records

    def _loop(self) -> None:
        while True:
            due = self._send_due()
            if due is None and not self._busy:
                return
            wait = IDLE_S if due is None else due - time.monotonic()
            if self._expiry:
                wait = min(wait, self._expiry[0][0] - time.monotonic())
            # epoll itself counts in whole milliseconds; select on the epoll does not. A closed loop
            # waits for answers alone, so it saves that call
            closed = self._job.closed_s is not None
            if wait > SPIN_S and not closed:
                select.select([self._epoll], [], [], wait - SPIN_S)
            for descriptor, _ in self._epoll.poll(max(wait, 0) if closed else 0):
                connection = self._connections.get(descriptor)
                if connection is not None:
                    self._advance(connection)
            self._expire()

    def _send_due(self) -> float | None:
        """Sends what is due; the moment the next one is, None when there is none to come."""
        for due in self._due_times():
            now = time.monotonic()
            if due > now:
                return due
            connection = self._free_connection()
            if connection is None:  # an answer, or a timeout, will free one
                if self._job.closed_s is not None or now - due < self._job.timeout_s:
                    return now + IDLE_S
                self._records.errors[self._next] = "no free connection"
                self._next += 1
                continue
            self._begin(connection, self._next, due, now)
            self._next += 1
        return None

    def _due_times(self) -> Iterator[float]:
        """When request ``_next`` is due, again and again while there is one."""
        closed_s, total = self._job.closed_s, len(self._job.order)
        while self._next < total:
            if closed_s is None:
                yield self._start + self._job.intended_s[self._next]
            elif time.monotonic() < self._start + closed_s:
                yield self._start
            else:
                return

    def _free_connection(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.socket.fileno() >= 0:
                return connection
        if len(self._connections) >= self._job.max_connections:
            return None
        connection = _Connection(self._job.address)
        self._connections[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket, _mask(connection.wants_out))
        self._records.connections = max(self._records.connections, len(self._connections))
        return connection

    def _begin(self, connection: _Connection, number: int, due: float, now: float) -> None:
        closed = self._job.closed_s is not None
        if closed:
            self._records.intended_s[number] = now - self._start
        self._records.sent_s[number] = now - self._start
        self._busy += 1
        connection.number = number
        connection.unsent = memoryview(self._job.messages[self._job.order[number]])
        self._expiry.append(((now if closed else due) + self._job.timeout_s, connection, number))
        if connection.error:
            self._fail(connection, _name_of(connection.error))
        elif not connection.connecting:
            self._send(connection)

    def _advance(self, connection: _Connection) -> None:
        """Goes on with a connection that epoll named."""
        if connection.connecting:
            error = connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._fail(connection, _name_of(error))
                return
            connection.connecting = False
        if connection.unsent:
            self._send(connection)
        self._receive(connection)

    def _send(self, connection: _Connection) -> None:
        try:
            sent = connection.socket.send(connection.unsent)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._fail(connection, type(error).__name__)
            return
        connection.unsent = connection.unsent[sent:]
        if connection.wants_out != bool(connection.unsent):
            connection.wants_out = bool(connection.unsent)
            self._epoll.modify(connection.socket, _mask(connection.wants_out))

    def _receive(self, connection: _Connection) -> None:
        if connection.socket.fileno() < 0:
            return  # the send before this failed
        try:
            data = connection.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(connection, type(error).__name__)
            return
        if not data:
            self._fail(connection, "closed by the server")
            return
        done = time.monotonic()
        connection.received += data
        try:
            connection.head = connection.head or read_head(connection.received)
        except (ValueError, IndexError):
            self._fail(connection, "not an HTTP answer")
            return
        head = connection.head
        if head is not None and len(connection.received) >= head.total:
            self._finish(connection, head, done)

    def _finish(self, connection: _Connection, head: Head, done: float) -> None:
        number, body = connection.number, bytes(connection.received[head.start :])
        if number is None:
            self._close(connection)  # an answer nobody asked for
            return
        self._records.done_s[number] = done - self._start
        self._records.status[number] = head.status
        connection.number, connection.head = None, None
        connection.received = bytearray()
        self._busy -= 1
        if head.closes or connection.unsent:
            self._close(connection)
        else:
            self._idle.append(connection)
        if head.status == OK:
            self._records.coverage[number] = coverage_of(body)
            if self._job.kept[number]:
                self._records.bodies[number] = body
        else:
            self._records.errors[number] = f"HTTP {head.status} {problem_of(body)}"

    def _fail(self, connection: _Connection, kind: str) -> None:
        """Ends a connection; its request, if it has one, is a failure and never a latency."""
        if connection.number is not None:
            self._records.errors[connection.number] = kind
            connection.number = None
            self._busy -= 1
        self._close(connection)

    def _expire(self) -> None:
        now = time.monotonic()
        while self._expiry:
            deadline, connection, number = self._expiry[0]
            if connection.number == number:
                if deadline > now:
                    return
                self._fail(connection, "timeout")
            self._expiry.popleft()

    def _close(self, connection: _Connection) -> None:
        self._connections.pop(connection.socket.fileno(), None)
        connection.socket.close()


def _mask(wants_out: bool) -> int:
    return select.EPOLLIN | (select.EPOLLOUT if wants_out else 0)


def _name_of(code: int) -> str:
    """ConnectionRefusedError for ECONNREFUSED, and so on."""
    return type(OSError(code, "")).__name__


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
