"""Which features a dataset suggests, for towers whose configuration names none.

Few-valued columns become categories, lists of values multi-valued, texts of several words hashed
text, other numbers numeric, and the query tower gets the user's history. A vector per id is learned
for items that are seen often enough to have one, and wherever there is nothing else to go by.
Codes and other keys are left out.
"""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from shardline.shards.core.errors import ConfigError
from shardline.shards.core.schema import ORIGINAL_ID
from shardline.shards.core.standardise import days_before
from shardline.training.config.tower_config import (
    USER_KEY,
    CategoricalFeature,
    FeatureConfig,
    HistoryFeature,
    IdFeature,
    MultiValuedFeature,
    NumericFeature,
    TextFeature,
    TowerConfig,
    TowersConfig,
)
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import Dataset
from shardline.training.features.columns import (
    is_list,
    is_number,
    list_values,
    numbers,
    plain,
    value_type,
)
from shardline.training.features.fitted import MIN_DEVIATION

logger = logging.getLogger(__name__)

FEW_INTEGERS = 32  # integer columns with more distinct values are quantities, not categories
FEW_STRINGS = 1000  # text columns with more are titles, codes or keys
FEW_ELEMENTS = 100_000  # distinct values of a list column; with more, they are keys of something
WORDS = 2.0  # average from which a many-valued text is language, and not a code or a name
DENSE_INTERACTIONS = 5  # train interactions per item from which a vector per id can be learned
SAFE_CUBE = 1e90  # cubes of numbers up to here, and their sums, are finite
SKEWED = 1.0  # skewness from which log(1 + x) is taken; an exponential has 2, a normal 0


def infer_config(config: TrainingConfig, dataset: Dataset) -> TrainingConfig:
    """The configuration with every tower's features named; those already named stay.

    Raises:
        ConfigError: a tower cannot take what its columns suggest.
    """
    query, item = config.towers.query, config.towers.item
    if item.features is None:
        items = dataset.items()
        features = _suggest(items, "item_id")
        num_train = dataset.counts("train")[1].sum()
        if not features or num_train >= DENSE_INTERACTIONS * items.num_rows:
            features = [IdFeature(column="item_id"), *features]
        item = _with_features("item", item, features)
    if config.towers.tied:
        return config.model_copy(update={"towers": TowersConfig(item=item, tied=True)})
    if query.features is None:
        features = _suggest(dataset.users(), USER_KEY)
        if not features or item.audience is not None:  # which pools the vectors of user ids
            features = [IdFeature(column=USER_KEY), *features]
        query = _with_features("query", query, [*features, HistoryFeature()])
    return config.model_copy(update={"towers": TowersConfig(query=query, item=item)})


def _with_features(name: str, tower: TowerConfig, features: list[FeatureConfig]) -> TowerConfig:
    try:
        return TowerConfig.model_validate(tower.model_dump() | {"features": tuple(features)})
    except ValidationError as error:
        raise ConfigError(
            "the features read off the columns do not fit the tower",
            field=f"towers.{name}.features",
            got=error.errors()[0]["msg"],
            hint=f"name them in the configuration, under training.towers.{name}.features",
        ) from error


def suggested_kinds(table: pa.Table) -> dict[str, str | None]:
    """The kind of feature that each column suggests, None where it becomes none; ids left out."""
    columns = [name for name in table.column_names[1:] if name != ORIGINAL_ID]
    found = {name: _suggest_one(name, table[name]) for name in columns}
    return {name: feature.kind if feature else None for name, feature in found.items()}


def _suggest(table: pa.Table, key: str) -> list[FeatureConfig]:
    features: list[FeatureConfig] = []
    for name in table.column_names:
        feature = None if name in (key, ORIGINAL_ID) else _suggest_one(name, table[name])
        if feature is not None:
            features.append(feature)
        elif name != key:
            logger.info("column %s (%s) is not used as a feature", name, table[name].type)
    return features


def _suggest_one(name: str, column: pa.ChunkedArray) -> FeatureConfig | None:
    if column.null_count == len(column):
        return None
    if is_list(column.type):
        return _suggest_list(name, column)
    values = plain(column)
    kind = value_type(values.type)
    distinct = pc.count_distinct(values).as_py() if kind else 0
    if kind == "string":
        if distinct <= min(FEW_STRINGS, len(values) // 2):
            return CategoricalFeature(column=name)
        return TextFeature(column=name) if _has_words(values) else None
    if kind == "bool" or (kind == "int" and distinct <= min(FEW_INTEGERS, len(values) // 4)):
        return CategoricalFeature(column=name)
    return NumericFeature(column=name, log=_is_skewed(column))


def _suggest_list(name: str, column: pa.ChunkedArray) -> FeatureConfig | None:
    _, values = list_values(column, "", name)
    known = value_type(values.type) in ("int", "string")
    few = known and pc.count_distinct(values).as_py() <= min(FEW_ELEMENTS, len(values) // 2)
    return MultiValuedFeature(column=name) if few else None


def _has_words(texts: pa.ChunkedArray) -> bool:
    words = pc.count_substring_regex(texts, r"\S+")
    return len(texts) > 0 and float(pc.mean(words).as_py()) >= WORDS


def _is_skewed(column: pa.ChunkedArray) -> bool:
    """Of numbers, or of the ages of times."""
    if not (is_number(column.type) or pa.types.is_timestamp(column.type)):
        return False
    values = numbers(column, "", "")
    values = values[~np.isnan(values)]
    if values.size and pa.types.is_timestamp(column.type):
        values = days_before(float(values.max()), values)
    if values.size == 0 or values.min() < 0:
        return False
    values = values / max(1.0, float(values.max()) / SAFE_CUBE)  # so that no cube is infinite
    if values.std() < MIN_DEVIATION:
        return False
    standardised = (values - values.mean()) / values.std()
    return bool(np.mean(standardised**3) > SKEWED)
