"""Fitted features against numbers worked out by hand, and what datasets suggest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shardline.shards.core.errors import ConfigError, DataError
from shardline.training.config.tower_config import NumericFeature
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import Dataset, vector_column
from shardline.training.features.columns import Standardiser, Vocabulary
from shardline.training.features.fitted import FeatureSpace, fit
from shardline.training.features.infer import infer_config
from tests.rich import rich_dataset
from tests.tiny import ITEM_IDS, tiny_config, tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


def test_blocks_against_the_tables(dataset: Dataset) -> None:
    space = fit(tiny_config(), dataset)
    users, items = dataset.users().to_pydict(), dataset.items().to_pydict()
    block = space.query.encode(dataset.users(), "users")
    seen_users = sorted(set(dataset.interactions("train")["user_id"].to_pylist()))
    for row in range(len(block)):
        expected = [
            seen_users.index(users["user_id"][row]) + 1,
            ["CA", "UK", "US"].index(users["country"][row]) + 1,
            [False, True].index(users["member"][row]) + 1,
        ]
        assert block.categorical[row].tolist() == expected
    ages = np.array(users["age"])
    np.testing.assert_allclose(block.numeric[:, 0], (ages - ages.mean()) / ages.std(), rtol=1e-5)

    block = space.item.encode(dataset.items(), "items")
    prices = np.log1p(items["price"])
    vectors = np.array(items["attribute_vector"])
    expected_numbers = np.column_stack([prices, vectors])
    expected_numbers = (expected_numbers - expected_numbers.mean(0)) / expected_numbers.std(0)
    np.testing.assert_allclose(block.numeric, expected_numbers, atol=1e-5)
    assert (space.item.width, block.numeric.shape[1]) == (4 + 3 + 1 + 4, 5)


def test_ids_without_train_interactions_are_unknown(dataset: Dataset) -> None:
    space = fit(tiny_config(), dataset)
    seen = set(dataset.interactions("train")["item_id"].to_pylist())
    assert len(seen) < len(ITEM_IDS)
    rows = space.item.encode(dataset.items(), "items").categorical[:, 0]
    for item, row in zip(ITEM_IDS.tolist(), rows, strict=True):
        assert (row > 0) == (item in seen)


def test_categories_without_train_interactions_are_unknown(tmp_path: Path) -> None:
    """Item 7, the only one of category "c", has a test interaction only; price is fitted on all."""
    users = pa.table({"user_id": [0, 1], "country": ["CA", "UK"]})
    items = pa.table({"item_id": [5, 6, 7], "category": ["a", "b", "c"], "price": [1.0, 2.0, 6.0]})
    rows = pa.table(
        {
            "user_id": [0, 0, 0],
            "item_id": [5, 6, 7],
            "timestamp": [1, 2, 3],
            "split": pa.array(["train", "train", "test"]).dictionary_encode(),
        }
    )
    dataset = write_dataset(tmp_path / "d", users, items, rows, name="d")
    towers = {
        "query": {"features": [{"kind": "categorical", "column": "country"}]},
        "item": {
            "features": [
                {"kind": "categorical", "column": "category"},
                {"kind": "numeric", "column": "price"},
            ]
        },
    }
    space = fit(tiny_config(towers=towers), dataset)
    assert space.query.vocabularies[0].values == ["CA"]
    assert space.item.vocabularies[0].values == ["a", "b"]
    assert space.item.encode(items, "items").categorical[:, 0].tolist() == [1, 2, 0]
    assert space.item.standardisers[0].mean == [3.0]


def test_unseen_values_get_row_zero() -> None:
    words = Vocabulary(
        column="c", kind="categorical", value_type="string", values=["a", "b"], dim=2
    )
    for kind in (pa.string(), pa.large_string()):
        table = pa.table({"c": pa.array(["b", "x", "a"], kind)})
        assert words.encode(table, "t").tolist() == [2, 0, 1]
    coded = pa.table({"c": pa.array(["b", "x", "a"]).dictionary_encode()})
    assert words.encode(coded, "t").tolist() == [2, 0, 1]


def test_space_survives_json(dataset: Dataset) -> None:
    space = fit(tiny_config(), dataset)
    assert FeatureSpace.from_json(json.loads(json.dumps(space.to_json()))) == space


def test_constant_columns_become_zeros(tmp_path: Path) -> None:
    numbers = Standardiser(column="x", log=False, vector=False, mean=[5.0], deviation=[1e-6])
    assert numbers.encode(pa.table({"x": [5, 5]}), "t").tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("country", pa.array([1, 2]), "users: country: wrong type; expected string; got int64"),
        ("country", None, "users: country: no such column; expected one of"),
        ("age", pa.array(["x", "y"]), "users: age: wrong type; expected numbers"),
        ("age", vector_column(np.ones((2, 1), np.float32)), "expected a number; got fixed_size"),
    ],
)
def test_tables_that_do_not_fit(dataset: Dataset, column: str, values: Any, words: str) -> None:
    space = fit(tiny_config(), dataset)
    table = dataset.users().slice(0, 2).drop_columns([column])
    if values is not None:
        table = table.append_column(column, values)
    with pytest.raises(DataError) as caught:
        space.query.encode(table, "users")
    assert words in str(caught.value)


def test_vectors_of_another_width_are_refused(dataset: Dataset) -> None:
    space = fit(tiny_config(), dataset)
    table = dataset.items().drop_columns(["attribute_vector"])
    table = table.append_column("attribute_vector", vector_column(np.ones((60, 3), np.float32)))
    with pytest.raises(DataError, match="expected a vector of 4 numbers; got fixed_size_list"):
        space.item.encode(table, "items")


def config_with(tower: str, feature: dict[str, Any]) -> TrainingConfig:
    other = "item" if tower == "query" else "query"
    towers = tiny_config().model_dump()["towers"]
    return tiny_config(towers={tower: {"features": [feature]}, other: towers[other]})


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        ({"kind": "categorical", "column": "price"}, "expected integers, strings or booleans"),
        ({"kind": "numeric", "column": "shoe"}, "items.parquet: shoe: no such column"),
        ({"kind": "numeric", "column": "attribute_vector", "log": True}, ">= 0, because log"),
    ],
)
def test_features_that_cannot_be_fitted(
    dataset: Dataset, feature: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError) as caught:
        fit(config_with("item", feature), dataset)
    assert words in str(caught.value)


def test_inferred_features_of_a_content_catalogue(dataset: Dataset) -> None:
    towers = infer_config(TrainingConfig(), dataset).towers
    assert towers.query.features is not None and towers.item.features is not None
    query = [(f.kind, f.column) for f in towers.query.features]
    assert query == [
        ("numeric", "age"),
        ("categorical", "country"),
        ("categorical", "member"),
        ("history", "history"),
    ]
    item = [(f.kind, f.column) for f in towers.item.features]
    # 240 train interactions on 60 items: seen too rarely for a vector per id
    assert item == [
        ("categorical", "category"),
        ("numeric", "price"),
        ("numeric", "attribute_vector"),
    ]
    logs = {f.column: f.log for f in towers.item.features if isinstance(f, NumericFeature)}
    assert logs == {"price": True, "attribute_vector": False}


def test_inferred_features_of_bare_interactions(tmp_path: Path) -> None:
    users, items = (
        pa.table({"user_id": [0, 1, 2]}),
        pa.table({"item_id": [5, 6], "title": ["Alien", "Brazil"]}),
    )
    rows = pa.table(
        {
            "user_id": [0, 1, 2],
            "item_id": [5, 6, 5],
            "timestamp": [1, 2, 3],
            "split": pa.array(["train"] * 3).dictionary_encode(),
        }
    )
    bare = write_dataset(tmp_path / "bare", users, items, rows, name="bare")
    towers = infer_config(TrainingConfig(), bare).towers
    assert [f.kind for f in towers.query.features or ()] == ["id", "history"]
    assert [f.column for f in towers.item.features or ()] == ["item_id"]


def test_keys_of_an_importer_are_no_features(tmp_path: Path) -> None:
    """Few-valued numbers and texts alike: only the name tells that they stand for the id."""
    users = pa.table({"user_id": range(8), "original_id": ["a", "b"] * 4, "age": [1.5, 2.5] * 4})
    items = pa.table({"item_id": [5, 6], "original_id": [70, 80]})
    rows = pa.table(
        {
            "user_id": [0, 1],
            "item_id": [5, 6],
            "timestamp": [1, 2],
            "split": pa.array(["train"] * 2).dictionary_encode(),
        }
    )
    towers = infer_config(
        TrainingConfig(), write_dataset(tmp_path / "keyed", users, items, rows, name="keyed")
    ).towers
    assert [f.column for f in towers.query.features or ()] == ["age", "history"]
    assert [f.column for f in towers.item.features or ()] == ["item_id"]


def test_inferred_features_of_lists_and_texts(tmp_path: Path) -> None:
    """Codes, and lists whose values hardly repeat, say nothing about another row."""
    dataset = rich_dataset(tmp_path)
    items = dataset.items()
    codes = pa.array([f"X-{i}" for i in range(items.num_rows)])
    keys = pa.array([[f"k{i}", f"k{i + 1000}"] for i in range(items.num_rows)])
    items = items.append_column("code", codes).append_column("keys", keys)
    titles = [f"The {i}th film of all" for i in range(items.num_rows)]
    at = items.column_names.index("title")
    items = items.set_column(at, "title", pa.array(titles, pa.large_string()))
    more = write_dataset(
        tmp_path / "more", dataset.users(), items, dataset.interactions(), name="more"
    )
    towers = infer_config(TrainingConfig(), more).towers
    assert [(f.kind, f.column) for f in towers.item.features or ()] == [
        ("categorical", "category"),
        ("numeric", "price"),
        ("numeric", "attribute_vector"),
        ("multi_valued", "tags"),
        ("text", "title"),
    ]
    assert ("multi_valued", "interests") in [
        (f.kind, f.column) for f in towers.query.features or ()
    ]
    fit(infer_config(TrainingConfig(), more), more)


def test_what_a_tower_cannot_take_is_named(dataset: Dataset) -> None:
    sums = {"projection": "identity", "hidden": []}
    named = tiny_config().towers.model_dump()
    for name, column in (("item", "price"), ("query", "age")):
        config = tiny_config(towers=named | {name: sums})
        words = rf"towers\.{name}\.features: .*do not fit.*cannot add up numbers: \['{column}'"
        with pytest.raises(ConfigError, match=words):
            infer_config(config, dataset)


def test_named_features_are_left_alone(dataset: Dataset) -> None:
    assert infer_config(tiny_config(), dataset) == tiny_config()
