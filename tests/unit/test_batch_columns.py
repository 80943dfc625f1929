"""Attributes of results: gathered chunk by chunk, whatever their type and size."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline.cluster.batch.result_columns import _taken
from shardline.cluster.batch.spans import ATTRIBUTE_BYTES_PER_BLOCK, default_block_rows
from shardline.shards.core.errors import InvalidInput

GIB = 1 << 30


def chunked(values: list[object], kind: pa.DataType, cuts: list[int]) -> pa.ChunkedArray:
    starts = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    parts = [pa.array(values[a:b], kind) for a, b in pairwise(starts)]
    return pa.chunked_array(parts, kind)


@given(
    data=st.data(),
    values=st.lists(st.none() | st.text(max_size=3), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=4),
)
def test_rows_of_chunks_are_those_of_the_whole(
    data: st.DataObject, values: list[object], cuts: list[int]
) -> None:
    rows = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=30))
    found = _taken(chunked(values, pa.string(), cuts), np.array(rows, np.int64), "title")
    assert found.to_pylist() == [values[row] for row in rows]
    assert found.type == pa.string()


TYPES = {
    "dictionary": (["a", "b", None, "a"], pa.dictionary(pa.int32(), pa.string())),
    "list": ([[1, 2], [], None, [3]], pa.list_(pa.int64())),
    "vector": ([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], pa.list_(pa.float32(), 2)),
    "time": ([1, 2, None, 4], pa.timestamp("us", "UTC")),
}


@pytest.mark.parametrize(("values", "kind"), TYPES.values(), ids=TYPES)
def test_every_type_is_gathered(values: list[object], kind: pa.DataType) -> None:
    column = chunked(values, kind, [1, 3])
    found = _taken(column, np.array([3, 0, 2, 2, 1]), "x")
    everything = column.to_pylist()
    assert found.to_pylist() == [everything[row] for row in (3, 0, 2, 2, 1)]
    assert found.type == kind


def column_of_3_gib() -> pa.ChunkedArray:
    """Rows 0, 2 and 4 are texts of 1 GiB, of memory that is never touched; the others of a byte."""
    data = pa.py_buffer(np.zeros(GIB + 1, np.uint8))
    offsets = pa.py_buffer(np.array([0, GIB, GIB + 1], np.int32))
    return pa.chunked_array([pa.StringArray.from_buffers(2, offsets, data)] * 3)


def test_a_column_above_2_gib_is_no_obstacle() -> None:
    found = _taken(column_of_3_gib(), np.array([5, 1, 3, 1]), "text")
    assert found.to_pylist() == ["\0"] * 4


def test_values_above_2_gib_are_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidInput, match=r"--return text.*2 GiB.*--block-rows"):
        _taken(column_of_3_gib(), np.array([0, 0, 0]), "text")


@pytest.mark.parametrize(("k", "size", "rows"), [(100, 0, 8192), (100, 100, 4096), (1000, 1e5, 1)])
def test_blocks_are_smaller_for_long_attributes(k: int, size: float, rows: int) -> None:
    assert default_block_rows(k, size) == rows
    assert rows == 1 or rows * k * size <= ATTRIBUTE_BYTES_PER_BLOCK
