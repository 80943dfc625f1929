"""One question where shards have several replicas: whom it asks, and whom next.

A shard's part goes to one replica, and to another as well

- at once, when the connection breaks, or the replica refuses it or answers nonsense;
- when the replica owes answers and sends nothing, not even keep-alive frames (``Chooser``);
- when it takes longer than its like, within a budget (``Pace``); not an exact search, which takes
  long everywhere, and says nothing about how fast a replica answers others.

No replica is asked twice. The first reply that fits counts; the others are dropped.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from shardline.router.fanout.choice import Chooser, Replicas, last_resort
from shardline.router.fanout.connection import ShardConnection
from shardline.router.fanout.hedging import Paces, kind_of
from shardline.router.fanout.link import Link
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
    """One question: ``send`` once, then ``look`` now and then, until it is over or given up.

    Calls ``put`` once per shard, with its position in ``shards``, unless given up before.

    links: of each shard the link that its reply came by; written here.
    """

    __slots__ = (
        "_delay_s",
        "_first",
        "_frames",
        "_hedges",
        "_is_exact",
        "_is_hedged",
        "_later",
        "_links",
        "_over",
        "_pace",
        "_put",
        "_request_id",
        "_rows",
        "_sampled",
        "_sent_at",
        "_shards",
        "_shared",
        "_start",
        "_table",
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
        # of each shard, who was asked first, while it owes an answer; who was asked later, when,
        # and owes one; and who was asked and has failed
        self._first: list[ShardConnection | None] = [None] * len(shards)
        self._later: dict[int, list[tuple[ShardConnection, float]]] = {}
        self._over: dict[int, list[ShardConnection]] = {}
        self._hedges: dict[int, ShardConnection] = {}

    def send(self, frames: Sequence[bytes], request: Request) -> float:
        """Asks one replica of each shard. Returns the seconds until ``look`` is to be called.

        frames: one per shard, or one for all; request: what they hold, or the first of them.
        """
        self._start: bytes | None  # of every fitting reply; None where replies are decoded to tell
        kind = type(request)
        if isinstance(request, SearchRequest):
            self._rows = rows = len(request.queries)
            self._is_exact = request.options.exact
            if request.options.background or request.options.filter:
                kind = kind_of(request)
            self._start = reply_start(rows, request.k, self._table.generation)
        else:
            self._rows = rows = max(1, len(request.item_ids))
            self._is_exact = False
            self._start = None
        shards, now, choose = self._shards, self._sent_at, self._shared.chooser.choose
        self._frames = frames
        self._sampled = self._request_id % len(shards)
        paces = self._shared.paces
        self._pace = pace = paces.of(kind, rows)
        if self._is_exact:
            self._delay_s = math.inf
        else:
            pace.budget.sends(rows * len(shards))
            self._delay_s = pace.delay_s if pace.delay_s < math.inf else paces.guess_s(kind, rows)
        for position, replicas in enumerate(shards):
            connection = choose(replicas, now)
            if connection is None:
                error = self._ask_another(position, now)
            else:
                try:
                    self._links[position] = connection.request(
                        self._request_id,
                        frames[position if len(frames) > 1 else 0],
                        partial(self._first_replied, position),
                    )
                    self._first[position] = connection
                    continue
                except Unavailable:
                    error = self._ask_another(position, now, (connection,))
            if error is not None:
                self._put(position, error)
        return min(self._delay_s, LOOK_S)

    def look(self) -> float:
        """Asks another replica where one takes long or is silent. Returns the seconds until the
        next look."""
        now = self._shared.time()
        rest = self._delay_s - (now - self._sent_at)
        is_due = rest <= 0 and not self._is_hedged
        self._is_hedged |= is_due
        is_silent = self._shared.chooser.is_silent
        for position in range(len(self._shards)):
            owing = self._owing(position)
            if not owing:
                continue
            if all(is_silent(connection, now) for connection, _ in owing):
                if self._ask_another(position, now) is None:
                    self._count_resent(position, "silent")
            elif is_due:
                self._hedge(position, now)
        return LOOK_S if self._is_hedged else min(LOOK_S, max(rest, SHORTEST_LOOK_S))

    def give_up(self) -> None:
        """Nothing is awaited any longer; replies that still come are dropped."""
        for position in range(len(self._shards)):
            self._abandon(self._settle(position))

    # Asking

    def _ask_another(
        self, position: int, now: float, refused: Sequence[ShardConnection] = ()
    ) -> Unavailable | None:
        """Whichever can be asked now and has not been; why, where none could.

        One that is not connected at this look may be asked at a later one. refused: those found
        so at this look.
        """
        error = Unavailable("no process serves it")
        replicas, choose = self._shards[position], self._shared.chooser.choose
        tried = [*self._tried(position), *refused]
        while True:
            connection = choose(replicas, now, tried) or last_resort(replicas, tried)
            if connection is None:
                return error
            refusal = self._ask_later(position, connection, now)
            if refusal is None:
                return None
            error = refusal
            tried.append(connection)

    def _ask_later(
        self, position: int, connection: ShardConnection, now: float
    ) -> Unavailable | None:
        """Why it could not be asked; None where it was."""
        frame = self._frames[position if len(self._frames) > 1 else 0]
        reply_to = partial(self._replied, position, connection, now)
        try:
            self._links[position] = connection.request(self._request_id, frame, reply_to)
        except Unavailable as error:
            return error
        self._later.setdefault(position, []).append((connection, now))
        return None

    def _hedge(self, position: int, now: float) -> None:
        """Asks a second replica as well, if one is fit and the budget allows it."""
        replicas, chooser = self._shards[position], self._shared.chooser
        connection = chooser.choose(replicas, now, self._tried(position))
        if connection is None or not self._pace.budget.allows(self._rows):
            return
        if self._ask_later(position, connection, now) is None:
            self._hedges[position] = connection
            self._shared.recorder.count(HEDGES, self._label(position))

    def _owing(self, position: int) -> list[tuple[ShardConnection, float]]:
        """Whoever owes an answer, and since when."""
        first, later = self._first[position], self._later.get(position, [])
        return later if first is None else [(first, self._sent_at), *later]

    def _tried(self, position: int) -> list[ShardConnection]:
        owing = [connection for connection, _ in self._owing(position)]
        return owing + self._over.get(position, [])

    def _settle(self, position: int) -> list[tuple[ShardConnection, float]]:
        """From now on nobody owes an answer; whoever did."""
        owing = self._owing(position)
        self._first[position] = None
        self._later.pop(position, None)
        return owing

    # Replies

    def _first_replied(self, position: int, reply: Payload | Unavailable) -> None:
        """As a rule the one that was asked first and alone, with a fitting reply."""
        connection = self._first[position]
        if connection is None:  # over: this one was told of its loss while others still were
            return
        if (
            isinstance(reply, Unavailable)
            or position in self._later
            or reply[:REPLY_START_BYTES] != self._start
        ):
            self._replied(position, connection, self._sent_at, reply)
            return
        self._first[position] = None
        if position == self._sampled and not self._is_exact:
            took_s = self._shared.time() - self._sent_at
            connection.took(took_s)
            self._pace.took(took_s)
        self._put(position, reply)

    def _replied(
        self,
        position: int,
        connection: ShardConnection,
        asked_at: float,
        reply: Payload | Unavailable,
    ) -> None:
        """What ``connection`` says: a payload, or why it is lost."""
        if all(each is not connection for each, _ in self._owing(position)):  # as above: over
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
        if not self._is_exact:
            connection.took(now - asked_at)
            if position == self._sampled:
                self._pace.took(now - self._sent_at)
        if self._hedges.get(position) is connection:
            self._shared.recorder.count(HEDGES_WON, self._label(position))
        self._links[position] = connection.link
        self._abandon(each for each in self._settle(position) if each[0] is not connection)
        self._put(position, answer)

    def _refuse(
        self, position: int, connection: ShardConnection, reply: ErrorReply | Unavailable
    ) -> None:
        """An error of the replica, or (Unavailable) nonsense, which costs it the connection."""
        if isinstance(reply, Unavailable):
            if connection.link is not None:
                connection.link.close(reply.message)
        elif reply.code == InvalidInput.code:  # every replica would say so
            self._abandon(each for each in self._settle(position) if each[0] is not connection)
            self._put(position, reply)
            return
        self._fail(position, connection, reply, "refused")

    def _fail(
        self, position: int, connection: ShardConnection, reply: ErrorReply | Unavailable, why: str
    ) -> None:
        """Asks another; ``reply`` is the answer when there is none and nobody else was asked."""
        if self._first[position] is connection:
            self._first[position] = None
        else:
            self._later[position] = [
                each for each in self._later[position] if each[0] is not connection
            ]
        self._over.setdefault(position, []).append(connection)
        is_in_time = isinstance(reply, Unavailable) or reply.code != DeadlineExceeded.code
        if is_in_time and self._ask_another(position, self._shared.time()) is None:
            self._count_resent(position, why)
        elif not self._owing(position):
            self._put(position, reply)

    def _abandon(self, owing: Iterable[tuple[ShardConnection, float]]) -> None:
        now = self._shared.time()
        for connection, asked_at in owing:
            connection.abandon(self._request_id)
            took_s = now - asked_at
            if not self._is_exact and took_s > connection.latency_s:  # it would have taken longer
                connection.took(took_s)

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
