"""An HTTP server in a thread that does to each request what a script says next."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

CLOSE = b"CLOSE"  # end the connection instead of answering
HANG = b"HANG"  # no answer until the client leaves
LATE = b"LATE"  # OK once ``release`` is set
ECHO = b"ECHO"  # the path that was asked for, as JSON; from then on to every request


def answer(status: int = 200, body: bytes = b"{}", *headers: str) -> bytes:
    """A response with a length."""
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers]
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body


OK = answer()


@dataclass
class ScriptedServer:
    """script: what each request is answered with, in order; OK once it is used up."""

    listener: socket.socket
    script: list[bytes] = field(default_factory=list)
    tls: ssl.SSLContext | None = None
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    open_now: int = 0
    most_open: int = 0
    release: threading.Event = field(default_factory=threading.Event)  # ends HANG and LATE
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://localhost:{self.port}"

    def serve(self, threads: list[threading.Thread]) -> None:
        with suppress(OSError):  # the listener is shut down at the end
            while True:
                connection, _ = self.listener.accept()
                self.connections += 1
                thread = threading.Thread(target=self._converse, args=(connection,))
                threads.append(thread)
                thread.start()

    def _converse(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            if self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
            with connection:
                self._count(+1)
                while (request := _read_request(connection)) is not None:
                    with self._lock:
                        self.requests.append(request)
                        reply = self.script.pop(0) if self.script else OK
                        if reply == ECHO:
                            self.script.insert(0, ECHO)
                            reply = answer(200, b'{"path": "%s"}' % request.split()[1])
                    if reply == CLOSE:
                        break
                    if reply == HANG:
                        self.release.wait(10)
                        break
                    if reply == LATE:
                        self.release.wait(10)
                        reply = OK
                    connection.sendall(reply)
                self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self.open_now += change
            self.most_open = max(self.most_open, self.open_now)


def _read_request(connection: socket.socket) -> bytes | None:
    data = b""
    while True:
        head, found, body = data.partition(b"\r\n\r\n")
        if found:
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            if len(body) >= int(length or 0):
                return data
        more = connection.recv(1 << 16)
        if not more:
            return None
        data += more


@contextmanager
def scripted(
    *script: bytes, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> Iterator[ScriptedServer]:
    """A running server, whose threads have ended when this one has."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        server = ScriptedServer(listener, list(script), tls)
        threads: list[threading.Thread] = []
        accepting = threading.Thread(target=server.serve, args=(threads,))
        accepting.start()
        try:
            yield server
        finally:
            server.release.set()
            listener.shutdown(socket.SHUT_RDWR)
            for thread in (accepting, *threads):
                thread.join(10)
                assert not thread.is_alive(), "a client has not closed its connection"
