"""Columns of lists, texts and numbers against loops over their values."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shardline.shards.core.errors import DataError
from shardline.shards.core.ngrams import ngram_buckets
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.csr import Csr
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import Dataset, vector_column
from shardline.training.features.columns import MultiVocabulary, Standardiser, TextHash, Vocabulary
from shardline.training.features.fitted import Block, FeatureSpace, fit
from shardline.training.features.prepared import TrainingData, prepare
from tests.rich import rich_config, rich_dataset
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return rich_dataset(tmp_path_factory.mktemp("data"))


def bags(csr: Csr) -> list[list[int]]:
    return [csr.items[a:b].tolist() for a, b in zip(csr.indptr, csr.indptr[1:], strict=False)]


def multi(values: list[Any], kind: str = "string", longest: int = 3) -> MultiVocabulary:
    return MultiVocabulary(
        column="c", kind="multi_valued", value_type=kind, values=values, dim=2, max_length=longest
    )


HASH = TextHash(column="c", kind="text", dim=2, buckets=100, words=(1, 2), chars=None, max_ngrams=3)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
@pytest.mark.parametrize("of", [pa.list_, pa.large_list])
def test_lists_keep_their_first_known_values(kind: pa.DataType, of: Any) -> None:
    lists = [["b", "x", "a", "a", "b"], [], ["x"], None, ["a"]]
    table = pa.table({"c": pa.array(lists, of(pa.string())).cast(of(kind))})
    expected = [[2, 1, 1], [0], [0], [0], [1]]
    assert bags(multi(["a", "b"]).encode(table, "t")) == expected
    sliced = pa.concat_tables([table.slice(2, 2), table.slice(0, 2), table.slice(4)])
    assert bags(multi(["a", "b"]).encode(sliced, "t")) == [expected[i] for i in (2, 3, 0, 1, 4)]


def test_lists_of_integers_and_none_at_all() -> None:
    numbers = multi([3, 7], "int", longest=1)
    assert bags(numbers.encode(pa.table({"c": [[7, 3], [5, 3], []]}), "t")) == [[2], [1], [0]]
    empty = pa.table({"c": pa.array([], pa.list_(pa.int32()))})
    assert numbers.encode(empty, "t").indptr.tolist() == [0]
    nothing_known = multi([], "int").encode(pa.table({"c": [[7, 3], []]}), "t")
    assert bags(nothing_known) == [[0], [0]]


def test_texts_are_their_first_ngrams() -> None:
    texts = ["Blade Runner", "", "!?", "Blade Runner (1982)", "ALIEN"]
    found = bags(HASH.encode(pa.table({"c": texts}), "t"))
    for text, bag in zip(texts, found, strict=True):
        grams = ngram_buckets(text, buckets=100, words=(1, 2), chars=None, limit=3)
        assert bag == (grams or [0])
    assert found[0] == found[3][:3]
    coded = pa.table({"c": pa.array(texts).dictionary_encode()})
    assert bags(HASH.encode(coded, "t")) == found


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        (multi(["a"]), pa.array(["a"]), "t: c: wrong type; expected lists of integers or strings"),
        (multi(["a"]), pa.array([[1]]), "expected lists of string; got int64"),
        (multi([1], "int"), pa.array([["a"]]), "expected lists of int; got string"),
        (multi(["a"]), pa.array([[[1]]]), "expected lists of string; got list"),
        (multi(["a"]), vector_column(np.ones((1, 2), np.float32)), "got fixed_size_list"),
        (HASH, pa.array([1]), "t: c: wrong type; expected string; got int64"),
        (HASH, pa.array([["a"]]), "expected string; got list"),
    ],
)
def test_columns_of_another_type(column: Any, values: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        column.encode(pa.table({"c": values}), "t")
    assert words in str(caught.value)
    with pytest.raises(DataError, match="t: c: no such column"):
        column.encode(pa.table({"d": values}), "t")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, np.inf], r"t: x\[1\]: number out of range; expected finite numbers; got inf"),
        ([-np.inf, 1.0], r"t: x\[0\].*got -inf"),
        ([1.0, -2.0], r"t: x\[1\].*expected >= 0, because log is set; got -2.0"),
    ],
)
def test_numbers_that_no_feature_takes(values: list[float], words: str) -> None:
    column = Standardiser(column="x", log=True, vector=False, mean=[0.0], deviation=[1.0])
    with pytest.raises(DataError, match=words):
        column.encode(pa.table({"x": values}), "t")
    vector = Standardiser(column="x", log=True, vector=True, mean=[0.0], deviation=[1.0])
    flat = np.array([[value] for value in values], np.float32)
    with pytest.raises(DataError, match=words):
        vector.encode(pa.table({"x": vector_column(flat)}), "t")


def test_fitted_lists_hold_what_train_has(dataset: Dataset) -> None:
    space = fit(rich_config(), dataset)
    tags, title = space.item.bags
    seen = set(dataset.interactions("train")["item_id"].to_pylist())
    rows = dataset.items().to_pylist()
    expected = {tag for row in rows if row["item_id"] in seen for tag in row["tags"]}
    assert isinstance(tags, MultiVocabulary)
    assert tags.values == sorted(expected)
    found = bags(tags.encode(dataset.items(), "items"))
    for row, bag in zip(rows, found, strict=True):
        known = [tags.values.index(t) + 1 for t in row["tags"] if t in expected]
        assert bag == (known or [0])
    assert space.query.kinds == {
        "user_id": "id", "interests": "multi_valued", "bio": "text", "age": "numeric",
    }  # fmt: skip
    assert space.query_kinds["history"] == "history"
    assert space.item.width == 4 + 3 + 5 + 1
    assert (title.rows, title.dim) == (41, 5)


def test_rare_values_are_unknown(dataset: Dataset) -> None:
    """Counted in train interactions, of ids and of the values in lists."""
    towers = rich_config().model_dump()["towers"]
    towers["item"]["features"][0]["min_count"] = 5
    towers["item"]["features"][1]["min_count"] = 66
    space = fit(tiny_config(towers=towers), dataset)
    times = Counter(dataset.interactions("train")["item_id"].to_pylist())
    ids = space.item.vocabularies[0].values
    assert ids == sorted(item for item, count in times.items() if count >= 5)
    tags: Counter[str] = Counter()
    for row in dataset.items().to_pylist():
        for tag in row["tags"]:
            tags[tag] += times[row["item_id"]]
    kept = sorted(tag for tag, count in tags.items() if count >= 66)
    assert 0 < len(kept) < len(tags)
    assert isinstance(space.item.bags[0], MultiVocabulary)
    assert space.item.bags[0].values == kept


def test_space_of_every_kind_survives_json(dataset: Dataset) -> None:
    space = fit(rich_config(), dataset)
    assert FeatureSpace.from_json(space.to_json()) == space


def test_blocks_of_bags_are_taken_hidden_and_mapped(dataset: Dataset, tmp_path: Path) -> None:
    space = fit(rich_config(), dataset)
    block = space.item.encode(dataset.items(), "items")
    rows = np.array([7, 3, 3, 59])
    for whole, part in zip(block.bags, block.take(rows).bags, strict=True):
        assert bags(part) == [bags(whole)[row] for row in rows]
    assert block.hideable == 1 + 2
    hidden = np.random.default_rng(0).random((60, 3)) < 0.4
    found = block.hide(hidden)
    assert (found.categorical == np.where(hidden[:, :1], 0, block.categorical)).all()
    assert found.numeric is block.numeric
    for place, (before, after) in enumerate(zip(block.bags, found.bags, strict=True)):
        expected = [[0] if hidden[r, 1 + place] else bag for r, bag in enumerate(bags(before))]
        assert bags(after) == expected
    prepare(dataset, space, tmp_path)
    mapped = TrainingData.open(tmp_path).items
    for stored, bag in zip(mapped.bags, block.bags, strict=True):
        assert bags(stored) == bags(bag)
        assert not stored.items.flags.owndata
    assert Block(block.categorical, block.numeric).hideable == 1


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        ({"kind": "multi_valued", "column": "title"}, "expected lists of integers or strings"),
        ({"kind": "multi_valued", "column": "attribute_vector"}, "got fixed_size_list"),
        (
            {"kind": "categorical", "column": "tags"},
            "expected integers, strings or booleans; got li",
        ),
        ({"kind": "numeric", "column": "tags"}, "expected numbers, or fixed-size lists of them"),
        ({"kind": "text", "column": "tags"}, "expected string; got list"),
        ({"kind": "text", "column": "shoe"}, "items.parquet: shoe: no such column"),
    ],
)
def test_kinds_that_do_not_fit_the_column(
    dataset: Dataset, feature: dict[str, Any], words: str
) -> None:
    towers = rich_config().model_dump()["towers"]
    towers["item"]["features"] = [feature]
    with pytest.raises(DataError) as caught:
        fit(TrainingConfig(towers=towers), dataset)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (pa.array([[1.5], []]), "tags: wrong type; .*got list<"),
        (pa.array([[["a"]], []]), "tags: wrong type; .*got list<"),
    ],
)
def test_lists_that_no_dataset_takes(tmp_path: Path, values: pa.Array, words: str) -> None:
    items = pa.table({"item_id": [1, 2], "tags": values})
    rows = pa.table(
        {"user_id": [0], "item_id": [1], "timestamp": [0], "split": pa.array(["train"])}
    )
    with pytest.raises(DataError, match=words):
        write_dataset(tmp_path / "d", pa.table({"user_id": [0]}), items, rows, name="d")


def test_one_vocabulary_for_whole_numbers_of_any_width() -> None:
    ids = Vocabulary(column="c", kind="id", value_type="int", values=[3, 300], dim=2)
    assert ids.encode(pa.table({"c": pa.array([300, 4, 3], pa.int64())}), "t").tolist() == [2, 0, 1]
