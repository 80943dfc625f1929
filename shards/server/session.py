"""One connection of a router to a shard: handshake, then requests in and replies out.

Lives in the server's loop thread; nothing here is touched by the search thread.

What a connection can make the shard hold is counted before it is asked for: the requests that are
under way, the largest replies they can have, and the replies that are not sent yet. A request for
which there is no room in MAX_KEPT_BYTES waits here; smaller ones overtake it for OVERTAKE_S. While
many or large ones wait nothing more is read, so that a peer that asks and does not read stops
itself.

Writes have room of their own, WRITE_ROOM_BYTES, and never wait here: a disk may keep them for long,
and what came behind them would wait too. One for which there is no room is refused.
"""

import asyncio
import logging
import socket
import time
from collections import deque
from typing import Protocol, cast

from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.messages import WRITE_ROOM_BYTES, ReplicaKey
from shardline.shards.server.handlers import Work, larger
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
# Of requests under way, their replies, and replies not sent, of one connection, writes apart; a
# single request may have more. While replies are made and encoded a connection takes two to four
# times this.
MAX_KEPT_BYTES = (32 << 20) - WRITE_ROOM_BYTES
MAX_WAITING = 64  # requests for which there is no room, and their bytes: beyond, nothing is read
MAX_WAITING_BYTES = 4 << 20
OVERTAKE_S = 0.1  # of the request that has waited longest: else small ones could pass it for ever
UNREAD_S = 30.0  # after which a client that reads nothing of what waits for it is dropped


class Server(Protocol):
    """What a session needs of the server it belongs to."""

    key: ReplicaKey
    secret: bytes
    epoch: int
    address: ServerAddress
    handshake_timeout_s: float
    sessions: "set[Session]"

    def work_for(self, session: "Session", request_id: int, message: Message, size: int, /) -> Work:
        """Of a message of ``size`` bytes. Raises ProtocolError: it is no request."""

    def submit(self, work: Work, /) -> None:
        """``work.taken`` is to be given back with the reply."""

    def submit_write(self, work: Work, /) -> None:
        """``work.taken`` is to be given back with ``reply_to_write``."""

    def refuse_write(self, work: Work, /) -> None:
        """Answers it with ``reply``: nothing of it was counted."""

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
        self._outbox: Outbox | None = None
        self._taken = 0  # bytes of the requests under way, and of the replies that they can have
        self._written = 0  # bytes of the writes under way, which ``_taken`` leaves out
        self._waiting: deque[Work] = deque()  # in the order they came
        self._waiting_bytes = 0  # of these requests
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

    def reply_to_write(self, request_id: int, message: Message, taken: int) -> None:
        """As ``reply``, to a write."""
        self._written -= taken
        self.reply(request_id, message)

    def ask_again(self, work: Work) -> None:
        """Lets a request wait whose reply would exceed ``reply_bytes``, now with more of them."""
        self._taken -= work.taken
        if self._transport is None:
            return
        reply_bytes = larger(work)
        work.taken += reply_bytes - work.reply_bytes
        work.reply_bytes = reply_bytes
        before = sum(each.arrived_at <= work.arrived_at for each in self._waiting)
        self._waiting.insert(before, work)
        self._waiting_bytes += work.taken - reply_bytes
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
        self._waiting_bytes = 0
        self._transport = None
        self._server.sessions.discard(self)

    def data_received(self, data: bytes) -> None:
        try:
            for request_id, payload in self._splitter.feed(data):
                message = decode_payload(payload)
                if self._is_proven:
                    self._take(self._server.work_for(self, request_id, message, len(payload)))
                else:
                    self._greet(message)
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

    def _take(self, work: Work) -> None:
        """Submits a request, or lets it wait until there is room."""
        assert self._outbox is not None
        if work.handler.answer is None:
            self._take_write(work)
            return
        under_way = self._taken + self._outbox.unsent
        if self._waiting or (under_way and under_way + work.taken > MAX_KEPT_BYTES):
            self._waiting.append(work)
            self._waiting_bytes += work.taken - work.reply_bytes
            self._look_soon()
            return
        self._taken += work.taken
        self._server.submit(work)

    def _take_write(self, work: Work) -> None:
        if self._written and self._written + work.taken > WRITE_ROOM_BYTES:
            self._server.refuse_write(work)
            return
        self._written += work.taken
        self._server.submit_write(work)

    def _look_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Submits waiting requests for which there is room, and reads on when few wait."""
        self._is_due = False
        if self._transport is None or self._outbox is None:
            return
        waiting, self._waiting = self._waiting, deque()
        while waiting:
            work = waiting.popleft()
            size = work.taken - work.reply_bytes
            under_way = self._taken + self._outbox.unsent
            kept = under_way + self._waiting_bytes - size
            if not under_way or kept + work.taken <= MAX_KEPT_BYTES:
                self._waiting_bytes -= size
                self._taken += work.taken
                self._server.submit(work)
            else:
                self._waiting.append(work)
                if time.monotonic() - work.arrived_at > OVERTAKE_S:
                    self._waiting += waiting
                    break
        self._server.after_read()
        if len(self._waiting) >= MAX_WAITING or self._waiting_bytes > MAX_WAITING_BYTES:
            self._transport.pause_reading()
        elif not self._outbox.is_paused:
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
