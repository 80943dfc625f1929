"""The numpy item encoder must say what the torch item tower says, and refuse what does not fit."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from shardline.router.encoder.feature_attributes import FeatureAttributes
from shardline.router.encoder.item_encoder import ItemEncoder
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.encoder_files import read_encoder
from shardline.shards.core.errors import CorruptFile, InvalidInput, NotFound
from shardline.shards.live.attributes import check_attributes
from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.storage.embedding_set import EmbeddingSet
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import ITEMS, Dataset
from shardline.training.export import export
from shardline.training.model.checkpoint import load_best
from shardline.training.model.encoding import encode_items
from tests.rich import sum_config, wide_config, wide_dataset
from tests.tiny import ITEM_IDS, NUM_ITEMS, tiny_config, untrained_run

NEW = 5  # an id that no catalogue of these tests has


@dataclass(frozen=True)
class Exported:
    run: Path
    dataset: Dataset
    embeddings: EmbeddingSet

    @property
    def encoder(self) -> ItemEncoder:
        assert self.embeddings.item_encoder_folder is not None
        return ItemEncoder.load(self.embeddings.item_encoder_folder)

    @property
    def query_weights(self) -> dict[str, Any]:
        assert self.embeddings.encoder_folder is not None
        return read_encoder(self.embeddings.encoder_folder)[1]

    def rows(self) -> list[dict[str, Any]]:
        """The features of the catalogue's items, as answers give attributes."""
        return rows_of(self.dataset, self.encoder)


def rows_of(dataset: Dataset, encoder: ItemEncoder) -> list[dict[str, Any]]:
    attributes = ItemAttributes(dataset.items())
    columns = {name: attributes.values(name, np.arange(NUM_ITEMS)) for name in encoder.names}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return json.loads(json.dumps(rows or [{}] * NUM_ITEMS))


def field_of(row: int, name: str, where: str) -> str:
    return f"{row}|{name}|{where}"


def exported(config: TrainingConfig, dataset: Dataset, folder: Path) -> Exported:
    run = untrained_run(folder / "run", config, dataset)
    embeddings = export(run, dataset.path, folder, created_at="2026-01-01T00:00:00Z")
    return Exported(run, dataset, embeddings)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return wide_dataset(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def trained(wide: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(wide_config(), wide, tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize(
    "config",
    [None, wide_config("mean", popularity_exponent=0.3), sum_config("attention"), sum_config()],
    ids=["attention", "popular ones longer", "summed attention", "summed mean"],
)
def test_equals_the_torch_tower(
    config: TrainingConfig | None, trained: Exported, wide: Dataset, tmp_path: Path
) -> None:
    """Known items, as they were exported; new ones, as the tower says of the unknown id."""
    made = trained if config is None else exported(config, wide, tmp_path)
    encoder, rows = made.encoder, made.rows()
    (batch,) = made.embeddings.batches()
    found = encoder.encode(ITEM_IDS, rows, field_of)
    assert found.dtype == np.float32 and found.shape == (NUM_ITEMS, encoder.dim)
    np.testing.assert_allclose(found, batch.vectors, atol=1e-5, rtol=1e-5)
    one = encoder.encode(ITEM_IDS[7:8], rows[7:8], field_of)
    np.testing.assert_allclose(one, batch.vectors[7:8], atol=1e-5, rtol=1e-5)

    run, model = load_best(made.run)
    strange = wide.items().set_column(0, "item_id", [np.arange(NUM_ITEMS) * 3 + 101])
    expected = encode_items(model, run.space.item.encode(strange, ITEMS))
    new = encoder.encode(np.arange(NUM_ITEMS) * 3 + 101, rows, field_of)
    np.testing.assert_allclose(new, expected, atol=1e-5)
    assert np.abs(new - found).max() > 1e-3, "the id counts"


@pytest.mark.parametrize("name", ["attention", "summed mean"])
def test_history_rows_are_those_of_the_export(
    name: str, trained: Exported, wide: Dataset, tmp_path: Path
) -> None:
    made = trained if name == "attention" else exported(sum_config(), wide, tmp_path)
    has_row, rows, scores = made.encoder.history_rows(ITEM_IDS, made.rows())
    weights = made.query_weights
    np.testing.assert_allclose(rows, weights["history.rows"], atol=1e-5)
    assert (scores is None) == ("history.item_scores" not in weights)
    if scores is not None:
        np.testing.assert_allclose(scores, weights["history.item_scores"], atol=1e-5)
        assert np.ptp(scores) > 1e-3
    assert has_row.sum() >= NUM_ITEMS - 5
    nothing = dict.fromkeys(made.encoder.names)
    assert made.encoder.history_rows(np.array([NEW]), [nothing])[0].tolist() == [False]


def test_blocks_change_nothing(trained: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, rows = trained.encoder, trained.rows()
    whole = encoder.encode(ITEM_IDS, rows, field_of)
    monkeypatch.setattr("shardline.router.encoder.item_encoder.ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(encoder.encode(ITEM_IDS, rows, field_of), whole, atol=1e-6)
    with pytest.raises(InvalidInput, match=r"^50\|tags\|\[1\]: wrong value"):
        encoder.encode(ITEM_IDS, [*rows[:50], rows[0] | {"tags": ["a", 1]}, *rows[51:]], field_of)


def test_features_are_named_without_the_id(trained: Exported) -> None:
    encoder = trained.encoder
    kinds = {each["name"]: each["kind"] for each in encoder.features}
    assert kinds == {
        "tags": "multi_valued",
        "title": "text",
        "adult": "categorical",
        "category": "categorical",
        "price": "numeric",
        "released": "numeric",
        "attribute_vector": "numeric",
        "year": "numeric",
        "brand": "categorical",
        "codes": "multi_valued",
    }
    assert encoder.model_version == trained.embeddings.model_version


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"colour": "red"}, "colour", "unknown feature; expected one of adult, attribute_vector"),
        ({"item_id": 7}, "item_id", "unknown feature; expected one of adult"),
        ({"price": "7"}, "price", "expected finite number >= 0, or null; got str"),
        ({"price": -1}, "price", "got -1"),
        ({"adult": 1}, "adult", "expected bool or null; got int"),
        ({"category": 1.5}, "category", "expected int or null; got float"),
        ({"tags": "sea"}, "tags", "expected list of strings, or null; got str"),
        ({"released": "soon"}, "released", "expected time as ISO 8601 text"),
        ({"attribute_vector": [1.0]}, "attribute_vector", "expected list of 4 finite numbers"),
        (None, "year", "missing feature; expected all of adult, attribute_vector"),
    ],
)
def test_what_does_not_fit(
    trained: Exported, change: dict[str, Any] | None, field: str, words: str
) -> None:
    good = trained.rows()[0]
    bad = good | change if change else {name: good[name] for name in good if name != "year"}
    with pytest.raises(InvalidInput) as caught:
        trained.encoder.encode(np.array([NEW, NEW + 1]), [good, bad], field_of)
    assert (caught.value.field or "").startswith(f"1|{field}|")
    assert words in str(caught.value)


def test_nulls_are_the_unknown(trained: Exported) -> None:
    """Of each feature on its own, as training has it, and of all of them."""
    encoder, rows = trained.encoder, trained.rows()
    nothing = dict.fromkeys(encoder.names)
    found = encoder.encode(np.array([NEW, NEW + 1]), [nothing, nothing], field_of)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(found[0], found[1])
    full = next(row for row in rows if all(value not in (None, "", []) for value in row.values()))
    whole = encoder.encode(np.array([NEW]), [full], field_of)
    for name in encoder.names:
        part = encoder.encode(np.array([NEW]), [full | {name: None}], field_of)
        assert np.abs(part - whole).max() > 1e-5, name


def test_a_tower_of_ids_alone_takes_known_items_only(wide: Dataset, tmp_path: Path) -> None:
    towers = tiny_config().model_dump()["towers"]
    towers["item"]["features"] = [{"kind": "id", "column": "item_id", "dim": 4}]
    made = exported(tiny_config(epochs=1, towers=towers), wide, tmp_path)
    encoder, (batch,) = made.encoder, made.embeddings.batches()
    known = [row for row, item in enumerate(ITEM_IDS) if item in seen_in_training(made)]
    found = encoder.encode(ITEM_IDS[known], [{}] * len(known), field_of)
    np.testing.assert_allclose(found, batch.vectors[known], atol=1e-5)
    with pytest.raises(InvalidInput, match=r"1\|\|: the model knows items by their ids alone.*5"):
        encoder.encode(np.array([ITEM_IDS[known[0]], NEW]), [{}, {}], field_of)
    assert not encoder.history_rows(np.array([NEW]), [{}])[0].any()


def seen_in_training(made: Exported) -> set[int]:
    return set(made.dataset.interactions("train")["item_id"].to_pylist())


def test_features_are_what_attributes_take(trained: Exported, wide: Dataset) -> None:
    """Filled from features, every column passes the shard's own check and reads the same."""
    encoder, rows = trained.encoder, trained.rows()
    schema = wide.items().schema.remove(0)
    names = encoder.attributes.names
    assert set(names) == set(encoder.names)
    filled = {n: encoder.attributes.column(n, [row[n] for row in rows]) for n in names}
    check_attributes(msgpack.packb(filled), ITEM_IDS, schema)
    stored = ItemAttributes(wide.items())
    assert all(filled[n] == stored.values(n, np.arange(NUM_ITEMS)) for n in names)


@pytest.mark.parametrize(
    ("kind", "given", "taken"),
    [
        ("timestamp[us]", 1_500_000_000.25, "2017-07-14T02:40:00.250000"),
        ("timestamp[us]", "2017-07-14T04:40:00+02:00", "2017-07-14T02:40:00"),
        ("timestamp[us]", "2017-07-14", "2017-07-14T00:00:00"),
        ("timestamp[ns]", "2017-07-14T04:40:00.123456789+02:00", "2017-07-14T02:40:00.123456789"),
        ("timestamp[ns, tz=UTC]", "2017-07-14T02:40:00.000000001",
         "2017-07-14T02:40:00.000000001+00:00"),
        ("timestamp[us, tz=UTC]", "2017-07-14T02:40:00", "2017-07-14T02:40:00+00:00"),
        ("timestamp[us]", 1e300, 1e300),
        ("int64", 3.0, 3),
        ("uint8", 3.5, 3.5),
        ("int64", 2.0**64, 2.0**64),
        ("double", 3.0, 3.0),
        ("list<element: int64>", [1.0, None, 2], [1, None, 2]),
        ("fixed_size_list<item: float>[2]", [1.0, 2], [1.0, 2]),
        ("dictionary<values=string, indices=int32, ordered=0>", "a", "a"),
        ("bool", None, None),
    ],
)  # fmt: skip
def test_one_feature_as_its_attribute(kind: str, given: Any, taken: Any) -> None:
    attributes = FeatureAttributes({"f": kind, "other": "int64"}, [{"column": "f"}])
    assert attributes.names == ("f",)
    (found,) = attributes.column("f", [given])
    assert found == taken and type(found) is type(taken)


@pytest.mark.parametrize(
    ("kind", "answered", "feature"),
    [
        ("decimal128(38, 20)", "0.12345678901234567890", 0.12345678901234568),
        ("decimal128(38, 20)", 0.5, 0.5),
        ("duration[ns]", "1000000000.123456789", 1000000000.1234568),
        ("list<element: decimal128(38, 20)>", ["1.00000000000000000001", None, 2.0],
         [1.0, None, 2.0]),
        ("string", "0.5", "0.5"),
        ("decimal128(38, 20)", None, None),
    ],
)  # fmt: skip
def test_one_attribute_as_its_feature(kind: str, answered: Any, feature: Any) -> None:
    attributes = FeatureAttributes({"f": kind}, [{"column": "f"}])
    found = attributes.feature("f", answered)
    assert found == feature and type(found) is type(feature)
    assert attributes.feature("g", answered) == answered


def test_times_are_the_same_in_seconds_and_as_text(trained: Exported) -> None:
    row = next(row for row in trained.rows() if row["released"] is not None)
    moments = ["2017-07-14T02:40:00", "2017-07-14T04:40:00+02:00", 1_500_000_000]
    rows = [row | {"released": moment} for moment in moments]
    found = trained.encoder.encode(np.array([NEW] * 3), rows, field_of)
    assert (found == found[0]).all()


def test_a_folder_that_holds_no_item_tower(trained: Exported, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"item_encoder/encoder\.json: no item encoder here"):
        ItemEncoder.load(tmp_path / "item_encoder")
    folder = trained.embeddings.item_encoder_folder
    assert folder is not None
    shutil.copytree(folder, tmp_path / "item_encoder")
    path = tmp_path / "item_encoder" / "encoder.json"
    content = json.loads(path.read_text())
    del content["attributes"]
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptFile, match="not an item encoder"):
        ItemEncoder.load(tmp_path / "item_encoder")
    path.write_text("{}")
    with pytest.raises(CorruptFile, match=r"encoder\.json: not an item encoder"):
        ItemEncoder.load(tmp_path / "item_encoder")


def test_new_items_count_in_histories(trained: Exported) -> None:
    """As if they had been exported: a query whose history names them instead of known ones."""
    assert trained.embeddings.encoder_folder is not None
    query = QueryEncoder.load(trained.embeddings.encoder_folder)
    encoder, rows = trained.encoder, trained.rows()
    _, inputs, scores = encoder.history_rows(ITEM_IDS, rows)
    renamed = {int(item) * 1000: row for row, item in enumerate(ITEM_IDS)}

    class Renamed:
        def find(self, item_ids):
            known = np.array([item in renamed for item in item_ids.tolist()], dtype=bool)
            places = [renamed[item] for item in item_ids[known].tolist()]
            if not places:
                return known, None, None
            assert scores is not None
            return known, inputs[places], scores[places]

    base = {"user_id": 1, "interests": [5, 1], "age": 30, "bio": "Brazil night"}
    rng = np.random.default_rng(0)
    changed = 0
    for length in (0, 1, 3, 4, 9):
        for _ in range(8):
            past = rng.choice(ITEM_IDS, length).tolist()
            some = [item * 1000 if rng.random() < 0.5 else item for item in past]
            strangers = [*some, 1] if rng.random() < 0.3 else some
            expected = query.encode([base | {"history": past}])
            if strangers is not some and len(past) > 3:
                continue  # new items are looked for among the last four ids only
            found = query.encode([base | {"history": strangers}], Renamed())
            np.testing.assert_allclose(found, expected, atol=1e-5)
            without = query.encode([base | {"history": strangers}])
            changed += int(np.abs(without - expected).max() > 1e-4)
    assert changed > 8
