"""The settings that a training run begins with, by the shape of its data.

Shape is what can be counted before anything is trained: users, items, train interactions, and
whether a table has columns that become features. Three rules, each from a configuration that was
chosen on validation (bench/configs); ``default_for`` states them.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from shardline.shards.core.errors import ConfigError
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import Dataset
from shardline.training.features.infer import suggested_kinds
from shardline.training.loop.batches import fitting_batch

# keys of the training section that say what the model is: where one is given, none is chosen here
MODEL_KEYS = ("dim", "towers", "metric", "loss", "optimiser", "popularity_exponent", "unknown_rate")
DENSE = 0.01  # share of all (user, item) pairs: ml-100k has .05, Gowalla and Amazon CDs .0006
IDS_DIM = 128  # of ids alone: recall is 4 and 7 % above that of 64 (docs/EXPERIMENTS.md)
MOST_USER_VECTORS = 1_000_000  # of IDS_DIM float32 with Adam's moments: 1.5 GB
FULL_BATCH = 2048
DENSE_BATCH = 1024
FULL_STEPS = 4200  # Gowalla's twelve epochs: so many steps its settings were chosen for
FEWEST_EPOCHS, MOST_EPOCHS = 8, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class DataShape:
    """Counts of a dataset. interactions: of train, each pair once; *_features: usable columns."""

    users: int
    items: int
    interactions: int
    user_features: int
    item_features: int

    @property
    def density(self) -> float:
        """Share of all pairs of a user and an item that train holds, 0 to 1."""
        return self.interactions / max(1, self.users * self.items)

    @property
    def ids_alone(self) -> bool:
        return not (self.user_features or self.item_features)


def shape_of(dataset: Dataset) -> DataShape:
    """Counts of both tables and of train; no other split's interactions are counted."""
    return DataShape(
        users=dataset.rows["users"],
        items=dataset.rows["items"],
        interactions=len(dataset.positives("train").items),
        user_features=_features(dataset.users()),
        item_features=_features(dataset.items()),
    )


def default_for(shape: DataShape, ranks: int = 1, batch_size: int | None = None) -> dict[str, Any]:
    """The training section for data of this shape; what it leaves out has its declared default.

    1. Ids alone: the settings of bench/configs/gowalla.yaml, with IDS_DIM dimensions. A vector per
       user, up to a million users, plus the sum of the user's past items by the root of their
       number; no layers; the BSL loss; strong decay of embeddings. Epochs: as many as make about
       FULL_STEPS steps, 8 to 40.
    2. Features, and a hundredth or more of all pairs in train: as bench/configs/ml-100k.yaml. No
       hidden layers, a fixed temperature of .2, a learning rate of .01, 8 epochs.
    3. Features and sparser data: the declared defaults.

    In all of them the batch has no more than an eighth of the examples, a multiple of ``ranks``;
    batch_size: one that was given.
    """
    batch = max(2, fitting_batch(shape.interactions, ranks))
    if shape.ids_alone:
        batch = batch_size or min(batch, FULL_BATCH // ranks * ranks)
        steps = max(1, shape.interactions // batch)
        epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(FULL_STEPS / steps)))
        return {**_ids_alone(shape), "batch_size": batch, "epochs": epochs}
    if shape.density >= DENSE:
        return {**_dense(), "batch_size": min(batch, DENSE_BATCH // ranks * ranks)}
    return {"batch_size": min(batch, FULL_BATCH // ranks * ranks)}


def with_default(config: TrainingConfig, shape: DataShape) -> TrainingConfig:
    """The configuration over ``default_for`` its data: keys that were given stay as given.

    Where one of MODEL_KEYS was given the configuration is returned as it is: parts of two models
    need not fit together. The weights of interactions go with any.
    """
    said = config.model_fields_set.intersection(MODEL_KEYS)
    if said == {"loss"} and config.loss.model_fields_set <= {"weight_exponent"}:
        said = set()
    if said:
        return config
    given = config.model_dump(exclude_unset=True)
    default = default_for(shape, config.num_workers, given.get("batch_size"))
    return TrainingConfig.model_validate(_merged(default, given))


def with_settings_of(
    config: TrainingConfig, older: TrainingConfig, *, whole: bool
) -> TrainingConfig:
    """The configuration over those settings of another run that say what the model is (MODEL_KEYS),
    or all of them if ``whole``; keys that were given stay as given, each by itself.

    Raises:
        ConfigError: they contradict each other.
    """
    settings = older.model_dump(include=None if whole else set(MODEL_KEYS))
    given = config.model_dump(exclude_unset=True)
    try:
        return TrainingConfig.model_validate(_merged(settings, given))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(
            f"what is given does not go with the other settings of that run: {problem['msg']}",
            field=".".join(("training", *map(str, problem["loc"]))),
        ) from error


def _ids_alone(shape: DataShape) -> dict[str, Any]:
    # the initial length .16 and the sum of inputs: as in matrix factorisation
    user: dict[str, Any] = {"kind": "id", "column": "user_id", "dim": IDS_DIM, "init_norm": 0.16}
    item: dict[str, Any] = {"kind": "id", "column": "item_id", "dim": IDS_DIM, "init_norm": 0.16}
    past = {"kind": "history", "pooling": "sqrtn", "max_length": 1000, "keep_target": True}
    query = [user, past] if shape.users <= MOST_USER_VECTORS else [past]
    return {
        "dim": IDS_DIM,
        "unknown_rate": 0.0,
        "towers": {
            "query": {"hidden": (), "projection": "identity", "features": query},
            "item": {"hidden": (), "projection": "identity", "features": [item]},
        },
        "loss": {
            "kind": "bsl",
            "temperature": 0.08,
            "learn_temperature": False,
            "logq": "expected_count",
            "bsl_negative_weight": 1.22,
        },
        "optimiser": {"learning_rate": 0.005, "embedding_weight_decay": 0.5, "beta2": 0.999},
        "popularity_exponent": 0.06,
        "validation": {"k": 20, "max_users": 10_000},
    }


def _dense() -> dict[str, Any]:
    return {
        "dim": 64,
        "unknown_rate": 0.05,
        "towers": {"query": {"hidden": ()}, "item": {"hidden": ()}},
        # a learnt temperature falls and overfits on such data
        "loss": {"temperature": 0.2, "learn_temperature": False, "symmetric": 0.3},
        "optimiser": {"learning_rate": 0.01},
        "validation": {"k": 20},
        "epochs": 8,
    }


def _features(table: Any) -> int:
    return sum(kind is not None for kind in suggested_kinds(table).values())


def _merged(settings: Any, over: Any) -> Any:
    if not isinstance(settings, dict) or not isinstance(over, dict):
        return over
    common = settings.keys() & over.keys()
    return settings | over | {name: _merged(settings[name], over[name]) for name in common}
