"""The comparison of a warm start with a refit: what it holds back, and what it reports."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from shardline.bench.training.warm_start_bench import main, without_a_day
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.model.checkpoint import open_run
from tests.tiny import tiny_config, tiny_dataset


def test_a_day_is_a_share_of_train_alone(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    before = without_a_day(dataset, tmp_path / "yesterday", 0.25, seed=1)
    for split in ("val", "test"):
        assert before.interactions(split).equals(dataset.interactions(split))
    ours, every = (
        {(line["user_id"], line["item_id"]) for line in each.interactions("train").to_pylist()}
        for each in (before, dataset)
    )
    assert ours < every
    assert len(ours) == pytest.approx(0.75 * len(every), rel=0.1)
    assert before.rows["items"] == dataset.rows["items"]


def test_the_report_holds_what_the_runs_are(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    config, report = tmp_path / "config.yaml", tmp_path / "report.json"
    config.write_text(f"training: {tiny_config(epochs=3).model_dump_json()}")
    found = CliRunner().invoke(
        main,
        [
            *("--config", str(config), "--data", str(dataset.path), "--runs", str(tmp_path / "r")),
            *("--warm-learning-rate", "0.003", "--warm-batch-size", "12"),
            *("--split", "val", "--json", str(report)),
        ],
    )
    assert found.exception is None, found.output
    content = json.loads(report.read_text())
    runs = content["runs"]
    assert json.loads(found.output.splitlines()[-1]) == content
    assert [runs[name]["epochs"] for name in ("yesterday", "full refit", "warm start")] == [3, 3, 1]
    assert runs["yesterday"]["start_recall"] is None is runs["full refit"]["start_recall"]
    assert 0 < runs["warm start"]["start_recall"] <= 1
    means = evaluate_exact(tmp_path / "r/warm", dataset, split="val", ks=(20,)).means
    assert runs["warm start"]["recall@20"] == means["recall@20"]
    ratio = content["of_refit"]
    assert ratio["wall"] == pytest.approx(
        runs["warm start"]["wall_s"] / runs["full refit"]["wall_s"], abs=0.1
    )
    assert ratio["recall@20"] == means["recall@20"] / runs["full refit"]["recall@20"]
    run = open_run(tmp_path / "r/warm")
    assert run.origin is not None and run.origin["run"] == str(tmp_path / "r/yesterday")
    assert (run.config.optimiser.learning_rate, run.config.batch_size) == (0.003, 12)
