"""One question to every shard: one frame, one deadline, whatever came by then, and its coverage.

Replies stay undecoded until somebody reads them, which is when the last one is in: decoding the
first ones earlier would take a core from the shards that still search.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from shardline.router.contract import Coverage, Degraded
from shardline.router.fanout.attempts import Attempts, Reply, Request
from shardline.router.fanout.clock import SOCKET_READ_S, Clock, Deadline
from shardline.router.fanout.connection import ShardConnection
from shardline.router.fanout.link import Link
from shardline.router.fanout.snapshot import TableSnapshot
from shardline.shards.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    ProtocolError,
    Unavailable,
)
from shardline.shards.core.messages import (
    AttributesReply,
    ErrorReply,
    FetchReply,
    SearchReply,
    ShardRoute,
)
from shardline.shards.wire.frames import Message, decode_payload, is_error

logger = logging.getLogger(__name__)

DEGRADED_IN_HINT = 8  # shards named in an error; coverage names them all
# Once enough rows have answered, the others get this share of the time that is left.
LATE_SHARE = 0.2

# What a shard may answer instead of results without having failed; code -> error.
TEMPORARY = {kind.code: kind for kind in Unavailable.__subclasses__()}

R = TypeVar("R", SearchReply, FetchReply, AttributesReply)


class Ask:
    """A frame on its way to all shards of ``snapshot``.

    ``on_done`` is called once, when nothing is awaited any longer; at the latest at ``deadline``,
    which is on ``clock``. With ``enough`` (a share of the rows, above 0) the wait is
    cut short once so many have answered: the late ones get LATE_SHARE of what remains.
    """

    __slots__ = (
        "_asked",
        "_attempts",
        "_clock",
        "_enough_rows",
        "_links",
        "_missing",
        "_on_done",
        "_replies",
        "_request_id",
        "_rows_in",
        "_timer",
        "_waits_until",
        "deadline",
        "done",
        "missing",
        "seq",
        "snapshot",
    )

    def __init__(
        self,
        snapshot: TableSnapshot,
        request_id: int,
        *,
        deadline: float,
        clock: Clock,
        on_done: Callable[[], None],
        enough: float = 0.0,
    ) -> None:
        self.snapshot = snapshot
        self.deadline = deadline
        self.done = False
        self.missing: list[int] = []  # shards that the last ``collect`` went without
        self.seq: list[int | None] = []  # of each shard, as its reply to that has it
        self._clock = clock
        self._on_done = on_done
        self._request_id = request_id
        self._replies: list[Reply | None]
        self._replies = [None] * len(snapshot.shards)
        self._missing = len(snapshot.shards)
        self._asked: list[ShardConnection] = []
        self._links: list[Link | None] = [None] * len(snapshot.shards)
        self._attempts: Attempts | None = None  # None: no shard has more than one replica
        self._timer: Deadline | None = None
        self._waits_until = deadline
        self._enough_rows = enough * snapshot.table.rows if 0 < enough < 1 else 0.0
        self._rows_in = 0

    def send(self, frames: Sequence[bytes], request: Request) -> None:
        """A frame to every shard, in order; those that cannot be asked are noted as missing.

        frames: one per shard, or one for all; request: what they hold, or the first of them.
        """
        snapshot, look_s = self.snapshot, 0.0
        if snapshot.redundancy is None:
            self._send(itertools.repeat(frames[0]) if len(frames) == 1 else frames)
        else:
            self._attempts = Attempts(
                *(snapshot.redundancy, snapshot.table, snapshot.shards),
                *(self._links, self._put, self._request_id),
            )
            look_s = self._attempts.send(frames, request)
        if not self.done:
            self._wait(look_s)

    def _send(self, frames: Iterable[bytes]) -> None:
        """To the only replica of each shard."""
        for position, (connection, frame) in enumerate(zip(self.snapshot.only, frames)):  # noqa: B905  one frame may be repeated for all
            if connection is None:
                self._put(position, Unavailable("no process serves it"))
                continue
            try:
                reply_to = partial(self._put, position)
                self._links[position] = connection.request(self._request_id, frame, reply_to)
            except Unavailable as error:
                self._put(position, error)
            else:
                self._asked.append(connection)

    def close(self) -> None:
        """Waits for nobody any longer: whoever has not answered by now is left out."""
        if self.done:
            return
        self.done = True
        if self._timer is not None:
            self._timer.cancel()
        if self._missing:
            if self._attempts is not None:
                self._attempts.give_up()
            for connection in self._asked:
                connection.abandon(self._request_id)
        self._attempts = None  # which refers to this: no work for the garbage collector
        self._on_done()

    def collect(
        self, kind: type[R], well_formed: Callable[[R], bool]
    ) -> tuple[list[tuple[ShardRoute, R]], Coverage]:
        """The replies worth using so far, with their routes, and the coverage they amount to.

        Raises:
            InvalidInput: a shard says that the caller's request is wrong.
        """
        answered: list[tuple[ShardRoute, R]] = []
        degraded = []
        self.missing.clear()
        self.seq.clear()
        rows_asked = rows_answered = 0
        for position, route in enumerate(self.snapshot.table.shards):
            reply = self._read(position)
            rows = reply.rows if isinstance(reply, SearchReply) else route.rows
            if (
                isinstance(reply, kind)
                and reply.generation == self.snapshot.table.generation
                and well_formed(reply)
            ):
                answered.append((route, reply))
                self.seq.append(reply.seq)
                rows_answered += rows
                rows_asked += rows
                continue
            error = _as_error(reply, self._links[position])
            if self._replies[position] is not None:
                self._replies[position] = error
            self.missing.append(route.shard)
            self.seq.append(None)
            degraded.append(Degraded(shard=route.shard, code=error.code, text=error.message))
            rows_asked += route.rows
        return answered, Coverage(
            shards_asked=len(self.snapshot.table.shards),
            shards_answered=len(answered),
            rows_asked=rows_asked,
            rows_answered=rows_answered,
            degraded=tuple(degraded),
        )

    def require(self, coverage: Coverage, min_coverage: float) -> None:
        """Raises what best describes too small a coverage, once ``collect`` has returned it."""
        if coverage.shards_answered and coverage.share >= min_coverage:
            return
        replies = [DeadlineExceeded("") if reply is None else reply for reply in self._replies]
        kinds = {type(reply) for reply in replies if isinstance(reply, Unavailable)}
        kind = kinds.pop() if len(kinds) == 1 else Unavailable
        raise kind(
            "too few rows answered" if coverage.shards_answered else "no shard answered",
            expected=f"coverage >= {min_coverage:g}" if min_coverage else "an answer from a shard",
            got=f"{coverage.rows_answered} of {coverage.rows_asked} rows",
            hint="; ".join(map(str, coverage.degraded[:DEGRADED_IN_HINT])),
        )

    def _put(self, position: int, reply: Reply) -> None:
        if self.done or self._replies[position] is not None:
            return
        self._replies[position] = reply
        self._missing -= 1
        if self._missing == 0:
            self.close()
        elif self._enough_rows and isinstance(reply, bytes | memoryview) and not is_error(reply):
            self._rows_in += self.snapshot.table.shards[position].rows
            if self._rows_in >= self._enough_rows:
                self._enough_rows = 0.0
                self._wait_less()

    def _wait_less(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        now = self._clock.time()
        self._waits_until = now + LATE_SHARE * max(0.0, self.deadline - now)
        if self._attempts is None:
            self._wait(0.0)
        else:
            self._look()

    def _wait(self, look_s: float) -> None:
        """For replies; with a look at the attempts in so many seconds, unless 0."""
        if look_s:
            look_at = self._clock.time() + look_s
            if look_at < self._waits_until:
                self._timer = Deadline(self._clock, look_at, self._look, SOCKET_READ_S)
                return
        self._timer = Deadline(self._clock, self._waits_until, self.close)

    def _look(self) -> None:
        assert self._attempts is not None
        look_s = self._attempts.look()
        if not self.done:
            self._wait(look_s)

    def _read(self, position: int) -> Message | Unavailable:
        """The reply, decoded once; a shard that has not answered counts as too late."""
        reply = self._replies[position]
        if reply is None:
            return DeadlineExceeded("deadline exceeded")
        if isinstance(reply, bytes | memoryview):
            try:
                reply = decode_payload(reply)
            except ProtocolError as error:
                reply = _BadReply(f"broke the protocol ({error.message})")
            self._replies[position] = reply
        return reply


class Hearing(Ask):
    """A question whose replies nobody reads: ``heard`` is set by the first that comes."""

    __slots__ = ("heard",)

    def __init__(self, *arguments: Any, heard: asyncio.Event, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.heard = heard

    def _put(self, position: int, reply: Reply) -> None:
        if not isinstance(reply, Unavailable):
            self.heard.set()
        super()._put(position, reply)


class _BadReply(Unavailable):
    """A payload that makes no sense: the link it came by is to be dropped."""


def _as_error(reply: Message | Unavailable, link: Link | None) -> Unavailable:
    """Why this reply is not part of the answer; drops the link if it sent nonsense."""
    if not isinstance(reply, Unavailable | ErrorReply):
        reply = _BadReply("broke the protocol (wrong reply)")
    if isinstance(reply, _BadReply):
        assert link is not None
        link.close(reply.message)
        return Unavailable(reply.message)
    if isinstance(reply, Unavailable):
        return reply
    if reply.code == InvalidInput.code:
        raise InvalidInput(reply.message, field=reply.field)
    if reply.code in TEMPORARY:
        return TEMPORARY[reply.code](reply.code.replace("_", " "))
    logger.warning("a shard failed a request: %s: %s", reply.code, reply.message)
    return Unavailable(f"failed ({reply.code})")
