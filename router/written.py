"""A write on its way through the router: what a body asks for, parts per shard, what came of it.

Upserts or Deletes -> Parts, a request per shard -> WriteReplies -> WriteAnswer, or an error with
``WriteParts``. Pure: no sockets here.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

import msgpack
import numpy as np

from shardline.router.contract import FailedPart, OtherModel, PayloadTooLarge, WriteParts
from shardline.shards.core.errors import (
    DeadlineExceeded,
    DeltaFull,
    InvalidInput,
    NotPrimary,
    Overloaded,
    ReadOnly,
    ShardlineError,
    StoreFull,
)
from shardline.shards.core.messages import (
    MAX_WRITTEN_ROWS,
    DeleteRequest,
    RoutingTable,
    UpsertRequest,
    WriteReply,
)
from shardline.shards.core.schema import IdArray, check_ids, query_vectors

PART_BYTES = (
    16 << 20
)  # of vectors, and of attributes: a frame, and a shard's log, take both at once
KEY_BYTES = 16  # of the digest that is a part's key
AGAIN = "once mended, send all of it again: with the same Idempotency-Key that is safe"
# an error's class, the gravest first: where parts fail differently, the request fails so
GRAVEST: tuple[type[ShardlineError], ...] = (
    InvalidInput,
    OtherModel,
    StoreFull,
    ReadOnly,
    NotPrimary,
    DeadlineExceeded,
    DeltaFull,
    Overloaded,
)


# of an item that is written by features: an attribute that it does not name
ABSENT: Final = object()


class WriteKind(StrEnum):
    UPSERT = "upsert"
    DELETE = "delete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upserts:
    """Items of a body: values that are not yet looked at one by one, in the order they came.

    item_ids: n ids; vectors (n, d) numbers, or features: n maps, and vectors once these are
    encoded; attributes: of each name n values of JSON, null where an item has none, or ABSENT where
    features may fill it. id_field and vector_field are what errors name them by, with the row after
    it and the row's own field, if it has one: ("items", "vector") names ``items[3].vector``.
    """

    item_ids: Any
    attributes: dict[str, list[Any]]
    timeout_ms: float
    vectors: Any = None
    features: list[dict[str, Any]] | None = None
    model_version: str | None = None
    id_field: tuple[str, str] = ("item_ids", "")
    vector_field: tuple[str, str] = ("vectors", "")

    def of(self, item_ids: IdArray) -> "Upserts":
        """Those of the items that have one of these ids."""
        rows = np.flatnonzero(np.isin(np.asarray(self.item_ids), item_ids)).tolist()
        features = self.features
        return replace(
            self,
            item_ids=[self.item_ids[row] for row in rows],
            attributes={name: [of[row] for row in rows] for name, of in self.attributes.items()},
            vectors=None if self.vectors is None else np.asarray(self.vectors)[rows],
            features=None if features is None else [features[row] for row in rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletes:
    """item_ids: n ids, existing or not, not yet looked at one by one."""

    item_ids: Any
    timeout_ms: float

    def of(self, item_ids: IdArray) -> "Deletes":
        """Those of the items that have one of these ids."""
        found = np.asarray(self.item_ids)
        return replace(self, item_ids=found[np.isin(found, item_ids)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one shard gets at once; ``message`` lacks the time that is left."""

    shard: int
    message: UpsertRequest | DeleteRequest

    @property
    def items(self) -> int:
        return len(self.message.item_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteAnswer:
    """rows: different items written; existed: those of them that were there before. duplicates:
    items of the request that a later one of the same id has replaced. seq: of each shard, how many
    writes it has applied with this one; None for a shard that had no part in it."""

    kind: WriteKind
    rows: int
    existed: int
    duplicates: int
    seq: tuple[int | None, ...]
    generation: int
    table_version: int
    model_version: str
    took_ms: float
    request_id: str


def upsert_parts(given: Upserts, table: RoutingTable, key: str) -> list[Part]:
    """Requests that write every item once, the last of those with the same id.

    Raises:
        InvalidInput: ids or vectors that are none; the error names the first.
        PayloadTooLarge: attributes or features that take more than PART_BYTES of one part.
    """
    with naming(*given.id_field):
        item_ids = check_ids(given.item_ids, field=given.id_field[0])
    with naming(*given.vector_field):
        vectors = query_vectors(
            given.vectors, dim=table.dim, metric=table.metric, field=given.vector_field[0]
        )
    rows_at_once = max(1, min(MAX_WRITTEN_ROWS, PART_BYTES // (4 * table.dim)))
    parts = []
    for shard, rows in by_shard(item_ids, last_of_each(item_ids), table, rows_at_once):
        attributes = _packed(given.attributes, rows)
        features = _packed_features(given, rows)
        # two routers may make vectors of features that differ in the last bit
        said = features or vectors[rows].tobytes()
        part_key = _part_key(key, WriteKind.UPSERT, item_ids[rows], said, attributes)
        message = UpsertRequest(
            item_ids=item_ids[rows],
            vectors=vectors[rows],
            attributes=attributes,
            features=features,
            key=part_key,
            timeout_ms=0.0,
        )
        parts.append(Part(shard=shard, message=message))
    return parts


def delete_parts(given: Deletes, table: RoutingTable, key: str) -> list[Part]:
    """Requests that name every item once. Raises InvalidInput: ids that are none."""
    item_ids = check_ids(given.item_ids)
    parts = []
    for shard, rows in by_shard(item_ids, last_of_each(item_ids), table, MAX_WRITTEN_ROWS):
        part_key = _part_key(key, WriteKind.DELETE, item_ids[rows])
        message = DeleteRequest(item_ids=item_ids[rows], key=part_key, timeout_ms=0.0)
        parts.append(Part(shard=shard, message=message))
    return parts


def last_of_each(item_ids: IdArray) -> IdArray:
    """Where each different id stands for the last time, ascending."""
    _, from_end = np.unique(item_ids[::-1], return_index=True)
    found: IdArray = np.sort(len(item_ids) - 1 - from_end).astype(np.int64)
    return found


def newest(
    parts: Sequence[Part], replies: Sequence[WriteReply], table: RoutingTable
) -> tuple[int | None, ...]:
    """Of each shard of the table the highest sequence number of its replies; None where it has
    none. Those of another generation count other writes, which were brought to this one before it
    went live, to whichever shards: these have all that they went live with."""
    seq: list[int | None] = [None] * len(table.shards)
    if any(reply.generation != table.generation for reply in replies):
        for shard, has in enumerate(table.went_live_with):
            seq[shard] = has or None
    for part, reply in zip(parts, replies, strict=True):
        if reply.generation == table.generation:
            seq[part.shard] = max(reply.seq, seq[part.shard] or 0)
    return tuple(seq)


def failure(
    parts: Sequence[Part], outcomes: Sequence[WriteReply | ShardlineError], key: str
) -> ShardlineError | None:
    """The error of a request, some of whose parts have failed; None: none has."""
    failed = [
        (part, outcome)
        for part, outcome in zip(parts, outcomes, strict=True)
        if isinstance(outcome, ShardlineError)
    ]
    if not failed:
        return None
    gravest = min((error for _, error in failed), key=_gravity)
    shards = ", ".join(str(shard) for shard in dict.fromkeys(part.shard for part, _ in failed))
    items = sum(part.items for part, _ in failed)
    applied = sum(part.items for part in parts) - items
    error = type(gravest)(
        f"{items} items of shard {shards} not acknowledged: {gravest.message}",
        field=gravest.field,
        expected=gravest.expected,
        got=gravest.got,
        hint=gravest.hint if isinstance(gravest, OtherModel) else AGAIN,
    )
    error.parts = WriteParts(
        failed=tuple(
            FailedPart(shard=part.shard, code=error.code, text=error.message, items=part.items)
            for part, error in failed
        ),
        applied_items=applied,
        idempotency_key=key,
    )
    return error


def _gravity(error: ShardlineError) -> int:
    kinds = [place for place, kind in enumerate(GRAVEST) if isinstance(error, kind)]
    return kinds[0] if kinds else GRAVEST.index(NotPrimary)


class naming:  # noqa: N801  reads as what it does, like contextlib's own
    """Errors of a row name its own field too."""

    def __init__(self, field: str, within: str) -> None:
        self._start = f"{field}["
        self._within = within

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if not self._within or not isinstance(error, InvalidInput):
            return
        if (error.field or "").startswith(self._start):
            error.field = f"{error.field}.{self._within}"


def by_shard(
    item_ids: IdArray, rows: IdArray, table: RoutingTable, at_once: int
) -> Iterator[tuple[int, IdArray]]:
    """Each shard with ``at_once`` of its rows at most, in their order."""
    homes = table.partition.shard_of(item_ids[rows])
    for shard in np.unique(homes).tolist():
        mine = rows[homes == shard]
        for start in range(0, len(mine), at_once):
            yield shard, mine[start : start + at_once]


def _packed(attributes: dict[str, list[Any]], rows: IdArray) -> bytes:
    if not attributes:
        return b""
    chosen = rows.tolist()
    columns = {name: [values[row] for row in chosen] for name, values in attributes.items()}
    return _bounded("attributes", msgpack.packb(columns))


def _packed_features(given: Upserts, rows: IdArray) -> bytes:
    """As ``UpsertRequest`` has them; b"" for items that are given by vector."""
    if given.features is None:
        return b""
    return _bounded("features", msgpack.packb([given.features[row] for row in rows.tolist()]))


def _bounded(field: str, packed: bytes) -> bytes:
    if len(packed) > PART_BYTES:
        raise PayloadTooLarge(
            f"{field} too large",
            field=field,
            expected=f"<= {PART_BYTES} bytes of those that one shard gets",
            got=f"{len(packed)} bytes",
            hint="send the items in several requests",
        )
    return packed


def _part_key(key: str, kind: WriteKind, item_ids: IdArray, *rest: bytes) -> str:
    """Of the caller's key and of all that the part says: the same key with other items is another
    write, which no shard may take for done."""
    digest = hashlib.blake2b(key.encode(), digest_size=KEY_BYTES)
    digest.update(f"\0{kind}\0{len(item_ids)}\0".encode())
    digest.update(item_ids.tobytes())
    for each in rest:
        digest.update(each)
    return digest.hexdigest()
