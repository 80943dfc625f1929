"""From table columns to model inputs: vocabularies and standardisation, fitted once.

``fit`` computes them from a dataset; ``Columns.encode`` turns a table into a ``Block``. Row 0 of an
embedding table means unknown: a value that training has not seen. A new kind of feature starts
here, gets its configuration in ``training.config`` and its serving side in ``router.encoder``.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.errors import DataError
from shards.schema import FloatArray, IdArray
from training.config import (
    CategoricalFeature,
    FeatureConfig,
    HistoryFeature,
    IdFeature,
    NumericFeature,
    TrainingConfig,
)
from training.tables import ITEMS, USERS, Dataset, vector_matrix

MIN_DEVIATION = 1e-6  # a constant column becomes zeros instead of a division by zero

ValueType = Literal["int", "string", "bool"]


@dataclass(frozen=True, slots=True)
class Block:
    """n input rows: categorical (n, C) int64 embedding rows, numeric (n, F) float32."""

    categorical: IdArray
    numeric: FloatArray

    def take(self, rows: IdArray) -> "Block":
        return Block(self.categorical[rows], self.numeric[rows])

    def __len__(self) -> int:
        return len(self.numeric)


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
        column = plain(_column(table, self.column, where))
        if value_type(column.type) != self.value_type:
            raise _wrong_type(where, self.column, self.value_type, column.type)
        found = pc.index_in(column, value_set=pa.array(self.values, type=column.type))
        return pc.add(pc.fill_null(found, -1), 1).to_numpy().astype(np.int64)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standardiser:
    """(x - mean) / deviation per component, after log(1 + x) where ``log`` is set."""

    column: str
    log: bool
    vector: bool  # a list of numbers per row, even if it is a list of one
    mean: list[float]
    deviation: list[float]

    @property
    def width(self) -> int:
        return len(self.mean)

    def encode(self, table: pa.Table, where: str) -> FloatArray:
        """(n, width) float32."""
        column = _column(table, self.column, where)
        values = numbers(column, where, self.column)
        if values.shape[1] != self.width or pa.types.is_fixed_size_list(column.type) != self.vector:
            expected = f"a vector of {self.width} numbers" if self.vector else "a number"
            raise _wrong_type(where, self.column, expected, column.type)
        values = _log1p(values, where, self.column) if self.log else values
        scaled = (values - np.asarray(self.mean)) / np.asarray(self.deviation)
        return np.asarray(scaled, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The fitted columns of one tower. An input row is its embeddings, then its numbers."""

    vocabularies: tuple[Vocabulary, ...]
    standardisers: tuple[Standardiser, ...]

    @property
    def width(self) -> int:
        """Width of an input row."""
        embedded = sum(vocabulary.dim for vocabulary in self.vocabularies)
        return embedded + sum(standardiser.width for standardiser in self.standardisers)

    def encode(self, table: pa.Table, where: str) -> Block:
        """The table's rows as model inputs, in order. ``where`` names the table in errors.

        Raises:
            DataError: a column is missing, or has another type than when it was fitted.
        """
        categorical = np.empty((table.num_rows, len(self.vocabularies)), np.int64)
        for place, vocabulary in enumerate(self.vocabularies):
            categorical[:, place] = vocabulary.encode(table, where)
        numeric = [s.encode(table, where) for s in self.standardisers]
        return Block(
            categorical, np.concatenate([np.empty((table.num_rows, 0), np.float32), *numeric], 1)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpace:
    """Everything fitted, for both towers; plain JSON on disk."""

    query: Columns
    item: Columns
    history: HistoryFeature | None

    def to_json(self) -> dict[str, Any]:
        history = self.history.model_dump() if self.history else None
        return {"query": asdict(self.query), "item": asdict(self.item), "history": history}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "FeatureSpace":
        history = content["history"]
        return cls(
            query=_columns_from_json(content["query"]),
            item=_columns_from_json(content["item"]),
            history=HistoryFeature(**history) if history else None,
        )


def fit(config: TrainingConfig, dataset: Dataset) -> FeatureSpace:
    """Vocabularies of what occurs in the train split; statistics of numbers over the whole table.

    Raises:
        DataError: a configured column is missing, or of a type that its kind cannot take.
    """
    train = dataset.interactions("train")
    query, item = config.towers.query.features or (), config.towers.item.features or ()
    history = next((f for f in query if isinstance(f, HistoryFeature)), None)
    return FeatureSpace(
        query=_fit_columns(query, dataset.users(), USERS, train["user_id"]),
        item=_fit_columns(item, dataset.items(), ITEMS, train["item_id"]),
        history=history,
    )


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dictionary-encoded columns as their values, large strings as strings."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return column.cast(pa.string() if pa.types.is_large_string(kind) else kind)


def value_type(kind: pa.DataType) -> ValueType | None:
    """What a vocabulary over a column of this type holds; None if it cannot have one."""
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int"
    return "string" if pa.types.is_string(kind) else None


def is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def numbers(column: pa.ChunkedArray, where: str, name: str) -> NDArray[np.float64]:
    """(n, width) float64 of a column of numbers or of fixed-size lists of them."""
    if is_number(column.type):
        return column.cast(pa.float64()).to_numpy()[:, None]  # type: ignore[no-any-return]
    if pa.types.is_fixed_size_list(column.type):
        return vector_matrix(column).astype(np.float64)
    raise _wrong_type(where, name, "numbers, or fixed-size lists of them", column.type)


def _fit_columns(
    features: tuple[FeatureConfig, ...], table: pa.Table, where: str, train_ids: pa.ChunkedArray
) -> Columns:
    key = "user_id" if where == USERS else "item_id"
    seen = table.filter(pc.is_in(table[key], value_set=pc.unique(train_ids)))
    vocabularies: list[Vocabulary] = []
    standardisers: list[Standardiser] = []
    for feature in features:
        if isinstance(feature, IdFeature | CategoricalFeature):
            # a row for a value that never occurs in train would be served as it was initialised
            vocabularies.append(_fit_vocabulary(feature, seen, where))
        elif isinstance(feature, NumericFeature):
            standardisers.append(_fit_standardiser(feature, table, where))
    return Columns(vocabularies=tuple(vocabularies), standardisers=tuple(standardisers))


def _fit_vocabulary(
    feature: IdFeature | CategoricalFeature, table: pa.Table, where: str
) -> Vocabulary:
    column = plain(_column(table, feature.column, where))
    kind = value_type(column.type)
    if kind is None:
        raise _wrong_type(where, feature.column, "integers, strings or booleans", column.type)
    return Vocabulary(
        column=feature.column,
        kind=feature.kind,
        value_type=kind,
        values=sorted(pc.unique(column).to_pylist()),
        dim=feature.dim,
    )


def _fit_standardiser(feature: NumericFeature, table: pa.Table, where: str) -> Standardiser:
    column = _column(table, feature.column, where)
    values = numbers(column, where, feature.column)
    values = _log1p(values, where, feature.column) if feature.log else values
    return Standardiser(
        column=feature.column,
        log=feature.log,
        vector=pa.types.is_fixed_size_list(column.type),
        mean=values.mean(axis=0).tolist(),
        deviation=np.maximum(values.std(axis=0), MIN_DEVIATION).tolist(),
    )


def _column(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise DataError(
            "no such column",
            field=f"{where}: {name}",
            expected=f"one of {', '.join(table.column_names)}",
            hint="name an existing column in the tower's features",
        )
    return table[name]


def _log1p(values: NDArray[np.float64], where: str, name: str) -> NDArray[np.float64]:
    if (values < 0).any():
        row = int(np.flatnonzero((values < 0).any(axis=1))[0])
        raise DataError(
            "cannot take the logarithm",
            field=f"{where}: {name}[{row}]",
            expected=">= 0, because log is set",
            got=str(values[row].min()),
        )
    return np.log1p(values)


def _wrong_type(where: str, name: str, expected: str, got: pa.DataType) -> DataError:
    return DataError("wrong type", field=f"{where}: {name}", expected=expected, got=str(got))


def _columns_from_json(content: dict[str, Any]) -> Columns:
    return Columns(
        vocabularies=tuple(Vocabulary(**v) for v in content["vocabularies"]),
        standardisers=tuple(Standardiser(**s) for s in content["standardisers"]),
    )
