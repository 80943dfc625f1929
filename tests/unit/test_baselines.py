"""Popularity by hand, SVD against a dense one, and both through a dataset folder."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shardline.shards.core.errors import DataError, InvalidInput
from shardline.training.data.csr import Csr
from shardline.training.data.table_writer import interaction_batch, write_dataset
from shardline.training.data.tables import Dataset
from shardline.training.evaluation.baselines import (
    SVD_RANK,
    Baseline,
    evaluate_baseline,
    popularity_vectors,
    svd_rank,
    svd_vectors,
)
from shardline.training.evaluation.ranking import rank_exact
from shardline.training.evaluation.ranking_metrics import MetricSums, score_lists
from shardline.training.evaluation.user_queries import evaluation_task


def write(path: Path, rows: list[tuple[int, int, int, int]], users: int, items: int) -> Dataset:
    columns = np.array(rows).T
    batch = interaction_batch(*columns[:3], columns[3].astype(np.int8))
    return write_dataset(
        path,
        pa.table({"user_id": pa.array(np.arange(users))}),
        pa.table({"item_id": pa.array(np.arange(items) * 10)}),
        iter([batch]),
        name="hand-made",
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Train counts of items 0, 10, 20, 30: 3, 2, 2, 0; user 0 knows item 0."""
    rows = [(0, 0, 1, 0), (1, 0, 1, 0), (2, 0, 1, 0), (1, 10, 2, 0), (2, 10, 2, 0)]
    rows += [(1, 20, 3, 0), (2, 20, 3, 1), (0, 20, 2, 2), (1, 30, 4, 2)]
    return write(tmp_path / "d", rows, users=4, items=4)


def test_popularity_by_hand(dataset: Dataset) -> None:
    """User 0 is shown 10, 20, 30 (0 is masked; 10 before 20 by id); user 1 is shown 30 only."""
    result = evaluate_baseline(Baseline.POPULARITY, dataset, ks=(1, 2))
    assert (result.users, result.skipped) == (2, 0)
    assert result.means == pytest.approx(
        {
            "recall@1": 0.5,
            "hit_rate@1": 0.5,
            "ndcg@1": 0.5,
            "recall@2": 1.0,
            "hit_rate@2": 1.0,
            "ndcg@2": (1 / np.log2(3) + 1) / 2,
            "mrr": 0.75,
        }
    )


def test_val_is_measured_on_train_alone(dataset: Dataset) -> None:
    """User 2's val item 20 is the only one left for them that is popular: train counts 3, 2, 1."""
    result = evaluate_baseline(Baseline.POPULARITY, dataset, split="val", ks=(1,))
    assert (result.users, result.means["recall@1"]) == (1, 1.0)


def test_a_split_without_interactions(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [(0, 0, 1, 0), (1, 10, 1, 0)], users=2, items=2)
    with pytest.raises(InvalidInput):
        evaluate_baseline(Baseline.POPULARITY, dataset)


def random_lists(seed: int) -> Csr:
    rng = np.random.default_rng(seed)
    lists = [rng.choice(15, rng.integers(0, 8), replace=False) for _ in range(20)]
    return Csr(np.cumsum([0, *map(len, lists)]).astype(np.int64), np.concatenate(lists))


@pytest.mark.parametrize("seed", range(3))
def test_svd_against_a_dense_one(seed: int) -> None:
    """Scores are those of the best rank-3 approximation, popularity multiplied back in."""
    train = random_lists(seed)
    dense = np.zeros((20, 16))
    dense[train.owners, train.items] = 1
    with np.errstate(divide="ignore", invalid="ignore"):
        normal = dense / np.sqrt(dense.sum(1, keepdims=True)) / np.sqrt(dense.sum(0))
    left, values, right = np.linalg.svd(np.nan_to_num(normal))
    expected = (left[:, :3] * values[:3]) @ right[:3] * np.sqrt(dense.sum(0))
    users, items = svd_vectors(train, 16, rank=3, seed=seed)
    assert users @ items.T == pytest.approx(expected, abs=1e-5)
    assert users.shape == (20, 3)
    assert not items[15].any()  # an item nobody took


def test_svd_repeats_itself_and_caps_its_rank() -> None:
    train = random_lists(1)
    first, second = svd_vectors(train, 15), svd_vectors(train, 15)
    assert np.array_equal(first[0], second[0])
    assert first[0].shape == (20, 14)
    with pytest.raises(DataError, match="too small"):
        svd_vectors(Csr(np.array([0, 1]), np.array([0])), 5)


def test_svd_finds_two_groups() -> None:
    """Users 0-4 take items 0-4, users 5-9 items 5-9, each all but one: that one comes first."""
    lists = [[i for i in range(u // 5 * 5, u // 5 * 5 + 5) if i % 5 != u % 5] for u in range(10)]
    train = Csr(np.arange(0, 41, 4), np.concatenate(lists))
    users, items = svd_vectors(train, 10, rank=2)
    rows, _ = rank_exact(users, items, k=1, exclude=train)
    assert rows.ravel().tolist() == list(range(10))


def test_svd_through_a_dataset(tmp_path: Path) -> None:
    rows = [(u, 10 * i, 1, 2 if i == 8 else 0) for u in range(6) for i in range(u, 9)]
    dataset = write(tmp_path / "d", rows, 6, 9)
    result = evaluate_baseline(Baseline.SVD, dataset, ks=(8,))
    assert (result.users, result.means["recall@8"]) == (6, 1.0)  # 8 or fewer candidates each


def test_popularity_counts() -> None:
    train = Csr(np.array([0, 2, 3]), np.array([1, 4, 4]))
    users, items = popularity_vectors(train, 6)
    rows, scores = rank_exact(users, items, k=6, exclude=train)
    assert rows.tolist() == [[0, 2, 3, 5, -1, -1], [1, 0, 2, 3, 5, -1]]
    assert scores[1].tolist() == [1, 0, 0, 0, 0, -np.inf]


def test_a_cut_of_many_factors_is_the_svd_of_few() -> None:
    train = random_lists(0)
    many, few = svd_vectors(train, 15, rank=9), svd_vectors(train, 15, rank=3)
    cut = many.users[:, :3] @ many.items[:, :3].T
    assert cut == pytest.approx(few.users @ few.items.T, abs=1e-5)


def groups(path: Path, with_val: bool) -> Dataset:
    """Two groups of items and users; two factors tell them apart, one factor cannot."""
    rows = [
        (user, 10 * item, 1, 1 if with_val and item % 5 == user % 5 else 0)
        for user in range(10)
        for item in range(user // 5 * 5, user // 5 * 5 + 5)
        if item % 5 != (user + 1) % 5
    ]
    rows += [(user, 10 * (user // 5 * 5 + (user + 1) % 5), 2, 2) for user in range(10)]
    return write(path, rows, 10, 10)


def test_the_number_of_factors_is_chosen_on_validation(tmp_path: Path) -> None:
    dataset = groups(tmp_path / "d", with_val=True)
    task = evaluation_task(dataset, "val", ks=(5,))
    recalls = {}
    # one factorisation, cut: each group has a singular value of 1, so which mixture of the two
    # comes first depends on how many factors the solver is asked for
    all_users, all_items = svd_vectors(task.known, 10, rank=6)
    for rank in (1, 2, 6):
        users, items = all_users[:, :rank], all_items[:, :rank]
        ranked, _ = rank_exact(users[task.users], items, k=5, exclude=task.known.take(task.users))
        sums = MetricSums()
        sums.add(score_lists(ranked, task.relevant.take(task.users), (5,)))
        recalls[rank] = sums.result().means["recall@5"]
    best = min(rank for rank, recall in recalls.items() if recall == max(recalls.values()))
    assert svd_rank(dataset, (1, 2, 6), k=5) == best
    result = evaluate_baseline(Baseline.SVD, dataset, ks=(1,))
    assert result.about == f"{min(9, svd_rank(dataset))} factors"


def test_without_validation_the_number_of_factors_is_fixed(tmp_path: Path) -> None:
    dataset = groups(tmp_path / "d", with_val=False)
    assert svd_rank(dataset) == SVD_RANK
    assert evaluate_baseline(Baseline.SVD, dataset, ks=(1,)).about == "9 factors"  # all there are


def test_users_and_items_that_train_lacks(tmp_path: Path) -> None:
    """User 2 and item 20 occur in test alone: measured, not an error; the item is never found."""
    rows = [(0, 0, 1, 0), (0, 10, 2, 0), (1, 0, 1, 0), (1, 30, 2, 0), (2, 20, 3, 2), (2, 0, 4, 2)]
    dataset = write(tmp_path / "d", rows, users=4, items=5)
    for baseline in Baseline:
        result = evaluate_baseline(baseline, dataset, ks=(1, 5), with_segments=True)
        assert (result.users, result.relevant) == (1, 2)
        assert result.means["recall@5"] == 1.0  # all five items
        assert all(np.isfinite(value) for value in result.means.values())
        cold, new = result.segments["cold items"], result.segments["new users"]
        assert cold is not None and (cold.users, cold.relevant) == (1, 1)
        assert cold.means["recall@1"] == 0.0
        assert new is not None and new.relevant == 2
        assert result.segments["regular users"] is None
