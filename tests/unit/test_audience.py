"""An item's users as a feature of the item tower: counted, bounded, left out, exported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from shardline.router.encoder.item_encoder import ItemEncoder
from shardline.shards.core.encoder_files import CONFIG
from shardline.shards.core.errors import ConfigError, InvalidInput
from shardline.training.config.loss_config import LossConfig
from shardline.training.config.tower_config import AudienceFeature
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.audiences import users_of_items
from shardline.training.data.csr import Csr
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import ITEMS, Dataset
from shardline.training.export import export, model_version
from shardline.training.features.audience import NOBODY, Audience
from shardline.training.features.fitted import FeatureSpace, fit
from shardline.training.features.infer import infer_config
from shardline.training.features.item_inputs import item_inputs
from shardline.training.features.prepared import TrainingData, prepare
from shardline.training.loop.batches import Sampler
from shardline.training.model.checkpoint import load_best
from shardline.training.model.encoding import encode_items, encode_queries
from shardline.training.model.towers import Inputs, build_model
from tests.audiences import audience_config, plain_sum_config, summed_audience_config
from tests.rich import rich_dataset
from tests.tiny import ITEM_IDS, NUM_ITEMS, NUM_USERS, USER_IDS, tiny_config, tiny_dataset
from tests.tiny import untrained_run as untrained

CPU = torch.device("cpu")
NEGATIVES = LossConfig(uniform_negatives=120, random_negatives=2, hard_negatives=1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return rich_dataset(tmp_path_factory.mktemp("rich"))


@pytest.fixture(scope="module")
def data(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    folder = tmp_path_factory.mktemp("cache")
    prepare(dataset, fit(audience_config(), dataset), folder)
    return TrainingData.open(folder)


def lists_of(lists: Csr) -> list[list[int]]:
    return [part.tolist() for part in np.split(lists.items, lists.indptr[1:-1])]


# Counting


def test_users_of_items_against_a_loop(dataset: Dataset) -> None:
    for splits in (("train",), ("train", "val")):
        rows = [r for r in dataset.interactions().to_pylist() if r["split"] in splits]
        found = lists_of(users_of_items(dataset, splits))
        for item, users in zip(ITEM_IDS, found, strict=True):
            mine = sorted((r["timestamp"], r["user_id"]) for r in rows if r["item_id"] == item)
            assert USER_IDS[users].tolist() == [user for _, user in mine]


def test_a_user_who_comes_back_counts_once_where_the_first_time_was(tmp_path: Path) -> None:
    users, items = pa.table({"user_id": [1, 2, 3]}), pa.table({"item_id": [5, 6]})
    rows = [(2, 5, 10), (1, 5, 20), (2, 5, 30), (3, 6, 1), (1, 5, 5), (3, 5, 20)]
    columns = list(zip(*rows, strict=True))
    table = pa.table(
        {
            "user_id": columns[0],
            "item_id": columns[1],
            "timestamp": columns[2],
            "split": pa.array(["train"] * len(rows)).dictionary_encode(),
        }
    )
    made = write_dataset(tmp_path / "data", users, items, table, name="again")
    assert lists_of(users_of_items(made, ("train",))) == [[0, 1, 2], [2]]
    assert lists_of(users_of_items(made, ("val",))) == [[], []]


def test_lists_are_of_known_users_and_bounded() -> None:
    users = Csr.of(np.array([5, 0, 2]), np.array([3, 1, 4, 0, 2, 1, 0]))
    table_rows = np.array([9, NOBODY, 7, 6, 8])  # training does not know user 1
    audience = Audience.of(users, table_rows, longest=2, user_column=0)
    assert lists_of(audience.lists) == [[8, 9, 7], [], [9]], "one more than are pooled"
    assert lists_of(audience.take(np.array([2, 0])).lists) == [[9], [9, 7]]
    items, left = np.array([0, 0, 0, 0, 1, 2]), np.array([7, 8, 6, NOBODY, 7, 9])
    found = lists_of(audience.without(items, left).lists)
    assert found == [[8, 9], [9, 7], [9, 7], [9, 7], [], []]
    hidden = audience.hide(np.array([True, False, False]))
    assert lists_of(hidden.lists) == [[], [], [9]]
    draws = np.array([0.0, 0.34, 0.999, 0.5, 0.5], np.float32)
    assert audience.drawn(np.array([0, 0, 0, 1, 2]), draws).tolist() == [8, 9, 7, NOBODY, 9]


def test_prepared_audiences_are_mapped_and_absent_without_the_feature(
    data: TrainingData, dataset: Dataset, tmp_path: Path
) -> None:
    audience = data.items.audience
    assert audience is not None
    assert not audience.lists.items.flags.owndata
    assert (audience.longest, audience.keep_target, audience.user_column) == (4, False, 0)
    whole = users_of_items(dataset, ("train",))
    for stored, users in zip(lists_of(audience.lists), lists_of(whole), strict=True):
        assert stored == [user + 1 for user in users[-5:]], "table row 0 is the unknown"
    assert max(whole.lengths) > 5, "or nothing is cut"
    prepare(dataset, fit(tiny_config(), dataset), tmp_path)
    assert TrainingData.open(tmp_path).items.audience is None
    assert not list(tmp_path.glob("audience*"))


# What a batch reads


def sampler(data: TrainingData, rank: int = 0, world: int = 1, **changes: Any) -> Sampler:
    settings = {"unknown_rate": 0.0, "loss": NEGATIVES, "hard": data.train} | changes
    return Sampler(
        data=data, batch_size=24, rank=rank, world=world, seed=9, history_length=4, **settings
    )


def test_the_pair_being_trained_is_in_neither_its_audience_nor_its_history(
    data: TrainingData,
) -> None:
    """For every example of an epoch; and nobody else is missing, up to the bound."""
    whole = data.items.audience
    assert whole is not None
    everyone = lists_of(whole.lists)
    seen, shorter = 0, 0
    for batch in sampler(data).epoch(0):
        audience = batch.items.audience
        assert audience is not None
        size = len(batch.user_rows)
        past = Csr.of(batch.history_lengths, batch.history.sources)
        for row, (users, items) in enumerate(
            zip(lists_of(audience.lists)[:size], lists_of(past), strict=True)
        ):
            user, item = int(batch.user_rows[row]) + 1, int(batch.item_rows[row])
            assert user not in users
            assert item not in items
            assert users == [each for each in everyone[item] if each != user][-4:]
            seen, shorter = seen + 1, shorter + (len(users) < 4)
    assert seen == 240 and 0 < shorter < seen


def test_a_drawn_negative_leaves_someone_out_too(data: TrainingData) -> None:
    """Or an empty audience would tell the positives of an item with one user from its draws."""
    whole = data.items.audience
    assert whole is not None
    everyone = lists_of(whole.lists)
    batch = next(sampler(data).epoch(0))
    audience, size = batch.items.audience, len(batch.user_rows)
    assert audience is not None
    drawn = batch.negatives.encoded
    assert len(drawn) == 120 + 24 * 3
    left = set()
    for item, users in zip(drawn.tolist(), lists_of(audience.lists)[size:], strict=True):
        full = everyone[item]
        assert len(users) == max(0, min(len(full), 5) - 1)
        missing = [each for each in full if each not in users]
        assert users == [each for each in full if each in users]
        left.update((item, each) for each in missing)
    by_item = {item: {u for i, u in left if i == item} for item, _ in left}
    assert any(len(users) > 1 for users in by_item.values()), "not always the same one"


def test_keep_target_leaves_the_pair_in(data: TrainingData) -> None:
    assert data.items.audience is not None
    kept = dataclasses.replace(data.items.audience, keep_target=True)
    items = dataclasses.replace(data.items, audience=kept)
    batch = next(sampler(dataclasses.replace(data, items=items)).epoch(0))
    audience = batch.items.audience
    assert audience is not None
    users = lists_of(audience.lists)
    for row, item in enumerate([*batch.item_rows, *batch.negatives.encoded]):
        assert users[row] == lists_of(kept.take(np.array([item])).lists)[0]
    assert any(user + 1 in users[row] for row, user in enumerate(batch.user_rows.tolist()))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_audiences_of_one(data: TrainingData, world: int) -> None:
    loss = LossConfig(uniform_negatives=12)
    whole = list(sampler(data, unknown_rate=0.3, loss=loss).epoch(1))
    ranks = [
        list(sampler(data, rank, world, unknown_rate=0.3, loss=loss).epoch(1))
        for rank in range(world)
    ]
    hidden = 0
    for step, batch in enumerate(whole):
        assert batch.items.audience is not None
        expected = lists_of(batch.items.audience.lists)
        positives: list[list[int]] = []
        negatives: list[list[int]] = []
        for rank in ranks:
            mine = rank[step]
            assert mine.items.audience is not None
            found = lists_of(mine.items.audience.lists)
            positives += found[: len(mine.item_rows)]
            negatives += found[len(mine.item_rows) :]
        assert positives + negatives == expected
        hidden += sum(not users for users in expected)
    assert 0.25 < hidden / (36 * len(whole)) < 0.5


# The tower


def test_pooled_audience_against_a_loop(data: TrainingData, dataset: Dataset) -> None:
    for pooling in ("mean", "sqrtn"):
        config = audience_config(pooling)
        model = build_model(config, fit(config, dataset)).eval()
        with torch.no_grad():
            part = model.audience_rows(
                Inputs.of(data.items.take(np.arange(NUM_ITEMS)), CPU)
            ).numpy()
        table = model.query_rows.embeddings[0].weight.detach().numpy()
        assert data.items.audience is not None
        for item, users in enumerate(lists_of(data.items.audience.lists)):
            newest = users[-4:]
            pooled = np.zeros(4, np.float32)
            for user in newest:
                pooled += table[user]
            count = max(1, len(newest))
            pooled /= count if pooling == "mean" else count**0.5
            expected = [*pooled, len(newest) / 4, float(not newest)]
            np.testing.assert_allclose(part[item], expected, atol=1e-6)


def test_an_item_without_users_has_zeros_and_a_history_reads_no_audience(
    dataset: Dataset, data: TrainingData
) -> None:
    config = audience_config()
    space = fit(config, dataset)
    model = build_model(config, space).eval()
    assert data.items.audience is not None
    nobody = data.items.audience.hide(np.ones(NUM_ITEMS, bool))
    lonely = dataclasses.replace(data.items, audience=nobody).take(np.arange(NUM_ITEMS))
    part = model.audience_rows(Inputs.of(lonely, CPU)).detach().numpy()
    assert part.tolist() == [[0, 0, 0, 0, 0, 1]] * NUM_ITEMS
    assert np.abs(encode_items(model, lonely) - encode_items(model, data.items)).max() > 1e-3
    for items in (lonely, data.items.alone()):
        found = encode_queries(model, data.users, data.train, items)
        expected = encode_queries(model, data.users, data.train, data.items)
        np.testing.assert_array_equal(found, expected)


def test_in_sums_an_item_of_nobody_is_its_own_vector(dataset: Dataset) -> None:
    config = plain_sum_config()
    space = fit(config, dataset)
    model = build_model(config, space).eval()
    items = item_inputs(space, dataset, ("train",))
    assert items.audience is not None
    taken = items.audience.lists.lengths > 0
    own = model.item_rows.embeddings[0].weight.detach().numpy()[items.categorical[:, 0]]
    unit = own / np.linalg.norm(own, axis=1, keepdims=True)
    same = np.isclose(encode_items(model, items), unit, atol=1e-6).all(axis=1)
    assert (same == ~taken).all()


# Configuration


@pytest.mark.parametrize(
    ("query", "item", "message"),
    [
        ([{"kind": "audience"}], None, "audience is a feature of the item tower only"),
        (None, [{"kind": "audience"}], "not an audience alone"),
        (None, [{"kind": "id", "column": "item_id"}] + [{"kind": "audience"}] * 2, "at most one"),
        (
            [{"kind": "numeric", "column": "age"}],
            [{"kind": "id", "column": "item_id"}, {"kind": "audience"}],
            "towers.query has no feature {kind: id, column: user_id}",
        ),
        (
            None,
            [
                {"kind": "id", "column": "item_id"},
                {"kind": "audience", "pooling": "attention", "keep_target": True},
            ],
            "keep_target needs pooling mean or sqrtn",
        ),
    ],
)
def test_towers_that_cannot_have_an_audience_are_refused(
    query: Any, item: Any, message: str
) -> None:
    if query and query[0]["kind"] == "audience":
        query = [{"kind": "id", "column": "user_id"}, *query]
    with pytest.raises(ValidationError) as caught:
        TrainingConfig.model_validate(
            {"towers": {"query": {"features": query}, "item": {"features": item}}}
        )
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("feature", "start", "message"),
    [
        ({"kind": "audience"}, "random", "tied towers have no vectors of users apart"),
        ({"kind": "categorical", "column": "category"}, "svd", "id_start svd has vectors of users"),
    ],
)
def test_tied_towers_are_refused(feature: Any, start: str, message: str) -> None:
    item = {"features": [{"kind": "id", "column": "item_id"}, feature]}
    with pytest.raises(ValidationError) as caught:
        TrainingConfig.model_validate({"towers": {"tied": True, "item": item}, "id_start": start})
    assert message in str(caught.value)


def test_inferred_query_features_get_the_ids_that_an_audience_pools(dataset: Dataset) -> None:
    item = {"features": [{"kind": "id", "column": "item_id"}, {"kind": "audience"}]}
    config = TrainingConfig.model_validate({"towers": {"item": item}})
    found = infer_config(config, dataset).towers.query
    assert found.has_ids("user_id")
    without = infer_config(TrainingConfig(), dataset).towers
    assert not without.query.has_ids("user_id") and without.item.audience is None


def test_sums_want_users_as_wide_as_items(dataset: Dataset) -> None:
    config = plain_sum_config()
    settings = config.model_dump()
    query = settings["towers"]["query"]
    query |= {"projection": "linear"}
    query["features"][0]["dim"] = 8
    with pytest.raises(ConfigError, match=r"towers.item: audience.*expected dim 16; got 8"):
        fit(TrainingConfig.model_validate(settings), dataset)


def test_a_space_without_an_audience_is_written_as_before(dataset: Dataset) -> None:
    assert "audience" not in fit(tiny_config(), dataset).to_json()
    space = fit(audience_config("attention"), dataset)
    again = FeatureSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert again.audience == AudienceFeature(pooling="attention", max_length=4)


# Export and serving


def field_of(row: int, name: str, where: str) -> str:
    return f"{row}|{name}|{where}"


def exported(config: TrainingConfig, dataset: Dataset, folder: Path) -> tuple[ItemEncoder, Any]:
    run = untrained(folder / "run", config, dataset)
    embeddings = export(run, dataset.path, folder, created_at="2026-01-01T00:00:00Z")
    assert embeddings.item_encoder_folder is not None
    (batch,) = embeddings.batches()
    return ItemEncoder.load(embeddings.item_encoder_folder), batch.vectors


def features_of(dataset: Dataset, encoder: ItemEncoder) -> list[dict[str, Any]]:
    columns = dataset.items().select(list(encoder.names)) if encoder.names else None
    return columns.to_pylist() if columns is not None else [{}] * NUM_ITEMS


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("layers", audience_config()),
        ("attention", audience_config("attention", popularity_exponent=0.2)),
        ("sums", summed_audience_config()),
    ],
)
def test_the_numpy_item_tower_is_torchs(
    name: str, config: TrainingConfig, dataset: Dataset, rich: Dataset, tmp_path: Path
) -> None:
    """Items of the catalogue with their users; any other with none."""
    source = rich if name == "sums" else dataset
    encoder, vectors = exported(config, source, tmp_path)
    rows = features_of(source, encoder)
    found = encoder.encode(ITEM_IDS, rows, field_of)
    np.testing.assert_allclose(found, vectors, atol=1e-5, rtol=1e-5)

    run, model = load_best(tmp_path / "run")
    strange = np.arange(NUM_ITEMS) * 3 + 101
    table = source.items().set_column(0, "item_id", [strange])
    block = run.space.item.encode(table, ITEMS)
    nobody = Audience(Csr.of(np.zeros(NUM_ITEMS, np.int64), strange[:0]), 4, 0)
    expected = encode_items(model, dataclasses.replace(block, audience=nobody))
    np.testing.assert_allclose(encoder.encode(strange, rows, field_of), expected, atol=1e-5)

    items = item_inputs(run.space, source, ("train",))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors / lengths, encode_items(model, items), atol=1e-6)
    with torch.no_grad():
        own = model.item_rows(Inputs.of(items.alone(), CPU)).numpy()
    np.testing.assert_allclose(encoder.history_rows(ITEM_IDS, rows)[1], own, atol=1e-5)


def test_what_a_written_item_brings_has_no_audience_in_it(dataset: Dataset, tmp_path: Path) -> None:
    encoder, _ = exported(audience_config(), dataset, tmp_path)
    rows = features_of(dataset, encoder)
    assert set(encoder.names) == {"category", "price", "attribute_vector"}
    with pytest.raises(InvalidInput, match="unknown feature; expected one of attribute_vector"):
        encoder.encode(ITEM_IDS[:1], [rows[0] | {"audience": [1]}], field_of)


def test_a_tower_of_ids_and_users_still_refuses_strangers(dataset: Dataset, tmp_path: Path) -> None:
    encoder, vectors = exported(plain_sum_config(), dataset, tmp_path)
    trained = np.isin(ITEM_IDS, dataset.interactions("train")["item_id"].to_numpy())
    found = encoder.encode(ITEM_IDS[trained], [{}] * int(trained.sum()), field_of)
    np.testing.assert_allclose(found, vectors[trained], atol=1e-5)
    with pytest.raises(InvalidInput, match="knows items by their ids alone"):
        encoder.encode(np.array([5]), [{}], field_of)


def test_older_readers_are_told_that_the_format_is_newer(dataset: Dataset, tmp_path: Path) -> None:
    versions: dict[bool, NDArray[Any] | int] = {}
    for has_audience, config in ((True, audience_config()), (False, tiny_config())):
        folder = tmp_path / str(has_audience)
        run = untrained(folder / "run", config, dataset)
        embeddings = export(run, dataset.path, folder, created_at="2026-01-01T00:00:00Z")
        assert embeddings.item_encoder_folder is not None
        content = json.loads((embeddings.item_encoder_folder / CONFIG).read_text())
        versions[has_audience] = content["format_version"]
        assert ("audience" in content) == has_audience
    assert versions == {True: 5, False: 3}


def test_the_version_of_a_model_follows_the_interactions_that_it_reads(
    dataset: Dataset, tmp_path: Path
) -> None:
    # both as written anew, so that the items' files are the same bytes
    table = dataset.interactions()
    made = [
        write_dataset(
            tmp_path / str(cut), dataset.users(), dataset.items(), table.slice(cut), name="tiny"
        )
        for cut in (0, 8)
    ]
    for config, same in ((tiny_config(), True), (audience_config(), False)):
        run = untrained(tmp_path / f"run-{same}", config, dataset)
        declared, model = load_best(run)
        versions = {model_version(declared, model, each) for each in made}
        assert (len(versions) == 1) == same


def test_export_counts_the_users_of_the_data_that_it_is_given(
    dataset: Dataset, tmp_path: Path
) -> None:
    """A user's first train item lost all of them: its vector alone is that of nobody's item."""
    rows = dataset.interactions("train")
    item = int(rows["item_id"][0].as_py())
    table = dataset.interactions()
    kept = table.filter(pc.not_equal(table["item_id"], item))
    other = write_dataset(tmp_path / "other", dataset.users(), dataset.items(), kept, name="tiny")
    run = untrained(tmp_path / "run", audience_config(), dataset)
    both = [
        next(iter(export(run, each.path, tmp_path / each.path.name, created_at="now").batches()))
        for each in (dataset, other)
    ]
    changed = np.abs(both[0].vectors - both[1].vectors).max(axis=1) > 1e-6
    assert ITEM_IDS[changed].tolist() == [item]
    assert len(dataset.user_ids) == NUM_USERS
