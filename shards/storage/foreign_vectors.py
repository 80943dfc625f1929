"""Vectors of someone else's: Parquet and Arrow files with an id and a vector column.

``read_foreign`` yields checked batches, and an ``EmbeddingWriter`` makes an embedding set of them.
Types and ids of the whole corpus are known before its first vector is read: one pass over the ids
alone, then one over the rest, a batch at a time. What is refused is a DataError that names the
file, the user's column, and the row of the file.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shardline.shards.core.errors import DataError, InvalidInput
from shardline.shards.core.schema import ORIGINAL_ID, FloatArray, Metric, check_vectors
from shardline.shards.storage.column_types import (
    LIBRARY_ERRORS,
    Unusable,
    first_line,
    vector_column,
)
from shardline.shards.storage.embedding_set import EmbeddingBatch, as_data_error
from shardline.shards.storage.foreign_ids import read_ids
from shardline.shards.storage.table_parts import Part, open_parts, pandas_index, unified_types
from shardline.shards.storage.vector_files import MAX_SAMPLE_QUERIES, plain

ID_COLUMNS = ("item_id", "id", "idx")  # names looked for, in this order
VECTOR_COLUMNS = ("embedding", "emb", "vector")
# columns of an embedding set, the last of ids that were numbered: no attribute can be called so
RESERVED = ("item_id", "embedding", ORIGINAL_ID)


@dataclass(frozen=True, slots=True)
class _Source:
    """A part with rows, and what its columns are."""

    part: Part
    id_name: str
    vector_name: str
    attributes: list[str]


def read_foreign(
    paths: Iterable[object],
    *,
    metric: Metric = Metric.DOT,
    id_column: str | None = None,
    vector_column: str | None = None,
) -> Iterator[EmbeddingBatch]:
    """Batches of Parquet or Arrow files of someone else's, converted to int64 and float32.

    paths: files, folders of part files, or URLs. Unnamed columns are looked for among ID_COLUMNS
    and VECTOR_COLUMNS; all others become attributes, in types that hold those of every part. Ids
    that are no integers from 0 up are numbered, and ORIGINAL_ID keeps them (``foreign_ids``).

    Raises:
        NotFound: no such file. InvalidInput: one column as id and vector, or a URL of an unknown
        kind. DataError: unreadable; a column is missing, occurs twice, is called as one of ours, or
            has a type unlike that of another part; ids that are null or occur twice; vectors that
            are null, of different lengths, not finite, or zero under cosine.
    """
    if id_column and id_column == vector_column:
        raise InvalidInput(
            "one column as id and as vector", field="--vector-column", got=repr(vector_column)
        )
    parts = open_parts(paths, option="--vectors")
    sources = [_source(each, id_column, vector_column) for each in parts if not each.is_empty]
    ids = read_ids([(source.part, source.id_name) for source in sources])
    types = unified_types((each.part.path, _stored(each)) for each in sources)
    dim, row = None, 0
    for source in sources:
        part, name = source.part, source.vector_name
        for start, batch in part.batches([name, *source.attributes]):
            vectors = _vectors(batch.column(0), part, name, start, dim, metric)
            count, dim = vectors.shape
            attributes = _attributes(batch.select(source.attributes), types, part)
            if ids.originals is not None:
                originals = ids.originals.slice(row, count).combine_chunks()
                attributes = pa.RecordBatch.from_arrays(
                    [*attributes.columns, originals], [*attributes.schema.names, ORIGINAL_ID]
                )
            yield EmbeddingBatch(ids.numbers[row : row + count], vectors, attributes)
            row += count


def read_foreign_queries(
    paths: Iterable[object],
    *,
    dim: int,
    metric: Metric = Metric.DOT,
    vector_column: str | None = None,
    seed: int = 0,
) -> FloatArray:
    """(n, dim) float32 sample queries: all vectors of such files, or MAX_SAMPLE_QUERIES of them.

    No id column is needed, and the vector column may be called as that of the items or as one of
    VECTOR_COLUMNS. Which of too many are taken depends on the seed alone.

    Raises:
        NotFound, DataError: as ``read_foreign``.
    """
    paths = list(paths)
    parts = [np.empty((0, dim), np.float32)]
    for part in open_parts(paths, option="--queries"):
        if part.is_empty:
            continue
        name = _find_column(part, (*filter(None, [vector_column]), *VECTOR_COLUMNS))
        for start, batch in part.batches([name]):
            parts.append(_vectors(batch.column(0), part, name, start, dim, metric))
    queries = np.concatenate(parts)
    if not len(queries):
        raise DataError("no rows", field=", ".join(map(str, paths)), expected="at least one vector")
    most = min(len(queries), MAX_SAMPLE_QUERIES)
    chosen = np.random.default_rng(seed).choice(len(queries), most, replace=False)
    sample: FloatArray = queries[np.sort(chosen)]
    return sample


def _source(part: Part, id_column: str | None, vector_column: str | None) -> _Source:
    id_name = id_column_of(part, id_column)
    vector_name = _find_column(part, (vector_column,) if vector_column else VECTOR_COLUMNS)
    unused = {id_name, vector_name, *pandas_index(part.schema)}
    source = _Source(part, id_name, vector_name, [n for n in part.schema.names if n not in unused])
    _refuse_names(RESERVED, [source], "Shardline calls a column of its own so")
    return source


def id_column_of(part: Part, id_column: str | None) -> str:
    """The column of that name, or the first of ID_COLUMNS. Raises DataError: there is none."""
    return _find_column(part, (id_column,) if id_column else ID_COLUMNS)


def _find_column(part: Part, known: tuple[str, ...]) -> str:
    found = [name for name in known if name in part.schema.names]
    if not found:
        raise DataError(
            "no such column",
            field=f"{part.path}: {' | '.join(known)}",
            got=", ".join(part.schema.names),
            hint="name the column with --id-column or --vector-column",
        )
    return found[0]


def _refuse_names(names: tuple[str, ...], sources: list[_Source], reason: str) -> None:
    for source in sources:
        for name in names:
            if name in source.attributes:
                where = f"{source.part.path}: {name}"
                raise DataError(
                    "column name is taken", field=where, hint=f"{reason}: rename it in the source"
                )


def _stored(source: _Source) -> pa.Schema:
    """The types in which a part's attributes are stored, before those of other parts are known."""
    columns = [pa.nulls(0, source.part.schema.field(name).type) for name in source.attributes]
    return _plain(pa.RecordBatch.from_arrays(columns, source.attributes), source.part).schema


def _plain(attributes: pa.RecordBatch, part: Part) -> pa.RecordBatch:
    try:
        return plain(attributes)
    except InvalidInput as error:
        raise as_data_error(error, part.path) from error
    except LIBRARY_ERRORS as error:
        raise DataError(
            "attributes that cannot be stored", field=part.path, got=first_line(error)
        ) from error


def _attributes(batch: pa.RecordBatch, types: dict[str, pa.DataType], part: Part) -> pa.RecordBatch:
    """One column per type, null where the batch has none."""
    found = _plain(batch, part)
    columns = []
    for name, kind in types.items():
        column = found.column(name) if name in found.schema.names else None
        try:
            if column is None:
                column = pa.nulls(batch.num_rows, kind)
            elif column.type != kind:
                column = column.cast(kind)
        except LIBRARY_ERRORS as error:
            raise DataError(
                "part files disagree",
                field=f"{part.path}: {name}",
                expected=f"values that fit {kind}, the type that holds those of all parts",
                got=f"{part.schema.field(name).type}: {first_line(error)}",
            ) from error
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, list(types))


def _vectors(
    column: pa.Array, part: Part, name: str, start: int, dim: int | None, metric: Metric
) -> FloatArray:
    """(n, dim) float32, checked; any dimension where dim is None. start: the row of the first."""
    try:
        matrix = vector_column(column, dim=dim)
        return check_vectors(
            matrix, dim=matrix.shape[1], metric=metric, field=name, first_row=start
        )
    except Unusable as why:
        row = "" if why.row is None else f"[{start + why.row}]"
        raise DataError(
            "not usable as vectors",
            field=f"{part.path}: {name}{row}",
            expected=why.expected,
            got=why.what,
        ) from why
    except InvalidInput as error:
        raise as_data_error(error, part.path) from error
