"""One connection of a router to a shard: handshake, then requests in and replies out.

Lives in the server's loop thread; nothing here is touched by the search thread.
"""

import asyncio
import logging
import socket
from typing import Protocol, cast

from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.messages import ReplicaKey
from shardline.shards.server.handlers import HANDLERS, Request
from shardline.shards.wire import local_socket
from shardline.shards.wire.frames import (
    KEEP_ALIVE,
    MAX_FRAME_BYTES,
    FrameSplitter,
    Message,
    decode_payload,
    encode_frame,
)
from shardline.shards.wire.handshake import ServerAddress, new_hello, welcome

logger = logging.getLogger(__name__)

HANDSHAKE_FRAME_BYTES = 1024  # a Proof has about 80; nobody unproven makes us buffer more
MAX_UNSENT_BYTES = 2 * MAX_FRAME_BYTES  # of a client that asks but does not read


class Server(Protocol):
    """What a session needs of the server it belongs to."""

    key: ReplicaKey
    secret: bytes
    epoch: int
    address: ServerAddress
    handshake_timeout_s: float
    sessions: "set[Session]"

    def submit(self, session: "Session", request_id: int, request: Request, /) -> None: ...

    def after_read(self) -> None:
        """Called once all that was read has been submitted."""


class Session(asyncio.Protocol):
    """A frame that breaks the protocol ends it, and only it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._splitter = FrameSplitter(HANDSHAKE_FRAME_BYTES)
        self._hello = new_hello(server.key, epoch=server.epoch)
        self._is_proven = False
        self._transport: asyncio.Transport | None = None
        self._address = server.address
        self._timer: asyncio.TimerHandle | None = None

    def reply(self, request_id: int, message: Message) -> None:
        """Sends a frame, unless the client has gone."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(encode_frame(request_id, message))
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            logger.warning("client %s does not read its replies", self._peer())
            transport.abort()

    def keep_alive(self) -> None:
        """Sends an empty keep-alive frame, if the router has proved that it knows the secret."""
        if self._is_proven and self._transport is not None and not self._transport.is_closing():
            self._transport.write(KEEP_ALIVE)

    def abort(self) -> None:
        """Drops the connection at once, unsent replies included."""
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # no isinstance here: Ray installs uvloop, whose transports are of no asyncio class
        self._transport = cast(asyncio.Transport, transport)
        connection: socket.socket = transport.get_extra_info("socket")
        self._address = local_socket.proven_address(connection, self._server.address)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server.sessions.add(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._server.handshake_timeout_s, self._give_up)
        self._transport.write(encode_frame(0, self._hello))

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None
        self._server.sessions.discard(self)

    def data_received(self, data: bytes) -> None:
        try:
            for request_id, payload in self._splitter.feed(data):
                message = decode_payload(payload)
                if not self._is_proven:
                    self._greet(message)
                elif type(message) in HANDLERS:
                    self._server.submit(self, request_id, cast(Request, message))
                else:
                    raise ProtocolError("not a request", got=type(message).__name__)
        except ProtocolError as error:
            logger.warning("client %s broke the protocol: %s", self._peer(), error)
            self.abort()
        finally:
            self._server.after_read()

    def pause_writing(self) -> None:
        """The client reads slower than it asks: take no more of its requests."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    # Inside

    def _greet(self, message: Message) -> None:
        server = self._server
        self.reply(0, welcome(message, server.secret, self._hello, self._address))
        self._is_proven = True
        self._splitter.limit = MAX_FRAME_BYTES
        if self._timer is not None:
            self._timer.cancel()

    def _give_up(self) -> None:
        logger.warning("client %s did not prove the secret in time", self._peer())
        self.abort()

    def _peer(self) -> str:
        if self._transport is None:
            return "(gone)"
        return str(self._transport.get_extra_info("peername") or "of this machine")
