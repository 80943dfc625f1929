"""One connection to a shard: handshake, then frames, with many requests in flight.

A reply costs no task and no future, and is handed over undecoded: decoding it while other shards
still search would take a core from them.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import TypeAlias, cast

from shardline.router.fanout.clock import TimeSource
from shardline.shards.core.errors import ProtocolError, Unavailable
from shardline.shards.core.messages import Hello
from shardline.shards.wire import local_socket
from shardline.shards.wire.frames import (
    HEADER,
    MAX_FRAME_BYTES,
    FrameSplitter,
    decode_payload,
    encode_frame,
)
from shardline.shards.wire.handshake import ServerAddress, check_welcome, prove
from shardline.shards.wire.readers import Payload

logger = logging.getLogger(__name__)

# Of frames the kernel has not taken. One frame never fills it, whatever its size; a shard that
# does not read costs at most this and the frame that goes beyond it.
MAX_UNSENT_BYTES = HEADER.size + MAX_FRAME_BYTES
HANDSHAKE_FRAME_BYTES = 1024  # Hello has about 120; nobody unproven makes us buffer more

OnReply: TypeAlias = Callable[[Payload | Unavailable], None]  # a frame's payload, or the loss


class Link(asyncio.Protocol):
    """One connection to a shard. ``hello`` resolves when both sides have proved the secret.

    ``lost`` resolves with the reason once the connection is gone; every pending request has been
    told by then. ``address`` is what it connects to.
    """

    def __init__(
        self, secret: bytes, address: ServerAddress, clock: TimeSource | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        self._clock: TimeSource = clock or loop
        self._secret = secret
        self._address = address
        self._proven_address = address
        self._splitter = FrameSplitter(HANDSHAKE_FRAME_BYTES)
        self._pending: dict[int, OnReply] = {}
        self._transport: asyncio.Transport | None = None
        self._greeting: tuple[Hello, bytes] | None = None
        # When the shard last sent a byte while it owed an answer, or began to owe one; None: it
        # owes none. On the clock. Read by whoever chooses a replica, for every query.
        self.waiting_since: float | None = None
        self.owed = 0  # replies that the shard has not sent yet, to abandoned requests included
        self.hello: asyncio.Future[Hello] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()
        self.is_local = False
        self.is_lost = False  # ``lost`` is done: read for every query
        self.writable = True
        self.answered = False

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    def stalled_for(self) -> float:
        """Seconds since the shard last sent a byte while it owed an answer; 0 when it owes none."""
        return 0.0 if self.waiting_since is None else self._clock.time() - self.waiting_since

    def send(self, request_id: int, frame: bytes, on_reply: OnReply) -> None:
        assert self._transport is not None
        self._pending[request_id] = on_reply
        self.owed += 1
        if self.waiting_since is None:
            self.waiting_since = self._clock.time()
        self._transport.write(frame)

    def abandon(self, request_id: int) -> None:
        """Its reply, should it still come, is dropped."""
        self._pending.pop(request_id, None)

    def close(self, reason: str) -> None:
        """Drops the connection at once and tells every pending request why."""
        if self._transport is not None:
            self._transport.abort()
        self._finish(reason)

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # no isinstance here: uvloop's transports, as in a Serve replica, are of no asyncio class
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        connection: socket.socket = transport.get_extra_info("socket")
        self.is_local = connection.family == socket.AF_UNIX
        self._proven_address = local_socket.proven_address(connection, self._address)
        if not self.is_local:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self.waiting_since = None
        try:
            for request_id, payload in self._splitter.feed(data):
                self._take(request_id, payload)
        except ProtocolError as error:
            logger.warning("shard at %s broke the protocol: %s", self._address, error)
            self.close(f"broke the protocol ({error.message})")
        if self._pending and self.waiting_since is None:
            self.waiting_since = self._clock.time()

    def connection_lost(self, error: Exception | None) -> None:
        self._finish("connection lost")

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True

    # Inside

    def _take(self, request_id: int, payload: Payload) -> None:
        if self.hello.done():
            self.answered = True
            if request_id and self.owed:  # 0: a keep-alive frame
                self.owed -= 1
            on_reply = self._pending.pop(request_id, None)
            if on_reply is not None:
                on_reply(payload)
        elif self._greeting is None:
            message = decode_payload(payload)
            hello, proof, welcome_mac = prove(message, self._secret, self._proven_address)
            self._greeting = hello, welcome_mac
            assert self._transport is not None
            self._transport.write(encode_frame(0, proof))
        else:
            hello, welcome_mac = self._greeting
            check_welcome(decode_payload(payload), welcome_mac)
            self._splitter.limit = MAX_FRAME_BYTES
            self.hello.set_result(hello)

    def _finish(self, reason: str) -> None:
        if self.lost.done():
            return
        self.is_lost = True
        self.lost.set_result(reason)
        if not self.hello.done():
            self.hello.set_exception(Unavailable(f"{reason} during the handshake"))
            self.hello.exception()  # marks it as seen: whoever connects may have been cancelled
        pending, self._pending = self._pending, {}
        for on_reply in pending.values():
            on_reply(Unavailable(reason))
