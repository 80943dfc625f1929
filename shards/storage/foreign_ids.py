"""Ids of someone else's as item ids: integers from 0 up are kept, all others are numbered.

The numbers are 0, 1, 2, ... in the sorted order of all ids of a corpus. The ids of a corpus are
held in memory, as int64 or as text, and nothing else of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shardline.shards.core.errors import DataError
from shardline.shards.core.schema import IdArray
from shardline.shards.storage.column_types import Unusable, id_column
from shardline.shards.storage.table_parts import Part

Column = tuple[Part, str]  # a part with rows, and its id column


@dataclass(frozen=True, slots=True)
class ForeignIds:
    """numbers (n,) int64, all different, in the order of the rows; originals if they are others."""

    numbers: IdArray
    originals: pa.ChunkedArray | None


def read_ids(columns: Sequence[Column]) -> ForeignIds:
    """The ids of all parts, of any type that ``column_types.id_column`` takes.

    Raises:
        DataError: no ids in a column, a null, numbers in one part and texts in another, or an id
            that occurs twice, by its original.
    """
    chunks: list[pa.Array] = []
    rows = [0]  # where each part starts, and the end
    for part, name in columns:
        for start, batch in part.batches([name]):
            chunks.append(_ids(batch.column(0), part, name, start))
        rows.append(sum(map(len, chunks)))
    _refuse_mixed(columns)
    ids = _of_one_type(chunks)
    is_kept = len(ids) == 0 or (pa.types.is_int64(ids.type) and pc.min(ids).as_py() >= 0)
    if is_kept:
        numbers: IdArray = ids.to_numpy()
    else:
        numbers = pc.rank(ids, tiebreaker="dense").to_numpy().astype(np.int64) - 1
    _refuse_repeated_ids(numbers, ids, columns, rows)
    return ForeignIds(numbers, None if is_kept else ids)


def _ids(column: pa.Array, part: Part, name: str, start: int) -> pa.Array:
    """A batch of ids as int64, uint64 or string; start: the row of the first."""
    try:
        ids = id_column(pa.chunked_array([column])).combine_chunks()
    except Unusable as why:
        row = "" if why.row is None else f"[{start + why.row}]"
        raise DataError(
            "not usable as ids",
            field=f"{part.path}: {name}{row}",
            expected=why.expected,
            got=why.what,
        ) from why
    return ids.take(pa.array(np.arange(len(ids))))  # a copy: a view would hold the whole batch


def _of_one_type(chunks: list[pa.Array]) -> pa.ChunkedArray:
    """As int64 if all are, else as uint64, and as text if no integer type of Arrow holds them."""
    kinds = {chunk.type for chunk in chunks}
    kind = pa.int64()
    if pa.string() in kinds:
        kind = pa.string()
    elif pa.uint64() in kinds:
        signed = [chunk for chunk in chunks if pa.types.is_int64(chunk.type)]
        is_negative = any(pc.min(chunk).as_py() < 0 for chunk in signed)
        kind = pa.string() if is_negative else pa.uint64()
    return pa.chunked_array([chunk.cast(kind) for chunk in chunks], type=kind)


def _refuse_mixed(columns: Sequence[Column]) -> None:
    """DataError where one part has numbers and another texts: equal ids would not be found so."""
    for part, name in columns:
        first, first_name = columns[0]
        kind, expected = part.schema.field(name).type, first.schema.field(first_name).type
        if _is_number(kind) != _is_number(expected):
            raise DataError(
                "part files disagree",
                field=f"{part.path}: {name}",
                expected=f"{expected}, as in {first.path}",
                got=str(kind),
            )


def _is_number(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _is_number(kind.value_type)
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(check(kind) for check in checks)


def _refuse_repeated_ids(
    numbers: IdArray, ids: pa.ChunkedArray, columns: Sequence[Column], rows: list[int]
) -> None:
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    if not len(again):
        return
    first, second = order[again[0]], order[again[0] + 1]
    places = []
    for row in (first, second):
        at = int(np.searchsorted(rows, row, side="right")) - 1
        part, name = columns[at]
        places.append(f"{part.path}: {name}[{row - rows[at]}]")
    count = len(np.unique(ordered[again]))
    raise DataError(
        "duplicate id",
        field=places[1],
        expected="unique ids",
        got=f"{ids[int(second)].as_py()!r}, as in {places[0]}"
        + (f", and {count - 1} more that occur twice" if count > 1 else ""),
    )
