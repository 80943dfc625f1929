"""One connection of a router to a shard: handshake, then requests in and replies out.

Lives in the server's loop thread; nothing here is touched by the search thread.

What a connection can make the shard hold is counted before it is asked for: the requests that are
under way, the largest replies they can have, and the replies that are not sent yet. While that is
more than MAX_KEPT_BYTES, further requests wait here and nothing more is read, so that a peer that
asks and does not read stops itself.
"""

import asyncio
import logging
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol, cast

from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.messages import ReplicaKey
from shardline.shards.server.handlers import HANDLERS, Request
from shardline.shards.server.outbox import Outbox
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
# Of requests under way, their replies, and replies not sent, of one connection; a single request
# may have more. While replies are made and encoded a connection takes two to four times this.
MAX_KEPT_BYTES = 32 << 20
UNREAD_S = 30.0  # after which a client that reads nothing of what waits for it is dropped


class Server(Protocol):
    """What a session needs of the server it belongs to."""

    key: ReplicaKey
    secret: bytes
    epoch: int
    address: ServerAddress
    handshake_timeout_s: float
    sessions: "set[Session]"

    def submit(
        self,
        session: "Session",
        request_id: int,
        request: Request,
        taken: int,
        arrived_at: float,
        /,
    ) -> None:
        """``taken``: to be given back with the reply; arrived_at: on time.monotonic's clock."""

    def reply_bytes(self, request: Request, /) -> int:
        """Of the largest reply that a request can have."""

    def after_read(self) -> None:
        """Called once all that was read has been submitted."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request for which there is no room yet."""

    request_id: int
    request: Request
    taken: int
    arrived_at: float


class Session(asyncio.Protocol):
    """A frame that breaks the protocol ends it, and only it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._splitter = FrameSplitter(HANDSHAKE_FRAME_BYTES)
        self._hello = new_hello(server.key, epoch=server.epoch)
        self._is_proven = False
        self._transport: asyncio.Transport | None = None
        self._outbox: Outbox | None = None
        self._taken = 0  # bytes of the requests under way, and of the replies that they can have
        self._waiting: deque[_Waiting] = deque()
        self._is_due = False  # waiting requests will be looked at
        self._unread_timer: asyncio.TimerHandle | None = None
        self._address = server.address
        self._timer: asyncio.TimerHandle | None = None

    def reply(self, request_id: int, message: Message, taken: int = 0) -> None:
        """Sends a frame, unless the client has gone. ``taken``: as the request was submitted."""
        self._taken -= taken
        transport = self._transport
        if transport is None or self._outbox is None or transport.is_closing():
            return
        self._outbox.send(encode_frame(request_id, message))
        if self._waiting:
            self._look_soon()

    def keep_alive(self) -> None:
        """Sends an empty keep-alive frame, if the router has proved that it knows the secret."""
        if not self._is_proven or self._transport is None or self._transport.is_closing():
            return
        if self._outbox is not None and not self._outbox.unsent:  # which says as much
            self._outbox.send(KEEP_ALIVE)

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
        self._outbox = Outbox(self._transport)
        connection: socket.socket = transport.get_extra_info("socket")
        self._address = local_socket.proven_address(connection, self._server.address)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server.sessions.add(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._server.handshake_timeout_s, self._give_up)
        self._transport.write(encode_frame(0, self._hello))

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self._timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        if self._outbox is not None:
            self._outbox.clear()
        self._waiting.clear()
        self._transport = None
        self._server.sessions.discard(self)

    def data_received(self, data: bytes) -> None:
        try:
            for request_id, payload in self._splitter.feed(data):
                message = decode_payload(payload)
                if not self._is_proven:
                    self._greet(message)
                elif type(message) in HANDLERS:
                    self._take(request_id, cast(Request, message), len(payload))
                else:
                    raise ProtocolError("not a request", got=type(message).__name__)
        except ProtocolError as error:
            logger.warning("client %s broke the protocol: %s", self._peer(), error)
            self.abort()
        finally:
            self._server.after_read()

    def pause_writing(self) -> None:
        """The client reads slower than it asks: take no more of its requests."""
        if self._transport is not None and self._outbox is not None:
            self._outbox.pause()
            self._transport.pause_reading()
            loop = asyncio.get_running_loop()
            self._unread_timer = loop.call_later(UNREAD_S, self._drop_unread)

    def resume_writing(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        if self._transport is not None and self._outbox is not None:
            self._outbox.resume()
            self._look_soon()

    # Inside

    def _take(self, request_id: int, request: Request, size: int) -> None:
        """Submits a request of ``size`` bytes, or lets it wait until there is room."""
        taken = size + self._server.reply_bytes(request)
        arrived_at = time.monotonic()
        if self._waiting or not self._has_room(taken):
            self._waiting.append(_Waiting(request_id, request, taken, arrived_at))
            assert self._transport is not None
            self._transport.pause_reading()
            return
        self._taken += taken
        self._server.submit(self, request_id, request, taken, arrived_at)

    def _has_room(self, taken: int) -> bool:
        assert self._outbox is not None
        kept = self._taken + self._outbox.unsent
        return kept == 0 or kept + taken <= MAX_KEPT_BYTES

    def _look_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Submits waiting requests for which there is room, and reads on when none waits."""
        self._is_due = False
        while self._waiting and self._has_room(self._waiting[0].taken):
            waiting = self._waiting.popleft()
            self._taken += waiting.taken
            self._server.submit(
                self, waiting.request_id, waiting.request, waiting.taken, waiting.arrived_at
            )
        self._server.after_read()
        if self._transport is None or self._outbox is None:
            return
        if not self._waiting and not self._outbox.is_paused:
            self._transport.resume_reading()

    def _drop_unread(self) -> None:
        logger.warning("client %s does not read its replies", self._peer())
        self.abort()

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
