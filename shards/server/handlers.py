"""What a shard can be asked, as a table: how large a request is, who answers it, may it expire.

A new kind of request is a message in ``shards.core.messages``, a tag in ``shards.wire.frames`` and
a row here.
"""

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias

from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.messages import (
    MAX_RETURNED_BYTES,
    AttributesRequest,
    FetchRequest,
    SearchRequest,
)
from shardline.shards.server.shard import Shard
from shardline.shards.wire.frames import Message

BYTES_PER_RESULT = 12  # an int64 id and a float32 score

Request: TypeAlias = SearchRequest | FetchRequest | AttributesRequest
Replies: TypeAlias = Sequence[Message | ShardlineError]


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler:
    """rows: the queries or ids of a request; reply_bytes: of its largest reply to so many of them
    at ``dim``, frame left out.

    answer: a reply to each of several requests, in order. may_expire: a request whose time has run
    out while it waited is dropped; it changes nothing, and nobody waits for it any longer.
    is_search: its time counts in the estimate of what a query costs. may_be_inline: what that
    estimate calls short may be answered by the loop thread.
    """

    rows: Callable[[Any], Sized]
    reply_bytes: Callable[[Any, int, int], int]
    answer: Callable[[Shard, Sequence[Any]], Replies]
    may_expire: bool
    is_search: bool = False
    may_be_inline: bool = True


HANDLERS: dict[type, Handler] = {
    SearchRequest: Handler(
        rows=attrgetter("queries"),
        reply_bytes=lambda request, rows, dim: rows * request.k * BYTES_PER_RESULT,
        answer=lambda shard, requests: shard.search_batch(requests),
        may_expire=True,
        is_search=True,
    ),
    FetchRequest: Handler(
        rows=attrgetter("item_ids"),
        reply_bytes=lambda request, rows, dim: rows * (dim * 4 + 8),
        answer=lambda shard, requests: shard.fetch_batch(requests),
        may_expire=True,
    ),
    AttributesRequest: Handler(
        rows=attrgetter("item_ids"),
        reply_bytes=lambda request, rows, dim: rows * 8 + MAX_RETURNED_BYTES,
        answer=lambda shard, requests: shard.attributes_batch(requests),
        may_expire=True,
        may_be_inline=False,  # what a value costs depends on its type
    ),
}
