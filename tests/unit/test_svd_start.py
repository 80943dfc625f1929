"""Tables of ids that begin at an SVD; and runs with it and an audience, from start to export."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from shardline.shards.core.errors import ConfigError
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import Dataset
from shardline.training.evaluation.baselines import Vectors, svd_vectors
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.export import export, sample_queries
from shardline.training.features.fitted import fit
from shardline.training.features.item_inputs import item_inputs
from shardline.training.features.prepared import TrainingData
from shardline.training.loop.launch import train
from shardline.training.loop.run_rank import train_rank
from shardline.training.loop.svd_start import (
    SVD_START,
    balanced,
    by_table_row,
    start_at_svd,
    write_svd_start,
)
from shardline.training.model.checkpoint import CACHE, latest_state, load_best, open_run
from shardline.training.model.encoding import encode_items, encode_queries
from shardline.training.model.towers import TwoTower, build_model
from tests.audiences import audience_config, plain_sum_config
from tests.tiny import NUM_ITEMS, NUM_USERS, declared_run, tiny_config, tiny_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


def started(config: TrainingConfig, dataset: Dataset, folder: Path) -> TwoTower:
    space = fit(config, dataset)
    write_svd_start(config, dataset, space, folder)
    model = build_model(config, space)
    start_at_svd(model, config, space, folder)
    return model


def table(rows: Any) -> np.ndarray:
    return rows.embeddings[0].weight.detach().numpy()


def test_products_of_balanced_factors_are_those_of_the_svd() -> None:
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((9, 3)))
    values, right = np.array([4.0, 1.0, 0.0]), rng.standard_normal((7, 3))
    given = Vectors((left * values).astype(np.float32), right.astype(np.float32))
    found = balanced(given)
    np.testing.assert_allclose(found.users @ found.items.T, given.users @ given.items.T, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.users, axis=0), [2, 1, 0], atol=1e-5)


def test_factors_stand_at_their_rows_with_length_one() -> None:
    factors = np.array([[3, 4], [0, 0], [2, 0], [9, 9]], np.float32)
    found = by_table_row(factors, np.array([2, 1, 4, 0]))
    np.testing.assert_allclose(found, [[0, 0], [0, 0], [0.6, 0.8], [0, 0], [1, 0]], atol=1e-7)


@pytest.mark.parametrize("side", ["users", "items"])
def test_tables_begin_at_the_svd_of_train(dataset: Dataset, tmp_path: Path, side: str) -> None:
    config = plain_sum_config(id_start="svd")
    model = started(config, dataset, tmp_path)
    fresh = build_model(config, fit(config, dataset))
    factors = balanced(svd_vectors(dataset.positives("train"), NUM_ITEMS, rank=16, seed=3))
    vectors = getattr(factors, side)
    name, ids = {
        "users": ("query_rows", dataset.user_ids),
        "items": ("item_rows", dataset.item_ids),
    }[side]
    found, random = table(getattr(model, name)), table(getattr(fresh, name))
    np.testing.assert_array_equal(found[0], random[0], "the unknown begins at random")
    space = fit(config, dataset)
    columns = space.query if side == "users" else space.item
    known = columns.vocabularies[0].values
    for row, each in enumerate(known, start=1):
        mine = vectors[list(ids).index(each)]
        np.testing.assert_allclose(found[row], mine / np.linalg.norm(mine), atol=1e-5)
    assert len(found) == len(known) + 1


def test_dimensions_beyond_the_rank_stay_random_and_lengths_as_declared(tmp_path: Path) -> None:
    small = tiny_dataset(tmp_path / "data")
    settings = plain_sum_config(id_start="svd").model_dump() | {"dim": 50}
    for tower in ("query", "item"):
        settings["towers"][tower]["features"][0].update(dim=50, init_norm=0.2)
    config = TrainingConfig.model_validate(settings)
    found = table(started(config, small, tmp_path).item_rows)[1:]
    random = table(build_model(config, fit(config, small)).item_rows)[1:]
    rank = min(NUM_USERS, NUM_ITEMS) - 1
    np.testing.assert_array_equal(found[:, rank:], random[:, rank:])
    share = np.linalg.norm(found[:, :rank], axis=1)
    np.testing.assert_allclose(share, 0.2 * (rank / 50) ** 0.5, atol=1e-5)


def test_towers_of_unequal_widths_take_the_strongest_factors(
    dataset: Dataset, tmp_path: Path
) -> None:
    config = audience_config(id_start="svd")  # four dimensions per id, in towers with layers
    model = started(config, dataset, tmp_path)
    factors = svd_vectors(dataset.positives("train"), NUM_ITEMS, rank=4, seed=3)
    users = balanced(factors).users
    expected = users / np.linalg.norm(users, axis=1, keepdims=True)
    np.testing.assert_allclose(table(model.query_rows)[1:], expected, atol=1e-5)


def test_the_file_is_the_same_each_time_and_absent_by_default(
    dataset: Dataset, tmp_path: Path
) -> None:
    config = plain_sum_config(id_start="svd")
    for name in ("a", "b"):
        write_svd_start(config, dataset, fit(config, dataset), tmp_path / name)
    first, again = ((tmp_path / name / SVD_START).read_bytes() for name in ("a", "b"))
    assert first == again
    write_svd_start(plain_sum_config(), dataset, fit(config, dataset), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_towers_without_ids_are_refused_before_anything_is_written(
    dataset: Dataset, tmp_path: Path
) -> None:
    numbers = {"features": [{"kind": "numeric", "column": "age"}]}
    prices = {"features": [{"kind": "numeric", "column": "price"}]}
    with pytest.raises(ValidationError, match="id_start svd needs a feature of kind id"):
        TrainingConfig.model_validate(
            {"towers": {"query": numbers, "item": prices}, "id_start": "svd"}
        )
    # features of the users are inferred, and give them no ids
    config = tiny_config(towers={"item": prices}, id_start="svd")
    with pytest.raises(ConfigError, match=r"id_start: no tower has vectors of ids.*got svd"):
        train(config, dataset.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Whole runs


@pytest.mark.parametrize("every", [None, 4])
@pytest.mark.parametrize("gradients", ["dense", "sparse"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    dataset: Dataset, tmp_path: Path, every: int | None, gradients: str
) -> None:
    config = audience_config(
        pooling="attention",
        id_start="svd",
        unknown_rate=0.1,
        epochs=3,
        loss={"uniform_negatives": 6, "hard_negatives": 2},
        mining={"every_epochs": 1, "per_user": 4, "range_max": 20},
        optimiser={"learning_rate": 0.01, "embedding_gradients": gradients},
    )
    whole = declared_run(tmp_path / "whole", config, dataset)
    train_rank(whole, CPU)
    often = config.model_copy(update={"checkpoint_every_steps": every, "log_every_steps": 1})
    cut = declared_run(tmp_path / "cut", often, dataset)

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_rank(cut, CPU, interrupt)
    state = latest_state(cut)
    assert state is not None and state.step == (10 if every is None else 16)
    train_rank(cut, CPU)
    last = latest_state(whole)
    assert last is not None and latest_state(cut) == last
    name = f"checkpoints/{last.step:08d}/model.safetensors"
    found, expected = load_file(cut / name), load_file(whole / name)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_run_starts_at_the_svd_and_is_evaluated_and_exported_with_audiences(
    dataset: Dataset, tmp_path: Path
) -> None:
    """Vectors of validation, evaluation and export are one: of train's users, no later ones."""
    config = plain_sum_config(id_start="svd", epochs=3, unknown_rate=0.0)
    config = config.model_copy(update={"popularity_exponent": 0.1})
    result = train(config, dataset.path, tmp_path / "run")
    run, model = load_best(tmp_path / "run")
    assert run.space == open_run(tmp_path / "run").space
    assert (tmp_path / "run" / CACHE / SVD_START).is_file()

    items = item_inputs(run.space, dataset, ("train",))
    data = TrainingData.open(tmp_path / "run" / CACHE)
    np.testing.assert_array_equal(encode_items(model, data.items), encode_items(model, items))
    found = evaluate_exact(tmp_path / "run", dataset, split="val", ks=(10,))
    assert found.means["recall@10"] == pytest.approx(result.best_value)

    made = export(tmp_path / "run", dataset.path, tmp_path, created_at="2026-01-01T00:00:00Z")
    (batch,) = made.batches()
    lengths = np.maximum(data.item_counts(), 1)[:, None] ** 0.1
    np.testing.assert_allclose(batch.vectors, encode_items(model, items) * lengths, atol=1e-5)
    queries = sample_queries(run, model, dataset)
    everyone = encode_queries(model, data.users, data.train, data.items)
    np.testing.assert_allclose(queries, everyone, atol=1e-6)
