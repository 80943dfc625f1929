"""The generator: the distribution of the draws, the files, the seed."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from shardline.shards.core.errors import DataError
from shardline.training.data.tables import open_dataset, vector_matrix
from shardline.training.synthetic.generator import BLOCK_USERS, PRESETS, SynthConfig, generate
from shardline.training.synthetic.race import draw_items, noise_hazard

SMALL = SynthConfig(num_users=300, num_items=500, val_users=40, ceiling_users=100, seed=7)


def slow_draw(
    log_weights: np.ndarray, c: float, count: int, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """The definition: noise for every pair, then one item after the other, the rest renormalised.

    Adding a Gumbel variable to each log weight and sorting is the same draw.
    """
    noisy = log_weights + c * rng.standard_normal((draws, len(log_weights)))
    return np.argsort(-(noisy + rng.gumbel(size=noisy.shape)), axis=1)[:, :count]


def stepwise_draw(
    log_weights: np.ndarray, c: float, count: int, rng: np.random.Generator
) -> list[int]:
    noisy = log_weights + c * rng.standard_normal(len(log_weights))
    p = np.exp(noisy) / np.exp(noisy).sum()
    return [int(i) for i in rng.choice(len(p), count, replace=False, p=p)]


@pytest.mark.parametrize(
    ("sharpness", "c", "m", "count"),
    [
        (1.0, 0.5, 8, 3),
        (1.5, 0.375, 300, 4),
        (3.0, 0.0, 10, 6),
        (0.5, 2.0, 12, 5),
        (1.0, 4.0, 6, 2),
    ],
)
def test_draws_have_the_distribution_of_the_definition(
    sharpness: float, c: float, m: int, count: int
) -> None:
    """Ordered pairs (first item, last item) of both ways, compared by a chi-squared test."""
    draws = 40_000
    rng = np.random.default_rng(5)
    log_weights = (sharpness * rng.standard_normal(m)).astype(np.float32)
    hazard = noise_hazard(c)
    fast = np.concatenate(
        [
            draw_items(np.tile(log_weights, (500, 1)), count, hazard, rng)
            for _ in range(draws // 500)
        ]
    )
    slow = slow_draw(log_weights, c, count, draws, rng)
    for first, last in ((0, count - 1), (1, 1)):
        table = np.stack([np.bincount(x[:, first] * m + x[:, last]) for x in padded(fast, slow, m)])
        common = table.sum(axis=0) >= 20
        pooled = np.column_stack([table[:, common], table[:, ~common].sum(axis=1)])
        p = stats.chi2_contingency(pooled[:, pooled.sum(axis=0) > 0]).pvalue
        assert p > 1e-4, (first, last, p)


def padded(fast: np.ndarray, slow: np.ndarray, m: int) -> list[np.ndarray]:
    """One more row in both, so that both bincounts are equally long."""
    last = np.full((1, fast.shape[1]), m - 1)
    return [np.concatenate([x, last]) for x in (fast, slow)]


def test_draws_agree_with_numpy_choice() -> None:
    """The seed text's own way: p renormalised after each item."""
    rng = np.random.default_rng(11)
    log_weights = np.array([2.0, 1.0, 0.0, -1.0, 0.5], dtype=np.float32)
    fast = draw_items(np.tile(log_weights, (6000, 1)), 3, noise_hazard(0.5), rng)
    slow = np.array([stepwise_draw(log_weights, 0.5, 3, rng) for _ in range(6000)])
    shares = [np.bincount(np.sort(x, axis=1) @ [25, 5, 1], minlength=125) for x in (fast, slow)]
    table = np.stack(shares)
    assert stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue > 1e-4


def test_draws_are_different_items_even_when_all_are_taken() -> None:
    rng = np.random.default_rng(2)
    log_weights = (30 * rng.standard_normal((20, 40))).astype(np.float32)  # nearly a fixed order
    order = np.argsort(-log_weights, axis=1)
    drawn = draw_items(log_weights, 40, noise_hazard(0.0), rng)
    assert (np.sort(drawn, axis=1) == np.arange(40)).all()
    assert (drawn[:, 0] == order[:, 0]).mean() > 0.8


@pytest.mark.parametrize("c", [0.3, 1.0, 4.0])
def test_noise_hazard_against_sampling(c: float) -> None:
    weights = np.exp(c * np.random.default_rng(0).standard_normal(2_000_000))
    hazard = noise_hazard(c)
    assert hazard.at_start == pytest.approx(c * c / 2, abs=1e-5)
    for log_x in (-3.0, 0.0, 1.0):
        late = np.exp(-np.exp(log_x) * weights)
        expected = np.log((late * weights).mean() / late.mean())
        assert hazard(np.array(log_x)) == pytest.approx(expected, abs=0.02)
    assert (np.diff(hazard.log_ratio) < 1e-9).all()


def test_files_and_columns(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    generate(SMALL, tmp_path / "d", progress=lambda *step: steps.append(step))
    dataset = open_dataset(tmp_path / "d")
    users, items = dataset.users(), dataset.items()
    assert users.column_names == ["user_id", "age", "gender", "country"]
    assert items.column_names == ["item_id", "category", "price", "rating", "attribute_vector"]
    ages, prices, ratings = (
        table[name].to_numpy()
        for table, name in ((users, "age"), (items, "price"), (items, "rating"))
    )
    assert (ages.min(), ages.max()) == (18, 69)
    assert set(users["gender"].to_pylist()) == {"M", "F", "O"}
    assert set(users["country"].to_pylist()) == {"US", "UK", "CA", "AU"}
    assert set(items["category"].to_pylist()) == set(range(20))
    assert prices.mean() == pytest.approx(30, rel=0.15)
    assert 1 <= ratings.min() < 1.1 < 4.9 < ratings.max() <= 5
    oracle = dataset.oracle()
    assert oracle is not None
    assert np.array_equal(oracle["attribute_vector"], vector_matrix(items["attribute_vector"]))
    assert oracle["interest_vector"].std() == pytest.approx(1, abs=0.05)
    assert dataset.manifest["parameters"] == {"generator": "synth", **SMALL.model_dump(mode="json")}
    assert ("interactions", 300, 300) in steps


def test_splits_and_interactions(tmp_path: Path) -> None:
    generate(SMALL, tmp_path / "d")
    dataset = open_dataset(tmp_path / "d")
    table = dataset.interactions()
    users, items, times = (table[c].to_numpy() for c in ("user_id", "item_id", "timestamp"))
    assert len(np.unique(users * 500 + items)) == 300 * 20
    assert (np.bincount(users) == 20).all()
    assert 0 <= times.min() < times.max() < 1_000_000
    splits = np.array(table["split"].to_pylist())
    assert {name: int((splits == name).sum()) for name in ("train", "val", "test")} == {
        "train": 300 * 16 - 40,
        "val": 40,
        "test": 300 * 4,
    }
    newest_train = np.full(300, -1)
    np.maximum.at(newest_train, users[splits == "train"], times[splits == "train"])
    assert (times[splits == "test"] >= newest_train[users[splits == "test"]]).all()
    assert (times[splits == "val"] >= newest_train[users[splits == "val"]]).all()
    oracle = dataset.oracle()
    assert oracle is not None
    affinity = (oracle["interest_vector"][users] * oracle["attribute_vector"][items]).sum(axis=1)
    assert affinity.mean() > 3  # of all pairs it is 0


def test_same_seed_same_files_whatever_the_threads(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"num_users": 2 * BLOCK_USERS + 9, "ceiling_users": 0})
    for name, threads in (("a", 1), ("b", 2), ("c", 3)):
        generate(config, tmp_path / name, threads=threads)
    other = config.model_copy(update={"seed": 8})
    generate(other, tmp_path / "other")
    manifests = {n: open_dataset(tmp_path / n).manifest for n in ("a", "b", "c", "other")}
    assert manifests["a"] == manifests["b"] == manifests["c"]
    files = {n: {f["name"]: f["sha256"] for f in m["files"]} for n, m in manifests.items()}
    assert all(files["a"][name] != files["other"][name] for name in files["a"])


@pytest.mark.parametrize(
    ("observe", "user_vector", "item_vector"),
    [((), False, False), (("interests",), True, False), (("attributes", "interests"), True, True)],
)
def test_observe_decides_what_is_written(
    tmp_path: Path, observe: tuple[str, ...], user_vector: bool, item_vector: bool
) -> None:
    config = SynthConfig(
        num_users=10, num_items=30, interactions_per_user=5, observe=observe, ceiling_users=0
    )
    dataset = generate(config, tmp_path / "d")
    assert ("interest_vector" in dataset.users().column_names) is user_vector
    assert ("attribute_vector" in dataset.items().column_names) is item_vector


def test_an_existing_target_is_kept(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"ceiling_users": 0})
    generate(config, tmp_path / "d")
    with pytest.raises(DataError, match="already exists"):
        generate(config, tmp_path / "d")
    generate(config, tmp_path / "d", overwrite=True)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_users": 0},
        {"num_items": 19},
        {"sharpness": -1},
        {"sharpness": 8, "noise": 1.0},
        {"observe": ("attribute",)},
        {"colour": "red"},
    ],
)
def test_bad_configurations(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SynthConfig.model_validate(bad)


def test_presets() -> None:
    assert (PRESETS["seed"].sharpness, PRESETS["seed"].noise) == (1.0, 0.5)
    assert (PRESETS["sharp"].sharpness, PRESETS["sharp"].noise) == (1.5, 0.25)
    assert (PRESETS["sharp"].num_users, PRESETS["sharp"].num_items) == (10_000, 100_000)
