"""One shard: answers search, fetch and attribute requests from its state.

No sockets, threads or Ray here. A shard is used by one thread at a time.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardline.shards.core.errors import (
    Behind,
    CardFailed,
    DeadlineExceeded,
    InvalidInput,
    ShardlineError,
)
from shardline.shards.core.exclusions import joined_excluded
from shardline.shards.core.messages import (
    MAX_RETURNED,
    NO_FILTER,
    AttributesReply,
    AttributesRequest,
    FetchReply,
    FetchRequest,
    SearchReply,
    SearchRequest,
)
from shardline.shards.core.schema import (
    MAX_K,
    check_ids,
    check_k,
)
from shardline.shards.index.spec import Device
from shardline.shards.live.loading import load_state
from shardline.shards.live.state import ShardState
from shardline.shards.storage.generation import (
    read_generation,
)

logger = logging.getLogger(__name__)


class Shard:
    """One item range of one generation. ``state`` is replaced, never changed."""

    def __init__(self, *, shard: int, generation: int, state: ShardState) -> None:
        self.shard = shard
        self.generation = generation
        self.state = state
        # told before the answer is; a process whose card has failed may end itself
        self.on_card_failure: Callable[[CardFailed], None] = lambda error: None

    @classmethod
    def load(cls, folder: Path, shard: int, *, device: Device | None = None) -> "Shard":
        """Verifies and reads one shard of a generation; ``device`` None means the manifest's.

        Raises:
            NotFound: no such generation or shard.
            CorruptFile: a file is missing, altered, or contradicts the manifest; named.
            NewerFormat: written by a version newer than this code.
        """
        manifest = read_generation(folder)
        state = load_state(folder, manifest, shard, device=device)
        return cls(shard=shard, generation=manifest.generation, state=state)

    @property
    def rows(self) -> int:
        return self.state.rows

    @property
    def dim(self) -> int:
        return self.state.main.dim

    def describe(self) -> dict[str, Any]:
        """What it holds, for status pages."""
        described = self.state.main.describe()
        return {
            "shard": self.shard,
            "generation": self.generation,
            **described,
            "rows": self.rows,
            "seq": self.state.seq,
            "delta_rows": self.state.delta.rows,
            "hidden_rows": self.state.hidden,
            "imbalance": self.state.main.imbalance,
        }

    def search(self, request: SearchRequest) -> SearchReply:
        """The k best items of each query.

        Raises:
            InvalidInput: k, dimension or a search parameter out of range, or a filter that is none
                for the shard's attributes.
        """
        (reply,) = self.search_batch([request])
        if isinstance(reply, ShardlineError):
            raise reply
        return reply

    def search_batch(self, requests: Sequence[SearchRequest]) -> list[SearchReply | ShardlineError]:
        """A reply to each request, in order; requests that differ in their queries alone share one
        search. One that is wrong gets its error in place of a reply and harms no other; what is no
        ``ShardlineError`` is raised if there is one request alone. One with a filter or exclusions
        is given up, as ``DeadlineExceeded``, when its ``timeout_ms`` from now are over.
        """
        state = self.state
        if len(requests) == 1:
            (request,) = requests
            looks = request.options.filter or request.options.exact or request.excluded is not None
            look = _until(time.monotonic(), requests) if looks else _no_look
            return self._search_group(state, requests, look)
        now = time.monotonic()
        replies: dict[int, SearchReply | ShardlineError] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        for at, request in enumerate(requests):
            key = (request.k, request.params, request.options, *request.queries.shape[1:])
            if len(request.queries) == 0:
                key = (at,)
            groups.setdefault(key, []).append(at)
        for members in groups.values():
            group = [requests[at] for at in members]
            answered = self._search_alone(state, group, _until(now, group))
            replies.update(zip(members, answered, strict=True))
        return [replies[at] for at in range(len(requests))]

    def is_prepared(self, request: SearchRequest) -> bool:
        """Whether a search has no filter to evaluate first, which may take long."""
        state, packed = self.state, request.options.filter
        return not packed or state.filter_rows.known(packed, state.delta) is not None

    def is_cheap(self, request: SearchRequest) -> bool:
        """Whether a search with a filter surely takes a millisecond or two at most."""
        state = self.state
        of_main = state.filter_rows.known(request.options.filter, state.delta)
        if of_main is None:
            return False
        queries, others = len(request.queries), state.delta.rows
        return state.main.is_cheap(of_main, queries, request.k, request.params, others)

    def prepare(self, request: SearchRequest, look: Callable[[], None]) -> None:
        """Evaluates a request's filter, for its search to find it known; beside the one thread that
        uses the shard. look: as of ``FilterRows.matching``.

        Raises:
            InvalidInput: as ``search``.
        """
        self.state.matching(request.options.filter, look)

    def search_exactly(
        self, request: SearchRequest, look: Callable[[], None]
    ) -> SearchReply | ShardlineError:
        """The reply to a request whose ``options.exact`` is set, or its error. May be called beside
        the one thread that uses the shard. look: as of ``ShardState.search_exactly``."""
        (reply,) = self._search_group(self.state, [request], look)
        return reply

    def fetch_batch(self, requests: Sequence[FetchRequest]) -> list[FetchReply | ShardlineError]:
        """A reply to each request, in order, or its error."""
        state = self.state
        return [self._fetch(state, request) for request in requests]

    def fetch(self, request: FetchRequest) -> FetchReply:
        """The vectors of those ids that this shard holds, in the order asked for.

        Raises:
            InvalidInput: a negative id.
        """
        reply = self._fetch(self.state, request)
        if isinstance(reply, ShardlineError):
            raise reply
        return reply

    def attributes_batch(
        self, requests: Sequence[AttributesRequest], limits: Sequence[int]
    ) -> list[AttributesReply | ShardlineError | None]:
        """A reply to each request, in order, or its error, or None if its values would have more
        bytes than its limit."""
        state = self.state
        return [self._attributes(state, *each) for each in zip(requests, limits, strict=True)]

    def _attributes(
        self, state: ShardState, request: AttributesRequest, limit: int
    ) -> AttributesReply | ShardlineError | None:
        deadline = time.monotonic() + request.timeout_ms / 1e3
        try:
            ids = check_ids(request.item_ids)
            self._check_seq(state, request.min_seq)
            names = request.names or state.attributes.names[:MAX_RETURNED]
            kinds = state.attributes.kinds(names)
            found = state.attributes_of(ids, names, deadline, limit)
        except (InvalidInput, Behind, DeadlineExceeded) as error:
            return error
        if found is None:
            return None
        item_ids, values = found
        return AttributesReply(
            item_ids=item_ids,
            names=names,
            values=values,
            kinds=kinds,
            generation=self.generation,
            seq=state.seq,
        )

    def _fetch(self, state: ShardState, request: FetchRequest) -> FetchReply | ShardlineError:
        try:
            ids = check_ids(request.item_ids)
            self._check_seq(state, request.min_seq)
            item_ids, vectors = state.fetch(ids)
        except (InvalidInput, Behind) as error:
            return error
        return FetchReply(
            item_ids=item_ids, vectors=vectors, generation=self.generation, seq=state.seq
        )

    def _check_seq(self, state: ShardState, min_seq: tuple[int, ...]) -> None:
        """Raises Behind where the state lacks writes that the request asks for."""
        if self.shard < len(min_seq) and state.seq < min_seq[self.shard]:
            raise Behind("writes are missing", got=f"{state.seq} applied")

    def _search_alone(
        self,
        state: ShardState,
        group: Sequence[SearchRequest],
        look: Callable[[], None],
    ) -> list[SearchReply | ShardlineError]:
        """As ``_search_group``, of several groups."""
        try:
            return self._search_group(state, group, look)
        except Exception:  # a bug of ours must cost these answers, not those of other groups
            logger.exception("a search failed")
            return [ShardlineError("internal error of the shard")] * len(group)

    def _search_group(
        self,
        state: ShardState,
        group: Sequence[SearchRequest],
        look: Callable[[], None],
    ) -> list[SearchReply | ShardlineError]:
        """Requests that differ in their queries alone, as one call to the index."""
        first = group[0]
        started = time.perf_counter()
        queries = first.queries
        given = first.excluded
        if len(group) > 1:
            queries = np.concatenate([request.queries for request in group])
            given = joined_excluded([(len(each.queries), each.excluded) for each in group])
        try:
            check_k(first.k, limit=MAX_K + 1)  # one more: an item is left out of its own answer
            if len(queries) == 0:
                raise InvalidInput("empty batch", field="queries", expected="at least one query")
            self._check_seq(state, first.options.min_seq)
            packed = first.options.filter
            matching = state.matching(packed, look) if packed else None
            k, params = first.k, None if first.options.exact else first.params
            excluded = None
            if given is not None:
                ranked, excluded = state.search_excluding(queries, k, params, given, matching, look)
            elif params is None:
                ranked = state.search_exactly(queries, k, look, matching)
            else:
                ranked = state.search(queries, k, params, matching, look)
        except CardFailed as error:
            self.on_card_failure(error)
            return [error] * len(group)
        except ShardlineError as error:
            return [error] * len(group)
        search_ms = (time.perf_counter() - started) * 1e3
        replies: list[SearchReply | ShardlineError] = []
        start = 0
        for request in group:
            end = start + len(request.queries)
            replies.append(
                SearchReply(
                    ranked=ranked if len(group) == 1 else ranked.rows(slice(start, end)),
                    rows=state.rows,
                    generation=self.generation,
                    seq=state.seq,
                    search_ms=search_ms,
                    matched=NO_FILTER if matching is None else matching.rows,
                    excluded=None if excluded is None else excluded[start:end],
                )
            )
            start = end
        return replies


def _no_look() -> None:
    """For searches that are too quick to be given up."""


def _until(now: float, group: Sequence[SearchRequest]) -> Callable[[], None]:
    """Raises DeadlineExceeded once the time of every request of a group is over; now: when it
    began, on time.monotonic's clock."""
    deadline = now + max(request.timeout_ms for request in group) / 1e3

    def look() -> None:
        if time.monotonic() > deadline:
            raise DeadlineExceeded("the request's time ran out during the search")

    return look
