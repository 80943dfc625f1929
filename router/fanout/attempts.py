"""One question where shards have several replicas: whom it asks, and whom next.

A shard's part goes to one replica, and to another as well

- at once, when the connection breaks, or the replica refuses it or answers nonsense;
- when the replica owes answers and sends nothing, not even keep-alive frames (``Chooser``);
- when it takes longer than its like, within a budget (``Pace``).

No replica is asked twice. The first reply that fits counts; the others are dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from shardline.router.fanout.choice import Chooser, Replicas, last_resort
from shardline.router.fanout.connection import ShardConnection
from shardline.router.fanout.link import Link
from shardline.router.fanout.pace import Paces
from shardline.shards.core.errors import DeadlineExceeded, InvalidInput, ProtocolError, Unavailable
from shardline.shards.core.messages import (
    AttributesReply,
    AttributesRequest,
    ErrorReply,
    FetchReply,
    FetchRequest,
    RoutingTable,
    SearchRequest,
)
from shardline.shards.core.metrics import HEDGES, HEDGES_WON, RESENT, Recorder
from shardline.shards.wire.frames import Message, decode_payload
from shardline.shards.wire.readers import Payload
from shardline.shards.wire.search_layout import REPLY_START_BYTES, reply_start

LOOK_S = 0.05  # between two looks at replicas that have not answered, to find silent ones
SHORTEST_LOOK_S = 0.001  # the clock of a Serve replica's loop ticks so, and may be early

Request: TypeAlias = SearchRequest | FetchRequest | AttributesRequest
Reply: TypeAlias = Payload | Message | Unavailable


@dataclass(frozen=True, slots=True)
class Redundancy:
    """What all questions share; ``time`` is the clock of the connections."""

    chooser: Chooser
    paces: Paces
    recorder: Recorder
    time: Callable[[], float]


class Attempts:
    """Calls ``put`` once per shard, with its position in ``shards``, unless given up before.

    links: of each shard the link that its reply came by; written here.
    """

    __slots__ = (
        "_delay_s",
        "_frames",
        "_hedges",
        "_is_hedged",
        "_links",
        "_over",
        "_pace",
        "_put",
        "_request_id",
        "_sent_at",
        "_shards",
        "_shared",
        "_start",
        "_table",
        "_waiting",
    )

    def __init__(
        self,
        shared: Redundancy,
        table: RoutingTable,
        shards: Sequence[Replicas],
        links: list[Link | None],
        put: Callable[[int, Reply], None],
        request_id: int,
    ) -> None:
        self._shared = shared
        self._table = table
        self._shards = shards
        self._links = links
        self._put = put
        self._request_id = request_id
        self._sent_at = shared.time()
        self._is_hedged = False
        # of each shard, the replicas that owe an answer, and since when; empty: not asked, or over
        self._waiting: list[list[tuple[ShardConnection, float]]] = [[] for _ in shards]
        self._over: dict[int, list[ShardConnection]] = {}  # those that failed or could not be asked
        self._hedges: dict[int, ShardConnection] = {}

    def send(self, frames: Sequence[bytes], request: Request) -> float:
        """Asks one replica of each shard. Returns the seconds until ``look`` is to be called.

        frames: one per shard, or one for all; request: what they hold, or the first of them.
        """
        self._start: bytes | None  # of every fitting reply; None where replies are decoded to tell
        if isinstance(request, SearchRequest):
            rows = len(request.queries)
            self._start = reply_start(rows, request.k, self._table.generation)
        else:
            rows, self._start = len(request.item_ids), None
        now, choose = self._sent_at, self._shared.chooser.choose
        self._frames = frames
        self._pace = self._shared.paces.of(type(request), rows)
        self._pace.sends(len(self._shards))
        self._delay_s = self._pace.delay_s
        for position, replicas in enumerate(self._shards):
            connection = choose(replicas, now)
            if connection is None or self._ask(position, connection, now) is not None:
                error = self._ask_another(position, now)
                if error is not None:
                    self._put(position, error)
        return min(self._delay_s, LOOK_S)

    def look(self) -> float:
        """Asks another replica where one takes long or is silent; when to look again, in seconds"""
        now = self._shared.time()
        rest = self._delay_s - (now - self._sent_at)
        if rest <= 0 and not self._is_hedged:
            self._is_hedged = True
            for position, waiting in enumerate(self._waiting):
                if waiting:
                    self._hedge(position, now)
        is_silent = self._shared.chooser.is_silent
        for position, waiting in enumerate(self._waiting):
            are_silent = waiting and all(is_silent(connection, now) for connection, _ in waiting)
            if are_silent and self._ask_another(position, now) is None:
                self._count_resent(position, "silent")
        return min(LOOK_S, max(rest, SHORTEST_LOOK_S)) if not self._is_hedged else LOOK_S

    def give_up(self) -> None:
        """Nothing is awaited any longer; replies that still come are dropped."""
        for position, waiting in enumerate(self._waiting):
            if waiting:
                self._waiting[position] = []
                self._abandon(waiting)

    # Asking

    def _ask(self, position: int, connection: ShardConnection, now: float) -> Unavailable | None:
        """Why it could not be asked; None where it was."""
        frames, request_id = self._frames, self._request_id
        reply_to = partial(self._replied, position, connection, now)
        frame = frames[position if len(frames) > 1 else 0]
        try:
            self._links[position] = connection.request(request_id, frame, reply_to)
        except Unavailable as error:
            self._over.setdefault(position, []).append(connection)
            return error
        self._waiting[position].append((connection, now))
        return None

    def _ask_another(self, position: int, now: float) -> Unavailable | None:
        """Whichever can be asked and has not been; None where one could."""
        error = Unavailable("no process serves it")
        replicas, choose = self._shards[position], self._shared.chooser.choose
        while True:
            tried = self._tried(position)
            connection = choose(replicas, now, tried) or last_resort(replicas, tried)
            if connection is None:
                return error
            refusal = self._ask(position, connection, now)
            if refusal is None:
                return None
            error = refusal

    def _tried(self, position: int) -> list[ShardConnection]:
        waiting = [connection for connection, _ in self._waiting[position]]
        return waiting + self._over.get(position, [])

    def _hedge(self, position: int, now: float) -> None:
        """Asks a second replica as well, if one is fit and the budget allows it."""
        replicas, chooser = self._shards[position], self._shared.chooser
        connection = chooser.choose(replicas, now, self._tried(position))
        if connection is None or not self._pace.may_hedge():
            return
        if self._ask(position, connection, now) is None:
            self._hedges[position] = connection
            self._shared.recorder.count(HEDGES, self._label(position))

    # Replies

    def _replied(
        self,
        position: int,
        connection: ShardConnection,
        asked_at: float,
        reply: Payload | Unavailable,
    ) -> None:
        """What ``connection`` says: a payload, or why it is lost."""
        waiting = self._waiting[position]
        if not waiting:  # over: this one was told of its loss while others were still being told
            return
        if isinstance(reply, Unavailable):
            self._fail(position, connection, reply, "lost")
            return
        answer: Reply = reply
        if reply[:REPLY_START_BYTES] != self._start:
            answer = self._read(reply)
            if isinstance(answer, ErrorReply | Unavailable):
                self._refuse(position, connection, answer)
                return
        now = self._shared.time()
        connection.took(now - asked_at)
        self._pace.took(now - self._sent_at)
        self._waiting[position] = []
        self._links[position] = connection.link
        if len(waiting) > 1:
            self._win(position, connection, waiting)
        self._put(position, answer)

    def _refuse(
        self, position: int, connection: ShardConnection, reply: ErrorReply | Unavailable
    ) -> None:
        """An error of the replica, or (Unavailable) nonsense, which costs it the connection."""
        if isinstance(reply, Unavailable):
            if connection.link is not None:
                connection.link.close(reply.message)
        elif reply.code == InvalidInput.code:  # every replica would say so
            waiting, self._waiting[position] = self._waiting[position], []
            self._abandon([each for each in waiting if each[0] is not connection])
            self._put(position, reply)
            return
        self._fail(position, connection, reply, "refused")

    def _fail(
        self, position: int, connection: ShardConnection, reply: ErrorReply | Unavailable, why: str
    ) -> None:
        """Asks another; ``reply`` is the answer when there is none and nobody else was asked."""
        left = [each for each in self._waiting[position] if each[0] is not connection]
        self._waiting[position] = left
        self._over.setdefault(position, []).append(connection)
        is_in_time = isinstance(reply, Unavailable) or reply.code != DeadlineExceeded.code
        if is_in_time and self._ask_another(position, self._shared.time()) is None:
            self._count_resent(position, why)
        elif not left:
            self._put(position, reply)

    def _win(
        self,
        position: int,
        winner: ShardConnection,
        waiting: list[tuple[ShardConnection, float]],
    ) -> None:
        """The first of several to answer: the others are not waited for."""
        if self._hedges.get(position) is winner:
            self._shared.recorder.count(HEDGES_WON, self._label(position))
        self._abandon([each for each in waiting if each[0] is not winner])

    def _abandon(self, waiting: list[tuple[ShardConnection, float]]) -> None:
        now = self._shared.time()
        for connection, asked_at in waiting:
            connection.abandon(self._request_id)
            if now - asked_at > connection.latency_s:  # it would have taken longer still
                connection.took(now - asked_at)

    def _read(self, payload: Payload) -> Message | Unavailable:
        """A reply to a look-up or an error, decoded; or what is wrong with it."""
        try:
            message = decode_payload(payload)
        except ProtocolError as error:
            return Unavailable(f"broke the protocol ({error.message})")
        is_fitting = isinstance(message, ErrorReply)
        if isinstance(message, FetchReply | AttributesReply) and not self._start:
            is_fitting = message.generation == self._table.generation
        return message if is_fitting else Unavailable("broke the protocol (wrong reply)")

    def _count_resent(self, position: int, why: str) -> None:
        self._shared.recorder.count(RESENT, self._label(position), why)

    def _label(self, position: int) -> str:
        return str(self._table.shards[position].shard)
