"""One persistent connection to one shard, with many requests in flight.

``Link`` is one connection: handshake, then frames. A reply costs no task and no future, and
is handed over undecoded: decoding it while other shards still search would take a core from them.
``ShardConnection`` keeps one link up: it connects, reconnects with growing random pauses, and
refuses a shard process that an older epoch or another generation marks as the wrong one. Deadlines
belong to the caller, who abandons what it no longer waits for.
"""

import asyncio
import logging
import random
import socket
from collections.abc import Callable
from typing import TypeAlias, cast

from router.config import RouterConfig
from shards import local_socket
from shards.errors import Overloaded, ProtocolError, Unavailable
from shards.handshake import ServerAddress, check_welcome, prove
from shards.types import Hello, ShardRoute
from shards.wire import HEADER, MAX_FRAME_BYTES, FrameSplitter, decode_payload, encode_frame

logger = logging.getLogger(__name__)

# Of frames the kernel has not taken. One frame never fills it, whatever its size; a shard that
# does not read costs at most this and the frame that goes beyond it.
MAX_UNSENT_BYTES = HEADER.size + MAX_FRAME_BYTES
HANDSHAKE_FRAME_BYTES = 1024  # Hello has about 120; nobody unproven makes us buffer more
OLDER_PROCESS_FAILURES = 3  # as many as its pauses grow with: it is about to learn its epoch

OnReply: TypeAlias = Callable[[bytes | Unavailable], None]  # a frame's payload, or the loss


class OlderProcess(ProtocolError):
    """The shard that answered has a lower epoch than the routing table: it may learn it yet."""


def backoff_ms(failures: int, config: RouterConfig, rng: random.Random) -> float:
    """The pause before the next attempt after ``failures`` >= 1 in a row: doubling, half random."""
    # 2**30 milliseconds is beyond any allowed maximum; the bound keeps the float finite
    longest = min(config.backoff_max_ms, config.backoff_base_ms * 2.0 ** min(failures - 1, 30))
    return longest * rng.uniform(0.5, 1.0)


class Link(asyncio.Protocol):
    """One connection to a shard. ``hello`` resolves when both sides have proved the secret.

    ``lost`` resolves with the reason once the connection is gone; every pending request has been
    told by then. ``address`` is what it connects to.
    """

    def __init__(self, secret: bytes, address: ServerAddress) -> None:
        self._loop = asyncio.get_running_loop()
        self._secret = secret
        self._address = address
        self._proven_address = address
        self._splitter = FrameSplitter(HANDSHAKE_FRAME_BYTES)
        self._pending: dict[int, OnReply] = {}
        self._transport: asyncio.Transport | None = None
        self._greeting: tuple[Hello, bytes] | None = None
        self._waiting_since: float | None = None
        self.hello: asyncio.Future[Hello] = self._loop.create_future()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self.is_local = False
        self.writable = True
        self.answered = False

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    @property
    def owes_answers(self) -> bool:
        return self._waiting_since is not None

    def stalled_for(self) -> float:
        """Seconds since the shard last sent a byte while it owed an answer; 0 when it owes none."""
        return 0.0 if self._waiting_since is None else self._loop.time() - self._waiting_since

    def send(self, request_id: int, frame: bytes, on_reply: OnReply) -> None:
        assert self._transport is not None
        self._pending[request_id] = on_reply
        if self._waiting_since is None:
            self._waiting_since = self._loop.time()
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
        self._waiting_since = None
        try:
            for request_id, payload in self._splitter.feed(data):
                self._take(request_id, payload)
        except ProtocolError as error:
            logger.warning("shard at %s broke the protocol: %s", self._address, error)
            self.close(f"broke the protocol ({error.message})")
        if self._pending and self._waiting_since is None:
            self._waiting_since = self._loop.time()

    def connection_lost(self, error: Exception | None) -> None:
        self._finish("connection lost")

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True

    # Inside

    def _take(self, request_id: int, payload: bytes) -> None:
        if self.hello.done():
            self.answered = True
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
        self.lost.set_result(reason)
        if not self.hello.done():
            self.hello.set_exception(Unavailable(f"{reason} during the handshake"))
            self.hello.exception()  # marks it as seen: whoever connects may have been cancelled
        pending, self._pending = self._pending, {}
        for on_reply in pending.values():
            on_reply(Unavailable(reason))


class ShardConnection:
    """Keeps a link to the shard process of one route, from ``start`` to ``close``."""

    def __init__(
        self,
        route: ShardRoute,
        generation: int,
        *,
        secret: bytes,
        config: RouterConfig,
        rng: random.Random,
    ) -> None:
        assert route.address is not None
        self.route = route
        self.generation = generation
        self._address = route.address
        self._secret = secret
        self._config = config
        self._rng = rng
        self._epoch = route.epoch
        self._keeps_to_tcp = False
        self._link: Link | None = None
        self._reason = "not connected yet"
        self._task: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()

    @property
    def connected(self) -> bool:
        return self._link is not None and not self._link.lost.done()

    @property
    def reason(self) -> str:
        """Why there is no connection now; empty when there is one."""
        return "" if self.connected else self._reason

    def start(self) -> None:
        name = f"shard {self.route.shard} connection"
        self._task = asyncio.create_task(self._keep_connected(), name=name)

    async def settled(self) -> None:
        """Returns once an attempt to connect has succeeded, or failed for a reason that counts.

        An older process is no such reason: a restarted controller publishes its table a moment
        before the shards hear of their new epochs. Only the caller's patience bounds that wait.
        """
        await self._settled.wait()

    async def close(self) -> None:
        """Drops the link and ends the task; pending requests are told."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def request(self, request_id: int, frame: bytes, on_reply: OnReply) -> Link:
        """Sends one frame over the link that is returned. ``on_reply`` is called once, with the
        reply or the connection's loss.

        request_id is the frame's own, and unique among the requests in flight.

        Raises:
            Unavailable: no connection now, or a shard so late that nothing more is asked of it.
            Overloaded: too many requests wait for this shard, or it does not read them.
        """
        link = self._link
        if link is None:
            raise Unavailable(self._reason)
        if link.owes_answers:
            self._refuse_if_busy(link)
        if link.lost.done():
            raise Unavailable(link.lost.result())
        if not link.writable:
            raise Overloaded("overloaded")
        link.send(request_id, frame, on_reply)
        return link

    def abandon(self, request_id: int) -> None:
        """The caller's deadline has passed: its reply is dropped, and a silent shard with it."""
        link = self._link
        if link is None:
            return
        link.abandon(request_id)
        self._drop_if_silent(link)

    def _refuse_if_busy(self, link: Link) -> None:
        """For one that owes answers: too many of them, or for too long."""
        self._drop_if_silent(link)
        if link.lost.done():
            return
        if link.stalled_for() * 1000 > self._config.late_after_ms:
            raise Unavailable("silent, though it owes answers")
        if link.in_flight >= self._config.shard_max_in_flight:
            raise Overloaded("overloaded")

    def _drop_if_silent(self, link: Link) -> None:
        if link.stalled_for() * 1000 > self._config.stall_timeout_ms:
            logger.warning("shard %d has gone silent: reconnecting", self.route.shard)
            link.close("gone silent")

    async def _keep_connected(self) -> None:
        failures = 0
        while True:
            try:
                link = await self._connect()
            except (OSError, TimeoutError, ProtocolError, Unavailable) as error:
                self._reason = _describe(error)
                log = logger.debug if failures else logger.warning
                log("shard %d at %s: %s", self.route.shard, self._address, self._reason)
                if isinstance(error, OlderProcess):
                    failures = min(failures, OLDER_PROCESS_FAILURES - 1)
                else:
                    self._settled.set()
            else:
                await self._serve(link)
                if link.answered:
                    failures = 0
            failures += 1
            await asyncio.sleep(backoff_ms(failures, self._config, self._rng) / 1000)

    async def _serve(self, link: Link) -> None:
        """Until the link is lost."""
        self._link = link
        self._settled.set()
        logger.info("shard %d at %s: connected", self.route.shard, self._address)
        try:
            # shielded, or cancelling this task would resolve the link's own future
            self._reason = await asyncio.shield(link.lost)
            logger.warning("shard %d at %s: %s", self.route.shard, self._address, self._reason)
        finally:
            self._link = None
            link.close("closing")

    async def _connect(self) -> Link:
        address = self._address
        async with asyncio.timeout(self._config.connect_timeout_ms / 1000):
            link = await self._open(address)
            try:
                hello = await self._greeted(link)
                self._check(hello)
            except BaseException:
                link.close("refused")
                raise
        return link

    async def _open(self, address: ServerAddress) -> Link:
        """Over a Unix socket to a shard of this machine, else over TCP."""
        loop = asyncio.get_running_loop()
        here = None if self._keeps_to_tcp else local_socket.connect(address)
        if here is None:
            _, link = await loop.create_connection(lambda: Link(self._secret, address), *address)
        else:
            _, link = await loop.create_unix_connection(
                lambda: Link(self._secret, address), sock=here
            )
        return link

    async def _greeted(self, link: Link) -> Hello:
        try:
            return await link.hello
        except BaseException:
            if link.is_local:  # somebody else may hold the name: that must not keep us from it
                logger.warning("shard %d: no handshake over its Unix socket", self.route.shard)
                self._keeps_to_tcp = True
            raise

    def _check(self, hello: Hello) -> None:
        """Refuses another shard or generation, and a process that a later one has replaced."""
        for name, expected, got in (
            ("shard", self.route.shard, hello.shard),
            ("generation", self.generation, hello.generation),
        ):
            if got != expected:
                raise ProtocolError(f"wrong {name}", expected=str(expected), got=str(got))
        if hello.epoch < self._epoch:
            raise OlderProcess(
                "an older process of this shard",
                expected=f"epoch >= {self._epoch}",
                got=str(hello.epoch),
            )
        self._epoch = hello.epoch


def _describe(error: Exception) -> str:
    """Without the peer's address, because the text ends in answers to callers."""
    if isinstance(error, TimeoutError):
        return "no connection in time"
    if isinstance(error, ProtocolError):
        return f"refused, {error}"
    if isinstance(error, Unavailable):
        return error.message
    return "no connection"
