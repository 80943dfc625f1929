"""Held-out interactions that a generation is measured with: a Parquet file, one query per row.

relevant    lists of item ids: what the query should find
known       lists of item ids, optional: left out of the results, as items that a user has had
a vector    column ``embedding``, ``emb`` or ``vector``; or a column per feature of the encoder
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardline.cluster.batch.query_files import VECTOR_COLUMNS, encoded, feature_values
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.errors import DataError, InvalidInput, NotFound
from shardline.shards.core.schema import FloatArray, IdArray, Metric, query_vectors
from shardline.shards.storage.column_types import Unusable, vector_column

MAX_QUERIES = 2000  # of a larger file so many rows are drawn: a standard error of .011 at most
RELEVANT, KNOWN = "relevant", "known"


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """relevant, known: of each query, item ids, each once. ``table`` has the queries."""

    name: str
    table: pa.Table
    relevant: tuple[IdArray, ...]
    known: tuple[IdArray, ...]

    @property
    def has_vectors(self) -> bool:
        return self._vector_column is not None

    @property
    def _vector_column(self) -> str | None:
        return next((name for name in VECTOR_COLUMNS if name in self.table.column_names), None)

    def vectors(
        self,
        encoder: QueryEncoder | None,
        *,
        dim: int,
        metric: Metric,
        takes_vectors: bool = True,
    ) -> FloatArray:
        """(n, dim) float32, ready for shards: of the features that the encoder takes, else of the
        vector column. takes_vectors: the file's vectors are of the encoder's model.

        Raises:
            DataError: neither is there, or a value cannot be used; file, column and row are named.
        """
        kinds = [] if encoder is None else [each["name"] for each in encoder.features]
        missing = [name for name in kinds if name not in self.table.column_names]
        if encoder is not None and not missing:
            found = encoded(
                encoder, self._features(kinds), lambda row, of: f"{self.name}: {of}[{row}]"
            )
            return query_vectors(found, dim=dim, metric=metric, field=self.name)
        column = self._vector_column if takes_vectors else None
        if column is None:
            raise DataError(
                "no queries",
                field=self.name,
                expected=_wanted(kinds, takes_vectors),
                got=", ".join(self.table.column_names),
            )
        try:
            matrix = vector_column(self.table[column].combine_chunks(), dim=dim)
            return query_vectors(matrix, dim=dim, metric=metric, field=column)
        except Unusable as why:
            raise DataError(
                "not usable as query vectors",
                field=f"{self.name}: {column}",
                expected=why.expected,
                got=why.got,
            ) from why
        except InvalidInput as error:
            raise DataError(
                error.message,
                field=f"{self.name}: {error.field}",
                expected=error.expected,
                got=error.got,
            ) from error

    def _features(self, names: list[str]) -> list[dict[str, Any]]:
        columns = [
            feature_values(self.name, 0, name, self.table[name].combine_chunks()) for name in names
        ]
        rows = zip(*columns, strict=True)
        return [dict(zip(names, values, strict=True)) for values in rows]


def _wanted(kinds: list[str], takes_vectors: bool) -> str:
    features = f"the features of the encoder ({', '.join(kinds)})" if kinds else ""
    vectors = f"a column {' | '.join(VECTOR_COLUMNS)}" if takes_vectors else ""
    given = " or ".join(each for each in (features, vectors) if each)
    return given or "a generation with an encoder: the models differ, and vectors are of one"


def read_held_out(path: Path, *, seed: int) -> HeldOut:
    """The queries of a file that have relevant items, at most MAX_QUERIES, drawn at random.

    Raises:
        NotFound: no such file. DataError: not Parquet, a column is missing or of another type, or
            no query has relevant items.
    """
    name = str(path)
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise NotFound(f"{name}: no such file", hint="publish.held_out names it") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: not a Parquet file", got=str(error).splitlines()[0]) from error
    relevant = _lists(name, table, RELEVANT)
    known = _lists(name, table, KNOWN) if KNOWN in table.column_names else None
    rows = np.flatnonzero([each.size > 0 for each in relevant])
    if not rows.size:
        raise DataError("nothing to measure", field=f"{name}: {RELEVANT}", got="no relevant item")
    if rows.size > MAX_QUERIES:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_QUERIES, replace=False))
    return HeldOut(
        name=name,
        table=table.take(pa.array(rows)),
        relevant=tuple(relevant[row] for row in rows),
        known=tuple(known[row] if known else np.empty(0, np.int64) for row in rows),
    )


def held_out_recall(found: IdArray, held_out: HeldOut, k: int) -> float:
    """Mean over queries of the relevant items among the first k results that are not known,
    divided by the relevant items. found (n, m): results, best first, -1 in empty slots."""
    shares = []
    for row, relevant, known in zip(found, held_out.relevant, held_out.known, strict=True):
        first = row[(row >= 0) & ~np.isin(row, known)][:k]
        wanted = np.setdiff1d(relevant, known)
        if wanted.size:
            shares.append(np.isin(wanted, first).mean())
    return float(np.mean(shares)) if shares else 0.0


def _lists(file: str, table: pa.Table, name: str) -> list[IdArray]:
    """Of each row the ids of a list column, each once; none for null."""
    if name not in table.column_names:
        raise DataError(
            "no such column", field=f"{file}: {name}", got=", ".join(table.column_names)
        )
    kind = table[name].type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (is_list and pa.types.is_integer(kind.value_type)):
        raise DataError(
            "not lists of item ids",
            field=f"{file}: {name}",
            expected="lists of integers",
            got=str(kind),
        )
    values = table[name].to_pylist()
    return [
        np.unique(np.array([i for i in row or () if i is not None], np.int64)) for row in values
    ]
