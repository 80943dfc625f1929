"""Queries from files: an id column beside a vector column, or beside the features of the encoder.

Types, columns and row counts of all files are known before the first query is read; a query that
cannot be used is a DataError that names the file, the column and the row of the file.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shardline.cluster.batch.queries import Queries, cut
from shardline.cluster.batch.spans import Span
from shardline.cluster.batch.unchanged_file import File
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.errors import DataError, InvalidInput
from shardline.shards.core.schema import FloatArray, Metric, check_vectors, normalise
from shardline.shards.storage.column_types import (
    LIBRARY_ERRORS,
    Unusable,
    feature_column,
    first_line,
    vector_column,
)
from shardline.shards.storage.embedding_set import as_data_error
from shardline.shards.storage.table_parts import unified_types

ID_COLUMNS = ("query_id", "user_id", "item_id", "id", "idx")  # names looked for, in this order
VECTOR_COLUMNS = ("embedding", "emb", "vector")
ENCODED_ROWS = 1024  # features encoded at once: their Python values take a kilobyte per query
FIELD = re.compile(r"features\[(\d+)\](?:\.(.*))?")  # as QueryEncoder names what it refuses


class _FileQueries(ABC):
    """Rows of files, one query each; subclasses say what a row is."""

    drops_own = False

    def __init__(self, files: Sequence[File], id_column: str | None, columns: list[str]) -> None:
        self._files = list(files)
        self._sizes = [file.rows for file in files]
        self._columns = columns
        self._id_column = _id_column(self._files, id_column)
        self.rows = sum(self._sizes)
        if not self.rows:
            names = ", ".join(file.name for file in files)
            raise DataError("no rows", field=names, expected="at least one query")
        self.id_type: pa.DataType = pa.int64()
        if self._id_column is not None:
            name = self._id_column
            kinds = unified_types(
                ((file.name, pa.schema([file.part.schema.field(name)])) for file in files),
                hint="write the ids of all files with one type",
            )
            self.id_type = _decoded(kinds[name])

    @property
    def unused(self) -> list[str]:
        """Columns of the first file that are neither id nor query."""
        used = {self._id_column, *self._columns}
        return [name for name in self._files[0].part.schema.names if name not in used]

    def place(self, start: int, row: int, field: str) -> str:
        """The user's name for a value of query ``start + row``."""
        row += start
        for file, size in zip(self._files, self._sizes, strict=True):
            if row < size:
                return f"{file.name}: {field}[{row}]"
            row -= size
        raise AssertionError(f"no query {start + row}")

    def _identity(self, kind: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "sha256": [file.sha256 for file in self._files],
            "id_column": self._id_column,
            "columns": self._columns,
            "folder_values": self._folder_values(),
        }

    def _folder_values(self) -> dict[str, list[Any]]:
        """Of each column that a folder brings: its value for each file, None for one without."""
        used = [name for name in (self._id_column, *self._columns) if name is not None]
        named = {name for file in self._files for name in file.part.folder_values}
        return {
            name: [
                file.part.folder_values[name].as_py() if name in file.part.folder_values else None
                for file in self._files
            ]
            for name in dict.fromkeys(used)
            if name in named
        }

    def read(self, spans: Iterable[Span]) -> Iterator[tuple[Span, Queries]]:
        yield from cut(spans, self._pieces)

    def _pieces(self, start: int) -> Iterator[Queries]:
        ends = list(accumulate(self._sizes))
        ids = [] if self._id_column is None else [self._id_column]
        columns = list(dict.fromkeys([*ids, *self._columns]))
        for file, size, end in zip(self._files, self._sizes, ends, strict=True):
            if end <= start:
                continue
            first = max(0, start - (end - size))
            for row, batch in file.batches(columns, first):
                yield self._queries(file, row, end - size, batch)

    @abstractmethod
    def _queries(self, file: File, row: int, before: int, batch: pa.RecordBatch) -> Queries:
        """row: of the file, that the batch starts with; before: rows of the files before it."""

    def _ids(self, file: File, row: int, before: int, batch: pa.RecordBatch) -> pa.Array:
        if self._id_column is None:
            start = before + row
            return pa.array(np.arange(start, start + batch.num_rows))
        column = batch.column(self._id_column)
        try:
            return column if column.type == self.id_type else column.cast(self.id_type)
        except LIBRARY_ERRORS as error:
            raise DataError(
                "part files disagree",
                field=f"{file.name}: {self._id_column}",
                expected=f"values that fit {self.id_type}, the type that holds those of all files",
                got=first_line(error),
            ) from error


class VectorFiles(_FileQueries):
    """Queries that are vectors already."""

    def __init__(
        self,
        files: Sequence[File],
        *,
        dim: int,
        metric: Metric,
        id_column: str | None = None,
        vector_column: str | None = None,
    ) -> None:
        """Unnamed columns are looked for among ID_COLUMNS and VECTOR_COLUMNS; without an id column
        rows are numbered from 0.

        Raises:
            DataError: a column is missing, or no rows.
        """
        names = (vector_column,) if vector_column else VECTOR_COLUMNS
        self._name = _column_of_all(files, names)
        self._dim, self._metric = dim, metric
        super().__init__(files, id_column, [self._name])
        self._check_first()

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity("vectors")

    def _check_first(self) -> None:
        """Most wrong files are wrong in their first row: said before anything is loaded."""
        for _ in self.read([Span(0, 0, 1)]):
            return

    def _queries(self, file: File, row: int, before: int, batch: pa.RecordBatch) -> Queries:
        ids = self._ids(file, row, before, batch)
        return Queries(ids=ids, vectors=self._vectors(file, row, batch.column(self._name)))

    def _vectors(self, file: File, row: int, column: pa.Array) -> FloatArray:
        try:
            matrix = vector_column(column, dim=self._dim)
            checked = check_vectors(
                matrix, dim=self._dim, metric=self._metric, field=self._name, first_row=row
            )
        except Unusable as why:
            place = "" if why.row is None else f"[{row + why.row}]"
            raise DataError(
                "not usable as query vectors",
                field=f"{file.name}: {self._name}{place}",
                expected=why.expected.replace("as the others", "as this generation has"),
                got=why.what,
            ) from why
        except InvalidInput as error:
            raise as_data_error(error, file.name) from error
        # always, not only where a length is not one: a row must not depend on those read with it
        return normalise(checked) if self._metric is Metric.COSINE else checked


class IdFiles(_FileQueries):
    """Queries that are known by their ids alone."""

    def __init__(self, files: Sequence[File], *, id_column: str | None = None) -> None:
        """Raises DataError: no id column, or no rows."""
        name = _column_of_all(files, (id_column,) if id_column else ID_COLUMNS)
        super().__init__(files, name, [])

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity("ids")

    def texts(self) -> Iterator[str | None]:
        """Each id as text.

        Raises:
            DataError: ids that are no numbers and no texts, such as lists, or bytes that are none.
        """
        for piece in self._pieces(0):
            try:
                yield from piece.ids.cast(pa.string()).to_pylist()
            except LIBRARY_ERRORS as error:
                raise DataError(
                    "not usable as ids of users",
                    field=", ".join(f"{file.name}: {self._id_column}" for file in self._files),
                    expected="numbers or texts",
                    got=f"{self.id_type}: {first_line(error)}",
                ) from error

    def name_of(self, row: int) -> str:
        """The user's name for the id of a query."""
        return self.place(0, row, self._id_column or "")

    def _queries(self, file: File, row: int, before: int, batch: pa.RecordBatch) -> Queries:
        return Queries(ids=self._ids(file, row, before, batch))


class FeatureFiles(_FileQueries):
    """Queries that are features of users: a column for each that the query encoder takes."""

    def __init__(
        self,
        files: Sequence[File],
        *,
        kinds: dict[str, str],
        encoder: Path | None,
        id_column: str | None = None,
    ) -> None:
        """kinds: name -> kind of the encoder's features. encoder: its folder; None: they are sent
        as they are, and a live cluster encodes them.

        Raises:
            DataError: a feature that no column brings, or no rows.
        """
        for name in kinds:
            _column_of_all(files, (name,), hint=f"the encoder takes {', '.join(kinds)}")
        self._kinds = kinds
        self._folder = encoder
        self._encoder: QueryEncoder | None = None
        super().__init__(files, id_column, list(kinds))

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity("features")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_encoder": None}  # each process maps its own

    def read(self, spans: Iterable[Span]) -> Iterator[tuple[Span, Queries]]:
        if self._folder is not None and self._encoder is None:
            self._encoder = QueryEncoder.load(self._folder)
        for span, queries in super().read(spans):
            if self._encoder is None or queries.features is None:
                yield span, queries
                continue
            # whole blocks: the last bits of a matrix product depend on its number of rows
            vectors = encoded(self._encoder, queries.features, partial(self.place, span.start))
            yield span, Queries(ids=queries.ids, vectors=vectors)

    def _queries(self, file: File, row: int, before: int, batch: pa.RecordBatch) -> Queries:
        ids = self._ids(file, row, before, batch)
        columns = {
            name: feature_values(file.name, row, name, batch.column(name)) for name in self._kinds
        }
        features = [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
        return Queries(ids=ids, features=features)


def encoded(
    encoder: QueryEncoder, features: list[dict[str, Any]], where: Callable[[int, str], str]
) -> FloatArray:
    """(n, dim) float32. where(place, feature): the user's name for a value.

    Raises:
        DataError: a value that the encoder refuses.
    """
    vectors = []
    for start in range(0, len(features), ENCODED_ROWS):
        try:
            vectors.append(encoder.encode(features[start : start + ENCODED_ROWS]))
        except InvalidInput as error:
            found = FIELD.fullmatch(error.field or "")
            if found is None:
                raise
            place = where(start + int(found[1]), found[2] or "")
            raise DataError(
                error.message, field=place, expected=error.expected, got=error.got
            ) from error
    return np.concatenate(vectors)


def _id_column(files: Sequence[File], named: str | None) -> str | None:
    if named is not None:
        return _column_of_all(files, (named,))
    first = next((name for name in ID_COLUMNS if name in files[0].part.schema.names), None)
    return None if first is None else _column_of_all(files, (first,))


def _column_of_all(
    files: Sequence[File],
    names: Sequence[str],
    hint: str = "name the column with --id-column or --vector-column",
) -> str:
    """The first of the names that the first file has; all files must have it."""
    found: str | None = None
    for file in files:
        known = file.part.schema.names
        found = next((name for name in ((found,) if found else names) if name in known), None)
        if found is None:
            raise DataError(
                "no such column",
                field=f"{file.name}: {' | '.join(names)}",
                got=", ".join(known),
                hint=hint,
            )
    assert found is not None
    return found


def _decoded(kind: pa.DataType) -> pa.DataType:
    """Of ids that are dictionaries: those of part files differ."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def feature_values(file: str, row: int, name: str, column: pa.Array) -> list[Any]:
    """As a query brings them: plain values, times in seconds since 1970. row: of the file, that the
    column starts with.

    Raises:
        DataError: a type or a value that no feature takes; file, column and row are named.
    """
    try:
        plain = feature_column(pa.chunked_array([column]))
    except Unusable as why:
        place = "" if why.row is None else f"[{row + why.row}]"
        raise DataError(
            "not usable as a feature",
            field=f"{file}: {name}{place}",
            expected=why.expected,
            got=why.what,
        ) from why
    if pa.types.is_timestamp(plain.type):
        ticks = plain.cast(pa.timestamp("us")).cast(pa.int64()).cast(pa.float64(), safe=False)
        plain = pc.divide(ticks, 1e6)
    return list(plain.to_pylist())
