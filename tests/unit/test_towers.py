"""The towers: unit length, shared embeddings, history pooling, and no leak between rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny_config, tiny_dataset
from training.batches import Sampler, TrainingData, item_lists, prepare
from training.encoding import encode_items, encode_queries
from training.features import Block, FeatureSpace, fit
from training.metrics import Csr
from training.tables import USERS, Dataset
from training.towers import Inputs, QueryInputs, TwoTower, build_model

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
    queries = encode_queries(model, users, item_lists(dataset, ("train",)), items)
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
        unknown_rate=0, history_length=4,
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
    queries = encode_queries(model, users, item_lists(dataset, ("train",)), items)
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
