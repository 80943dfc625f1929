"""The tables' plans against their rules, and each command on a tiny data set."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from shardline.bench.training.recall_tables import (
    Row,
    main,
    of_batch_sizes,
    of_temperatures,
    settings_of,
)
from shardline.bench.training.variants import BASELINE, STRATEGIES
from shardline.shards.core.errors import ConfigError
from shardline.training.data.tables import Dataset
from shardline.training.evaluation.baselines import Baseline, evaluate_baseline
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.model.checkpoint import open_run
from tests.tiny import NUM_USERS, PER_USER, tiny_config, tiny_dataset

EXAMPLES = NUM_USERS * (PER_USER - 2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


def run(
    dataset: Dataset, tmp_path: Path, *words: str, changes: dict[str, Any] | None = None
) -> Result:
    """The command on the tiny data, for two epochs; runs and figures below ``tmp_path``."""
    settings = tiny_config().model_dump(mode="json", exclude_unset=True) | (changes or {})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"training": settings}))
    base = ["--config", str(tmp_path / "tiny.yaml"), "--data", str(dataset.path), "--epochs", "2"]
    ends = ["--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "figures.json")]
    return CliRunner().invoke(main, [*base, *ends, *words])


def figures(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    return found


def test_equal_epochs_or_the_nearest_whole_ones_to_equal_steps() -> None:
    sizes = (256, 1000, 4096)
    at_epochs = of_batch_sizes(sizes, 10_000, epochs=3, steps=None)
    assert [row.run for row in at_epochs] == [{"batch_size": b, "epochs": 3} for b in sizes]
    at_steps = of_batch_sizes(sizes, 10_000, epochs=3, steps=39)
    # steps per epoch: 39, 10 and 2
    assert [row.run["epochs"] for row in at_steps] == [1, 4, 20]


@pytest.mark.parametrize(
    ("sizes", "steps", "field"), [((8, 20_000), None, "batch-size"), ((8, 256), 38, "steps")]
)
def test_batches_that_cannot_be_are_refused(
    sizes: tuple[int, ...], steps: int | None, field: str
) -> None:
    with pytest.raises(ConfigError) as error:
        of_batch_sizes(sizes, 10_000, epochs=3, steps=steps)
    assert error.value.field == field


def test_a_short_run_reaches_its_peak_rate_and_is_measured_at_its_end() -> None:
    training = tiny_config(epochs=4, optimiser={"warmup_steps": 50})
    few = settings_of(Row("few", {"batch_size": 100}), training, 500, seed=9)
    many = settings_of(Row("many", {"batch_size": 2}), training, 500, seed=9)
    assert (few.optimiser.warmup_steps, many.optimiser.warmup_steps) == (2, 50)
    assert few.validation.every_epochs == 4
    assert few.validation.patience > 4
    assert (few.seed, few.batch_size) == (9, 100)
    assert few.loss == training.loss


def test_temperatures_are_held_and_the_last_row_learns() -> None:
    training = tiny_config()
    rows = of_temperatures((0.1, 0.3), training)
    losses = [settings_of(row, training, 100, 0).loss for row in rows]
    assert [(loss.temperature, loss.learn_temperature) for loss in losses] == [
        (0.1, False),
        (0.3, False),
        (training.loss.temperature, True),
    ]


def test_batch_sizes_from_the_command_line(dataset: Dataset, tmp_path: Path) -> None:
    words = ("--seed", "1", "--split", "val", "batch-size", "--batch-size", "24")
    answer = run(dataset, tmp_path, *words, "--batch-size", "120", "--steps", "10")
    assert answer.exit_code == 0, answer.output
    assert "batch size, about 10 steps, tiny, val, 1 seed(s)" in answer.output
    rows = figures(tmp_path)["results"]
    assert [(row["name"], row["epochs"], row["steps"], row["examples"]) for row in rows] == [
        ("24", 1, 10, 240),
        ("120", 5, 10, 1200),
    ]
    for number, row in enumerate(rows):
        means = evaluate_exact(
            tmp_path / "runs" / f"{number}-1", dataset, split="val", ks=(10,)
        ).means
        assert row["best_epoch"] == row["epochs"]
        assert row["recall@10"] == means["recall@10"]
    popular = evaluate_baseline(Baseline.POPULARITY, dataset, split="val", ks=(10,)).means
    assert figures(tmp_path)["popularity"]["recall@10"] == popular["recall@10"]
    assert figures(tmp_path)["best_estimate"] is None  # no ceilings: not synthetic


def test_negatives_are_mined_by_the_in_batch_run_that_is_no_row(
    dataset: Dataset, tmp_path: Path
) -> None:
    changes = {"mining": {"per_user": 3, "range_max": 20}}
    words = ("negatives", "--strategy", BASELINE, "--strategy", "in-batch + 1 mined")
    answer = run(dataset, tmp_path, *words, changes=changes)
    assert answer.exit_code == 0, answer.output
    assert [row["name"] for row in figures(tmp_path)["results"]] == [BASELINE, words[-1]]
    runs = [open_run(tmp_path / "runs" / name).config.loss for name in ("base", "0-0", "1-0")]
    assert [loss.hard_negatives for loss in runs] == [0, 0, 1]
    assert (tmp_path / "runs" / "hard-negatives").is_dir()


def test_without_mined_strategies_nothing_is_mined(dataset: Dataset, tmp_path: Path) -> None:
    answer = run(dataset, tmp_path, "negatives", "--strategy", "in-batch + 5 random")
    assert answer.exit_code == 0, answer.output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["0-0"]


def test_every_strategy_is_a_loss_that_can_be() -> None:
    for changes in STRATEGIES.values():
        settings_of(Row("any", loss=changes), tiny_config(), EXAMPLES, 0)


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (("batch-size", "--batch-size", "500"), {}, "at most 240"),
        (("batch-size", "--batch-size", "24", "--steps", "9"), {}, "at least 10"),
        (("temperature",), {"num_workers": 2}, "training.num_workers"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    dataset: Dataset, tmp_path: Path, words: tuple[str, ...], changes: dict[str, Any], said: str
) -> None:
    answer = run(dataset, tmp_path, *words, changes=changes)
    assert answer.exit_code == 1
    assert said in answer.output
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_there_is_not_touched(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    answer = run(dataset, tmp_path, "temperature")
    assert answer.exit_code == 1
    assert "exists already" in answer.output
    assert list((tmp_path / "runs").iterdir()) == []
