"""Chance against every order there is, attribute popularity against a direct solution."""

import dataclasses
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shardline.shards.core.errors import InvalidInput
from shardline.training.data.csr import Csr
from shardline.training.data.table_writer import interaction_batch, write_dataset
from shardline.training.data.tables import Dataset, vector_column
from shardline.training.evaluation.cold import RIDGE, attribute_vectors, chance, cold_baselines
from shardline.training.evaluation.ranking_metrics import MetricSums, score_lists
from shardline.training.evaluation.user_queries import EvaluationTask, evaluation_task


def csr(lists: list[list[int]]) -> Csr:
    flat = np.array([item for items in lists for item in items], dtype=np.int64)
    return Csr(np.cumsum([0, *map(len, lists)]).astype(np.int64), flat)


def task_of(
    known: list[list[int]], relevant: list[list[int]], ks: tuple[int, ...]
) -> EvaluationTask:
    return EvaluationTask(
        users=np.arange(len(known)),
        known=csr(known),
        relevant=csr(relevant),
        num_items=8,
        ks=ks,
        segments=(),
        candidates=np.array([1, 3, 4, 6, 7]),
    )


def test_chance_is_the_mean_over_all_orders() -> None:
    """Users with five, four and two candidates; the third asks for more than there are."""
    known, relevant = [[0], [3, 2], [1, 3, 4]], [[1, 4], [7], [6, 7]]
    task = task_of(known, relevant, (1, 2, 3))
    got = chance(task)
    means: dict[str, list[float]] = {}
    for mine, wanted in zip(known, relevant, strict=True):
        pool = [item for item in (1, 3, 4, 6, 7) if item not in mine]
        sums = MetricSums()
        for order in permutations(pool):
            ranked = np.array([[*order, -1, -1, -1][:3]])
            sums.add(score_lists(ranked, csr([wanted]), (1, 2, 3)))
        for name, value in sums.result().means.items():
            means.setdefault(name, []).append(value)
    assert got.means == pytest.approx({name: np.mean(v) for name, v in means.items()}, abs=1e-12)
    assert (got.users, got.relevant) == (3, 5)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Items 0 to 5 were taken 4, 4, 1, 1, 0, 0 times: "a" and bright ones are popular."""
    counts, rows = [4, 4, 1, 1], []
    for item, count in enumerate(counts):
        rows += [(user, item * 10, user, 0) for user in range(count)]
    rows += [(0, 40, 9, 2), (1, 50, 9, 2), (2, 20, 9, 2)]
    columns = np.array(rows).T
    items = pa.table(
        {
            "item_id": np.arange(6) * 10,
            "kind": ["a", "a", "b", "b", "a", "b"],
            "bright": [True, True, False, False, True, False],
            "tags": pa.array([["x", "y"], ["x"], ["z"], [], ["x"], ["z", "y"]]),
            "title": ["one", "two", "three", "four", "five", "six"],
            "vector": vector_column(np.arange(12, dtype=np.float32).reshape(6, 2)),
        }
    )
    return write_dataset(
        tmp_path / "d",
        pa.table({"user_id": np.arange(4)}),
        items,
        iter([interaction_batch(*columns[:3], columns[3].astype(np.int8))]),
        name="hand-made",
    )


def test_attribute_popularity_against_a_direct_solution(dataset: Dataset) -> None:
    task = evaluation_task(dataset, "test", ks=(1,), candidates="cold")
    users, items = attribute_vectors(dataset, task)
    flags = {
        "kind": [[1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 1]],
        "bright": [[1], [1], [0], [0], [1], [0]],
        "tags": [[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 1]],
        "title": np.eye(6).tolist(),
        "vector": np.arange(12).reshape(6, 2).tolist(),
    }
    design = np.concatenate([np.array(v, dtype=float) for v in flags.values()], axis=1)
    warm = design[:4]
    used = warm.std(axis=0) > 0
    scaled = (design[:, used] - warm[:, used].mean(axis=0)) / warm[:, used].std(axis=0)
    target = np.log1p([4, 4, 1, 1])
    # ridge as least squares with RIDGE^1/2 rows of zeros to reach
    stacked = np.concatenate([scaled[:4], np.sqrt(RIDGE) * np.eye(scaled.shape[1])])
    wanted = np.concatenate([target - target.mean(), np.zeros(scaled.shape[1])])
    weights = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
    assert items[:, 0] == pytest.approx(scaled @ weights, abs=1e-5)
    assert items[4] > items[5]  # like the popular ones
    assert (users == 1).all()


def test_cold_items_are_ranked_among_themselves(dataset: Dataset) -> None:
    """Users 0 and 1 want 40 and 50, the two cold items; user 2 has no cold item."""
    found = cold_baselines(dataset, ks=(1,))
    assert found["chance"].means["recall@1"] == 0.5
    assert found["attributes"].means["recall@1"] == 0.5  # 40 first, for both
    assert found["attributes"].users == found["chance"].users == 2
    with pytest.raises(InvalidInput, match=r"k: .*expected 1 to 2; got 3"):
        cold_baselines(dataset, ks=(3,))


def test_no_cold_item_to_find(dataset: Dataset) -> None:
    with pytest.raises(InvalidInput, match="no interactions in val with items that train lacks"):
        evaluation_task(dataset, "val", ks=(1,), candidates="cold")


def test_chance_over_all_items() -> None:
    task = dataclasses.replace(task_of([[0]], [[1]], (4,)), candidates=None)
    assert chance(task).means["recall@4"] == pytest.approx(4 / 7)
