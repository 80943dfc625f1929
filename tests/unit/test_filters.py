"""Filters bound to columns and evaluated: equal to plain Python, row by row, for every type."""

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from shardline.shards.core.filter_language import check_filter, read_filter
from shardline.shards.filters.bound import bind
from shardline.shards.filters.matching import Mask, matches
from tests.filter_model import filter_of, holds, stored_value

SCALARS = (
    *(pa.bool_(), pa.int8(), pa.uint8(), pa.int64(), pa.uint64()),
    *(pa.float16(), pa.float32(), pa.float64()),
    *(pa.decimal32(6, 2), pa.decimal128(20, 1), pa.decimal256(50, 3)),
    *(pa.string(), pa.large_string(), pa.string_view()),
    *(pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(2)),
    *(pa.date32(), pa.date64(), pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("ms", "UTC")),
    *(pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.duration("ms"), pa.duration("us")),
    *(pa.dictionary(pa.int8(), pa.string()), pa.run_end_encoded(pa.int32(), pa.int64())),
)
LISTS = (
    *(pa.list_(pa.int64()), pa.large_list(pa.string()), pa.list_(pa.float32(), 2)),
    *(pa.list_view(pa.int64()), pa.large_list_view(pa.string())),
    *(pa.list_(pa.bool_()), pa.list_(pa.date32()), pa.list_(pa.dictionary(pa.int8(), pa.string()))),
)


def mask_of(item_filter: Any, table: pa.Table, ids: Any = None) -> Mask:
    bound = bind(read_filter(check_filter(item_filter)), table.schema)
    ids = np.arange(table.num_rows) if ids is None else np.array(ids, np.int64)
    return matches(bound, table, ids)


def rows_of(item_filter: Any, **columns: Any) -> list[int]:
    """The rows that match, of columns of equal lengths."""
    return np.flatnonzero(mask_of(item_filter, pa.table(columns))).tolist()


def array_of(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_run_end_encoded(kind):
        return pc.run_end_encode(pa.array(values, kind.value_type), run_end_type=kind.run_end_type)
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values, kind)


def random_column(rng: random.Random, kind: pa.DataType, chunks: list[int]) -> pa.ChunkedArray:
    """Random values, in chunks of these lengths, each a slice of something longer."""
    made = []
    for rows in chunks:
        values = [stored_value(rng, kind) for _ in range(rows + 3)]
        made.append(array_of(values, kind).slice(2, rows))
    return pa.chunked_array(made, kind)


def random_table(rng: random.Random, kinds: list[pa.DataType], rows: int) -> pa.Table:
    columns = {}
    for i, kind in enumerate(kinds):
        first = rng.randrange(rows + 1)
        chunks = [rows] if rng.random() < 0.5 else [first, 0, rows - first]
        columns[f"c{i}"] = random_column(rng, kind, chunks)
    return pa.table(columns)


def check_equal(rng: random.Random, table: pa.Table, filters: int) -> None:
    rows = table.to_pylist()
    for _ in range(filters):
        item_filter = filter_of(rng, table.schema)
        expected = [holds(item_filter, row, table.schema) for row in rows]
        assert mask_of(item_filter, table).tolist() == expected, item_filter


@pytest.mark.parametrize("kind", [*SCALARS, *LISTS], ids=str)
def test_equal_to_plain_python_for_every_type(kind: pa.DataType) -> None:
    rng = random.Random(str(kind))
    for _ in range(5):
        check_equal(rng, random_table(rng, [kind], rng.choice((0, 1, 40))), 30)


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_plain_python_over_several_columns(seed: int) -> None:
    rng = random.Random(seed)
    table = random_table(rng, rng.sample([*SCALARS, *LISTS], 5), 60)
    check_equal(rng, table, 100)
