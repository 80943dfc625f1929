"""People who know people: users are items too. For tests of tied towers."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import Dataset
from tests.tiny import tiny_config

NUM_PEOPLE, GROUPS = 60, 6
PEOPLE = np.arange(NUM_PEOPLE) * 3 + 100  # ids are not rows
FEATURES: list[dict[str, Any]] = [
    {"kind": "id", "column": "item_id", "dim": 6},
    {"kind": "categorical", "column": "country", "dim": 3},
    {"kind": "multi_valued", "column": "groups", "dim": 4},
    {"kind": "text", "column": "about", "dim": 4, "buckets": 50},
    {"kind": "numeric", "column": "age"},
]


def person_columns(rng: np.random.Generator) -> dict[str, Any]:
    group = np.arange(NUM_PEOPLE) % GROUPS
    return {
        "country": [["CA", "UK", None][i] for i in rng.integers(0, 3, NUM_PEOPLE)],
        "groups": [[int(g), int(rng.integers(0, 20))] for g in group],
        "about": [f"likes sport {g} and tea {rng.integers(0, 9)}" for g in group],
        "age": rng.integers(18, 70, NUM_PEOPLE).astype(np.float64),
    }


def people(folder: Path, *, more: tuple[tuple[int, int, str], ...] = ()) -> Dataset:
    """Each knows six of their group, both ways; the last two pairs are val and test.

    more: rows of interactions besides, (user_id, item_id, split).
    """
    rng = np.random.default_rng(0)
    columns = person_columns(rng)
    rows = []
    for person in range(NUM_PEOPLE):
        others = [p for p in range(NUM_PEOPLE) if p != person and (p - person) % GROUPS == 0]
        known = rng.permutation(others)[:6]
        split = ["train"] * 4 + ["val", "test"]
        rows += [(PEOPLE[person], PEOPLE[p], s) for p, s in zip(known, split, strict=True)]
    rows += list(more)
    user_id, item_id, splits = zip(*rows, strict=True)
    interactions = pa.table(
        {
            "user_id": pa.array(user_id, pa.int64()),
            "item_id": pa.array(item_id, pa.int64()),
            "timestamp": np.arange(len(rows)),
            "split": pa.array(splits).dictionary_encode(),
        }
    )
    # the users in another order: rows are not the same in the two tables
    users = pa.table({"user_id": PEOPLE} | columns).slice(0, NUM_PEOPLE - 5)
    late = pa.table({"user_id": PEOPLE} | columns).slice(NUM_PEOPLE - 5)
    return write_dataset(
        folder,
        pa.concat_tables([late, users]),
        pa.table({"item_id": PEOPLE} | columns),
        interactions,
        name="people",
    )


def tied_config(**changes: Any) -> TrainingConfig:
    """Every kind of feature that both tables can have."""
    towers = {"tied": True, "item": {"features": FEATURES, "hidden": [24, 12]}}
    return tiny_config(**({"towers": towers} | changes))
