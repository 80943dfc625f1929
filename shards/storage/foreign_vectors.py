"""Vectors of someone else's: Parquet and Arrow IPC files with an id and a vector column.

``read_foreign`` yields checked batches, and an ``EmbeddingWriter`` makes an embedding set of them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shardline.shards.core.errors import DataError, InvalidInput, NotFound
from shardline.shards.core.schema import FloatArray, IdArray, Metric, check_ids, check_vectors
from shardline.shards.storage.embedding_set import EmbeddingBatch, as_data_error
from shardline.shards.storage.vector_files import MAX_SAMPLE_QUERIES, ROWS_PER_BATCH

ID_COLUMNS = ("item_id", "id", "idx")  # names looked for, in this order
VECTOR_COLUMNS = ("embedding", "emb", "vector")


def read_foreign(
    paths: Iterable[Path], *, id_column: str | None = None, vector_column: str | None = None
) -> Iterator[EmbeddingBatch]:
    """Batches of Parquet or Arrow IPC files of someone else's, converted to int64 and float32.

    A folder stands for its .parquet, .arrow and .feather files, sorted. Unnamed columns are looked
    for among ID_COLUMNS and VECTOR_COLUMNS; all others become attributes.

    Raises:
        NotFound: no such file. DataError: unreadable, a column is missing, of a wrong type, or
            holds nulls; vectors of different lengths; a value that is not finite.
    """
    dim: int | None = None
    for path in _foreign_files(paths):
        for batch in _foreign_batches(path):
            names = batch.schema.names
            id_name = _find_column(names, id_column, ID_COLUMNS, path)
            vector_name = _find_column(names, vector_column, VECTOR_COLUMNS, path)
            vectors = _foreign_vectors(batch, vector_name, path, dim)
            dim = vectors.shape[1]
            ids = _foreign_ids(batch.column(id_name), path, id_name)
            rest = batch.select([n for n in names if n not in (id_name, vector_name)])
            yield EmbeddingBatch(ids, vectors, rest)


def read_foreign_queries(paths: Iterable[Path], *, dim: int, seed: int = 0) -> FloatArray:
    """(n, dim) float32 sample queries: all vectors of such files, or MAX_SAMPLE_QUERIES of them.

    No id column is needed. Which of too many are taken depends on the seed alone.

    Raises:
        NotFound, DataError: as ``read_foreign``.
    """
    parts = [np.empty((0, dim), np.float32)]
    for path in _foreign_files(paths):
        for batch in _foreign_batches(path):
            name = _find_column(batch.schema.names, None, VECTOR_COLUMNS, path)
            parts.append(_foreign_vectors(batch, name, path, dim))
    queries = np.concatenate(parts)
    if not len(queries):
        raise DataError("no rows", field=", ".join(map(str, paths)), expected="at least one vector")
    most = min(len(queries), MAX_SAMPLE_QUERIES)
    chosen = np.random.default_rng(seed).choice(len(queries), most, replace=False)
    sample: FloatArray = queries[np.sort(chosen)]
    return sample


def _foreign_files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            found = [p for p in path.iterdir() if p.suffix in (".parquet", ".arrow", ".feather")]
            if not found:
                raise NotFound(f"{path}: no .parquet, .arrow or .feather file in it")
            yield from sorted(found)
        elif path.is_file():
            yield path
        else:
            raise NotFound(f"{path}: no such file or folder")


def _foreign_batches(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                yield from (b for b in file.iter_batches(ROWS_PER_BATCH) if b.num_rows)
        else:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            for index in range(reader.num_record_batches):
                if reader.get_batch(index).num_rows:
                    yield reader.get_batch(index)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not readable", expected="Parquet, or Arrow IPC file format", got=str(error)
        ) from error


def _find_column(names: list[str], named: str | None, known: tuple[str, ...], path: Path) -> str:
    found = [name for name in ((named,) if named else known) if name in names]
    if not found:
        raise DataError(
            "no such column",
            field=f"{path}: {named or ' | '.join(known)}",
            expected=f"one of {', '.join(names)}",
            hint="name the column with --id-column or --vector-column",
        )
    return found[0]


def _foreign_ids(column: pa.Array, path: Path, name: str) -> IdArray:
    if not pa.types.is_integer(column.type) or column.null_count:
        got = f"{column.null_count} nulls" if column.null_count else str(column.type)
        raise DataError("not ids", field=f"{path}: {name}", expected="integers", got=got)
    try:
        return check_ids(column.to_numpy(zero_copy_only=False), field=name)
    except InvalidInput as error:
        raise as_data_error(error, path) from error


def _foreign_vectors(batch: pa.RecordBatch, name: str, path: Path, dim: int | None) -> FloatArray:
    """(n, dim) float32, finite; any dimension where dim is None."""
    column = batch.column(name)
    kind, where = column.type, f"{path}: {name}"
    is_list = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    if not is_list or not (
        pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)
    ):
        raise DataError("not vectors", field=where, expected="lists of numbers", got=str(kind))
    flat = column.flatten()
    if column.null_count or flat.null_count:
        raise DataError("missing values", field=where, expected="no nulls")
    width, rest = divmod(len(flat), len(column))
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    if rest or width == 0 or (lengths != width).any():
        got = f"lengths from {lengths.min()} to {lengths.max()}"
        raise DataError("vectors differ in length", field=where, expected="one length", got=got)
    matrix = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    try:
        return check_vectors(matrix, dim=dim or width, metric=Metric.DOT, field=name)
    except InvalidInput as error:
        raise as_data_error(error, path) from error
