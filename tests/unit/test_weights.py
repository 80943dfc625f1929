"""Weights of interactions: read, kept with their pairs, in the loss, and as grades of relevance."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardline.shards.core.errors import ConfigError, DataError, InvalidInput
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.csr import Csr
from shardline.training.data.importers import Format, ImportConfig, import_dataset
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import Dataset, open_dataset
from shardline.training.evaluation.baselines import Baseline, evaluate_baseline
from shardline.training.evaluation.ranking_metrics import metric_names, score_lists
from shardline.training.evaluation.user_queries import evaluation_task
from shardline.training.features.fitted import fit
from shardline.training.features.prepared import TrainingData, example_weights, prepare
from shardline.training.loop.batches import Sampler
from shardline.training.loop.launch import train
from tests.tiny import tiny_config, tiny_dataset, with_weights


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("weighted")
    return with_weights(tiny_dataset(folder / "plain"), folder / "data")


def ratings(**columns: object) -> pa.Table:
    plain = {
        "user_id": [1, 1, 1, 2, 2],
        "item_id": [7, 8, 7, 8, 9],
        "timestamp": [1, 2, 3, 4, 5],
        "rating": [4, None, 2, 1, 5],
    }
    return pa.table(plain | columns)


def imported(tmp_path: Path, table: pa.Table, column: str | None = "rating") -> Dataset:
    pq.write_table(table, tmp_path / "rows.parquet")
    config = ImportConfig(weight_column=column, test_per_user=0, val_users=0)
    import_dataset(Format.TABLE, tmp_path / "rows.parquet", tmp_path / "data", config)
    return open_dataset(tmp_path / "data")


def test_weights_stay_with_their_pairs(tmp_path: Path) -> None:
    """Of the pair (1, 7) that comes twice, the first row is kept, with its weight."""
    dataset = imported(tmp_path, ratings())
    assert dataset.interactions()["weight"].to_pylist() == [4, None, 1, 5]
    pairs = dataset.positives("train")
    assert dataset.item_ids[pairs.items].tolist() == [7, 8, 8, 9]
    np.testing.assert_array_equal(dataset.weights("train"), [4, np.nan, 1, 5])
    assert dataset.weights("val", "train") is not None


def test_repeats_and_order_of_a_written_table(tmp_path: Path) -> None:
    """Rows in any order, a pair twice: the oldest counts, in the order of time."""
    tiny = tiny_dataset(tmp_path / "tiny")
    user, items = int(tiny.user_ids[0]), tiny.item_ids[:3].tolist()
    table = pa.table(
        {
            "user_id": [user] * 4,
            "item_id": [items[0], items[1], items[2], items[1]],
            "timestamp": [30, 20, 10, 5],
            "split": pa.array(["train"] * 4).dictionary_encode(),
            "weight": pa.array([3.0, 2.0, 1.0, 0.5], pa.float32()),
        }
    )
    dataset = write_dataset(tmp_path / "data", tiny.users(), tiny.items(), table, name="rows")
    assert dataset.positives("train").items.tolist() == [1, 2, 0]
    np.testing.assert_array_equal(dataset.weights("train"), [0.5, 1.0, 3.0])
    assert tiny.weights("train") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([4, -1, 2, 1, 5], "weight: weights of interactions are finite.*got -1"),
        ([4.0, math.inf, 2, 1, 5], "not usable as weights|finite"),
        (["a", "b", "c", "d", "e"], "rating: not usable as weights; expected numbers"),
    ],
)
def test_weights_that_cannot_be_read(tmp_path: Path, values: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        imported(tmp_path, ratings(rating=values))
    assert not (tmp_path / "data").exists()


def test_a_weight_column_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stars: missing column"):
        imported(tmp_path, ratings(), "stars")
    (tmp_path / "train.txt").write_text("0 1 2\n")
    (tmp_path / "test.txt").write_text("0 3\n")
    config = ImportConfig(weight_column="rating")
    with pytest.raises(InvalidInput, match="the format has no weights"):
        import_dataset(Format.LIGHTGCN, tmp_path, tmp_path / "out", config)


def test_weights_of_examples_have_a_mean_of_one() -> None:
    given = np.array([1.0, np.nan, 4.0, 0.0], np.float32)
    np.testing.assert_allclose(example_weights(given, 1.0), [3 / 5, 1, 12 / 5, 0], rtol=1e-6)
    np.testing.assert_allclose(example_weights(given, 0.5), [1, 1, 2, 0], rtol=1e-6)
    nothing = np.array([0.0, np.nan], np.float32)
    with pytest.raises(ConfigError, match="no interaction of train has a weight above 0"):
        example_weights(nothing, 1.0)
    with pytest.raises(ConfigError, match=r"loss.weight_exponent: the interactions have no w"):
        example_weights(None, 1.0)


def test_each_example_brings_its_weight_on_any_number_of_ranks(
    weighted: Dataset, tmp_path: Path
) -> None:
    config = tiny_config(loss={"weight_exponent": 2.0})
    prepare(weighted, fit(config, weighted), tmp_path / "cache")
    data = TrainingData.open(tmp_path / "cache")
    whole = next(sampler_of(config, data, 0, 1).epoch(0)).weights
    halves = [next(sampler_of(config, data, rank, 2).epoch(0)).weights for rank in (0, 1)]
    assert whole is not None and whole.std() > 0.3
    np.testing.assert_array_equal(np.concatenate(halves), whole)  # type: ignore[arg-type]
    given, scaled = weighted.weights("train"), data.row_weights(2.0)
    assert given is not None and scaled is not None
    five = scaled[given == 5]
    np.testing.assert_allclose(five, 25 / np.nanmean(given.astype(float) ** 2), rtol=1e-6)
    assert next(sampler_of(tiny_config(), data, 0, 1).epoch(0)).weights is None


def sampler_of(config: TrainingConfig, data: TrainingData, rank: int, world: int) -> Sampler:
    return Sampler(
        data=data, batch_size=24, rank=rank, world=world, seed=1, unknown_rate=0.0,
        history_length=4, loss=config.loss,
    )  # fmt: skip


def test_a_run_that_would_have_no_weights_is_refused_before_anything(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    config = tiny_config(loss={"weight_exponent": 1.0})
    with pytest.raises(ConfigError, match="the interactions have no weights"):
        train(config, dataset.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def slow_graded(ranked: list[int], relevant: dict[int, float], k: int) -> float:
    def gain(grade: float) -> float:
        return 2 ** (1.0 if math.isnan(grade) else grade) - 1

    found = [gain(relevant[i]) if i in relevant else 0.0 for i in ranked[:k]]
    best = sorted(map(gain, relevant.values()), reverse=True)[:k]
    dcg, ideal = (
        sum(g / math.log2(rank + 1) for rank, g in enumerate(part, 1)) for part in (found, best)
    )
    return dcg / ideal if ideal else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_graded_ndcg_against_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 7, 20)
    lengths[3] = 9  # more than the list is long
    items = np.concatenate([rng.permutation(30)[:n] for n in lengths]) * 10**12
    relevant = Csr.of(lengths, items.astype(np.int64))
    grades = rng.integers(0, 6, len(items)).astype(np.float32)
    grades[rng.random(len(items)) < 0.2] = np.nan
    ranked = np.array([rng.permutation(30)[:8] for _ in range(20)]) * 10**12
    ranked[4, 3:] = -1
    found = score_lists(ranked, relevant, (1, 3, 8), grades)
    assert tuple(found.values) == metric_names((1, 3, 8), graded=True)
    for place, user in enumerate(found.users):
        part = slice(relevant.indptr[user], relevant.indptr[user + 1])
        wanted = dict(zip(items[part].tolist(), grades[part].tolist(), strict=True))
        for k in (1, 3, 8):
            slow = slow_graded(ranked[user].tolist(), wanted, k)
            assert found.values[f"graded_ndcg@{k}"][place] == pytest.approx(slow, abs=1e-12)
    plain = score_lists(ranked, relevant, (1, 3, 8))
    for name in metric_names((1, 3, 8)):
        np.testing.assert_array_equal(plain.values[name], found.values[name])


def test_equal_grades_rank_as_without_and_large_ones_are_refused() -> None:
    relevant = Csr(np.array([0, 2]), np.array([4, 5]))
    ranked = np.array([[5, 1, 4]])
    same = score_lists(ranked, relevant, (3,), np.full(2, 3.0, np.float32)).values
    assert same["graded_ndcg@3"][0] == pytest.approx(same["ndcg@3"][0])
    with pytest.raises(InvalidInput, match=r"expected 0 to 50.*got 1 to 900"):
        score_lists(ranked, relevant, (3,), np.array([1, 900], np.float32))


def test_grades_of_a_task_follow_its_users(weighted: Dataset) -> None:
    task = evaluation_task(weighted, "test", graded=True)
    given = weighted.weights("test")
    assert given is not None
    users = np.array([5, 2, 31])  # each has one test item
    np.testing.assert_array_equal(task.grades_of(users), given[users])
    graded = evaluate_baseline(
        Baseline.POPULARITY, weighted, ks=(5,), graded=True, with_segments=True
    )
    assert 0 < graded.means["graded_ndcg@5"] < 1
    head = graded.segments["head items"]
    assert head is not None and "graded_ndcg@5" in head.means
    plain = evaluate_baseline(Baseline.POPULARITY, weighted, ks=(5,))
    assert "graded_ndcg@5" not in plain.means


def test_grades_need_weights(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    with pytest.raises(InvalidInput, match="graded: the interactions have no weights to be grades"):
        evaluation_task(dataset, "test", graded=True)
