"""A warm start beside a full refit: the same quality in a fraction of the time, or not.

Theory. A share of the train interactions, drawn at random, is held back as "a day". Yesterday's
run is trained without it. Then the whole of train is fitted twice: anew, by the configuration as it
is (the full refit, which is the baseline), and from yesterday's weights (``train --from``) in a few
epochs. Most of what a model knows of the whole it knows of the rest, so the warm run has to learn
a day, not a year; its floor is the share of the epochs that it trains. Both are measured on the
same split with the same known items left out, and timed from the opening of the data to the last
checkpoint. ``start_recall`` is that of yesterday's weights on validation before the first step,
with today's items known; the other figures of yesterday's run are with its own.

A day drawn at random is kind: the taste of users does not drift within it, and few of its users and
items are new. Choose the warm schedule on validation (``--split val``), then look at test once.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from shardline.bench.training.published_tables import METRICS, K, changed
from shardline.cluster.config import load_config
from shardline.cluster.console import print_table
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import Dataset, open_dataset
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.loop.launch import train
from shardline.training.loop.runlog import LOG, read_log
from shardline.training.model.checkpoint import open_run

YESTERDAY, REFIT, WARM = "yesterday", "full refit", "warm start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One run: what it cost, and how good it is.

    wall_s and cpu_s (all threads) of ``train``; means: METRICS on the split; start_recall: Recall@K
    on val of the weights it started from, None of a cold one.
    """

    epochs: int
    steps: int
    wall_s: float
    cpu_s: float
    means: dict[str, float]
    start_recall: float | None


def without_a_day(dataset: Dataset, folder: Path, share: float, seed: int) -> Dataset:
    """The same data without ``share`` of its train interactions, drawn at random."""
    table = dataset.interactions()
    is_train = pc.equal(table["split"].cast(pa.string()), "train").to_numpy()
    rng = np.random.default_rng(seed)
    kept = ~is_train | (rng.random(len(table)) >= share)
    return write_dataset(
        folder, dataset.users(), dataset.items(), table.filter(pa.array(kept)), name=dataset.name
    )


def fitted(
    config: TrainingConfig, dataset: Dataset, folder: Path, split: str, warm: Path | None = None
) -> Fit:
    """Trains to the last epoch and measures the model it ends with."""
    # one validation, at the end: an earlier epoch can then not be the one that is kept
    config = changed(config, {"validation": {"every_epochs": config.epochs, "k": K}})
    began, cpu = time.perf_counter(), time.process_time()
    result = train(config, dataset.path, folder, warm=warm)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    means = evaluate_exact(folder, dataset, split=split, ks=(K,)).means
    first = [
        event[f"recall@{K}"]
        for event in read_log(folder / LOG)
        if event["event"] == "validation" and event["epoch"] == 0
    ]
    return Fit(
        epochs=config.epochs,
        steps=result.steps,
        wall_s=wall_s,
        cpu_s=cpu_s,
        means={metric: means[metric] for metric in METRICS},
        start_recall=first[0] if first else None,
    )


def compare(
    config: TrainingConfig,
    warm_changes: dict[str, Any],
    dataset: Dataset,
    runs: Path,
    *,
    share: float,
    split: str,
) -> dict[str, Any]:
    """The three runs, and of the warm one the ratios to the full refit."""
    day_before = without_a_day(dataset, runs / "data-yesterday", share, config.seed)
    fits = {YESTERDAY: fitted(config, day_before, runs / YESTERDAY, split)}
    fits[REFIT] = fitted(config, dataset, runs / "refit", split)
    warm = changed(config, warm_changes)
    fits[WARM] = fitted(warm, dataset, runs / "warm", split, runs / YESTERDAY)
    refit, started = fits[REFIT], fits[WARM]
    origin = open_run(runs / "warm").origin
    assert origin is not None, "it was started from yesterday's run"
    return {
        "setup": {
            "dataset": dataset.name,
            "rows": dataset.rows,
            "rows_yesterday": day_before.rows,
            "day_share": share,
            "split": split,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "warm_changes": warm_changes,
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "tables": origin["tables"],
        "runs": {
            name: {
                "epochs": fit.epochs,
                "steps": fit.steps,
                "wall_s": round(fit.wall_s, 2),
                "cpu_s": round(fit.cpu_s, 2),
                "start_recall": fit.start_recall,
                **fit.means,
            }
            for name, fit in fits.items()
        },
        "of_refit": {
            "wall": started.wall_s / refit.wall_s,
            "cpu": started.cpu_s / refit.cpu_s,
            **{metric: started.means[metric] / refit.means[metric] for metric in METRICS},
        },
    }


@click.command()
@click.option("--config", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Data set folder.")
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="Folder for the runs.")
@click.option(
    "--day-share",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the train interactions that yesterday's run does not have.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Of the refit; the configuration's.")
@click.option("--warm-epochs", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--warm-learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Peak rate of the warm run; that of the configuration.",
)
@click.option(
    "--warm-batch-size",
    type=click.IntRange(min=2),
    help="Of the warm run; that of the configuration. A smaller one gives a short run more steps.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures too.")
def main(
    config: Path,
    data: Path,
    runs: Path,
    day_share: float,
    epochs: int | None,
    warm_epochs: int,
    warm_learning_rate: float | None,
    warm_batch_size: int | None,
    seed: int,
    split: str,
    json_path: Path | None,
) -> None:
    """Compare a warm start after a day of new interactions with a full refit."""
    settings = load_config(config).training
    settings = changed(settings, {"epochs": epochs or settings.epochs, "seed": seed})
    warm_changes: dict[str, Any] = {"epochs": warm_epochs}
    if warm_learning_rate is not None:
        warm_changes["optimiser"] = {"learning_rate": warm_learning_rate}
    if warm_batch_size is not None:
        warm_changes["batch_size"] = warm_batch_size
    dataset = open_dataset(data)
    report = compare(settings, warm_changes, dataset, runs, share=day_share, split=split)
    rows = [
        (
            name,
            str(run["epochs"]),
            f"{run['wall_s']:.1f}",
            f"{run['cpu_s']:.1f}",
            *(f"{run[metric]:.4f}" for metric in METRICS),
        )
        for name, run in report["runs"].items()
    ]
    rows.append(
        (
            "warm / refit",
            "",
            *(f"{report['of_refit'][key]:.3f}" for key in ("wall", "cpu", *METRICS)),
        )
    )
    print_table(f"{dataset.name}, {split}", ("run", "epochs", "wall s", "CPU s", *METRICS), rows)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
