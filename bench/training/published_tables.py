"""The published tables: our models under the published protocols, the published figures beside.

Protocol: everything about a configuration, its number of epochs too, was chosen on validation
before. A run on train is measured on the validation split; then the model is fitted anew on train
and validation together, for the same epochs with the same schedule, and test is looked at once.
Every item is ranked but the user's train items. Seeds give mean and deviation; CPU seconds are
those of the refit, of all threads. The baselines stand in the same table.

``--ablate`` takes named changes of the configuration instead, one at a time, and measures each on
validation; it never looks at test. Figures of others stand beside Gowalla alone: for the ua split
of MovieLens 100k with these metrics we know of none whose protocol is ours.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from shardline.cluster.config import load_config
from shardline.cluster.console import print_table
from shardline.shards.core.errors import ConfigError
from shardline.shards.core.small_files import MAX_TEXT_BYTES, read_small
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import Dataset, open_dataset
from shardline.training.evaluation.baselines import Baseline, evaluate_baseline
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.loop.launch import train

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
    """Figures on validation of a fit on train, and on test of a fit on both."""
    on_val = measured(config, dataset, folder / "select", "val", say)
    refit = changed(config, {"fit_splits": "train+val"})
    on_test = measured(refit, dataset, folder / "final", "test", say)
    return {
        "seed": config.seed,
        "epochs": config.epochs,
        "val": {metric: on_val[metric] for metric in METRICS},
        "cpu_s": on_test["cpu_s"],
        **{metric: on_test[metric] for metric in METRICS},
    }


def measured(
    config: TrainingConfig, dataset: Dataset, folder: Path, split: str, say: Say
) -> dict[str, float]:
    """Trains to the last epoch and measures the model it ends with; METRICS and cpu_s."""
    # one validation, at the end: an earlier epoch can then not be the one that is kept
    last = {"every_epochs": config.epochs}
    config = changed(config, {"validation": last, "log_every_steps": 100})

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            say(json.dumps({name: event[name] for name in ("epoch", "step", "loss")}))

    began = time.process_time()
    train(config, dataset.path, folder, on_event=on_event)
    seconds = time.process_time() - began
    means = evaluate_exact(folder, dataset, split=split, ks=(K,)).means
    return {"cpu_s": seconds, **{metric: means[metric] for metric in METRICS}}


def changed(config: TrainingConfig, changes: dict[str, Any]) -> TrainingConfig:
    """The configuration with some settings replaced, lists as a whole."""
    return TrainingConfig.model_validate(_merged(config.model_dump(), changes))


def _merged(settings: Any, changes: Any) -> Any:
    if not isinstance(settings, dict) or not isinstance(changes, dict):
        return changes
    common = settings.keys() & changes.keys()
    return settings | changes | {name: _merged(settings[name], changes[name]) for name in common}


def read_changes(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> settings to replace, in the order of the file.

    Raises:
        ConfigError: not a mapping of mappings.
    """
    content = yaml.safe_load(read_small(path, MAX_TEXT_BYTES))
    if not isinstance(content, dict) or not all(isinstance(c, dict) for c in content.values()):
        raise ConfigError(
            "not a table of changes", field=str(path), expected="name: {setting: value, ...}, ..."
        )
    return content


def ablate(
    config: TrainingConfig,
    dataset: Dataset,
    folder: Path,
    changes: dict[str, dict[str, Any]],
    say: Say,
) -> list[dict[str, Any]]:
    """Each change alone, on validation; the first row is the configuration as it is."""
    rows = []
    # every configuration is checked before the first one trains
    variants = {name: changed(config, change) for name, change in changes.items()}
    for place, (name, variant) in enumerate({"as it is": config, **variants}.items()):
        figures = measured(variant, dataset, folder / str(place), "val", lambda line: None)
        rows.append({"change": name, "epochs": variant.epochs, **figures})
        say(json.dumps(rows[-1]))
    return rows


def summary(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """``.1712 ± .0004``, without a deviation where there is one seed."""
    values = [row[metric] for row in rows]
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


@click.command()
@click.option("--config", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Imported data set.")
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="Folder for the runs.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), help="Instead of the configuration's.")
@click.option("--baselines/--no-baselines", default=True, show_default=True)
@click.option("--ablate", "changes", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures too.")
def main(
    config: Path,
    data: Path,
    runs: Path,
    seeds: tuple[int, ...],
    epochs: int | None,
    baselines: bool,
    changes: Path | None,
    json_path: Path | None,
) -> None:
    """Train with a configuration of bench/configs and print its row beside the published ones."""
    dataset = open_dataset(data)
    if not len(dataset.positives("val").items):
        raise ConfigError("no validation split to measure on", hint="import the data with one")
    settings = load_config(config).training
    settings = changed(settings, {"epochs": epochs or settings.epochs})
    if changes is not None:
        settings = changed(settings, {"seed": seeds[0]})
        rows = ablate(settings, dataset, runs, read_changes(changes), click.echo)
        print_ablation(f"{config.stem}, validation, seed {seeds[0]}", rows)
    else:
        rows = []
        for seed in seeds:
            seeded = changed(settings, {"seed": seed})
            rows.append(run_seed(seeded, dataset, runs / f"seed-{seed}", click.echo))
            click.echo(json.dumps(rows[-1]))
        print_results(config, dataset, rows, baselines=baselines)
    if json_path is not None:
        json_path.write_text(json.dumps({"config": str(config), "rows": rows}, indent=2))


def print_results(
    config: Path, dataset: Dataset, rows: Sequence[dict[str, Any]], *, baselines: bool
) -> None:
    val = [row["val"] for row in rows]
    name, place = f"ours, {len(rows)} seed(s)", str(config)
    table = [
        [f"{name}, val", *(summary(val, metric) for metric in METRICS), "-", place],
        [
            f"{name}, test",
            *(summary(rows, metric) for metric in METRICS),
            f"{statistics.mean(row['cpu_s'] for row in rows):.0f}",
            place,
        ],
    ]
    for baseline in Baseline if baselines else ():
        means = evaluate_baseline(baseline, dataset, split="test", ks=(K,)).means
        table.append([str(baseline), *(f"{means[metric]:.4f}" for metric in METRICS), "-", "ours"])
    table += [
        [each.name, f"{each.recall:.4f}", f"{each.ndcg:.4f}", "-", each.source]
        for each in PUBLISHED.get(config.stem, ())
    ]
    print_table(f"{config.stem}, test", ["model", *METRICS, "CPU s", "source"], table)


def print_ablation(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = [
        [row["change"], *(f"{row[metric]:.4f}" for metric in METRICS), f"{row['cpu_s']:.0f}"]
        for row in rows
    ]
    print_table(f"{title}, {rows[0]['epochs']} epochs", ["change", *METRICS, "CPU s"], table)


if __name__ == "__main__":
    main()
