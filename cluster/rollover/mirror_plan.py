"""From records of one generation's log to the writes that bring another one the same. Pure.

Records of one shard in order -> ``Joined``, in which every item comes once, as its last record has
it -> for another model the same with new vectors -> ``Part``s, one request per shard of the target.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgpack
import numpy as np

from shardline.router.written import PART_BYTES, Part, by_shard, last_of_each
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import (
    MAX_WRITTEN_ROWS,
    DeleteRequest,
    RoutingTable,
    UpsertRequest,
)
from shardline.shards.core.schema import FloatArray, IdArray, query_vectors
from shardline.shards.live.records import Record, Upsert

EXAMPLES = 5  # ids of items that could not be replayed, for people


class ItemEncoder(Protocol):
    """The item tower of one model version."""

    def encode(self, item_ids: IdArray, rows: Sequence[dict[str, Any]], /) -> FloatArray:
        """(n, dim) float32: the vectors of item_ids (n,) with these features, in order.

        Raises:
            InvalidInput: features that the model does not take.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """item_ids (n,) int64, each once; vectors (n, dim) float32. Of each attribute n values; of each
    item its features, or of none: they were given by vector."""

    item_ids: IdArray
    vectors: FloatArray
    attributes: dict[str, list[Any]] = field(default_factory=dict)
    features: list[dict[str, Any]] = field(default_factory=list)

    def part(self, rows: IdArray) -> "Rows":
        chosen = rows.tolist()
        return Rows(
            item_ids=self.item_ids[rows],
            vectors=self.vectors[rows],
            attributes={name: [of[row] for row in chosen] for name, of in self.attributes.items()},
            features=[self.features[row] for row in chosen] if self.features else [],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """What consecutive records leave of the items they name: no item is in two of the three."""

    by_vector: Rows
    featured: Rows
    deleted: IdArray

    @property
    def rows(self) -> int:
        return len(self.by_vector.item_ids) + len(self.featured.item_ids) + len(self.deleted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreplayed:
    """Items that were written for one model only: how many rows, and the ids of some."""

    rows: int = 0
    examples: tuple[int, ...] = ()

    def and_(self, item_ids: IdArray) -> "Unreplayed":
        examples = dict.fromkeys((*self.examples, *item_ids[:EXAMPLES].tolist()))
        return Unreplayed(rows=self.rows + len(item_ids), examples=tuple(examples)[:EXAMPLES])


NONE_UNREPLAYED = Unreplayed()


def joined(records: Sequence[Record]) -> Joined:
    """Of consecutive records of one shard, at least one, the last that each item came in.

    Raises:
        InvalidInput: attributes or features that no router sends.
    """
    item_ids = np.concatenate([record.change.item_ids for record in records])
    sizes = [len(record.change.item_ids) for record in records]
    last = last_of_each(item_ids)
    record_of = np.repeat(np.arange(len(records)), sizes)[last]
    row_of = (np.concatenate([np.arange(size) for size in sizes]))[last]
    by_vector, featured, deleted = [_no_rows(records)], [_no_rows(records)], [item_ids[:0]]
    for number in np.unique(record_of).tolist():
        change, rows = records[number].change, row_of[record_of == number]
        if not isinstance(change, Upsert):
            deleted.append(change.item_ids[rows])
            continue
        whole = Rows(
            item_ids=change.item_ids,
            vectors=change.vectors,
            attributes=_unpacked(change.attributes, dict),
            features=_unpacked(change.features, list),
        )
        (featured if whole.features else by_vector).append(whole.part(rows))
    return Joined(
        by_vector=_concatenated(by_vector),
        featured=_concatenated(featured),
        deleted=np.concatenate(deleted),
    )


def translated(
    changes: Joined, encoder: ItemEncoder | None, table: RoutingTable
) -> tuple[Joined, IdArray]:
    """What can be written to a generation of another model; and the ids of the items that cannot,
    which came by vector alone or with features that ``encoder`` does not take. None: it has no
    encoder for items."""
    vectors = np.empty((0, table.dim), np.float32)
    none = Rows(item_ids=changes.by_vector.item_ids[:0], vectors=vectors)
    featured, refused = none, changes.featured.item_ids
    if encoder is not None and len(refused):
        featured, refused = _encoded(changes.featured, encoder, table)
    unreplayed = np.concatenate((changes.by_vector.item_ids, refused))
    return Joined(by_vector=none, featured=featured, deleted=changes.deleted), unreplayed


def parts_of(changes: Joined, table: RoutingTable, columns: Sequence[str], key: str) -> list[Part]:
    """Requests to the shards of ``table``, no item in two of them: their order is of no meaning.

    columns: the attributes of the target; others are left out. key: what the keys of the parts
    begin with; the same changes, table and columns give every part the same key.
    """
    at_once = max(1, min(MAX_WRITTEN_ROWS, PART_BYTES // (4 * table.dim)))
    messages: list[tuple[int, UpsertRequest | DeleteRequest]] = []
    for given in (changes.by_vector, changes.featured):
        known = {name: of for name, of in given.attributes.items() if name in columns}
        given = replace(given, attributes=known)
        everything = np.arange(len(given.item_ids))
        for shard, rows in by_shard(given.item_ids, everything, table, at_once):
            messages += [(shard, each) for each in _requests(given.part(rows))]
    for shard, rows in by_shard(
        changes.deleted, np.arange(len(changes.deleted)), table, MAX_WRITTEN_ROWS
    ):
        deleted = DeleteRequest(item_ids=changes.deleted[rows], key="", timeout_ms=0.0)
        messages.append((shard, deleted))
    return [
        Part(shard=shard, message=replace(message, key=f"{key}-{_kind_and_ids(message)}"))
        for shard, message in messages
    ]


def _kind_and_ids(message: UpsertRequest | DeleteRequest) -> str:
    """No two parts of a round have the same; a part of the same items is the same write, though
    an encoder on another host may give its vectors other last bits."""
    kind = "upsert" if isinstance(message, UpsertRequest) else "delete"
    return f"{kind}-{hashlib.blake2b(message.item_ids.tobytes(), digest_size=8).hexdigest()}"


def _requests(rows: Rows) -> Iterator[UpsertRequest]:
    """One, or more where attributes or features take more than PART_BYTES."""
    attributes: bytes = msgpack.packb(rows.attributes) if rows.attributes else b""
    features: bytes = msgpack.packb(rows.features) if rows.features else b""
    count = len(rows.item_ids)
    if count > 1 and max(len(attributes), len(features)) > PART_BYTES:
        yield from _requests(rows.part(np.arange(count // 2)))
        yield from _requests(rows.part(np.arange(count // 2, count)))
        return
    yield UpsertRequest(
        item_ids=rows.item_ids,
        vectors=rows.vectors,
        attributes=attributes,
        features=features,
        key="",
        timeout_ms=0.0,
    )


def _encoded(rows: Rows, encoder: ItemEncoder, table: RoutingTable) -> tuple[Rows, IdArray]:
    """The rows that the encoder takes, with its vectors; and the ids of the others."""
    try:
        vectors = encoder.encode(rows.item_ids, rows.features)
        checked = query_vectors(vectors, dim=table.dim, metric=table.metric, field="features")
    except InvalidInput:
        count = len(rows.item_ids)
        if count == 1:
            empty = rows.part(np.arange(0))
            return replace(empty, vectors=np.empty((0, table.dim), np.float32)), rows.item_ids
        halves = [
            _encoded(rows.part(half), encoder, table)
            for half in (np.arange(count // 2), np.arange(count // 2, count))
        ]
        taken = _concatenated([each for each, _ in halves])
        return taken, np.concatenate([refused for _, refused in halves])
    return replace(rows, vectors=checked), rows.item_ids[:0]


def _no_rows(records: Sequence[Record]) -> Rows:
    dims = [each.change.vectors.shape[1] for each in records if isinstance(each.change, Upsert)]
    vectors = np.empty((0, dims[0] if dims else 0), np.float32)
    return Rows(item_ids=np.empty(0, np.int64), vectors=vectors)


def _concatenated(given: Sequence[Rows]) -> Rows:
    """A name that is missing in some of them is null there, as in a write that leaves it out."""
    names = dict.fromkeys(name for rows in given for name in rows.attributes)
    nulls = [[None] * len(rows.item_ids) for rows in given]
    return Rows(
        item_ids=np.concatenate([rows.item_ids for rows in given]),
        vectors=np.concatenate([rows.vectors for rows in given]),
        attributes={
            name: [
                value
                for rows, null in zip(given, nulls, strict=True)
                for value in rows.attributes.get(name, null)
            ]
            for name in names
        },
        features=[each for rows in given for each in rows.features],
    )


def _unpacked(packed: bytes, kind: type) -> Any:
    """Raises InvalidInput."""
    if not packed:
        return kind()
    try:
        value = msgpack.unpackb(packed, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise InvalidInput("not readable", expected="msgpack", got=str(error)) from error
    if not isinstance(value, kind):
        raise InvalidInput("no write", expected=kind.__name__, got=type(value).__name__)
    return value
