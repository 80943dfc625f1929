"""A block of queries on its way through Ray Data: an Arrow table of one row per query."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.cluster.batch.queries import Queries
from shardline.cluster.batch.spans import Span
from shardline.shards.core.schema import Ranked

NUMBER, START, STOP = "number", "start", "stop"
QUERY_ID, VECTOR, OWN, ITEM_IDS, SCORES = "query_id", "vector", "own", "item_ids", "scores"


def block_table(span: Span, queries: Queries, ranked: Ranked | None) -> pa.Table:
    """One row per query; the span is in every row, where no stage can lose it."""
    assert queries.vectors is not None
    count = len(queries)
    columns = {
        NUMBER: pa.repeat(span.number, count),
        START: pa.repeat(span.start, count),
        STOP: pa.repeat(span.stop, count),
        QUERY_ID: queries.ids,
        VECTOR: _lists(queries.vectors),
    }
    if queries.own is not None:
        columns[OWN] = pa.array(queries.own)
    if ranked is not None:
        columns |= {ITEM_IDS: _lists(ranked.ids), SCORES: _lists(ranked.scores)}
    return pa.table(columns)


def parts_of(table: pa.Table) -> tuple[Span, Queries, Ranked | None]:
    """What ``block_table`` was made of."""
    (span,) = set(spans_in(table.slice(0, 1)))
    assert table.num_rows == len(span), "Ray Data has cut a block"
    names = table.column_names
    own = _one(table, OWN).to_numpy() if OWN in names else None
    queries = Queries(ids=_one(table, QUERY_ID), vectors=_matrix(table, VECTOR), own=own)
    if ITEM_IDS not in names:
        return span, queries, None
    return span, queries, Ranked(_matrix(table, ITEM_IDS), _matrix(table, SCORES))


def spans_in(table: pa.Table) -> Iterator[Span]:
    """The span of each row."""
    columns = [table.column(name).to_pylist() for name in (NUMBER, START, STOP)]
    yield from (Span(*row) for row in zip(*columns, strict=True))


def _lists(matrix: np.ndarray[Any, Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(matrix).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def _one(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def _matrix(table: pa.Table, name: str) -> Any:
    column = _one(table, name)
    return column.flatten().to_numpy().reshape(len(column), -1)
