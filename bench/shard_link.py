"""A blocking connection to a shard's server, for benchmarks and tests that write or search."""

import select
import socket
from collections import deque
from types import TracebackType

from shardline.shards.core.errors import ProtocolError, Unavailable
from shardline.shards.wire.frames import FrameSplitter, Message, decode_payload, encode_frame
from shardline.shards.wire.handshake import ServerAddress, check_welcome, prove

READ_BYTES = 1 << 16


class ShardLink:
    """One connection, greeted. Every method may raise Unavailable: it is broken, for good."""

    def __init__(self, address: ServerAddress, secret: bytes, *, timeout_s: float) -> None:
        """``timeout_s``: of connecting, and of the handshake.

        Raises:
            Unavailable: nobody answers. ProtocolError: whoever answers does not know the secret.
        """
        self._splitter = FrameSplitter()
        self._came: deque[tuple[int, Message]] = deque()
        try:
            self._socket = socket.create_connection(address, timeout=timeout_s)
        except OSError as error:
            raise Unavailable(f"{address}: {error}") from error
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, proof, mac = prove(self._expected(timeout_s), secret, address)
            self.send(0, proof)
            check_welcome(self._expected(timeout_s), mac)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, request_id: int, message: Message) -> None:
        try:
            self._socket.sendall(encode_frame(request_id, message))
        except OSError as error:
            raise Unavailable(f"connection lost: {error}") from error

    def receive(self, timeout_s: float) -> tuple[int, Message] | None:
        """The next reply with the id of its request; None: none has come in this time."""
        while not self._came:
            if not select.select([self._socket], [], [], timeout_s)[0]:
                return None
            self._read()
        return self._came.popleft()

    def ask(self, message: Message, *, timeout_s: float) -> Message:
        """The reply to a request that is the only one under way. Raises Unavailable: none came."""
        self.send(1, message)
        return self._expected(timeout_s)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> "ShardLink":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _expected(self, timeout_s: float) -> Message:
        received = self.receive(timeout_s)
        if received is None:
            raise Unavailable(f"no reply within {timeout_s} s")
        return received[1]

    def _read(self) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
        except OSError as error:
            raise Unavailable(f"connection lost: {error}") from error
        if not data:
            raise Unavailable("connection closed")
        try:
            frames = self._splitter.feed(data)
        except ProtocolError as error:
            raise Unavailable(f"no frames: {error}") from error
        # without a payload: a sign of life
        self._came += [(number, decode_payload(payload)) for number, payload in frames if payload]
