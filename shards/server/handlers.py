"""What a shard can be asked, as a table: how large a request is, who answers it, may it expire.

A new kind of request is a message in ``shards.core.messages``, a tag in ``shards.wire.frames`` and
a row here.

How large a reply may become is counted before it is made. That of attributes is not known before:
it gets a bound that values rarely exceed, and a reply that would is made again with a larger one.
"""

import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Protocol, TypeAlias

from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.messages import (
    MAX_RETURNED,
    MAX_RETURNED_BYTES,
    AttributesRequest,
    DeleteRequest,
    FetchRequest,
    SearchRequest,
    UpsertRequest,
)
from shardline.shards.server.shard import Shard
from shardline.shards.wire.frames import Message

ID_BYTES = 8
BYTES_PER_RESULT = 12  # an id and a float32 score
COUNT_BYTES = 4  # of what a query's exclusions left out

WRITE_REPLY_BYTES = 64  # four integers
VALUE_BYTES = 256  # of an attribute's value, packed: titles and numbers have less
LARGER = 16  # times the bound, for a reply that exceeds it: two more attempts at most

Reply: TypeAlias = Message | ShardlineError | None  # None: it would exceed the work's reply_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler:
    """rows_of: the queries or ids of a request. reply_bytes: the bound of its reply to so many of
    them at ``dim``, frame left out.

    answer: a reply to each of several requests, in order; None: a write, which ``write_thread``
    answers. may_expire: a request whose time has run
    out while it waited is dropped; it changes nothing, and nobody waits for it any longer.
    is_search: its time counts, unless it has a filter, in the estimate of what a query costs.
    may_be_inline: whether what that estimate calls short may be answered by the loop thread.
    """

    rows_of: Callable[[Any], Sized]
    reply_bytes: Callable[[Any, int, int], int]
    answer: Callable[[Shard, "Sequence[Work]"], Sequence[Reply]] | None
    may_expire: bool
    is_search: bool = False
    may_be_inline: Callable[[Shard, Any], bool] = lambda shard, request: True


class Asker(Protocol):
    """Whoever waits for a reply."""

    def reply(self, request_id: int, message: Message, taken: int = 0, /) -> None: ...

    def reply_to_write(self, request_id: int, message: Message, taken: int, /) -> None: ...

    def ask_again(self, work: "Work", /) -> None:
        """Its reply would exceed ``reply_bytes``: it is to be submitted with more of them."""


@dataclass(slots=True)
class Work:
    """A request of ``rows`` queries or ids; its times are seconds of time.monotonic.

    reply_bytes: what its reply has at most. taken: what the asker counts for it, in bytes, until
    it has the reply: the request and ``reply_bytes``.
    """

    asker: Asker
    request_id: int
    request: Any  # of the type that its handler takes
    handler: Handler
    rows: int
    arrived_at: float
    deadline: float
    reply_bytes: int
    taken: int

    @property
    def has_filter(self) -> bool:
        """Whether it is a search with a filter."""
        return self.handler.is_search and bool(self.request.options.filter)

    @property
    def is_background(self) -> bool:
        """Whether it is a search that nobody waits for (``SearchOptions.background``)."""
        return self.handler.is_search and self.request.options.background


def attributes_bytes(request: AttributesRequest, rows: int) -> int:
    """The first bound of a reply, arrays of values and their headers included."""
    values = (len(request.names) or MAX_RETURNED) * (rows + 1) * VALUE_BYTES
    return rows * ID_BYTES + min(values, MAX_RETURNED_BYTES)


def larger(work: Work) -> int:
    """The next ``reply_bytes`` of a request for attributes."""
    return min(LARGER * work.reply_bytes, work.rows * ID_BYTES + MAX_RETURNED_BYTES)


def _search(shard: Shard, works: Sequence[Work]) -> Sequence[Reply]:
    return shard.search_batch([in_time(work) for work in works])


def in_time(work: Work) -> SearchRequest:
    """The request of a search, with what is left of its time."""
    request: SearchRequest = work.request
    if request.excluded is None and not request.options.filter:  # it does not look at it
        return request
    return replace(request, timeout_ms=(work.deadline - time.monotonic()) * 1e3)


def _may_be_inline(shard: Shard, request: SearchRequest) -> bool:
    options = request.options
    return not options.background and (not options.filter or shard.is_cheap(request))


def _attributes(shard: Shard, works: Sequence[Work]) -> Sequence[Reply]:
    limits = [work.reply_bytes - work.rows * ID_BYTES for work in works]
    return shard.attributes_batch([work.request for work in works], limits)


_WRITE = Handler(
    rows_of=attrgetter("item_ids"),
    reply_bytes=lambda request, rows, dim: WRITE_REPLY_BYTES,
    answer=None,
    may_expire=False,  # who repeats it would wait for the same work again
)

HANDLERS: dict[type, Handler] = {
    SearchRequest: Handler(
        rows_of=attrgetter("queries"),
        reply_bytes=lambda request, rows, dim: rows * (request.k * BYTES_PER_RESULT + COUNT_BYTES),
        answer=_search,
        may_expire=True,
        is_search=True,
        may_be_inline=_may_be_inline,
    ),
    FetchRequest: Handler(
        rows_of=attrgetter("item_ids"),
        reply_bytes=lambda request, rows, dim: rows * (dim * 4 + ID_BYTES),
        answer=lambda shard, works: shard.fetch_batch([work.request for work in works]),
        may_expire=True,
    ),
    AttributesRequest: Handler(
        rows_of=attrgetter("item_ids"),
        reply_bytes=lambda request, rows, dim: attributes_bytes(request, rows),
        answer=_attributes,
        may_expire=True,
        may_be_inline=lambda shard, request: False,  # what a value costs depends on its type
    ),
    UpsertRequest: _WRITE,
    DeleteRequest: _WRITE,
}
