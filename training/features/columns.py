"""A table column as model inputs: vocabularies, bags of values, hashed text, scaled numbers.

Each is fitted or configured once and then encodes the column of any table of the same kind. Row 0
of an embedding table means unknown: a null, a value that training has not seen, a list or a text
with nothing known in it. A row's *bag* is a list of embedding rows whose embeddings are averaged;
it is never empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shardline.shards.core.errors import DataError
from shardline.shards.core.ngrams import ngram_buckets
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.core.standardise import standardised, time_inputs
from shardline.training.data.csr import Csr
from shardline.training.data.tables import vector_matrix

ValueType = Literal["int", "string", "bool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """values[i] has row i + 1 of an embedding table of len(values) + 1 rows, each ``dim`` wide."""

    column: str
    kind: Literal["id", "categorical"]
    value_type: ValueType
    values: list[Any]  # ascending
    dim: int

    @property
    def rows(self) -> int:
        return len(self.values) + 1

    def encode(self, table: pa.Table, where: str) -> IdArray:
        """(n,) int64 embedding rows, 0 where the vocabulary lacks the value."""
        column = plain(column_of(table, self.column, where))
        if value_type(column.type) != self.value_type:
            raise wrong_type(where, self.column, self.value_type, column.type)
        return _embedding_rows(column, self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiVocabulary:
    """As a vocabulary, for lists of values: the first ``max_length`` known ones of each list."""

    column: str
    kind: Literal["multi_valued"]
    value_type: ValueType
    values: list[Any]  # ascending
    dim: int
    max_length: int

    @property
    def rows(self) -> int:
        return len(self.values) + 1

    def encode(self, table: pa.Table, where: str) -> Csr:
        """The bag of each row; [0] where the list has no known value."""
        lengths, values = list_values(column_of(table, self.column, where), where, self.column)
        if value_type(values.type) != self.value_type:
            raise wrong_type(where, self.column, f"lists of {self.value_type}", values.type)
        return _bags(_embedding_rows(values, self.values), lengths, self.max_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextHash:
    """Hashed n-grams of a text (``shards.core.ngrams``), over a table of ``buckets`` + 1 rows."""

    column: str
    kind: Literal["text"]
    dim: int
    buckets: int
    words: tuple[int, int] | None
    chars: tuple[int, int] | None
    max_ngrams: int

    @property
    def rows(self) -> int:
        return self.buckets + 1

    def encode(self, table: pa.Table, where: str) -> Csr:
        """The bag of each row; [0] where the text has no n-gram."""
        texts = strings(column_of(table, self.column, where), where, self.column)
        bags = [self._ngrams(text or "") for text in texts.to_pylist()]
        lengths = np.array([len(bag) for bag in bags], dtype=np.int64)
        flat = np.fromiter((row for bag in bags for row in bag), np.int64, int(lengths.sum()))
        return _bags(flat, lengths, self.max_ngrams)

    def _ngrams(self, text: str) -> list[int]:
        return ngram_buckets(
            text, buckets=self.buckets, words=self.words, chars=self.chars, limit=self.max_ngrams
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Standardiser:
    """What ``shards.core.standardise`` takes; ``router.encoder.inputs.Number`` is its twin.

    log: of log(1 + x). newest: of a time, in seconds since 1970; its age in days before then is
    what is scaled, and its place in ``cycles``. missing: set where the fitted column had missing
    values.
    """

    column: str
    log: bool
    vector: bool  # a list of numbers per row, even if it is a list of one
    mean: list[float]
    deviation: list[float]
    missing: bool = False
    newest: float | None = None
    cycles: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        return len(self.mean) + self.missing

    def encode(self, table: pa.Table, where: str) -> FloatArray:
        """(n, width) float32; DataError where a value is infinite, or negative under ``log``."""
        column = column_of(table, self.column, where)
        is_time = pa.types.is_timestamp(column.type)
        values = numbers(
            *(column, where, self.column), log=self.log, newest=self.newest, cycles=self.cycles
        )
        is_vector = pa.types.is_fixed_size_list(column.type)
        if (
            values.shape[1] != len(self.mean)
            or is_vector != self.vector
            or is_time != (self.newest is not None)
        ):
            expected = "a number" if self.newest is None else "a timestamp"
            if self.vector:
                expected = f"a vector of {len(self.mean)} numbers"
            raise wrong_type(where, self.column, expected, column.type)
        return standardised(values, self.mean, self.deviation, missing=self.missing)


Bag = MultiVocabulary | TextHash


def column_of(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    """The named column; DataError naming those there are."""
    if name not in table.column_names:
        raise DataError(
            "no such column",
            field=f"{where}: {name}",
            expected=f"one of {', '.join(table.column_names)}",
            hint="training.towers.*.features in the configuration name the columns",
        )
    return table[name]


def plain(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Dictionary-encoded columns as their values, large strings as strings."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return column.cast(pa.string() if pa.types.is_large_string(kind) else kind)


def strings(column: pa.ChunkedArray, where: str, name: str) -> pa.ChunkedArray:
    """The column as plain strings; DataError where it holds anything else."""
    texts = plain(column)
    if value_type(texts.type) != "string":
        raise wrong_type(where, name, "string", texts.type)
    return texts


def value_type(kind: pa.DataType) -> ValueType | None:
    """What a vocabulary over values of this type holds; None if it cannot have one."""
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int"
    return "string" if pa.types.is_string(kind) else None


def is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def is_list(kind: pa.DataType) -> bool:
    """Lists of any length; a fixed-size list is a vector of numbers."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def list_values(column: pa.ChunkedArray, where: str, name: str) -> tuple[IdArray, pa.Array]:
    """(n,) int64 lengths of the lists, a null as an empty one, and their values end to end."""
    if not is_list(column.type):
        raise wrong_type(where, name, "lists of integers or strings", column.type)
    lists = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64), plain(lists.flatten())


def numbers(
    column: pa.ChunkedArray,
    where: str,
    name: str,
    *,
    log: bool = False,
    newest: float | None = None,
    cycles: Sequence[str] = (),
) -> NDArray[np.float64]:
    """(n, width) float64 of numbers, times, or fixed-size lists of numbers; NaN where missing.

    Times are seconds since 1970 or, with ``newest``, as in ``time_inputs``. With ``log``, log(1 +
    x).

    Raises:
        DataError: another type; an infinity; a negative number under ``log``.
    """
    if is_number(column.type):
        # integers beyond 2^53 are rounded, as a quantity may be
        values: NDArray[np.float64] = column.cast(pa.float64(), safe=False).to_numpy()[:, None]
    elif pa.types.is_timestamp(column.type):
        ticks = column.cast(pa.timestamp("us")).cast(pa.int64()).cast(pa.float64(), safe=False)
        values = ticks.to_numpy()[:, None] / 1e6
        if newest is not None:
            return time_inputs(values, newest, cycles, log=log)
    elif pa.types.is_fixed_size_list(column.type):
        values = vector_matrix(column).astype(np.float64)
    else:
        raise wrong_type(where, name, "numbers, or fixed-size lists of them", column.type)
    _refuse(np.isinf(values), values, where, name, "finite numbers")
    if log:
        _refuse(values < 0, values, where, name, ">= 0, because log is set")
        return np.log1p(values)
    return values


def wrong_type(where: str, name: str, expected: str, got: pa.DataType) -> DataError:
    return DataError("wrong type", field=f"{where}: {name}", expected=expected, got=str(got))


def _refuse(
    bad: NDArray[np.bool_], values: NDArray[np.float64], where: str, name: str, expected: str
) -> None:
    rows, places = np.nonzero(bad)
    if len(rows):
        raise DataError(
            "number out of range",
            field=f"{where}: {name}[{rows[0]}]",
            expected=expected,
            got=str(values[rows[0], places[0]]),
        )


def _embedding_rows(column: pa.ChunkedArray | pa.Array, values: list[Any]) -> IdArray:
    found = pc.index_in(column, value_set=pa.array(values, type=column.type))
    rows: IdArray = pc.add(pc.fill_null(found, -1), 1).to_numpy().astype(np.int64)
    return rows


def _bags(rows: IdArray, lengths: IdArray, longest: int) -> Csr:
    """Lists of embedding rows without their zeros, cut to ``longest``; [0] where none is left."""
    owners = np.repeat(np.arange(len(lengths)), lengths)[rows > 0]
    known = rows[rows > 0]
    counts = np.bincount(owners, minlength=len(lengths))
    place = np.arange(len(known)) - np.repeat(np.cumsum(counts) - counts, counts)
    indptr = np.concatenate([[0], np.cumsum(np.clip(counts, 1, longest))]).astype(np.int64)
    out = np.zeros(indptr[-1], dtype=np.int64)
    kept = place < longest
    out[indptr[owners[kept]] + place[kept]] = known[kept]
    return Csr(indptr, out)
