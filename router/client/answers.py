"""What a client's calls return, and how it is read from msgpack bodies.

Fields that this version does not know are ignored, so that a newer server can be asked.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack
import numpy as np

from shardline.router.client.seq import Seq, newer
from shardline.router.contract import Coverage, Degraded, ItemAnswer, Reason, array_of
from shardline.shards.core.errors import InvalidInput, ProtocolError
from shardline.shards.core.schema import EMPTY_ID, ORIGINAL_ID, FloatArray, IdArray

if TYPE_CHECKING:
    import pandas
    import pyarrow

Answer = TypeVar("Answer")
# what several requests of one write add up to
NO_SEQ = Seq()
COUNTS = ("rows", "duplicates", "took_ms", "created", "updated", "deleted", "missing")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchAnswer:
    """ids (n, k) int64 and scores (n, k) float32, best first; empty slots are -1 and -inf, last.

    The arrays are read-only. attributes and original_ids hold what ``return_`` and
    ``return_original_ids`` asked for: a list per query, with a value per result; None
    where a shard did not bring them, and attributes_missing says why. seq: of each shard, how many
    writes were in what it searched, None for one that did not answer; a search can ask for them.
    took_ms is the time from the request's arrival at the server to its answer, search_ms the
    longest search of any shard, both in milliseconds. others_share: of a background search, the
    share of the last two seconds in which the busiest shard searched for others; None of others.
    pool: of a search with cap, boost or diversify, how many items were considered for each query;
    scores have what boosts add, and items are in the order of the answer, by score or diverse.
    arms: of each experiment that the search was part of, the arm.
    """

    ids: IdArray
    scores: FloatArray
    generation: int
    model_version: str
    coverage: Coverage
    took_ms: float
    search_ms: float
    request_id: str
    seq: Seq = NO_SEQ
    reasons: tuple[Reason, ...] = ()
    attributes: Mapping[str, list[list[Any]]] = field(default_factory=dict)
    original_ids: list[list[Any]] | None = None
    attributes_missing: tuple[Degraded, ...] = ()
    others_share: float | None = None
    pool: tuple[int, ...] = ()
    arms: Mapping[str, str] = field(default_factory=dict)

    def to_arrow(self) -> "pyarrow.Table":
        """One row per result, in answer order: query int64, rank int64, id int64, score float32.

        query is the position in the request, rank counts from 0; empty slots have no row. Then
        original_id and the attributes, where they were asked for.

        Raises:
            ImportError: pyarrow is not installed.
        """
        try:
            import pyarrow as pa
        except ImportError as error:
            raise ImportError("to_arrow() needs pyarrow: pip install pyarrow") from error
        columns = self._columns()
        return pa.table({name: _arrow_column(values) for name, values in columns.items()})

    def to_pandas(self) -> "pandas.DataFrame":
        """The columns of ``to_arrow`` as a DataFrame. Raises ImportError: pandas is missing."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install pandas") from error
        return pd.DataFrame(self._columns())

    def _columns(self) -> dict[str, Any]:
        query, rank = np.nonzero(self.ids != EMPTY_ID)
        columns: dict[str, Any] = {
            "query": query,
            "rank": rank,
            "id": self.ids[query, rank],
            "score": self.scores[query, rank],
        }
        if self.original_ids is not None:
            columns[ORIGINAL_ID] = list(chain.from_iterable(self.original_ids))
        for name, rows in self.attributes.items():
            while name in columns:
                name = f"attribute.{name}"
            columns[name] = list(chain.from_iterable(rows))
        return columns


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteAnswer:
    """Of one write, however many requests it took: all of it is durable on the store; in searches
    that ask for its ``seq`` at once, in all others within about a second.

    rows: different items of each request; duplicates: items that a later one of the same request
    has replaced. seq: of each shard, how many writes it has applied with this one, None where it
    had no part in it; a search that asks for these numbers goes to no replica that lacks the write.
    took_ms: milliseconds of the server, all requests together. request_id: the last one's.
    """

    rows: int
    duplicates: int
    seq: Seq
    generation: int
    model_version: str
    took_ms: float
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UpsertAnswer(WriteAnswer):
    """created, updated: items that were not there before, and that were."""

    created: int
    updated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteAnswer(WriteAnswer):
    """deleted, missing: items that were there, and that were not."""

    deleted: int
    missing: int


Written = TypeVar("Written", UpsertAnswer, DeleteAnswer)


def together(first: Written | None, second: Written) -> Written:
    """Both as one: counts added, ``newer`` of their numbers, the rest the second's, which may be of
    a generation that went live between them and has what the first wrote."""
    if first is None:
        return second
    sums = {
        each.name: getattr(first, each.name) + getattr(second, each.name)
        for each in fields(second)
        if each.name in COUNTS
    }
    return replace(second, seq=newer(first.seq, second.seq), **sums)


def _arrow_column(values: Any) -> Any:
    """An array, or values of JSON: where no Arrow type holds them all, their texts in JSON."""
    import pyarrow as pa

    for kind in (None, pa.uint64()):
        try:
            return pa.array(values, kind)
        except (pa.ArrowException, OverflowError):
            continue
    return pa.array([None if value is None else json.dumps(value) for value in values])


def read_search(body: bytes) -> SearchAnswer:
    """A search's answer. Raises ProtocolError: the body is none."""
    return _read(body, "search answer", _search_of)


def read_item(body: bytes) -> ItemAnswer:
    """An item's answer. Raises ProtocolError: the body is none."""
    return _read(body, "item", _item_of)


def read_upsert(body: bytes) -> UpsertAnswer:
    """The answer to a request to write items. Raises ProtocolError: the body is none."""
    return _read(
        body,
        "write answer",
        lambda content: UpsertAnswer(
            created=content["created"], updated=content["updated"], **_written(content)
        ),
    )


def read_delete(body: bytes) -> DeleteAnswer:
    """The answer to a request to delete items. Raises ProtocolError: the body is none."""
    return _read(
        body,
        "write answer",
        lambda content: DeleteAnswer(
            deleted=content["deleted"], missing=content["missing"], **_written(content)
        ),
    )


def _written(content: Mapping[str, Any]) -> dict[str, Any]:
    names = (each.name for each in fields(WriteAnswer))
    return {name: content[name] for name in names} | {"seq": _seq_of(content)}


def _seq_of(content: Mapping[str, Any]) -> Seq:
    """Of a server that is older than sequence numbers, or than table versions, too."""
    return Seq(content.get("seq") or (), content["generation"], content.get("table_version"))


def _read(body: bytes, name: str, build: Callable[[dict[str, Any]], Answer]) -> Answer:
    try:
        return build(msgpack.unpackb(body))
    except (InvalidInput, TypeError, KeyError, ValueError, AttributeError) as error:
        raise ProtocolError(f"not a {name}", got=repr(error)) from error


def _search_of(content: dict[str, Any]) -> SearchAnswer:
    ids, scores = array_of(content["ids"]), array_of(content["scores"])
    if not (ids.dtype == np.int64 and scores.dtype == np.float32 and ids.shape == scores.shape):
        raise ValueError(f"ids {ids.dtype} {ids.shape}, scores {scores.dtype} {scores.shape}")
    coverage = content["coverage"]
    return SearchAnswer(
        ids=ids,
        scores=scores,
        generation=content["generation"],
        model_version=content["model_version"],
        coverage=Coverage(
            shards_asked=coverage["shards_asked"],
            shards_answered=coverage["shards_answered"],
            rows_asked=coverage["rows_asked"],
            rows_answered=coverage["rows_answered"],
            degraded=tuple(map(_degraded, coverage["degraded"])),
        ),
        took_ms=content["took_ms"],
        search_ms=content["search_ms"],
        request_id=content["request_id"],
        seq=_seq_of(content),
        reasons=tuple(map(_reason, content.get("reasons") or ())),
        attributes=content.get("attributes") or {},
        original_ids=content.get("original_ids"),
        attributes_missing=tuple(map(_degraded, content.get("attributes_missing") or ())),
        others_share=content.get("others_share"),
        pool=tuple(content.get("pool") or ()),
        arms=content.get("arms") or {},
    )


def _reason(content: dict[str, Any]) -> Reason:
    return Reason(
        query=content["query"],
        code=content["code"],
        text=content["text"],
        matched=content.get("matched"),
        count=content.get("count"),
    )


def _degraded(content: dict[str, Any]) -> Degraded:
    return Degraded(shard=content["shard"], code=content["code"], text=content["text"])


def _item_of(content: dict[str, Any]) -> ItemAnswer:
    return ItemAnswer(
        item_id=content["item_id"],
        vector=array_of(content["vector"]).astype(np.float32, copy=False),
        attributes=content.get("attributes") or {},
        shard=content["shard"],
        seq=content.get("seq", 0),
        generation=content["generation"],
        model_version=content["model_version"],
    )
