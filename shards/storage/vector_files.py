"""Arrow IPC files of vectors: the columns that embedding sets, spills and query samples share.

    item_id     int64
    embedding   fixed_size_list<float32>[dim]
    ...         the catalogue's attribute columns

The IPC *stream* format is not used: cut at a message boundary, it reads as a shorter table.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shardline.shards.core.errors import CorruptFile, InvalidInput
from shardline.shards.core.files import atomic_path
from shardline.shards.core.schema import FloatArray, IdArray

ROWS_PER_BATCH = 1 << 16  # 32 MB at 128 dimensions
QUERIES_NAME = "queries.arrow"
MAX_SAMPLE_QUERIES = 2_000


def item_batch(
    item_ids: IdArray, vectors: FloatArray, attributes: pa.RecordBatch | None
) -> pa.RecordBatch:
    """item_ids (n,), vectors (n, dim) and the attributes of n rows, ``plain``, as one batch.

    Raises as ``plain``.
    """
    columns = {"item_id": pa.array(item_ids), "embedding": vector_array(vectors)}
    if attributes is not None:
        attributes = plain(attributes)
        columns |= zip(attributes.schema.names, attributes.columns, strict=True)
    return pa.RecordBatch.from_pydict(columns)


def plain(attributes: pa.RecordBatch) -> pa.RecordBatch:
    """The columns in the types that every part of a corpus can share and rows can be picked from.

    Dictionaries are decoded, since parts of a corpus come with dictionaries of their own and an IPC
    file takes only one; so are runs. Views become text and bytes with 64-bit offsets.

    Raises:
        InvalidInput: one of these types inside a list or a struct.
    """
    columns = []
    for field, column in zip(attributes.schema, attributes.columns, strict=True):
        if pa.types.is_run_end_encoded(field.type):
            column = pc.run_end_decode(column)
        kind = _plain_type(column.type)
        columns.append(column if column.type == kind else column.cast(kind))
        if any(map(_is_encoded, _inner_types(columns[-1].type))):
            raise InvalidInput(
                "an attribute's type cannot be stored",
                field=field.name,
                expected="no dictionaries, runs or views inside lists and structs",
                got=str(field.type),
            )
    return pa.RecordBatch.from_arrays(columns, names=attributes.schema.names)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _plain_type(kind.value_type)
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return views.get(kind, kind)


def _is_encoded(kind: pa.DataType) -> bool:
    return bool(_plain_type(kind) != kind)


def _inner_types(kind: pa.DataType) -> Iterator[pa.DataType]:
    for index in range(kind.num_fields):
        inner = kind.field(index).type
        yield inner
        yield from _inner_types(inner)


def vector_array(vectors: FloatArray) -> pa.FixedSizeListArray:
    """(n, dim) float32 as fixed_size_list<float32>[dim]."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def vector_matrix(column: pa.FixedSizeListArray, dim: int) -> FloatArray:
    """(n, dim) float32, a read-only view of the column."""
    matrix: FloatArray = column.flatten().to_numpy().reshape(-1, dim)
    return matrix


def open_ipc(path: Path) -> Any:
    """The reader of an Arrow IPC file, mapped; CorruptFile where it is none."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except (pa.ArrowException, OSError) as error:
        raise CorruptFile(f"{path}: not an Arrow IPC file", got=str(error)) from error


def write_table(path: Path, table: pa.Table) -> None:
    """Writes an Arrow IPC file, complete or not at all."""
    with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
        writer.write_table(table, max_chunksize=ROWS_PER_BATCH)


def write_queries(path: Path, queries: FloatArray) -> None:
    """Writes (n, dim) float32 sample queries: one column, ``embedding``."""
    write_table(path, pa.table({"embedding": vector_array(queries)}))


def read_queries(path: Path, *, dim: int) -> FloatArray:
    """(n, dim) float32 sample queries of a file whose checksum has been verified.

    Raises:
        CorruptFile: not such a file, or of another dimension.
    """
    table = open_ipc(path).read_all()
    if table.schema != pa.schema({"embedding": pa.list_(pa.float32(), dim)}):
        raise CorruptFile(
            f"{path}: wrong columns",
            expected=f"embedding, {dim} float32 values per row",
            got=str(table.schema),
        )
    return vector_matrix(table["embedding"].combine_chunks(), dim)
