"""A model's users mined: against loops over all users and items, alike for any number of ranks."""

import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.numpy import load_file, save_file

from shardline.shards.core.errors import ConfigError, DataError, Unavailable
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.config.training_config import MiningConfig
from shardline.training.data.csr import Csr
from shardline.training.data.tables import open_dataset
from shardline.training.evaluation.searchers import ExactSearch
from shardline.training.features.fitted import fit
from shardline.training.features.prepared import TrainingData, prepare
from shardline.training.loop.launch import train
from shardline.training.mining import miner as miner_module
from shardline.training.mining.candidates import draws, joined
from shardline.training.mining.hard_negatives import Origin, write_negatives
from shardline.training.mining.miner import build_miner, evaluating, mine_in_process, mine_table
from shardline.training.model import encoding
from shardline.training.model.checkpoint import load_best, load_parts
from shardline.training.model.encoding import encode_items, encode_queries
from shardline.training.model.towers import TwoTower, build_model
from tests.tiny import NUM_ITEMS, NUM_USERS, tiny_config, tiny_dataset

CONFIG = MiningConfig(per_user=3, range_min=2, range_max=12, margin=0.1)
SEED = 11
ORIGIN = Origin(
    model_version="m",
    fit_splits="train",
    generation=None,
    config=CONFIG,
    seed=SEED,
    created_at="2026-01-01",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    dataset = tiny_dataset(folder / "data")
    prepare(dataset, fit(tiny_config(), dataset), folder / "cache")
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miner_module, "BLOCK_USERS", 7)
    monkeypatch.setattr(encoding, "SHARED_ROWS", 16)


def model_and_data(folder: Path) -> tuple[TwoTower, TrainingData]:
    """An untrained model, which has nearest items like any other."""
    config = tiny_config()
    space = fit(config, open_dataset(folder / "data", verify=False))
    return build_model(config, space), TrainingData.open(folder / "cache")


def slow_lists(
    model: TwoTower, data: TrainingData, config: MiningConfig, known: list[set[int]]
) -> list[list[int]]:
    """Every user against every item, sorted in full."""
    everyone = np.arange(NUM_USERS)
    queries = encode_queries(model, data.users.take(everyone), data.train, data.items)
    scores = queries @ encode_items(model, data.items).T
    lists = []
    for user in range(NUM_USERS):
        own = data.train.items[data.train.indptr[user] : data.train.indptr[user + 1]]
        if not len(own):
            lists.append([])
            continue
        reference = scores[user][own].mean()
        ranked = [
            item for item in np.argsort(-scores[user], kind="stable") if item not in known[user]
        ][config.range_min - 1 : config.range_max]
        highest = reference - config.margin * abs(reference)
        allowed = [item for item in ranked if scores[user][item] <= highest]
        keys = {
            int(item): int(draws(SEED, np.array([user]), np.array([item]))[0]) for item in ranked
        }
        drawn = sorted(allowed, key=keys.__getitem__)[: config.per_user]
        lists.append([int(item) for item in ranked if item in drawn])
    return lists


def as_lists(mined: Csr) -> list[list[int]]:
    return [part.tolist() for part in np.split(mined.items, mined.indptr[1:-1])]


def sets(*lists: Csr) -> list[set[int]]:
    every = [as_lists(each) for each in lists]
    return [set().union(*(each[user] for each in every)) for user in range(NUM_USERS)]


def test_mined_as_by_sorting_every_item_of_every_user(folder: Path) -> None:
    model, data = model_and_data(folder)
    mined = as_lists(mine_in_process(model, data, CONFIG, SEED))
    assert mined == slow_lists(model, data, CONFIG, sets(data.train))
    assert any(len(each) == CONFIG.per_user for each in mined), "the test sees full lists"
    assert any(len(each) < CONFIG.per_user for each in mined), "and starved ones"
    overlap = [set(each) & known for each, known in zip(mined, sets(data.train), strict=True)]
    assert overlap == [set()] * NUM_USERS


def test_validation_items_are_mined_unless_they_are_to_be_dropped(folder: Path) -> None:
    model, data = model_and_data(folder)
    wide = CONFIG.model_copy(update={"per_user": NUM_ITEMS, "range_min": 1, "range_max": NUM_ITEMS})
    for drop in (False, True):
        config = wide.model_copy(update={"drop_val": drop, "margin": 0.0, "reference": "highest"})
        mined = as_lists(mine_in_process(model, data, config, SEED))
        held = sets(data.val)
        assert any(set(each) & val for each, val in zip(mined, held, strict=True)) is not drop


def test_the_table_of_one_process_has_the_same_lists_and_their_scores(folder: Path) -> None:
    model, data = model_and_data(folder)
    with evaluating(model):
        miner = build_miner(model, data, CONFIG, SEED)
        stages: list[tuple[str, int, int]] = []
        mined = mine_table(
            ExactSearch(miner.item_vectors), miner, lambda *stage: stages.append(stage)
        )
    assert as_lists(mined.lists(NUM_USERS)) == as_lists(mine_in_process(model, data, CONFIG, SEED))
    assert mined.users.tolist() == sorted(mined.users.tolist())
    assert stages[-1] == ("mine", NUM_USERS, NUM_USERS)
    queries = encode_queries(model, data.users.take(mined.users), data.train, data.items)
    for query, items, scores in zip(queries, mined.items, mined.scores, strict=True):
        filled = items >= 0
        expected = miner.item_vectors[items[filled]] @ query
        np.testing.assert_allclose(scores[filled], expected, atol=1e-6)
        assert (np.diff(scores[filled]) <= 0).all()


def test_a_user_without_interactions_is_not_mined(folder: Path) -> None:
    model, data = model_and_data(folder)
    lengths = data.train.lengths.copy()
    lengths[5] = 0
    kept = data.train.owners != 5
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    train = Csr(indptr, data.train.items[kept])
    data = replace(data, train=train, train_users=data.train_users[kept])
    mined = mine_in_process(model, data, CONFIG, SEED)
    assert as_lists(mined) == slow_lists(model, data, CONFIG, sets(data.train))
    assert mined.lengths[5] == 0


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(folder: Path, training: bool) -> None:
    model, data = model_and_data(folder)
    model.train(training)
    mine_in_process(model, data, CONFIG, SEED)
    assert model.training is training
    assert all(module.training is training for module in model.modules())


class SlowFirst:
    """Exact search whose first calls are the last to end: ``in_flight`` must overlap to get on."""

    in_flight = 3

    def __init__(self, items: FloatArray) -> None:
        self.exact = ExactSearch(items)
        self.together = threading.Barrier(3)
        self.calls = 0

    def __call__(self, queries: FloatArray, k: int) -> tuple[FloatArray, IdArray]:
        self.calls += 1
        if self.calls <= 3:
            self.together.wait(timeout=30)
        return self.exact(queries, k)


def test_searches_overlap_and_results_keep_their_order(folder: Path) -> None:
    model, data = model_and_data(folder)
    with evaluating(model):
        miner = build_miner(model, data, CONFIG, SEED)
        found = list(miner.mine(SlowFirst(miner.item_vectors), miner.blocks()))
        expected = list(miner.mine(ExactSearch(miner.item_vectors), miner.blocks()))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.users, theirs.users)
        np.testing.assert_array_equal(ours.items, theirs.items)


class Failing:
    in_flight = 2

    def __call__(self, queries: FloatArray, k: int) -> tuple[FloatArray, IdArray]:
        raise Unavailable("the cluster is gone")


def test_a_failing_search_ends_the_mining(folder: Path) -> None:
    model, data = model_and_data(folder)
    with evaluating(model):
        miner = build_miner(model, data, CONFIG, SEED)
        with pytest.raises(Unavailable, match="gone"):
            mine_table(Failing(), miner)
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]


def one_rank(rank: int, world: int, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    miner_module.BLOCK_USERS, encoding.SHARED_ROWS = 7, 16
    dist.init_process_group("gloo", init_method=f"file://{out}/group", rank=rank, world_size=world)
    mined = mine_in_process(*model_and_data(folder), CONFIG, SEED)
    save_file({"indptr": mined.indptr, "items": mined.items}, out / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_every_number_of_ranks_mines_the_same(folder: Path, tmp_path: Path, world: int) -> None:
    expected = mine_in_process(*model_and_data(folder), CONFIG, SEED)
    multiprocessing.set_forkserver_preload([__name__])  # torch is imported once, not W times
    mp.start_processes(one_rank, (world, folder, tmp_path), nprocs=world, start_method="forkserver")
    for rank in range(world):
        found = load_file(tmp_path / f"{rank}.safetensors")
        np.testing.assert_array_equal(found["indptr"], expected.indptr)
        np.testing.assert_array_equal(found["items"], expected.items)
    assert not multiprocessing.active_children()


def test_training_starts_with_the_lists_of_a_table(folder: Path, tmp_path: Path) -> None:
    model, data = model_and_data(folder)
    dataset = open_dataset(folder / "data")
    with evaluating(model):
        miner = build_miner(model, data, CONFIG, SEED)
        mined = mine_table(ExactSearch(miner.item_vectors), miner)
    write_negatives(tmp_path / "hard", mined, dataset, ORIGIN)
    config = tiny_config(epochs=1, loss={"hard_negatives": 2})
    train(config, dataset.path, tmp_path / "with", hard=tmp_path / "hard")
    train(tiny_config(epochs=1), dataset.path, tmp_path / "without")
    kept = load_parts(tmp_path / "with", 10)["mined"]
    expected = mined.lists(NUM_USERS)
    np.testing.assert_array_equal(kept["indptr"].numpy(), expected.indptr)
    np.testing.assert_array_equal(kept["items"].numpy(), expected.items)
    ours, theirs = (load_best(tmp_path / name)[1].state_dict() for name in ("with", "without"))
    assert any((ours[name] != theirs[name]).any() for name in ours), "they counted in the loss"


def test_a_table_of_another_dataset_does_not_start_a_run(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder / "data")
    other = tiny_dataset(tmp_path / "other", seed=1)
    write_negatives(tmp_path / "hard", joined([], CONFIG), other, ORIGIN)
    config = tiny_config(loss={"hard_negatives": 2})
    with pytest.raises(DataError, match="another dataset"):
        train(config, dataset.path, tmp_path / "run", hard=tmp_path / "hard")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fit_splits": "train+val"}, "fit_splits: .*fitted on other splits"),
        ({"loss": {"hard_negatives": 4}}, "loss.hard_negatives: .*<= 3, the per_user of .*hard;"),
        (
            {"loss": {"hard_negatives": 4}, "mining": {"every_epochs": 1, "per_user": 2}},
            "loss.hard_negatives: .*<= 2, the per_user of mining;",
        ),
        ({}, "hard: .*there is no negative in it"),
        ({"loss": {}}, "loss.hard_negatives: mined negatives would not be used"),
    ],
)
def test_a_table_that_would_do_nothing_does_not_start_a_run(
    folder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    dataset = open_dataset(folder / "data")
    write_negatives(tmp_path / "hard", joined([], CONFIG), dataset, ORIGIN)
    config = tiny_config(**({"loss": {"hard_negatives": 2}} | changes))
    with pytest.raises(ConfigError, match=words):
        train(config, dataset.path, tmp_path / "run", hard=tmp_path / "hard")
    assert not (tmp_path / "run").exists()
