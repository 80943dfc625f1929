"""A small HTTP server that misbehaves on request, for tests of the load generator."""

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgpack

WHOLE = msgpack.packb({"coverage": {"rows_asked": 10, "rows_answered": 10}})
PROBLEM = b'{"code": "overloaded", "detail": "too many"}'
PAGE = b"<html><h1>Bad\r\nGateway</h1>" + b"x" * 60
PARTIAL = msgpack.packb({"coverage": {"rows_asked": 10, "rows_answered": 5}})


@dataclass
class FakeEndpoint:
    """One thread, so that a stall holds up every connection. What a request's body says is done:
    429 and 500 are answered so, close and garbage break the connection, never is never answered,
    partial is an answer from half of the rows; anything else is answered whole.
    """

    stall_at: int | None = None  # the number of the request that is answered stall_s late
    stall_s: float = 0.0
    bodies: list[bytes] = field(default_factory=list)
    most_connections: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def serve(self, listener: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ, None)
            open_sockets: dict[socket.socket, bytearray] = {}
            while not self._done.is_set():
                for key, _ in selector.select(0.02):
                    connection = key.fileobj
                    assert isinstance(connection, socket.socket)
                    if connection is listener:
                        accepted, _ = listener.accept()
                        open_sockets[accepted] = bytearray()
                        self.most_connections = max(self.most_connections, len(open_sockets))
                        selector.register(accepted, selectors.EVENT_READ, None)
                    elif not self._advance(connection, open_sockets[connection]):
                        selector.unregister(connection)
                        del open_sockets[connection]
                        connection.close()
            for connection in open_sockets:
                connection.close()

    def stop(self) -> None:
        self._done.set()

    def _advance(self, connection: socket.socket, received: bytearray) -> bool:
        """Whether the connection stays open."""
        try:
            data = connection.recv(1 << 20)
        except ConnectionResetError:
            return False
        if not data:
            return False
        received += data
        while (end := received.find(b"\r\n\r\n")) >= 0:
            head = bytes(received[:end]).lower()
            length = int(head.split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])
            if len(received) < end + 4 + length:
                return True
            body = bytes(received[end + 4 : end + 4 + length])
            del received[: end + 4 + length]
            if not self._answer(connection, body):
                return False
        return True

    def _answer(self, connection: socket.socket, body: bytes) -> bool:
        self.bodies.append(body)
        if self.stall_at is not None and len(self.bodies) - 1 == self.stall_at:
            self._done.wait(self.stall_s)
        if body == b"close":
            return False
        if body == b"never":
            return True
        if body == b"garbage":
            connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")
            return False
        status = int(body) if body in (b"429", b"500") else 200
        special = {b"partial": PARTIAL, b"429": PROBLEM, b"500": PAGE}
        content = special.get(body, WHOLE)
        head = f"HTTP/1.1 {status} x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        return True


@contextmanager
def running(endpoint: FakeEndpoint) -> Iterator[tuple[str, int]]:
    """Its address, while it runs in a thread."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        thread = threading.Thread(target=endpoint.serve, args=(listener,))
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            endpoint.stop()
            thread.join()
