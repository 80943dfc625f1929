"""``mine`` and ``evaluate`` on a generation's files, and users of a data set as a batch job."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from shardline.cluster.batch.batch_job import Wanted
from shardline.cluster.batch.loaded_shards import LoadedShards
from shardline.cluster.build import BuildPlan, build_generation, run_here
from shardline.cluster.cli import cli
from shardline.cluster.commands.mine import mine_run
from shardline.cluster.store import Store
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.errors import InvalidInput, NotFound, VersionMismatch
from shardline.shards.core.partition import Partitioning
from shardline.shards.index.spec import IndexSpec
from shardline.shards.storage.generation import QUERY_ENCODER_FOLDER
from shardline.training.config.training_config import MiningConfig
from shardline.training.data.tables import Dataset
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.evaluation.user_queries import query_features
from shardline.training.export import export
from shardline.training.loop.run_rank import train_rank
from tests.batch_store import read_parts
from tests.engine import write_set
from tests.tiny import ITEM_IDS, USER_IDS, declared_run, tiny_config, tiny_dataset

CONFIG = MiningConfig(per_user=3, range_min=1, range_max=20, margin=0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path, Dataset]:
    """Generation 1 of the run's model, 2 of another's."""
    folder = tmp_path_factory.mktemp("offline")
    dataset = tiny_dataset(folder / "data")
    train_rank(declared_run(folder / "run", tiny_config(), dataset), torch.device("cpu"))
    store = Store(folder / "store")
    exported = export(folder / "run", dataset.path, store.root, created_at="2026-01-01T00:00:00Z")
    other = write_set(store.embeddings / "m1", np.eye(8, dtype=np.float32))
    for corpus in (exported.folder, other.folder):
        plan = BuildPlan(
            spec=IndexSpec(kind="flat"),
            num_shards=2,
            partitioning=Partitioning.RANGE,
            threads=1,
        )
        build_generation(store, corpus, plan, run_jobs=run_here)
    store.set_current(1)
    return store, folder / "run", dataset


def command(store: Store, *words: object) -> str:
    done = CliRunner().invoke(
        cli, ["--store", str(store.root), *map(str, words)], standalone_mode=False
    )
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_a_flat_generation_mines_what_exact_search_mines(
    trained: tuple[Store, Path, Dataset],
) -> None:
    store, run, dataset = trained
    by_files, report = mine_run(run, dataset, CONFIG, 1, cluster=None, files=(store, 1))
    exact, _ = mine_run(run, dataset, CONFIG, 1, cluster=None)
    assert by_files.users.tolist() == exact.users.tolist()
    assert (by_files.items == exact.items).mean() > 0.95  # sums in another order
    assert report.generation == 1
    with pytest.raises(VersionMismatch, match="another model"):
        mine_run(run, dataset, CONFIG, 1, cluster=None, files=(store, 2))
    with pytest.raises(NotFound, match="no generation 9"):
        mine_run(run, dataset, CONFIG, 1, cluster=None, files=(store, 9))


def test_a_generation_and_a_cluster_are_not_mined_at_once(
    trained: tuple[Store, Path, Dataset], tmp_path: Path
) -> None:
    store, run, dataset = trained
    words = ("mine", "--data", dataset.path, "--run", run, "--out", tmp_path / "hard")
    with pytest.raises(InvalidInput, match="choose one"):
        command(store, *words, "--generation", 1, "--url", "http://127.0.0.1:1")
    printed = command(store, *words, "--generation", 1, "--range-max", 20, "--json")
    assert json.loads(printed)["generation"] == 1


def test_a_flat_generation_is_as_good_as_its_model(trained: tuple[Store, Path, Dataset]) -> None:
    store, run, dataset = trained
    words = ("evaluate", "--data", dataset.path, "--generation", 1, "--k", 5, "--k", 10, "--json")
    found = json.loads(command(store, *words))["generation 1"]
    assert found == pytest.approx(evaluate_exact(run, dataset, ks=(5, 10)).means, abs=1e-9)


def test_users_of_a_data_set_are_queries(
    trained: tuple[Store, Path, Dataset], tmp_path: Path
) -> None:
    store, _, dataset = trained
    command(store, *("batch", "--users", dataset.path, "--out", tmp_path / "out", "-k", 60))
    table = read_parts(tmp_path / "out")
    assert table["query_id"].to_pylist() == USER_IDS.tolist()
    encoder = QueryEncoder.load(store.generation(1) / QUERY_ENCODER_FOLDER)
    kinds = {each["name"]: each["kind"] for each in encoder.features}
    everything = query_features(dataset, kinds, np.arange(len(USER_IDS)), ("train", "val", "test"))
    vectors = encoder.encode(everything)
    shards = LoadedShards.load(store.generation(1), range(2))
    expected = shards.search(vectors, Wanted(k=60))
    assert table["ids"].to_pylist() == expected.ids.tolist()
    assert sorted(expected.ids[7].tolist()) == ITEM_IDS.tolist()
