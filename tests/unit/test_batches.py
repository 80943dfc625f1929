"""Prepared data against the tables it came from, and batches against loops."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from shardline.shards.core.errors import ConfigError, DataError
from shardline.training.config.loss_config import LossConfig
from shardline.training.data.csr import Csr
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import Dataset
from shardline.training.features.fitted import fit
from shardline.training.features.prepared import TrainingData, prepare
from shardline.training.loop.batches import Batch, Sampler, check_batch, fitting_batch, others
from tests.tiny import ITEM_IDS, NUM_USERS, PER_USER, USER_IDS, tiny_config, tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def data(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    folder = tmp_path_factory.mktemp("cache")
    prepare(dataset, fit(tiny_config(), dataset), folder)
    return TrainingData.open(folder)


def sampler(data: TrainingData, rank: int = 0, world: int = 1, rate: float = 0.0) -> Sampler:
    return Sampler(
        data=data,
        batch_size=24,
        rank=rank,
        world=world,
        seed=9,
        unknown_rate=rate,
        history_length=4,
        loss=LossConfig(),
    )


def test_lists_hold_each_users_items_in_order_of_time(dataset: Dataset, data: TrainingData) -> None:
    table = dataset.interactions("train").to_pylist()
    for row, user in enumerate(USER_IDS):
        mine = sorted((r["timestamp"], r["item_id"]) for r in table if r["user_id"] == user)
        items = data.train.items[data.train.indptr[row] : data.train.indptr[row + 1]]
        assert ITEM_IDS[items].tolist() == [item for _, item in mine]
    assert (data.train_users == data.train.owners).all()
    assert data.item_counts().sum() == NUM_USERS * (PER_USER - 2)


def test_mapped_arrays_are_not_copies(data: TrainingData) -> None:
    for array in (data.items.numeric, data.items.categorical, data.train.items):
        assert not array.flags.writeable
        assert not array.flags.owndata


def test_every_example_once_an_epoch_and_orders_differ(data: TrainingData) -> None:
    epochs = []
    for epoch in (0, 1):
        pairs = [
            (u, i)
            for batch in sampler(data).epoch(epoch)
            for u, i in zip(batch.users.categorical[:, 0], batch.item_rows, strict=True)
        ]
        assert len(pairs) == len(set(pairs)) == 240
        epochs.append(pairs)
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) == set(epochs[1])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batch_of_one(data: TrainingData, world: int) -> None:
    whole = list(sampler(data, rate=0.3).epoch(2))
    parts = [list(sampler(data, rank, world, rate=0.3).epoch(2)) for rank in range(world)]
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole):
        ours = [part[step] for part in parts]
        for name in ("users", "items", "history"):
            for field in ("categorical", "numeric"):
                joined = np.concatenate([getattr(getattr(b, name), field) for b in ours])
                assert (joined == getattr(getattr(batch, name), field)).all()
        for name in ("history_lengths", "item_rows", "known_items"):
            joined = np.concatenate([getattr(b, name) for b in ours])
            assert (joined == getattr(batch, name)).all()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_negatives_are_encoded_after_the_positives_and_hidden_like_them(
    data: TrainingData, world: int
) -> None:
    loss = LossConfig(uniform_negatives=600, random_negatives=2, hard_negatives=1)
    hard = data.train  # any list per user will do
    for rank in range(world):
        ours = dataclasses.replace(sampler(data, rank, world, rate=0.3), loss=loss, hard=hard)
        batch = next(ours.epoch(0))
        rows = np.concatenate([batch.item_rows, batch.negatives.encoded])
        assert len(rows) == len(batch.items) == (24 + 600 + 24 * 3) // world
        hidden = batch.items.categorical != data.items.categorical[rows]
        assert (batch.items.categorical[hidden] == 0).all()
        assert hidden[len(batch.item_rows) :].mean() == pytest.approx(0.3, abs=0.06)
        assert (batch.user_rows == data.train_users[batch_rows(data, batch)]).all()
    whole = next(dataclasses.replace(sampler(data), loss=loss, hard=hard).epoch(0))
    assert (batch.negatives.random == whole.negatives.random[-24 // world :]).all()


def test_hard_negatives_without_lists_are_refused(data: TrainingData) -> None:
    with pytest.raises(ConfigError, match=r"loss.hard_negatives.*mined list per user|mined list"):
        dataclasses.replace(sampler(data), loss=LossConfig(hard_negatives=1))


def batch_rows(data: TrainingData, batch: Batch) -> np.ndarray:
    """The train interactions of a batch, found by user and item."""
    pairs = zip(data.train_users.tolist(), data.train.items.tolist(), strict=True)
    place = {pair: row for row, pair in enumerate(pairs)}
    wanted = zip(batch.user_rows.tolist(), batch.item_rows.tolist(), strict=True)
    return np.array([place[pair] for pair in wanted])


def test_history_leaves_the_positive_out_and_keeps_the_newest(data: TrainingData) -> None:
    rows = np.arange(len(data.train.items))
    users = data.train_users
    for newest in (1, 3, 4, 5, 50):
        found = others(data.train, users, rows, newest)
        for row in rows:
            start, end = data.train.indptr[users[row]], data.train.indptr[users[row] + 1]
            rest = [data.train.items[i] for i in range(start, end) if i != row][-newest:]
            mine = found.items[found.indptr[row] : found.indptr[row + 1]]
            assert mine.tolist() == rest


def test_history_that_keeps_the_positive_is_the_one_of_serving(
    data: TrainingData, dataset: Dataset, tmp_path: Path
) -> None:
    features = [{"kind": "id", "column": "user_id"}, {"kind": "history", "keep_target": True}]
    towers = tiny_config().model_dump()["towers"] | {"query": {"features": features}}
    prepare(dataset, fit(tiny_config(towers=towers), dataset), tmp_path)
    keeping = TrainingData.open(tmp_path)
    assert keeping.keep_target and not data.keep_target
    batch = next(sampler(keeping).epoch(0))
    start = 0
    for user, length in zip(batch.user_rows, batch.history_lengths, strict=True):
        newest = keeping.train.items[: keeping.train.indptr[user + 1]][-4:]
        expected = keeping.items.categorical[newest, 0]
        assert batch.history.categorical[start : start + length, 0].tolist() == expected.tolist()
        start += length
    assert (batch.history_lengths == 4).all()


def test_others_of_users_with_one_item_and_without_history() -> None:
    train = Csr(np.array([0, 1, 3]), np.array([7, 8, 9]))
    rows = np.array([0, 2])
    found = others(train, np.array([0, 1]), rows, 4)
    assert found.indptr.tolist() == [0, 0, 1]
    assert found.items.tolist() == [8]
    assert others(train, np.array([0, 1]), rows, 0).indptr.tolist() == [0, 0, 0]


def test_known_pairs_are_all_train_items_of_the_users(data: TrainingData) -> None:
    rows = np.arange(24) * 7
    batch = sampler(data).batch(rows, np.random.default_rng(0))
    expected = [
        (example, item)
        for example, row in enumerate(rows)
        for item in data.train.items[
            data.train.indptr[data.train_users[row]] : data.train.indptr[data.train_users[row] + 1]
        ].tolist()
    ]
    pairs = zip(batch.known_rows.tolist(), batch.known_items.tolist(), strict=True)
    assert list(pairs) == expected


def test_hidden_values_come_at_the_asked_rate(data: TrainingData) -> None:
    batches = [b for epoch in range(20) for b in sampler(data, rate=0.25).epoch(epoch)]
    for blocks in ([b.users for b in batches], [b.items for b in batches]):
        unknown = np.concatenate([block.categorical for block in blocks]) == 0
        assert unknown.mean(axis=0) == pytest.approx(0.25, abs=0.04)
    empty = np.concatenate([b.history_lengths for b in batches]) == 0
    assert empty.mean() == pytest.approx(0.25, abs=0.04)
    for batch in batches[:10]:
        assert len(batch.history) == batch.history_lengths.sum()


def test_take_cuts_from_the_front() -> None:
    lists = Csr(np.array([0, 3, 3, 5]), np.array([1, 2, 3, 4, 5]))
    cut = lists.take(np.array([2, 0, 1]), 2)
    assert (cut.indptr.tolist(), cut.items.tolist()) == ([0, 2, 4, 4], [4, 5, 2, 3])
    assert lists.take(np.array([0])).items.tolist() == [1, 2, 3]
    assert lists.take(np.array([0]), 0).items.tolist() == []


def test_positives_of_several_splits(dataset: Dataset) -> None:
    both = dataset.positives("train", "val")
    assert both.lengths.tolist() == [PER_USER - 1] * NUM_USERS


@pytest.mark.parametrize("seed", range(3))
def test_no_step_hides_by_the_draws_that_ordered_the_epoch(
    data: TrainingData, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordering = np.random.default_rng([seed, 1]).random(4)
    drawn: list[list[float]] = []
    monkeypatch.setattr(Sampler, "batch", lambda self, rows, rng: drawn.append(rng.random(4)))
    steps = list(dataclasses.replace(sampler(data), seed=seed).epoch(1))
    assert len({tuple(first) for first in [ordering, *drawn]}) == len(steps) + 1


@pytest.mark.parametrize(
    ("size", "ranks", "words"),
    [(9, 2, "a multiple of 2 ranks; got 9"), (12, 2, "expected <= 10; got 12")],
)
def test_batches_that_do_not_fit(size: int, ranks: int, words: str) -> None:
    check_batch(10, 2, 10)
    with pytest.raises(ConfigError, match=words):
        check_batch(size, ranks, 10)


def test_nothing_to_train_on_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    tables = dataset.users(), dataset.items(), dataset.interactions("test")
    only_test = write_dataset(tmp_path / "only", *tables, name="only test")
    with pytest.raises(DataError, match="no interactions to train on"):
        prepare(only_test, fit(tiny_config(), dataset), tmp_path)


@pytest.mark.parametrize(("examples", "ranks", "batch"), [(236, 1, 16), (3937, 2, 256), (3, 2, 2)])
def test_the_proposed_batch_fits_the_data(examples: int, ranks: int, batch: int) -> None:
    assert fitting_batch(examples, ranks) == batch
    with pytest.raises(ConfigError, match=f"--set training.batch_size={batch}$"):
        check_batch(4096, ranks, examples)
