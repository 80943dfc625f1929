"""The published tables: our models under the published protocols, the published figures beside.

Protocol: the epoch is chosen on a validation split taken from train; then the model is fitted anew
on all of train for that many epochs, and test is looked at once. Every item is ranked but the
user's train items. Seeds give mean and deviation. The baselines stand in the same table.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cluster.config import load_config
from cluster.console import print_table
from shards.errors import ConfigError
from training.baselines import Baseline, evaluate_baseline
from training.config import TrainingConfig
from training.evaluate import evaluate_exact
from training.launch import train
from training.tables import Dataset, open_dataset

K = 20
METRICS = (f"recall@{K}", f"ndcg@{K}")


@dataclass(frozen=True, slots=True)
class Published:
    """Figures of somebody else: (Recall@20, NDCG@20), and where they stand."""

    name: str
    recall: float
    ndcg: float
    source: str


# Gowalla, LightGCN split, 64 dimensions, as the papers named report them; from notes made when the
# project began, not copied from the papers again.
GOWALLA = (
    Published("MF-BPR", 0.1627, 0.1378, "He et al., LightGCN, SIGIR 2020"),
    Published("LightGCN", 0.1820, 0.1547, "the same"),
    Published("MF softmax", 0.1759, 0.1395, "Wu et al., BSL, arXiv 2312.12882; stopped on test"),
    Published("MF-BSL", 0.1882, 0.1584, "the same; stopped on test"),
    Published("LightGCN-BSL", 0.189, 0.159, "the same; stopped on test"),
)
PUBLISHED = {"gowalla": GOWALLA}

Say = Callable[[str], None]


def run_seed(config: TrainingConfig, dataset: Dataset, folder: Path, say: Say) -> dict[str, Any]:
    """Validation chooses the epoch, a refit on train and val is measured on test."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "validation":
            say(json.dumps(event))

    chosen = train(config, dataset.path, folder / "select", on_event=on_event)
    if chosen.best_epoch is None:
        raise ConfigError("no validation split to choose on", hint="import the data with one")
    if chosen.best_epoch != config.epochs:
        say("note: the refit's schedule ends earlier than that of the run that was chosen")
    final = TrainingConfig.model_validate(
        config.model_dump() | {"fit_splits": "train+val", "epochs": chosen.best_epoch}
    )
    train(final, dataset.path, folder / "final")
    means = evaluate_exact(folder / "final", dataset, ks=(K,)).means
    return {
        "seed": config.seed,
        "epochs": chosen.best_epoch,
        "val": chosen.best_value,
        **{metric: means[metric] for metric in METRICS},
    }


def summary(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """``.1712 ± .0004``, without a deviation where there is one seed."""
    values = [row[metric] for row in rows]
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


@click.command()
@click.option("--config", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Imported data set.")
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="Folder for the runs.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures too.")
def main(config: Path, data: Path, runs: Path, seeds: int, json_path: Path | None) -> None:
    """Train with a configuration of bench/configs and print its row beside the published ones."""
    dataset = open_dataset(data)
    settings = load_config(config).training
    rows = []
    for seed in range(seeds):
        seeded = settings.model_copy(update={"seed": seed})
        rows.append(run_seed(seeded, dataset, runs / f"seed-{seed}", click.echo))
        click.echo(json.dumps(rows[-1]))
    name = config.stem
    table = [
        [f"ours, {len(rows)} seed(s)", *(summary(rows, metric) for metric in METRICS), str(config)]
    ]
    for baseline in Baseline:
        means = evaluate_baseline(baseline, dataset, split="test", ks=(K,)).means
        table.append([str(baseline), *(f"{means[metric]:.4f}" for metric in METRICS), "ours"])
    table += [
        [each.name, f"{each.recall:.4f}", f"{each.ndcg:.4f}", each.source]
        for each in PUBLISHED.get(name, ())
    ]
    print_table(f"{name}, test", ["model", *METRICS, "source"], table)
    if json_path is not None:
        json_path.write_text(json.dumps({"config": str(config), "seeds": rows}, indent=2))


if __name__ == "__main__":
    main()
