"""`shardline tune` as a command, and its comparison with a full grid."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from shardline.bench.index.tune_bench import Data, gowalla_sample, measure, show
from shardline.bench.index.tune_bench import sample_of as gowalla_or_mnist
from shardline.bench.vectors import clustered
from shardline.cluster.cli import cli
from shardline.cluster.commands import tune as tune_command
from shardline.cluster.console import StageProgress
from shardline.cluster.tuner import outcome as outcome_module
from shardline.cluster.tuner.configurations import (
    configurations,
)
from shardline.cluster.tuner.halving import Bounds
from shardline.shards.core.errors import InvalidInput, NotFound
from shardline.shards.core.schema import Metric
from shardline.shards.index.spec import IndexKind
from tests.engine import write_set
from tests.tuner_samples import DIM, LEAST_RUNG_ROWS, ROWS, sample_of, table

QUICK = (IndexKind.FLAT, IndexKind.IVF, IndexKind.IVFPQ_FS)


@pytest.fixture(scope="module", autouse=True)
def small_rungs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome_module, "LEAST_RUNG_ROWS", LEAST_RUNG_ROWS)
        yield


def test_tune_and_the_grid_on_the_same_sample(capsys: pytest.CaptureFixture[str]) -> None:
    bounds = Bounds(target_recall=0.9)
    kinds = [IndexKind.FLAT, IndexKind.IVF]
    with StageProgress() as progress:
        report = measure(sample_of(), bounds, progress, threads=1, kinds=kinds)
    tried = configurations(rows=ROWS, dim=DIM, metric=Metric.COSINE, kinds=kinds)
    assert [each["name"] for each in report["grid"]] == [each.name for each in tried]
    able = {each["name"] for each in report["grid"] if each["recall"] >= 0.9}
    assert {report["best_of_grid"]["name"], report["choice"]["name"]} <= able
    assert report["time_ratio"] > 0 and report["latency_ratio"] > 0
    show(report, bounds)
    shown = capsys.readouterr().out
    assert report["choice"]["name"] in shown and "latency of tune's choice" in shown
    with StageProgress() as progress:
        none = Bounds(target_recall=0.9, max_p99_ms=1e-6)
        report = measure(sample_of(3000), none, progress, threads=1, kinds=kinds)
    show(report, none)
    assert "nothing within the bounds" in capsys.readouterr().out


def test_the_files_of_gowalla_become_vectors_and_held_out_items(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    taken = [rng.permutation(90)[:12].tolist() for _ in range(40)]
    for name, part in (("train.txt", slice(0, 8)), ("test.txt", slice(8, 12))):
        lines = [" ".join(map(str, [user, *items[part]])) for user, items in enumerate(taken)]
        (tmp_path / name).write_text("\n".join(reversed(lines)) + "\n")
    sample = gowalla_sample(tmp_path)
    assert sample.held_out is not None and sample.metric is Metric.DOT
    assert sample.vectors.shape[0] == sample.rows == max(map(max, taken)) + 1
    assert sorted(sample.ids.tolist()) == list(range(sample.rows))
    pairs = list(zip(sample.held_out.owners.tolist(), sample.held_out.items.tolist(), strict=True))
    assert pairs == [(user, item) for user, items in enumerate(taken) for item in items[8:]]
    with pytest.raises(InvalidInput, match="needs --path"):
        gowalla_or_mnist(Data.MNIST784, 100, 8, None)
    with pytest.raises(NotFound):
        gowalla_sample(tmp_path / "none")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """The command, over a set of clustered vectors in a store."""
    monkeypatch.setattr(tune_command, "cores", lambda: 1)  # threads that wait for busy cores spin
    vectors = clustered(8200, DIM, 40, seed=1)
    write_set(tmp_path / "store" / "embeddings" / "m1", vectors)
    options = itertools.chain.from_iterable(("--kind", str(kind)) for kind in QUICK)
    common = ["--store", str(tmp_path / "store"), "tune", "--shards", "1", *options]

    def invoke(*arguments: str):
        return CliRunner().invoke(cli, [*common, *arguments])

    return invoke


def test_the_command_prints_the_front_and_writes_a_section_to_build_with(
    tmp_path: Path, run: Callable[..., object]
) -> None:
    files = {name: tmp_path / name for name in ("tune.yaml", "tune.json", "tune.png")}
    options = ["--out", "tune.yaml", "--json", "tune.json", "--plot", "tune.png"]
    arguments = [str(files.get(each, each)) for each in options]
    done = run("--embeddings", "m1", "--target-recall", "0.95", *arguments)
    assert done.exit_code == 0, done.output
    assert "Pareto front for 8,200 rows x 16, cosine, 1 shards" in done.output
    assert "* " in done.output
    report = json.loads(files["tune.json"].read_text())
    assert report["chosen"] in {each["name"] for each in report["configurations"]}
    assert report["setup"]["query_source"] == "item vectors held out"
    assert files["tune.png"].read_bytes().startswith(b"\x89PNG")
    written = files["tune.yaml"].read_text()
    assert written.splitlines()[0] == "# shardline tune: m1, recall@100 >= 0.95"
    assert written.partition("\n")[2] in done.output
    store = ["--store", str(tmp_path / "store"), "--set", "cluster.shards=1"]
    built = CliRunner().invoke(
        cli, ["-c", str(files["tune.yaml"]), *store, "build", "--in-process"]
    )
    assert built.exit_code == 0, built.output
    assert "chosen for a target of 0.95" in built.output
    chosen = next(each for each in report["configurations"] if each["name"] == report["chosen"])
    assert f"index: {chosen['factory']}" in built.output


def test_a_folder_and_interactions_are_taken(tmp_path: Path, run: Callable[..., object]) -> None:
    vectors = clustered(8200, DIM, 40, seed=1)
    asked = clustered(60, DIM, 40, seed=1, first_row=70_000)
    items = np.argsort(-(asked @ vectors.T), axis=1)[:, :50:4]
    paths = table(tmp_path / "held.parquet", vector=asked.tolist(), item_id=items.tolist())
    folder = str(tmp_path / "store" / "embeddings" / "m1")
    done = run(
        *("--embeddings", folder, "--interactions", str(paths[0])), *("--target-recall", "0.9")
    )
    assert done.exit_code == 0, done.output
    assert "recall@100 of held-out items by that of exact search" in done.output
    assert "60 users with held-out items" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--embeddings", "m9"], "no finished embedding set"),
        (["--max-bytes-per-vector", "3"], "no configuration is that small"),
        (["--max-p99-ms", "0.000001"], "no configuration meets the bounds"),
        (["--interactions", "a", "--data", "b"], "exclude each other"),
        (["--shards", "9"], "too few rows to tune for"),
        (["--data", "."], "no query encoder"),
        (["--kind", "auto"], "Invalid value"),
    ],
)
def test_what_the_command_refuses(
    run: Callable[..., object], options: list[str], message: str
) -> None:
    done = run(*options)
    assert done.exit_code != 0
    said = f"{done.output} {done.exception}"
    assert message in said
    assert ("Pareto front" in done.output) == ("meets the bounds" in message)
