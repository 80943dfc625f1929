"""Metric dot: vectors keep their lengths in training, export, numpy encoders and the index."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from shardline.cluster.build import build_generation
from shardline.cluster.commands.offline_search import OfflineGeneration, encoded_search
from shardline.cluster.store import Store
from shardline.router.encoder.item_encoder import ItemEncoder
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.encoder_files import read_encoder
from shardline.shards.core.schema import Metric
from shardline.training.config.loss_config import LossConfig
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import ITEMS, USERS, Dataset
from shardline.training.evaluation.baselines import Baseline, evaluate_baseline
from shardline.training.evaluation.evaluate import evaluate_exact, evaluate_through
from shardline.training.evaluation.user_queries import query_features
from shardline.training.export import export
from shardline.training.loop.run_rank import train_rank
from shardline.training.model.checkpoint import load_best
from shardline.training.model.encoding import encode_items, encode_queries
from tests.engine import plan_of
from tests.people import people, tied_config
from tests.rich import sum_config, wide_config, wide_dataset
from tests.tiny import declared_run, tiny_config, tiny_dataset, untrained_run

WHEN = "2026-01-01T00:00:00Z"


def as_dot(config: TrainingConfig) -> TrainingConfig:
    """The same towers under inner product."""
    given = config.model_dump(exclude_unset=True) | {"metric": "dot"}
    return TrainingConfig.model_validate(given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    folder = tmp_path_factory.mktemp("dot")
    dataset = tiny_dataset(folder / "data")
    run = declared_run(folder / "run", tiny_config(metric="dot", epochs=6), dataset)
    train_rank(run, torch.device("cpu"))
    return run, dataset


def test_the_temperature_is_one_and_fixed_unless_given() -> None:
    config = TrainingConfig.model_validate({"metric": "dot"})
    assert (config.loss.temperature, config.loss.learn_temperature) == (1.0, False)
    given = TrainingConfig(metric="dot", loss=LossConfig(temperature=0.5, logq="none"))
    assert (given.loss.temperature, given.loss.learn_temperature) == (0.5, False)
    assert given.loss.logq == "none"
    assert TrainingConfig.model_validate(given.model_dump()) == given
    assert TrainingConfig().loss.learn_temperature


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"learn_temperature": True}}, "leave out loss.learn_temperature"),
        ({"popularity_exponent": 0.1}, "which metric dot learns: it is 0 there, not 0.1"),
        ({"metric": "l2"}, "metric"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingConfig.model_validate({"metric": "dot"} | changes)


def test_it_learns_and_lengths_differ(trained: tuple[Path, Dataset]) -> None:
    run_folder, dataset = trained
    run, model = load_best(run_folder)
    vectors = encode_items(model, run.space.item.encode(dataset.items(), ITEMS))
    lengths = np.linalg.norm(vectors, axis=1)
    assert lengths.std() > 0.05 * lengths.mean()
    assert float(model.temperature()) == pytest.approx(1.0)
    ours = evaluate_exact(run_folder, dataset, ks=(10,)).means["recall@10"]
    popular = evaluate_baseline(Baseline.POPULARITY, dataset, ks=(10,)).means["recall@10"]
    assert ours > popular


@pytest.mark.parametrize("towers", [wide_config, sum_config], ids=["mlp", "sum"])
def test_encoders_equal_the_torch_towers(tmp_path: Path, towers: Any) -> None:
    dataset = wide_dataset(tmp_path / "data")
    run_folder = untrained_run(tmp_path / "run", as_dot(towers()), dataset)
    written = export(run_folder, dataset.path, tmp_path, created_at=WHEN)
    assert (written.metric, written.normalised) == (Metric.DOT, False)
    assert written.encoder_folder is not None
    assert read_encoder(written.encoder_folder)[0]["format_version"] == 5
    run, model = load_best(run_folder)
    items = run.space.item.encode(dataset.items(), ITEMS)
    (batch,) = written.batches()
    np.testing.assert_array_equal(batch.vectors, encode_items(model, items))
    users = run.space.query.encode(dataset.users(), USERS)
    wanted = encode_queries(model, users, dataset.positives("train"), items)
    encoder = QueryEncoder.load(written.encoder_folder)
    kinds = {each["name"]: each["kind"] for each in encoder.features}
    features = query_features(dataset, kinds, np.arange(len(users)), ("train",))
    np.testing.assert_allclose(encoder.encode(features), wanted, rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(wanted, axis=1).std() > 0.01


def test_the_index_ranks_by_inner_product(trained: tuple[Path, Dataset], tmp_path: Path) -> None:
    run_folder, dataset = trained
    store = Store(tmp_path)
    written = export(run_folder, dataset.path, store.root, created_at=WHEN)
    built = build_generation(store, written.folder, plan_of(2, kind="flat"))
    assert built.metric is Metric.DOT
    search = encoded_search(OfflineGeneration.open(store, built.generation))
    exact = evaluate_exact(run_folder, dataset, ks=(5, 10)).means
    found = evaluate_through(search, dataset, kinds=search.kinds, ks=(5, 10)).means
    for name, value in exact.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_tied_towers_without_length_one_are_symmetric_too(tmp_path: Path) -> None:
    dataset = people(tmp_path / "data")
    run_folder = untrained_run(tmp_path / "run", tied_config(metric="dot"), dataset)
    written = export(run_folder, dataset.path, tmp_path, created_at=WHEN)
    assert written.encoder_folder is not None
    encoder = QueryEncoder.load(written.encoder_folder)
    kinds = {each["name"]: each["kind"] for each in encoder.features}
    features = query_features(dataset, kinds, np.arange(60), ("train",))
    (batch,) = written.batches()
    np.testing.assert_array_equal(encoder.encode(features), batch.vectors)
    assert written.item_encoder_folder is not None
    items = ItemEncoder.load(written.item_encoder_folder)
    rows = [{name: each[name] for name in items.names} for each in features]
    again = items.encode(batch.item_ids, rows, lambda row, name, where: name)
    np.testing.assert_array_equal(again, batch.vectors)
    assert np.linalg.norm(batch.vectors, axis=1).std() > 0.01
