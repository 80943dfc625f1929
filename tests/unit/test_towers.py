"""The towers: unit length, shared embeddings, history pooling, and no leak between rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from shardline.shards.core.errors import ConfigError
from shardline.training.data.csr import Csr
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import ITEMS, USERS, Dataset
from shardline.training.features.fitted import Block, FeatureSpace, fit
from shardline.training.features.prepared import TrainingData, prepare
from shardline.training.loop.batches import Sampler
from shardline.training.model.encoding import encode_items, encode_queries
from shardline.training.model.towers import Inputs, QueryInputs, TwoTower, build_model, distinct
from tests.rich import rich_config, rich_dataset, sum_config
from tests.tiny import tiny_config, tiny_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def space(dataset: Dataset) -> FeatureSpace:
    return fit(tiny_config(), dataset)


@pytest.fixture(scope="module")
def model(space: FeatureSpace) -> TwoTower:
    return build_model(tiny_config(), space).eval()


def blocks(dataset: Dataset, space: FeatureSpace) -> tuple[Block, Block]:
    users = space.query.encode(dataset.users(), "users")
    return users, space.item.encode(dataset.items(), "items")


def test_every_vector_has_length_one(
    dataset: Dataset, space: FeatureSpace, model: TwoTower
) -> None:
    users, items = blocks(dataset, space)
    queries = encode_queries(model, users, dataset.positives("train"), items)
    for vectors in (queries, encode_items(model, items)):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        assert vectors.dtype == np.float32


def test_query_tower_against_a_row_built_by_hand(
    dataset: Dataset, space: FeatureSpace, model: TwoTower
) -> None:
    users, items = blocks(dataset, space)
    past = Csr(np.array([0, 3, 3, 9]), np.array([4, 9, 2, 7, 8, 10, 30, 31, 32]))
    found = encode_queries(model, users.take(np.arange(3)), past, items)
    item_rows = model.item_rows(Inputs.of(items, CPU)).detach().numpy()
    kept = [[4, 9, 2], [], [10, 30, 31, 32]]  # the newest four
    for user, history in enumerate(kept):
        own = model.query_rows(Inputs.of(users.take(np.array([user])), CPU)).detach().numpy()[0]
        mean = item_rows[history].mean(axis=0) if history else np.zeros(space.item.width)
        row = np.concatenate([own, mean, [len(history) / 4, not history]]).astype(np.float32)
        expected = model.query_tower(torch.from_numpy(row)[None], None).detach().numpy()[0]
        np.testing.assert_allclose(found[user], expected, atol=1e-5)


def test_a_row_does_not_depend_on_the_others(
    dataset: Dataset, space: FeatureSpace, model: TwoTower, tmp_path: Path
) -> None:
    prepare(dataset, space, tmp_path)
    data = TrainingData.open(tmp_path)
    users = np.array([3, 1, 7])
    past = data.train.take(users)
    together = encode_queries(model, data.users.take(users), past, data.items)
    for place, user in enumerate(users):
        alone = np.array([user])
        single = encode_queries(model, data.users.take(alone), data.train.take(alone), data.items)
        np.testing.assert_allclose(single[0], together[place], atol=1e-6)


def test_history_trains_the_item_embeddings(
    dataset: Dataset, space: FeatureSpace, tmp_path: Path
) -> None:
    prepare(dataset, space, tmp_path)
    sampler = Sampler(
        data=TrainingData.open(tmp_path), batch_size=24, rank=0, world=1, seed=0,
        unknown_rate=0, history_length=4, loss=tiny_config().loss,
    )  # fmt: skip
    batch = next(sampler.epoch(0))
    model = build_model(tiny_config(), space)
    queries = model.encode_queries(
        QueryInputs.of(batch.users, batch.history, batch.history_lengths, CPU)
    )
    queries[:, 0].sum().backward()
    table = model.item_rows.embeddings[0].weight.grad
    touched = set(torch.nonzero(table.abs().sum(dim=1))[:, 0].tolist())
    assert touched == set(batch.history.categorical[:, 0].tolist())


def test_linear_towers_without_history(dataset: Dataset, space: FeatureSpace) -> None:
    towers = tiny_config().model_dump()["towers"]
    towers["query"]["features"] = towers["query"]["features"][:-1]
    towers["query"]["hidden"] = towers["item"]["hidden"] = []
    config = tiny_config(towers=towers)
    bare = fit(config, dataset)
    assert bare.history is None
    model = build_model(config, bare)
    users, items = blocks(dataset, bare)
    queries = encode_queries(model, users, dataset.positives("train"), items)
    rows = model.query_rows(Inputs.of(users, CPU))
    linear = rows @ model.query_tower.skip.weight.T + model.query_tower.output(rows)
    expected = torch.nn.functional.normalize(linear, dim=1).detach().numpy()
    np.testing.assert_allclose(queries, expected, atol=1e-6)


def test_dropout_follows_its_generator_alone(dataset: Dataset, space: FeatureSpace) -> None:
    towers = tiny_config().model_dump()["towers"]
    towers["item"]["dropout"] = 0.5
    config = tiny_config(towers=towers)
    model = build_model(config, space)
    items = Inputs.of(space.item.encode(dataset.items(), "items"), CPU)
    first, same, other = (
        model.encode_items(items, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(model.encode_items(items), model.encode_items(items))


def test_queries_only_with_history_have_no_columns(dataset: Dataset, tmp_path: Path) -> None:
    towers = tiny_config().model_dump()["towers"]
    towers["query"]["features"] = [{"kind": "history"}]
    config = tiny_config(towers=towers)
    space = fit(config, dataset)
    prepare(dataset, space, tmp_path)
    data = TrainingData.open(tmp_path)
    assert data.users.numeric.shape == (40, 0)
    model = build_model(config, space)
    assert encode_queries(model, data.users, data.train, data.items).shape == (40, 16)
    assert len(space.query.encode(dataset.users(), USERS)) == 40


@pytest.mark.parametrize("largest", [5, 40, 10_000])
def test_distinct_rows_stand_for_all(largest: int) -> None:
    """Both ways to find them: marking values, and sorting where there are many more values."""
    rows = np.random.default_rng(0).integers(0, largest, 50)
    first, places = distinct(rows)
    assert rows[first].tolist() == sorted(set(rows.tolist()))
    assert (rows[first][places] == rows).all()
    assert [len(part) for part in distinct(rows[:0])] == [0, 0]


def test_bags_are_means_of_their_embeddings(tmp_path: Path) -> None:
    dataset = rich_dataset(tmp_path)
    space = fit(rich_config(), dataset)
    model = build_model(rich_config(), space)
    block = space.item.encode(dataset.items(), ITEMS)
    found = model.item_rows(Inputs.of(block, CPU)).detach().numpy()
    tables = [table.weight.detach().numpy() for table in model.item_rows.bags]
    ids = model.item_rows.embeddings[0].weight.detach().numpy()
    for row in range(len(block)):
        means = [
            table[bag.items[bag.indptr[row] : bag.indptr[row + 1]]].mean(axis=0)
            for table, bag in zip(tables, block.bags, strict=True)
        ]
        expected = [ids[block.categorical[row, 0]], *means, block.numeric[row]]
        np.testing.assert_allclose(found[row], np.concatenate(expected), atol=1e-6)
    rows = np.array([5, 9, 5, 5, 0])  # taken rows repeat, so each bag is averaged once
    repeated = Inputs.of(block.take(rows), CPU)
    assert repeated.places is not None and len(repeated.bags[0][1]) == 3 + 1
    np.testing.assert_allclose(model.item_rows(repeated).detach(), found[rows], atol=1e-6)
    again = Inputs.of(block.take(rows).take(np.array([3, 1, 0])), CPU)
    np.testing.assert_allclose(model.item_rows(again).detach(), found[[5, 9, 5]], atol=1e-6)
    hidden = block.take(rows).hide(np.eye(5, 3, dtype=np.bool_))
    assert Inputs.of(hidden, CPU).places is None
    # n-grams that no text of train has must not be noise to those that have some
    assert np.linalg.norm(tables[1], axis=1).mean() < 0.2 < np.linalg.norm(tables[0], axis=1).mean()


def test_towers_without_weights_are_sums(tmp_path: Path) -> None:
    """The item vector is id + title, the query vector id + interests + mean of past items."""
    dataset = rich_dataset(tmp_path)
    space = fit(sum_config(), dataset)
    model = build_model(sum_config(), space)
    items = space.item.encode(dataset.items(), ITEMS)
    users = space.query.encode(dataset.users(), USERS)
    past = Csr(np.array([0, 3, 3, 9]), np.array([4, 9, 2, 7, 8, 10, 30, 31, 32]))
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"item_rows", "query_rows", "log_temperature"}

    def unit(row: np.ndarray) -> np.ndarray:
        return row / np.linalg.norm(row)

    def table(rows: torch.nn.ModuleList) -> np.ndarray:
        return rows[0].weight.detach().numpy()

    def bag(block: Block, weights: np.ndarray, row: int) -> np.ndarray:
        lists = block.bags[0]
        return weights[lists.items[lists.indptr[row] : lists.indptr[row + 1]]].mean(axis=0)

    own = [
        table(model.item_rows.embeddings)[items.categorical[row, 0]]
        + bag(items, table(model.item_rows.bags), row)
        for row in range(len(items))
    ]
    found = encode_items(model, items)
    np.testing.assert_allclose(found, [unit(row) for row in own], atol=1e-6)
    queries = encode_queries(model, users.take(np.arange(3)), past, items)
    for user, history in enumerate([[4, 9, 2], [], [10, 30, 31, 32]]):
        row = table(model.query_rows.embeddings)[users.categorical[user, 0]].copy()
        row += bag(users, table(model.query_rows.bags), user)
        if history:
            row += np.mean([own[item] for item in history], axis=0)
        np.testing.assert_allclose(queries[user], unit(row), atol=1e-5)


def test_fresh_vectors_have_the_asked_length(tmp_path: Path) -> None:
    dataset = rich_dataset(tmp_path)
    towers = sum_config().model_dump()["towers"]
    towers["item"]["features"][0]["init_norm"] = 0.25
    config = tiny_config(towers=towers)
    model = build_model(config, fit(config, dataset))
    tables = (*model.item_rows.embeddings, *model.item_rows.bags, *model.query_rows.bags)
    norms = [table.weight.detach().norm(dim=1).mean().item() for table in tables]
    assert norms == pytest.approx([0.25, 0.1, 1.0], rel=0.3)


def test_sums_need_equal_widths(tmp_path: Path) -> None:
    dataset = rich_dataset(tmp_path)
    towers = sum_config().model_dump()["towers"]
    towers["query"]["features"][1]["dim"] = 8
    with pytest.raises(ConfigError, match=r"towers\.query: user_id: .*expected dim 16; got 8"):
        fit(tiny_config(towers=towers), dataset)
    towers = sum_config().model_dump()["towers"]
    towers["item"] = rich_config().model_dump()["towers"]["item"]
    with pytest.raises(ConfigError, match=r"towers\.query: history: .*expected dim 16; got 13"):
        fit(tiny_config(towers=towers), dataset)


def test_a_cold_item_goes_by_its_features(dataset: Dataset, tmp_path: Path) -> None:
    """Its id is the trained unknown: a twin of a known item lands nearer to it than to others."""
    items, rows = dataset.items(), dataset.interactions()
    new = items.set_column(0, "item_id", pa.array(items["item_id"].to_numpy() + 1000))
    both = write_dataset(
        tmp_path / "both", dataset.users(), pa.concat_tables([items, new]), rows, name="both"
    )
    config = tiny_config(unknown_rate=0.3)
    space = fit(config, both)
    prepare(both, space, tmp_path)
    data = TrainingData.open(tmp_path)
    model = build_model(config, space)
    before = model.item_rows.embeddings[0].weight[0].detach().clone()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    sampler = Sampler(
        data=data, batch_size=48, rank=0, world=1, seed=0, unknown_rate=0.3, history_length=4,
        loss=config.loss,
    )  # fmt: skip
    for epoch in range(10):
        for batch in sampler.epoch(epoch):
            queries = QueryInputs.of(batch.users, batch.history, batch.history_lengths, CPU)
            left, right, temperature = model(queries, Inputs.of(batch.items, CPU))
            loss = torch.nn.functional.cross_entropy(left @ right.T / temperature, torch.arange(48))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert (model.item_rows.embeddings[0].weight[0] - before).norm() > 0.05
    vectors = encode_items(model, data.items)
    assert (data.items.categorical[60:, 0] == 0).all()
    assert np.isfinite(vectors).all()
    alike = vectors[:60] @ vectors[60:].T
    seen = data.items.categorical[:60, 0] > 0
    rank = (alike[seen] > np.diag(alike)[seen, None]).sum(axis=1)
    assert np.median(rank) <= 2  # of 60 cold items, the one with the item's own features
