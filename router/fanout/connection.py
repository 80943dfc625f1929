"""A link to one shard, kept up: connecting, and reconnecting with growing random pauses.

A shard process that an older epoch or another generation marks as the wrong one is refused.
Deadlines belong to the caller, who abandons what it no longer waits for.
"""

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable

from shardline.router.fanout.clock import TimeSource
from shardline.router.fanout.link import Link, OnReply
from shardline.router.fanout.write_room import WriteRoom
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import Overloaded, ProtocolError, Unavailable
from shardline.shards.core.messages import Hello, ReplicaRoute
from shardline.shards.wire import local_socket
from shardline.shards.wire.handshake import ServerAddress

logger = logging.getLogger(__name__)

LATENCY_WEIGHT = 0.1  # of the newest request in a replica's running mean
OLDER_PROCESS_FAILURES = 3  # as many as its pauses grow with: it is about to learn its epoch


class OlderProcess(ProtocolError):
    """The shard that answered has a lower epoch than the routing table: it may learn it yet."""


def backoff_ms(failures: int, config: RouterConfig, rng: random.Random) -> float:
    """The pause before the next attempt after ``failures`` >= 1 in a row: doubling, half random."""
    # 2**30 milliseconds is beyond any allowed maximum; the bound keeps the float finite
    longest = min(config.backoff_max_ms, config.backoff_base_ms * 2.0 ** min(failures - 1, 30))
    return longest * rng.uniform(0.5, 1.0)


class ShardConnection:
    """Keeps a link to the process of one replica, from ``start`` to ``close``."""

    def __init__(
        self,
        route: ReplicaRoute,
        *,
        secret: bytes,
        config: RouterConfig,
        rng: random.Random,
        clock: TimeSource | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """clock is what a shard's silence is measured by; sleep is for tests; seconds."""
        assert route.address is not None
        self.route = route
        self.link: Link | None = None  # the one that is up now
        self.opened_at = -math.inf  # when it came up, on the clock
        self.latency_s = 0.0  # running mean of what ``took`` was told
        self.write_room = WriteRoom()
        self._address = route.address
        self._secret = secret
        self._config = config
        self._rng = rng
        self._clock = clock
        self._sleep = sleep
        self._epoch = route.epoch
        self._keeps_to_tcp = False
        self._reason = "not connected yet"
        self._task: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()

    @property
    def connected(self) -> bool:
        return self.link is not None and not self.link.is_lost

    @property
    def answers(self) -> bool:
        """Connected, and not silent about what it owes; a shard that is owed nothing may be."""
        return self.connected and self.link is not None and not self._is_late(self.link)

    @property
    def in_flight(self) -> int:
        return 0 if self.link is None else self.link.in_flight

    @property
    def reason(self) -> str:
        """Why there is no connection now; empty when there is one."""
        return "" if self.connected else self._reason

    def start(self) -> None:
        name = f"replica {self.route.key} connection"
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
        link = self.link
        # what ``usable_link`` looks at, without its call: most queries find an idle shard
        if link is None or link.waiting_since is not None or link.is_lost or not link.writable:
            link = self.usable_link()
        link.send(request_id, frame, on_reply)
        return link

    def usable_link(self) -> Link:
        """The link that takes a request now. Raises as ``request``, which a caller whose frame is
        expensive to encode asks here before."""
        link = self.link
        if link is None:
            raise Unavailable(self._reason)
        if link.waiting_since is not None:
            self._refuse_if_busy(link)
        if link.is_lost:
            raise Unavailable(link.lost.result())
        if not link.writable:
            raise Overloaded("overloaded")
        return link

    def abandon(self, request_id: int) -> None:
        """The caller's deadline has passed: its reply is dropped, and a silent shard with it."""
        link = self.link
        if link is None:
            return
        link.abandon(request_id)
        self._drop_if_silent(link)

    def took(self, seconds: float) -> None:
        """A request was answered after so long, or is not waited for any longer."""
        self.latency_s += LATENCY_WEIGHT * (seconds - self.latency_s)

    def drop_if_silent(self) -> None:
        """Closes a link whose shard has long owed an answer, so that it is opened anew."""
        if self.link is not None:
            self._drop_if_silent(self.link)

    def _refuse_if_busy(self, link: Link) -> None:
        """For one that owes answers: too many of them, or for too long."""
        self._drop_if_silent(link)
        if link.is_lost:
            return
        if self._is_late(link):
            raise Unavailable("silent, though it owes answers")
        if link.in_flight >= self._config.shard_max_in_flight:
            raise Overloaded("overloaded")

    def _is_late(self, link: Link) -> bool:
        return link.stalled_for() * 1000 > self._config.late_after_ms

    def _drop_if_silent(self, link: Link) -> None:
        if link.stalled_for() * 1000 > self._config.stall_timeout_ms:
            logger.warning("replica %s has gone silent: reconnecting", self.route.key)
            link.close("gone silent")

    async def _keep_connected(self) -> None:
        failures = 0
        while True:
            try:
                link = await self._connect()
            except (OSError, TimeoutError, ProtocolError, Unavailable) as error:
                self._reason = _describe(error)
                log = logger.debug if failures else logger.warning
                log("replica %s at %s: %s", self.route.key, self._address, self._reason)
                if isinstance(error, OlderProcess):
                    failures = min(failures, OLDER_PROCESS_FAILURES - 1)
                else:
                    self._settled.set()
            else:
                await self._serve(link)
                if link.answered:
                    failures = 0
            failures += 1
            await self._sleep(backoff_ms(failures, self._config, self._rng) / 1000)

    async def _serve(self, link: Link) -> None:
        """Until the link is lost."""
        self.link = link
        self.opened_at = (self._clock or asyncio.get_running_loop()).time()
        self._settled.set()
        logger.info("replica %s at %s: connected", self.route.key, self._address)
        try:
            # shielded, or cancelling this task would resolve the link's own future
            self._reason = await asyncio.shield(link.lost)
            logger.warning("replica %s at %s: %s", self.route.key, self._address, self._reason)
        finally:
            self.link = None
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

        def new_link() -> Link:
            return Link(self._secret, address, self._clock)

        here = None if self._keeps_to_tcp else local_socket.connect(address)
        if here is None:
            _, link = await loop.create_connection(new_link, *address)
        else:
            _, link = await loop.create_unix_connection(new_link, sock=here)
        return link

    async def _greeted(self, link: Link) -> Hello:
        try:
            return await link.hello
        except BaseException:
            if link.is_local:  # somebody else may hold the name: that must not keep us from it
                logger.warning("replica %s: no handshake over its Unix socket", self.route.key)
                self._keeps_to_tcp = True
            raise

    def _check(self, hello: Hello) -> None:
        """Refuses another replica, and a process that a later one has replaced."""
        if hello.key != self.route.key:
            raise ProtocolError("wrong replica", expected=str(self.route.key), got=str(hello.key))
        if hello.epoch < self._epoch:
            raise OlderProcess(
                "an older process of this replica",
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
