"""The tiny dataset with lists and texts beside its columns, and configurations that use them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import Dataset
from tests.tiny import NUM_ITEMS, NUM_USERS, tiny_config, tiny_dataset

TAGS = ("sea", "war", "love", "crime", "space")
WORDS = ("Alien", "Brazil", "the", "Return", "of", "Été", "42", "night")


def rich_dataset(folder: Path) -> Dataset:
    """Items have tags and a title, users interests and a bio; some of each are empty."""
    tiny = tiny_dataset(folder / "tiny")
    rng = np.random.default_rng(7)

    def lists(values: Any, count: int) -> list[list[Any]]:
        return [rng.choice(values, rng.integers(0, 4)).tolist() for _ in range(count)]

    def texts(count: int) -> list[str]:
        return [" ".join(rng.choice(WORDS, rng.integers(0, 5))) for _ in range(count)]

    users = tiny.users().append_column("interests", pa.array(lists(range(6), NUM_USERS)))
    users = users.append_column("bio", pa.array(texts(NUM_USERS)))
    tags = pa.array(lists(TAGS, NUM_ITEMS), pa.list_(pa.string()))
    items = tiny.items().append_column("tags", tags)
    items = items.append_column("title", pa.array(texts(NUM_ITEMS)))
    return write_dataset(folder / "rich", users, items, tiny.interactions(), name="rich")


def rich_config(pooling: str = "attention", **changes: Any) -> TrainingConfig:
    """Every feature kind in both towers that can take it."""
    towers = {
        "query": {
            "features": [
                {"kind": "id", "column": "user_id", "dim": 4},
                {"kind": "multi_valued", "column": "interests", "dim": 3, "max_length": 2},
                {"kind": "numeric", "column": "age"},
                {
                    "kind": "text",
                    "column": "bio",
                    "dim": 5,
                    "buckets": 50,
                    "words": [1, 1],
                    "chars": [3, 4],
                    "max_ngrams": 20,
                },
                {"kind": "history", "max_length": 4, "pooling": pooling},
            ],
            "hidden": [24, 12],
        },
        "item": {
            "features": [
                {"kind": "id", "column": "item_id", "dim": 4},
                {"kind": "multi_valued", "column": "tags", "dim": 3},
                {"kind": "text", "column": "title", "dim": 5, "buckets": 40},
                {"kind": "numeric", "column": "price", "log": True},
            ],
            "hidden": [24],
        },
    }
    return tiny_config(towers=towers, **changes)


def sum_config(pooling: str = "mean", own: bool = True, **changes: Any) -> TrainingConfig:
    """Towers without weights of their own: every input 16 wide, added up."""
    query: list[dict[str, Any]] = [{"kind": "history", "max_length": 4, "pooling": pooling}]
    if own:
        query += [
            {"kind": "id", "column": "user_id", "dim": 16},
            {"kind": "multi_valued", "column": "interests", "dim": 16},
        ]
    item = [
        {"kind": "id", "column": "item_id", "dim": 16},
        {"kind": "text", "column": "title", "dim": 16, "buckets": 40},
    ]
    bare = {"hidden": [], "projection": "identity"}
    towers = {"query": {"features": query} | bare, "item": {"features": item} | bare}
    return tiny_config(towers=towers, **changes)


def wide_dataset(folder: Path) -> Dataset:
    """The rich dataset whose items also have a column of every other type; some values of each, and
    of prices, are missing."""
    rich = rich_dataset(folder)
    rng = np.random.default_rng(11)

    def gaps(values: list[Any]) -> list[Any]:
        return [None if rng.random() < 0.2 else value for value in values]

    seconds = rng.integers(1_500_000_000, 1_700_000_000, NUM_ITEMS)
    items = rich.items()
    for name, values in {
        "released": pa.array(gaps((seconds * 1_000_000 + 250).tolist()), pa.timestamp("us")),
        "adult": pa.array(gaps((rng.random(NUM_ITEMS) < 0.5).tolist())),
        "year": pa.array(gaps(rng.integers(1950, 2000, NUM_ITEMS).tolist())),
        "brand": pa.array(gaps(rng.choice(WORDS, NUM_ITEMS).tolist())).dictionary_encode(),
        "codes": pa.array(gaps([rng.integers(0, 9, n % 4).tolist() for n in range(NUM_ITEMS)])),
    }.items():
        items = items.append_column(name, values)
    prices = pa.array(gaps(items["price"].to_pylist()))
    items = items.set_column(items.column_names.index("price"), "price", prices)
    return write_dataset(folder / "wide", rich.users(), items, rich.interactions(), name="wide")


def wide_config(pooling: str = "attention", **changes: Any) -> TrainingConfig:
    """Every kind of feature that items can have."""
    towers = rich_config(pooling).model_dump()["towers"]
    towers["item"]["features"] += (
        {"kind": "categorical", "column": "adult", "dim": 2},
        {"kind": "categorical", "column": "category", "dim": 2},
        {"kind": "numeric", "column": "released", "log": True, "cycles": ["week", "year"]},
        {"kind": "numeric", "column": "attribute_vector"},
        {"kind": "numeric", "column": "year"},
        {"kind": "categorical", "column": "brand", "dim": 3},
        {"kind": "multi_valued", "column": "codes", "dim": 3, "max_length": 2},
    )
    return tiny_config(towers=towers, **changes)
