"""Configurations on data of tests.tiny and tests.rich whose item towers read the items' users."""

from typing import Any

from shardline.training.config.training_config import TrainingConfig
from tests.rich import sum_config
from tests.tiny import tiny_config


def audience_config(pooling: str = "mean", max_length: int = 4, **changes: Any) -> TrainingConfig:
    """tiny_config with an audience: towers with layers, inputs side by side."""
    given = {"kind": "audience", "pooling": pooling, "max_length": max_length}
    return _with_audience(tiny_config(**changes), given)


def summed_audience_config(
    pooling: str = "sqrtn", keep_target: bool = False, **changes: Any
) -> TrainingConfig:
    """sum_config with an audience: inputs added up, nothing after them; for the rich dataset."""
    given = {"kind": "audience", "pooling": pooling, "max_length": 4, "keep_target": keep_target}
    return _with_audience(sum_config("sqrtn", **changes), given)


def plain_sum_config(**changes: Any) -> TrainingConfig:
    """Ids of users and items, the user's items, the item's users, all added up; for tests.tiny."""
    bare: dict[str, Any] = {"hidden": [], "projection": "identity"}
    towers = {
        "query": bare
        | {
            "features": [
                {"kind": "id", "column": "user_id", "dim": 16},
                {"kind": "history", "max_length": 4, "pooling": "sqrtn"},
            ]
        },
        "item": bare
        | {
            "features": [
                {"kind": "id", "column": "item_id", "dim": 16},
                {"kind": "audience", "max_length": 4, "pooling": "sqrtn"},
            ]
        },
    }
    return tiny_config(towers=towers, **changes)


def _with_audience(config: TrainingConfig, feature: dict[str, Any]) -> TrainingConfig:
    settings = config.model_dump()
    settings["towers"]["item"]["features"] += (feature,)
    return TrainingConfig.model_validate(settings)
