"""Lengths by popularity: what they are, and that evaluation and export agree on them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shardline.cluster.commands.mine import mine_run
from shardline.shards.core.schema import IdArray, Metric
from shardline.shards.storage.embedding_set import open_embedding_set
from shardline.training.config.training_config import MiningConfig
from shardline.training.data.tables import ITEMS, USERS
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.evaluation.ranking import rank_exact
from shardline.training.evaluation.ranking_metrics import score_lists
from shardline.training.evaluation.user_queries import evaluation_task
from shardline.training.export import export
from shardline.training.loop.run_rank import train_rank
from shardline.training.model.checkpoint import load_best
from shardline.training.model.encoding import encode_items, encode_queries
from shardline.training.model.popularity import item_lengths, metric_of
from tests.tiny import declared_run, tiny_config, tiny_dataset

EXPONENT = 0.5


def test_lengths_grow_with_the_interactions_and_unseen_items_count_as_seen_once() -> None:
    counts = np.array([0, 1, 4, 9])
    np.testing.assert_array_equal(item_lengths(counts, 0.5), np.float32([1, 1, 2, 3]))
    np.testing.assert_array_equal(item_lengths(counts, 0.0), np.ones(4, np.float32))


@pytest.mark.parametrize(("exponent", "metric"), [(0.0, Metric.COSINE), (0.1, Metric.DOT)])
def test_only_vectors_of_length_one_are_compared_by_cosine(exponent: float, metric: Metric) -> None:
    assert metric_of(exponent) is metric


@pytest.mark.parametrize("fit_splits", ["train", "train+val"])
def test_evaluation_and_export_lengthen_alike(fit_splits: str, tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    config = tiny_config(epochs=2, popularity_exponent=EXPONENT, fit_splits=fit_splits)
    train_rank(declared_run(tmp_path / "run", config, dataset), torch.device("cpu"))
    run, model = load_best(tmp_path / "run")
    items = run.space.item.encode(dataset.items(), ITEMS)
    fitted = dataset.positives(*fit_splits.split("+")).items
    counts = np.bincount(fitted, minlength=len(items))
    assert counts.max() > counts.min()
    lengths = np.maximum(counts, 1) ** EXPONENT
    expected = encode_items(model, items) * lengths[:, None].astype(np.float32)

    exported = export(tmp_path / "run", dataset.path, tmp_path, created_at="2026-01-01T00:00:00Z")
    assert (exported.metric, exported.normalised) == (Metric.DOT, False)
    found = open_embedding_set(tmp_path / "embeddings" / exported.model_version)
    np.testing.assert_allclose(
        np.concatenate([batch.vectors for batch in found.batches()]), expected, rtol=1e-6
    )

    task = evaluation_task(dataset, "test", ks=(5,))
    users = run.space.query.encode(dataset.users(), USERS).take(task.users)
    known = task.known.take(task.users)
    queries = encode_queries(model, users, known, items)
    ranked, _ = rank_exact(queries, expected, k=5, exclude=known)
    recall = score_lists(ranked, task.relevant.take(task.users), (5,)).values["recall@5"].mean()
    measured = evaluate_exact(tmp_path / "run", dataset, ks=(5,)).means["recall@5"]
    assert measured == pytest.approx(float(recall))


def test_the_exponent_names_another_model(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    versions = set()
    for exponent in (0.0, 0.1, 0.2):
        folder = tmp_path / f"run-{exponent}"
        config = tiny_config(epochs=1, popularity_exponent=exponent)
        train_rank(declared_run(folder, config, dataset), torch.device("cpu"))
        versions.add(
            export(folder, dataset.path, tmp_path, created_at="2026-01-01T00:00:00Z").model_version
        )
    assert len(versions) == 3


def test_mining_ranks_the_vectors_that_are_served(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    config = tiny_config(epochs=1, popularity_exponent=1.0)
    train_rank(declared_run(tmp_path / "run", config, dataset), torch.device("cpu"))
    mining = MiningConfig(per_user=3, range_max=3, margin=0.0, reference="highest")
    mined, _ = mine_run(tmp_path / "run", dataset, mining, seed=0, cluster=None)

    run, model = load_best(tmp_path / "run")
    items = run.space.item.encode(dataset.items(), ITEMS)
    users = run.space.query.encode(dataset.users(), USERS).take(mined.users)
    train = dataset.positives("train")
    known = train.take(mined.users)
    queries = encode_queries(model, users, known, items)
    plain = encode_items(model, items)
    lengths = item_lengths(np.bincount(train.items, minlength=len(items)), 1.0)
    served, _ = rank_exact(queries, plain * lengths[:, None], k=3, exclude=known)
    unserved, _ = rank_exact(queries, plain, k=3, exclude=known)
    found = mined.items >= 0
    assert found.sum() > 0.5 * found.size
    assert np.isin(keyed(mined.items), keyed(served))[found].all()
    assert not np.isin(keyed(mined.items), keyed(unserved))[found].all()


def keyed(items: IdArray) -> IdArray:
    """(n, k) item rows as numbers that tell the rows of the list apart."""
    return items + 1000 * np.arange(len(items))[:, None]
