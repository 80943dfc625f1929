"""From tables to model inputs: the fitted columns of both towers, and what they encode to.

``fit`` computes them from a dataset; ``Columns.encode`` turns a table into a ``Block``. A new kind
of feature starts in ``training.features.columns``, gets its configuration in
``training.config.tower_config`` and its serving side in ``router.encoder.query_encoder``.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shardline.shards.core.errors import ConfigError
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.config.tower_config import (
    USER_KEY,
    AudienceFeature,
    CategoricalFeature,
    HistoryFeature,
    IdFeature,
    MultiValuedFeature,
    NumericFeature,
    TextFeature,
    TowerConfig,
    mirrored_column,
)
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.csr import Csr
from shardline.training.data.tables import ITEMS, USERS, Dataset
from shardline.training.features.audience import Audience
from shardline.training.features.columns import (
    Bag,
    MultiVocabulary,
    Standardiser,
    TextHash,
    Vocabulary,
    column_of,
    list_values,
    numbers,
    plain,
    strings,
    value_type,
    wrong_type,
)
from shardline.training.features.tied import rows_of_both

MIN_DEVIATION = 1e-6  # a constant column becomes zeros instead of a division by zero
SAFE_SQUARE = 1e100  # squares of numbers up to here, and their sums, are finite


@dataclass(frozen=True, slots=True)
class Block:
    """n input rows: categorical (n, C) int64 embedding rows, numeric (n, F) float32, and of each
    multi-valued or text column a bag of embedding rows per row, never empty. sources (n,) int64:
    which row of a table each is, where they were taken from one.
    """

    categorical: IdArray
    numeric: FloatArray
    bags: tuple[Csr, ...] = ()
    sources: IdArray | None = None
    audience: Audience | None = None  # of items whose tower has one

    @property
    def hideable(self) -> int:
        """Columns that ``hide`` can make unknown: the categorical ones, the bags, the audience."""
        return int(self.categorical.shape[1]) + len(self.bags) + (self.audience is not None)

    def take(self, rows: IdArray) -> "Block":
        bags = tuple(bag.take(rows) for bag in self.bags)
        sources = rows if self.sources is None else self.sources[rows]
        audience = None if self.audience is None else self.audience.take(rows)
        return Block(self.categorical[rows], self.numeric[rows], bags, sources, audience)

    def hide(self, hidden: NDArray[np.bool_]) -> "Block":
        """The block with the values where hidden (n, hideable) is set made unknown, row 0."""
        width = self.categorical.shape[1]
        bags = [_hide(bag, hidden[:, width + i]) for i, bag in enumerate(self.bags)]
        categorical = np.where(hidden[:, :width], 0, self.categorical)
        audience = None if self.audience is None else self.audience.hide(hidden[:, -1])
        return Block(categorical, self.numeric, tuple(bags), audience=audience)

    def alone(self) -> "Block":
        """The block without an audience: what a history pools of each item."""
        return self if self.audience is None else replace(self, audience=None)

    def __len__(self) -> int:
        return len(self.numeric)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The fitted columns of one tower: an input row is embeddings | means of bags | numbers."""

    vocabularies: tuple[Vocabulary, ...]
    standardisers: tuple[Standardiser, ...]
    bags: tuple[Bag, ...] = ()

    @property
    def width(self) -> int:
        """Width of an input row."""
        embedded = sum(column.dim for column in (*self.vocabularies, *self.bags))
        return embedded + sum(standardiser.width for standardiser in self.standardisers)

    @property
    def mirrored(self) -> "Columns":
        """The same columns as the users table calls them."""

        def named(column: Any) -> Any:
            return replace(column, column=mirrored_column(column.column))

        return Columns(
            vocabularies=tuple(map(named, self.vocabularies)),
            standardisers=tuple(map(named, self.standardisers)),
            bags=tuple(map(named, self.bags)),
        )

    @property
    def kinds(self) -> dict[str, str]:
        """Name and kind of each column."""
        kinds: dict[str, str] = {c.column: c.kind for c in (*self.vocabularies, *self.bags)}
        return kinds | {s.column: "numeric" for s in self.standardisers}

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
            categorical,
            np.concatenate([np.empty((table.num_rows, 0), np.float32), *numeric], 1),
            tuple(bag.encode(table, where) for bag in self.bags),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpace:
    """Everything fitted, for both towers; plain JSON on disk."""

    query: Columns
    item: Columns
    history: HistoryFeature | None
    audience: AudienceFeature | None = None

    @property
    def user_ids(self) -> int:
        """Which vocabulary of the query tower is that of user ids; ValueError if there is none."""
        return [(each.kind, each.column) for each in self.query.vocabularies].index(
            ("id", USER_KEY)
        )

    @property
    def query_kinds(self) -> dict[str, str]:
        """Name and kind of every feature a query brings, as a loaded encoder also lists them."""
        history = {self.history.column: "history"} if self.history else {}
        return self.query.kinds | history

    def to_json(self) -> dict[str, Any]:
        history = self.history.model_dump() if self.history else None
        content = {"query": asdict(self.query), "item": asdict(self.item), "history": history}
        audience = {"audience": self.audience.model_dump()} if self.audience else {}
        return content | audience  # without one as it was before there were any

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "FeatureSpace":
        history, audience = content["history"], content.get("audience")
        return cls(
            query=_columns_from_json(content["query"]),
            item=_columns_from_json(content["item"]),
            history=HistoryFeature(**history) if history else None,
            audience=AudienceFeature(**audience) if audience else None,
        )


def fit(config: TrainingConfig, dataset: Dataset) -> FeatureSpace:
    """Vocabularies of what occurs in the train split; statistics of numbers over the whole table.

    Raises:
        DataError: a configured column is missing, or of a type that its kind cannot take.
        ConfigError: a tower without projection whose inputs are not all as wide as its output.
            Of tied towers: users and items that do not have the same columns, or other numbers.
    """
    of_users, of_items = dataset.counts(*config.fitted_splits)
    query, item = config.towers.query, config.towers.item
    if config.towers.tied:
        return _fit_tied(config, dataset)
    history = next((f for f in query.features or () if isinstance(f, HistoryFeature)), None)
    space = FeatureSpace(
        query=_fit_columns(query, dataset.users(), USERS, of_users),
        item=_fit_columns(item, dataset.items(), ITEMS, of_items),
        history=history,
        audience=item.audience,
    )
    _check_widths(config, space)
    return space


def _fit_tied(config: TrainingConfig, dataset: Dataset) -> FeatureSpace:
    """One fit over the rows of both tables, so that equal values have equal rows everywhere."""
    given = config.towers.item.features or ()  # an audience is none of a tied tower's
    features = [each.column for each in given if not isinstance(each, AudienceFeature)]
    table, counts = rows_of_both(dataset, features, config.fitted_splits)
    item = _fit_columns(config.towers.item, table, f"{ITEMS} and {USERS}", counts)
    space = FeatureSpace(query=item.mirrored, item=item, history=None)
    _check_widths(config, space)
    return space


def _hide(bag: Csr, hidden: NDArray[np.bool_]) -> Csr:
    lengths = np.where(hidden, 1, bag.lengths)
    rows = np.zeros(lengths.sum(), dtype=np.int64)
    rows[np.repeat(~hidden, lengths)] = bag.items[np.repeat(~hidden, bag.lengths)]
    return Csr.of(lengths, rows)


def _fit_columns(tower: TowerConfig, table: pa.Table, where: str, occurrences: IdArray) -> Columns:
    vocabularies: list[Vocabulary] = []
    standardisers: list[Standardiser] = []
    bags: list[Bag] = []
    for feature in tower.features or ():
        if isinstance(feature, IdFeature | CategoricalFeature):
            vocabularies.append(_fit_vocabulary(feature, table, where, occurrences))
        elif isinstance(feature, NumericFeature):
            standardisers.append(_fit_standardiser(feature, table, where))
        elif isinstance(feature, MultiValuedFeature):
            bags.append(_fit_multi_valued(feature, table, where, occurrences))
        elif isinstance(feature, TextFeature):
            strings(column_of(table, feature.column, where), where, feature.column)
            bags.append(TextHash(**feature.model_dump(exclude={"init_norm"})))
    return Columns(
        vocabularies=tuple(vocabularies), standardisers=tuple(standardisers), bags=tuple(bags)
    )


def _fit_vocabulary(
    feature: IdFeature | CategoricalFeature, table: pa.Table, where: str, occurrences: IdArray
) -> Vocabulary:
    column = plain(column_of(table, feature.column, where))
    kind = value_type(column.type)
    if kind is None:
        raise wrong_type(where, feature.column, "integers, strings or booleans", column.type)
    return Vocabulary(
        column=feature.column,
        kind=feature.kind,
        value_type=kind,
        values=_frequent(column, occurrences, feature.min_count),
        dim=feature.dim,
    )


def _fit_multi_valued(
    feature: MultiValuedFeature, table: pa.Table, where: str, occurrences: IdArray
) -> MultiVocabulary:
    lists = column_of(table, feature.column, where)
    lengths, values = list_values(lists, where, feature.column)
    kind = value_type(values.type)
    if kind not in ("int", "string"):
        raise wrong_type(where, feature.column, "lists of integers or strings", lists.type)
    return MultiVocabulary(
        column=feature.column,
        kind=feature.kind,
        value_type=kind,
        values=_frequent(values, np.repeat(occurrences, lengths), feature.min_count),
        dim=feature.dim,
        max_length=feature.max_length,
    )


def _frequent(
    column: pa.ChunkedArray | pa.Array, occurrences: IdArray, min_count: int
) -> list[Any]:
    """The values, ascending, whose rows have ``min_count`` train interactions or more.

    An embedding for a value that never occurs in train would be served as it was initialised.
    """
    table = pa.table({"value": column, "count": occurrences})
    counts = table.group_by("value").aggregate([("count", "sum")])
    kept = counts.filter(pc.greater_equal(counts["count_sum"], min_count))["value"]
    return sorted(kept.drop_null().to_pylist())


def _fit_standardiser(feature: NumericFeature, table: pa.Table, where: str) -> Standardiser:
    column = column_of(table, feature.column, where)
    newest = None
    if pa.types.is_timestamp(column.type):
        seconds = numbers(column, where, feature.column)
        newest = float(np.nanmax(seconds)) if not np.isnan(seconds).all() else 0.0
    elif feature.cycles:
        raise wrong_type(where, feature.column, "timestamps, because cycles are set", column.type)
    values = numbers(
        *(column, where, feature.column), log=feature.log, newest=newest, cycles=feature.cycles
    )
    mean, deviation = _moments(values)
    return Standardiser(
        column=feature.column,
        log=feature.log,
        vector=pa.types.is_fixed_size_list(column.type),
        mean=mean.tolist(),
        deviation=deviation.tolist(),
        missing=bool(np.isnan(values).any()),
        newest=newest,
        cycles=list(feature.cycles),
    )


def _moments(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation of each column without its NaN; finite for any finite values."""
    values = values[~np.isnan(values).all(axis=1)]
    if not len(values):
        return np.zeros(values.shape[1]), np.ones(values.shape[1])
    largest = float(np.nanmax(np.abs(values)))
    scale = largest if largest > SAFE_SQUARE else 1.0
    scaled = values / scale
    has_gaps = bool(np.isnan(scaled).any())
    mean = np.nanmean(scaled, axis=0) if has_gaps else scaled.mean(axis=0)
    deviation = np.nanstd(scaled, axis=0) if has_gaps else scaled.std(axis=0)
    return mean * scale, np.maximum(deviation * scale, MIN_DEVIATION)


def _check_widths(config: TrainingConfig, space: FeatureSpace) -> None:
    """Where nothing projects, every input is added to the others and is the output."""
    towers = config.towers
    for name, tower, columns in (
        ("query", towers.query, space.query),
        ("item", towers.item, space.item),
    ):
        if tower.projection == "identity":
            embedded: Sequence[Vocabulary | Bag] = (*columns.vocabularies, *columns.bags)
            widths = {column.column: column.dim for column in embedded}
            if name == "query" and space.history and towers.item.projection == "linear":
                widths[space.history.column] = space.item.width
            if name == "item" and space.audience:
                widths["audience"] = space.query.vocabularies[space.user_ids].dim
            for column, width in widths.items():
                if width != config.dim:
                    raise ConfigError(
                        "the tower has no projection, and this input another width",
                        field=f"towers.{name}: {column}",
                        expected=f"dim {config.dim}",
                        got=str(width),
                        hint="give the input that width, or set the tower's projection to linear",
                    )


def _columns_from_json(content: dict[str, Any]) -> Columns:
    return Columns(
        vocabularies=tuple(Vocabulary(**v) for v in content["vocabularies"]),
        standardisers=tuple(Standardiser(**s) for s in content["standardisers"]),
        bags=tuple(_bag_from_json(b) for b in content.get("bags", ())),  # older runs had none
    )


def _bag_from_json(content: dict[str, Any]) -> Bag:
    if content["kind"] == "multi_valued":
        return MultiVocabulary(**content)
    ranges = {name: tuple(content[name]) if content[name] else None for name in ("words", "chars")}
    return TextHash(**(content | ranges))
