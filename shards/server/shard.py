"""One shard: item ids over a main index; answers search, fetch and attribute requests.

No sockets, threads or Ray here. A shard is used by one thread at a time.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from shardline.shards.core.errors import (
    Behind,
    CorruptFile,
    DeadlineExceeded,
    InvalidInput,
    ShardlineError,
    too_much_returned,
)
from shardline.shards.core.messages import (
    MAX_RETURNED,
    MAX_RETURNED_BYTES,
    AttributesReply,
    AttributesRequest,
    FetchReply,
    FetchRequest,
    SearchParams,
    SearchReply,
    SearchRequest,
)
from shardline.shards.core.schema import (
    EMPTY_ID,
    ORIGINAL_ID,
    FloatArray,
    IdArray,
    Ranked,
    check_ids,
    check_k,
)
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.selection import Selection
from shardline.shards.index.spec import Device
from shardline.shards.server.item_attributes import ItemAttributes
from shardline.shards.storage.generation import (
    INDEX_NAME,
    ITEM_IDS_NAME,
    GenerationManifest,
    read_attributes,
    read_generation,
    read_item_ids,
    shard_folder,
    verify_shard,
)

NO_ATTRIBUTES = ItemAttributes()
READ_ROWS = 64  # values of an attribute between two looks at the clock


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ShardState:
    """All that a search sees of a shard, swapped as one reference: a search uses one of them.

    ids_by_row (rows + 1,) int64: the item of each local row of ``main``, ascending; the last slot
    is the empty id, so that row -1 of an empty result reads it. selection: the rows that may come
    back, None for all. seq: how many writes are in it.
    """

    main: MainIndex
    ids_by_row: IdArray
    selection: Selection | None = None
    seq: int = 0
    attributes: ItemAttributes = NO_ATTRIBUTES

    @classmethod
    def of(
        cls, main: MainIndex, item_ids: IdArray, attributes: ItemAttributes = NO_ATTRIBUTES
    ) -> "ShardState":
        """item_ids (n,) int64, ascending: the item of each local row of ``main``."""
        assert main.rows == item_ids.size
        return cls(main=main, ids_by_row=np.append(item_ids, EMPTY_ID), attributes=attributes)

    @property
    def rows(self) -> int:
        """Rows that may come back."""
        excluded = 0 if self.selection is None else self.selection.num_excluded
        return self.main.rows - excluded

    def search(self, queries: FloatArray, k: int, params: SearchParams) -> Ranked:
        """The k best items of queries (n, dim) float32.

        Raises:
            InvalidInput: wrong dimension, or a search parameter out of range.
        """
        rows, scores = self.main.search(queries, k, params, self.selection)
        return Ranked(self.ids_by_row[rows], scores)

    def fetch(self, item_ids: IdArray) -> tuple[IdArray, FloatArray]:
        """Those of item_ids (n,) int64 that are here, and their vectors (m, dim) float32.

        As exact as ``MainIndex.reconstruct``: an index without exact copies gives approximations.
        """
        found, rows = self._rows_of(item_ids)
        return found, self.main.reconstruct(rows)

    def attributes_of(
        self, item_ids: IdArray, names: Sequence[str], deadline: float, limit: int
    ) -> tuple[IdArray, bytes] | None:
        """Those of item_ids (n,) int64 that are here, and ``AttributesReply.values``; None if
        these would have more than ``limit`` bytes.

        An item whose id was kept at its import is its own ``original_id``. deadline: on
        time.monotonic's clock.

        Raises:
            InvalidInput: no such attribute, or more than MAX_RETURNED_BYTES.
            DeadlineExceeded: it took too long.
        """
        found, rows = self._rows_of(item_ids)
        packed = bytearray()
        for name in names:
            is_own = name == ORIGINAL_ID and name not in self.attributes.names
            for start in range(0, max(1, len(rows)), READ_ROWS):
                part = slice(start, start + READ_ROWS)
                values = (
                    found[part].tolist() if is_own else self.attributes.values(name, rows[part])
                )
                packed += msgpack.packb(values)
                if len(packed) > MAX_RETURNED_BYTES:
                    raise too_much_returned(MAX_RETURNED_BYTES)
                if len(packed) > limit:
                    return None
                if time.monotonic() > deadline:
                    raise DeadlineExceeded("the request's time ran out while attributes were read")
        return found, bytes(packed)

    def _rows_of(self, item_ids: IdArray) -> tuple[IdArray, IdArray]:
        """Those of item_ids (n,) int64 that are here and may come back, and their rows."""
        rows = np.searchsorted(self.ids_by_row[:-1], item_ids)
        found = self.ids_by_row[rows] == item_ids
        if self.selection is not None:
            found[found] = self.selection.live[rows[found]]
        return item_ids[found], rows[found].astype(np.int64)


class Shard:
    """One item range of one generation. ``state`` is replaced, never changed."""

    def __init__(self, *, shard: int, generation: int, state: ShardState) -> None:
        self.shard = shard
        self.generation = generation
        self.state = state

    @classmethod
    def load(cls, folder: Path, shard: int, *, device: Device | None = None) -> "Shard":
        """Verifies and reads one shard of a generation; ``device`` None means the manifest's.

        Raises:
            NotFound: no such generation or shard.
            CorruptFile: a file is missing, altered, or contradicts the manifest; named.
            NewerFormat: written by a version newer than this code.
        """
        manifest = read_generation(folder)
        entry = verify_shard(folder, manifest, shard)
        main = _load_main(folder, manifest, shard, device or manifest.index.device)
        ids_path = folder / shard_folder(shard) / ITEM_IDS_NAME
        attributes = ItemAttributes(read_attributes(folder, manifest, shard, verify=False))
        state = ShardState.of(main, read_item_ids(ids_path, rows=entry.rows), attributes)
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
        }

    def search(self, request: SearchRequest) -> SearchReply:
        """The k best items of each query.

        Raises:
            InvalidInput: k, dimension or a search parameter out of range.
        """
        (reply,) = self.search_batch([request])
        if isinstance(reply, ShardlineError):
            raise reply
        return reply

    def search_batch(self, requests: Sequence[SearchRequest]) -> list[SearchReply | ShardlineError]:
        """A reply to each request, in order; requests that differ in their queries alone share one
        search. One that is wrong gets its error in place of a reply and harms no other.
        """
        state = self.state
        if len(requests) == 1:
            return self._search_group(state, requests)
        replies: dict[int, SearchReply | ShardlineError] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        for at, request in enumerate(requests):
            key = (request.k, request.params, request.options, *request.queries.shape[1:])
            if len(request.queries) == 0:
                key = (at,)
            groups.setdefault(key, []).append(at)
        for members in groups.values():
            answered = self._search_group(state, [requests[at] for at in members])
            replies.update(zip(members, answered, strict=True))
        return [replies[at] for at in range(len(requests))]

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
            names = request.names or state.attributes.names[:MAX_RETURNED]
            found = state.attributes_of(ids, names, deadline, limit)
        except (InvalidInput, DeadlineExceeded) as error:
            return error
        if found is None:
            return None
        item_ids, values = found
        return AttributesReply(
            item_ids=item_ids,
            names=names,
            values=values,
            generation=self.generation,
            seq=state.seq,
        )

    def _fetch(self, state: ShardState, request: FetchRequest) -> FetchReply | ShardlineError:
        try:
            item_ids, vectors = state.fetch(check_ids(request.item_ids))
        except InvalidInput as error:
            return error
        return FetchReply(
            item_ids=item_ids, vectors=vectors, generation=self.generation, seq=state.seq
        )

    def _search_group(
        self, state: ShardState, group: Sequence[SearchRequest]
    ) -> list[SearchReply | ShardlineError]:
        """Requests that differ in their queries alone, as one call to the index."""
        first = group[0]
        started = time.perf_counter()
        queries = first.queries
        if len(group) > 1:
            queries = np.concatenate([request.queries for request in group])
        try:
            check_k(first.k)
            if len(queries) == 0:
                raise InvalidInput("empty batch", field="queries", expected="at least one query")
            if state.seq < first.options.min_seq_of(self.shard):
                raise Behind("writes are missing", got=f"{state.seq} applied")
            ranked = state.search(queries, first.k, first.params)
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
                )
            )
            start = end
        return replies


def _load_main(folder: Path, manifest: GenerationManifest, shard: int, device: Device) -> MainIndex:
    path = folder / shard_folder(shard) / INDEX_NAME
    main = MainIndex.load(
        path, metric=manifest.metric, defaults=manifest.index.search_params, device=device
    )
    rows = manifest.shard_entry(shard).rows
    if main.rows != rows:
        raise CorruptFile(f"{path}: wrong row count", expected=str(rows), got=str(main.rows))
    if main.dim != manifest.dim:
        raise CorruptFile(f"{path}: wrong dimension", expected=str(manifest.dim), got=str(main.dim))
    return main
