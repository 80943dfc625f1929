"""The tables' protocol on a tiny dataset: what is trained on what, and measured on which split."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from shardline.bench.training.published_tables import (
    METRICS,
    changed,
    main,
    measured,
    read_changes,
    run_seed,
    summary,
)
from shardline.cluster.config import load_config
from shardline.shards.core.errors import ConfigError
from shardline.training.data.tables import Dataset
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.model.checkpoint import open_run
from tests.tiny import tiny_config, tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


def nothing(line: str) -> None:
    """Says nothing."""


def test_the_refit_sees_validation_too_for_as_many_epochs(dataset: Dataset, tmp_path: Path) -> None:
    config = tiny_config(epochs=3, seed=4)
    row = run_seed(config, dataset, tmp_path, nothing)
    assert (row["seed"], row["epochs"]) == (4, 3)
    select, final = (open_run(tmp_path / name).config for name in ("select", "final"))
    assert (select.fit_splits, final.fit_splits) == ("train", "train+val")
    assert select.epochs == final.epochs == 3
    on_val = evaluate_exact(tmp_path / "select", dataset, split="val", ks=(20,)).means
    on_test = evaluate_exact(tmp_path / "final", dataset, split="test", ks=(20,)).means
    assert row["val"] == {metric: on_val[metric] for metric in METRICS}
    assert {metric: row[metric] for metric in METRICS} == {m: on_test[m] for m in METRICS}
    assert row["cpu_s"] > 0


def test_the_last_epoch_is_measured_even_where_an_earlier_one_is_better(
    dataset: Dataset, tmp_path: Path
) -> None:
    lines: list[str] = []
    spoilt = tiny_config(epochs=2, optimiser={"learning_rate": 1.0, "schedule": "constant"})
    found = measured(spoilt, dataset, tmp_path / "run", "val", lines.append)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    validations = [event for event in log if event["event"] == "validation"]
    assert [event["epoch"] for event in validations] == [2]
    assert found.keys() == {"cpu_s", *METRICS}
    assert [json.loads(line)["epoch"] for line in lines][-1] == 2


def test_changes_replace_settings_and_keep_their_neighbours() -> None:
    config = tiny_config(seed=5)
    other = changed(config, {"loss": {"temperature": 0.3}, "towers": {"item": {"hidden": [7]}}})
    assert other.loss == config.loss.model_copy(update={"temperature": 0.3})
    assert other.towers.item.hidden == (7,)
    assert other.towers.item.features == config.towers.item.features
    assert other.towers.query == config.towers.query
    assert other.seed == 5
    with pytest.raises(ValueError, match=r"loss\.tau"):
        changed(config, {"loss": {"tau": 0.3}})


@pytest.mark.parametrize("text", ["[1, 2]", "name: 3", ""])
def test_changes_that_are_no_table_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "changes.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a table of changes"):
        read_changes(path)


def test_committed_changes_fit_their_configuration() -> None:
    configs = Path(__file__).parents[2] / "bench" / "configs"
    settings = load_config(configs / "gowalla.yaml").training
    changes = read_changes(configs / "gowalla-ablation.yaml")
    for name, change in changes.items():
        assert changed(settings, change) != settings, name


def test_means_and_deviations() -> None:
    rows = [{"recall@20": value} for value in (0.1, 0.2, 0.3)]
    assert summary(rows, "recall@20") == "0.2000 ± 0.1000"
    assert summary(rows[:1], "recall@20") == "0.1000"


def test_tables_from_the_command_line(dataset: Dataset, tmp_path: Path) -> None:
    config, changes = tmp_path / "tiny.yaml", tmp_path / "changes.yaml"
    settings = tiny_config().model_dump(mode="json")
    config.write_text(yaml.safe_dump({"training": settings}))
    changes.write_text("warmer: {loss: {temperature: 0.5}}\n")
    base = ["--config", str(config), "--data", str(dataset.path), "--seed", "1", "--epochs", "1"]
    report = tmp_path / "report.json"
    runner = CliRunner()
    one = [*base, "--runs", str(tmp_path / "a"), "--no-baselines", "--json", str(report)]
    answer = runner.invoke(main, one, catch_exceptions=False)
    assert "ours, 1 seed(s), test" in answer.output
    assert [(row["seed"], row["epochs"]) for row in json.loads(report.read_text())["rows"]] == [
        (1, 1)
    ]
    two = [*base, "--runs", str(tmp_path / "b"), "--ablate", str(changes), "--json", str(report)]
    runner.invoke(main, two, catch_exceptions=False)
    rows = json.loads(report.read_text())["rows"]
    assert [row["change"] for row in rows] == ["as it is", "warmer"]
    assert [rows[0][metric] for metric in METRICS] != [rows[1][metric] for metric in METRICS]
