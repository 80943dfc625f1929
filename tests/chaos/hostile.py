"""Hostile clients: what strangers, and callers with a key, may send. Nobody else may notice.

Each attack runs in a thread until it is told to stop, and returns what it saw that must not be: an
internal error, or an answer that it should not have had.
"""

import random
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from tests.chaos.faults import Fault, Kind
from tests.chaos.oracle import Finding, FindingKind
from tests.chaos.served import Served
from tests.chaos.windows import Allowance

SOCKET_TIMEOUT_S = 3.0
SILENT = 500  # connections that never send their body: four times router.max_in_flight
BUSY = (429, 502, 503, 504)  # what another fault at the same time may bring
SLOW = 60
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where to attack, with a key for those who have one, and the ports of the shards."""

    address: tuple[str, int]
    key: str
    shards: tuple[tuple[str, int], ...]
    stop: threading.Event

    def open(self, stack: ExitStack | None = None) -> socket.socket:
        """A connection; closed with the stack, where there is one. Raises OSError."""
        connected = socket.create_connection(self.address, SOCKET_TIMEOUT_S)
        return connected if stack is None else stack.enter_context(connected)


Attack = Callable[[Target, random.Random], Iterable[str]]


def head(
    target: Target,
    length: int | None,
    *,
    key: str | None = None,
    media: str = "application/json",
    more: str = "",
) -> bytes:
    lines = [f"POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Type: {media}"]
    lines += [] if length is None else [f"Content-Length: {length}"]
    lines += [] if key is None else [f"Authorization: Bearer {key}"]
    return ("\r\n".join(lines) + f"\r\n{more}\r\n").encode()


def status(connection: socket.socket) -> int | None:
    """The status of the answer, if one comes in time."""
    with suppress(OSError, ValueError, IndexError):
        return int(connection.recv(4096).split(b" ", 2)[1])
    return None


def exchange(target: Target, *parts: bytes, half_close: bool = False) -> int | None:
    """Sends on a connection of its own; the status that comes back, None: none."""
    with suppress(OSError), target.open() as connection:
        for part in parts:
            connection.sendall(part)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return status(connection)
    return None


def refused(got: int | None, *allowed: int) -> list[str]:
    """What is said about a status that is none of ``allowed``; none at all is allowed."""
    return (
        []
        if got is None or got in (*allowed, *BUSY)
        else [f"HTTP {got}, expected one of {allowed}"]
    )


def random_bytes(target: Target, rng: random.Random) -> Iterable[str]:
    while not target.stop.wait(0.02):
        yield from refused(exchange(target, rng.randbytes(rng.randrange(1, 40_000))), 400, 408)


def random_requests(target: Target, rng: random.Random) -> Iterable[str]:
    """Heads that are right with a key and bodies that are noise."""
    while not target.stop.wait(0.02):
        body = rng.randbytes(rng.randrange(1, 5000))
        media = rng.choice(("application/json", "application/msgpack", "text/plain"))
        sent = head(target, len(body), key=target.key, media=media)
        yield from refused(exchange(target, sent, body), 400, 408, 413, 415)


def bodies_never_sent(target: Target, rng: random.Random) -> Iterable[str]:
    """Connections without a key that announce a body, send none or some of it, and stay."""
    with ExitStack() as stack:
        for _ in range(SILENT):
            with suppress(OSError):
                connection = target.open(stack)
                length = rng.choice((1000, 100_000, 10 * MIB))
                connection.sendall(head(target, length))
                connection.sendall(
                    b"x" * rng.choice((0, 1, 900, length // 2 if length < MIB else 0))
                )
        target.stop.wait()
    return ()


def huge_bodies(target: Target, rng: random.Random) -> Iterable[str]:
    """Above the limit, announced or in chunks without end, with a key and without."""
    block = b"x" * MIB
    while not target.stop.wait(0.05):
        key = rng.choice((target.key, None))
        if rng.random() < 0.5:
            sent = head(target, rng.choice((33 * MIB, 2_000 * MIB)), key=key)
            got = exchange(target, sent, *[block] * 33)
        else:
            sent = head(target, None, key=key, more="Transfer-Encoding: chunked\r\n")
            chunk = f"{MIB:x}\r\n".encode() + block + b"\r\n"
            got = exchange(target, sent, *[chunk] * 40)
        yield from refused(got, 400, 401, 408, 413)


def slow_headers(target: Target, rng: random.Random) -> Iterable[str]:
    """A byte of the header now and then, on many connections."""
    with ExitStack() as stack:
        connections = []
        for _ in range(SLOW):
            with suppress(OSError):
                connections.append(target.open(stack))
        text = head(target, 10, more="X-Slow: " + "x" * 500)
        for at in range(len(text)):
            for connection in connections:
                with suppress(OSError):
                    connection.send(text[at : at + 1])
            if target.stop.wait(0.3):
                break
    return ()


def half_closes(target: Target, rng: random.Random) -> Iterable[str]:
    """The sending side is shut at once: before anything, inside the head, after a whole request."""
    body = b'{"vectors": [[1]], "k": 1}'
    whole = head(target, len(body), key=target.key) + body
    while not target.stop.wait(0.02):
        cut = rng.choice((0, rng.randrange(len(whole)), len(whole)))
        yield from refused(exchange(target, whole[:cut], half_close=True), 400, 408)


def wrong_keys(target: Target, rng: random.Random) -> Iterable[str]:
    body = b'{"item_ids": [1], "k": 1}'
    while not target.stop.wait(0.005):
        key = rng.choice(("w" * 40, target.key[:-1] + "~", target.key[:-1], "", "\x01"))
        got = exchange(target, head(target, len(body), key=key), body)
        yield from refused(got, 400, 401)


def bombs(target: Target, rng: random.Random) -> Iterable[str]:
    """Bodies within the limit that become much more when they are read."""
    while not target.stop.wait(0.5):
        media, body = rng.choice(BOMBS)(rng.choice((2, 8, 30)) * MIB)
        sent = head(target, len(body), key=target.key, media=media)
        yield from refused(exchange(target, sent, body), 400, 408, 413)


JSON, MSGPACK = "application/json", "application/msgpack"
BOMBS: tuple[Callable[[int], tuple[str, bytes]], ...] = (
    lambda size: (MSGPACK, _array_of("features", size, b"\x80")),  # empty maps
    lambda size: (MSGPACK, _array_of("features", size, b"\x90")),  # empty lists
    lambda size: (MSGPACK, _array_of("vectors", size, b"\x90")),
    lambda size: (MSGPACK, _array_of("item_ids", size, b"\x01")),
    lambda size: (MSGPACK, b"\x91" * size),
    lambda size: (JSON, b"[" * size),
    lambda size: (JSON, b'{"vectors":[' + b"[]," * (size // 3) + b"[]]}"),
    lambda size: (JSON, b'{"features":[' + b"{}," * (size // 3) + b"{}]}"),
    lambda size: (JSON, b'{"item_ids":[' + b"1," * (size // 2) + b"1]}"),
    lambda size: (JSON, b'{"k":' + b"9" * size + b"}"),
)


def _array_of(field: str, count: int, element: bytes) -> bytes:
    """A map of msgpack with one field: an array of ``count`` one-byte elements."""
    start = b"\x81" + bytes([0xA0 | len(field)]) + field.encode()
    return start + b"\xdd" + struct.pack(">I", count) + element * count


def never_reading(target: Target, rng: random.Random) -> Iterable[str]:
    """Large answers that are asked for with a key and not read."""
    vectors = ",".join(f"[{','.join('1' for _ in range(64))}]" for _ in range(64))
    body = f'{{"vectors": [{vectors}], "k": 2048}}'.encode()
    with ExitStack() as stack:
        for _ in range(20):
            with suppress(OSError):
                target.open(stack).sendall(head(target, len(body), key=target.key) + body)
            if target.stop.wait(0.1):
                break
        target.stop.wait()
    return ()


def shard_ports(target: Target, rng: random.Random) -> Iterable[str]:
    """Random bytes, lengths that are never filled, and silence, on the ports of shards."""
    with ExitStack() as stack:
        while not target.stop.wait(0.02):
            with suppress(OSError):
                connection = socket.create_connection(rng.choice(target.shards), SOCKET_TIMEOUT_S)
                sent = rng.choice(
                    (
                        rng.randbytes(rng.randrange(1, 3000)),
                        struct.pack(">I", rng.randrange(1 << 32)),
                        struct.pack("<I", rng.randrange(1 << 32)) + rng.randbytes(100),
                        b"",
                    )
                )
                if rng.random() < 0.1:
                    stack.enter_context(connection).sendall(sent)
                else:
                    with connection:
                        connection.sendall(sent)
    return ()


@dataclass(slots=True)
class Hostile:
    """One attack for ``held_s`` seconds, in a thread."""

    target: Target
    attack: Attack
    rng: random.Random
    held_s: float
    findings: list[Finding] = field(default_factory=list)
    _thread: threading.Thread | None = None

    def inject(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def undo(self) -> None:
        self.target.stop.set()
        if self._thread is not None:
            self._thread.join()

    def is_whole(self) -> bool:
        return True

    def _run(self) -> None:
        for text in self.attack(self.target, self.rng):
            self.findings.append(
                Finding(kind=FindingKind.HOSTILE, text=f"{self.attack.__name__}: {text}")
            )


def target_of(served: Served) -> Target:
    """The cluster as it is now; shards that restart later have other ports."""
    host, _, port = served.address.url.removeprefix("http://").rpartition(":")
    shards = [each["address"].rpartition(":") for each in served.status()["shards"]]
    return Target(
        address=(host, int(port)),
        key=served.address.key or "",
        shards=tuple((name, int(number)) for name, _, number in shards),
        stop=threading.Event(),
    )


def hostile(attack: Attack) -> Callable[[Served, random.Random], Fault]:
    return lambda served, rng: Hostile(target_of(served), attack, rng, held_s=rng.uniform(3, 8))


UNTOUCHED = Allowance(whole_within_s=5)
HOSTILE_KINDS = tuple(
    Kind(name=f"hostile: {name}", allowance=UNTOUCHED, make=hostile(attack))
    for name, attack in (
        ("random bytes", random_bytes),
        ("random bodies with a key", random_requests),
        (f"{SILENT} bodies never sent", bodies_never_sent),
        ("huge bodies", huge_bodies),
        ("slow headers", slow_headers),
        ("half-closed connections", half_closes),
        ("wrong keys", wrong_keys),
        ("bodies that unpack to much more", bombs),
        ("answers never read", never_reading),
        ("random bytes on shard ports", shard_ports),
    )
)
