"""Recall against batch size, temperature, and kinds of negatives: one setting changes at a time.

Theory. In-batch negatives are the items of a step's other rows, so a batch of B gives each row
B - 1 of them, and the estimate of the full softmax gets better with B. Two tables tell this apart
from the number of updates: at fixed epochs a larger batch takes fewer steps over the same
examples; at fixed steps it sees more examples. The learning rate is the configuration's in every
row, and the warm-up at most a tenth of a run's steps, so that a run of few steps reaches its peak
rate at all. The temperature is held at each value, and learned in the last row. The strategies are
those of ``shardline bench mining``, with one table of negatives that the in-batch model of the
first seed mines by exact search; its own training is not counted as theirs.

A run is measured once, after its last epoch. Beside the rows stand popularity and, on the test
split of synthetic data, the best estimate (``training.synthetic.ceilings``).

    shardline data synth --preset sharp --out data/sharp
    python -m shardline.bench.training.recall_tables temperature --data data/sharp --runs runs/t
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from pydantic import ValidationError

from shardline.bench.training.variants import BASELINE, KS, STRATEGIES, trained, variant
from shardline.cluster.commands.bench_options import json_option
from shardline.cluster.commands.mine import mine_run
from shardline.cluster.config import load_config
from shardline.cluster.console import print_table
from shardline.shards.core.errors import ConfigError, ShardlineError
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import Dataset, open_dataset
from shardline.training.evaluation.baselines import Baseline, evaluate_baseline
from shardline.training.features.prepared import train_lists
from shardline.training.loop.launch import train
from shardline.training.mining.hard_negatives import Origin, write_negatives

BATCH_SIZES = (256, 1024, 4096, 16_384)
TEMPERATURES = (0.02, 0.05, 0.1, 0.2)
WARM_UP_SHARE = 10  # one in so many steps, at most
CREATED_AT = "2026-01-01T00:00:00+00:00"  # the same inputs give the same files


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its name, and what it changes in the run and in the loss."""

    name: str
    run: dict[str, int] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What all rows of a table share; ``examples`` are the interactions that they train on."""

    training: TrainingConfig
    dataset: Dataset
    examples: int
    runs: Path
    seeds: tuple[int, ...]
    split: str
    json_path: Path | None

    @property
    def ks(self) -> tuple[int, ...]:
        """Those of KS that the catalogue has; all of it where it is smaller."""
        items = self.dataset.rows["items"]
        return tuple(k for k in KS if k <= items) or (items,)


def of_batch_sizes(
    sizes: Sequence[int], examples: int, *, epochs: int, steps: int | None
) -> list[Row]:
    """A row per size: of ``epochs`` epochs, or of the epochs that come nearest to ``steps`` steps.

    Raises:
        ConfigError: a size beyond the examples, or steps that are less than one of its epochs.
    """
    rows = []
    for size in sizes:
        per_epoch = examples // size
        if not per_epoch:
            raise ConfigError(
                "a batch larger than the data",
                field="batch-size",
                expected=f"at most {examples}, the training examples",
                got=str(size),
            )
        if steps is not None and steps < per_epoch:
            raise ConfigError(
                "fewer steps than one epoch has",
                field="steps",
                expected=f"at least {per_epoch}, one epoch of batch size {size}",
                got=str(steps),
                hint="more steps, or larger batches: runs end with whole epochs",
            )
        passes = epochs if steps is None else round(steps / per_epoch)
        rows.append(Row(f"{size:,}", {"batch_size": size, "epochs": passes}))
    return rows


def of_temperatures(temperatures: Sequence[float], training: TrainingConfig) -> list[Row]:
    """A row per temperature, held, and one that learns it from the configuration's."""
    held = [
        Row(f"{each:g}", loss={"temperature": each, "learn_temperature": False})
        for each in temperatures
    ]
    start = training.loss.temperature
    return [*held, Row(f"learned, from {start:g}", loss={"learn_temperature": True})]


def settings_of(row: Row, training: TrainingConfig, examples: int, seed: int) -> TrainingConfig:
    """The configuration of one run. Raises pydantic's ValidationError: a loss that cannot be."""
    training = training.model_copy(update=row.run)
    steps = examples // training.batch_size * training.epochs
    warm_up = min(training.optimiser.warmup_steps, steps // WARM_UP_SHARE)
    once = training.validation.model_copy(update={"every_epochs": training.epochs})
    optimiser = training.optimiser.model_copy(update={"warmup_steps": warm_up})
    settings = training.model_copy(update={"validation": once, "optimiser": optimiser})
    return variant(settings, row.loss, seed)


def compare(common: Common, rows: Sequence[Row], table: Path | None = None) -> list[dict[str, Any]]:
    """Trains every row with every seed: name, seed, epochs, steps, examples, seconds, recall@k.

    examples are what all steps of the run have seen. table: mined negatives.
    """
    # every configuration is checked before the first one trains
    plan = [
        (number, row, settings_of(row, common.training, common.examples, seed))
        for number, row in enumerate(rows)
        for seed in common.seeds
    ]
    results = []
    for number, row, settings in plan:
        folder = common.runs / f"{number}-{settings.seed}"
        figures = trained(settings, common.dataset, folder, table, split=common.split, ks=common.ks)
        seen = figures["steps"] * settings.batch_size
        about = {"name": row.name, "seed": settings.seed, "epochs": settings.epochs}
        results.append(about | {"examples": seen} | figures)
        click.echo(json.dumps(results[-1]), err=True)
    return results


def mined_table(common: Common) -> Path:
    """A table of negatives, mined exactly by the in-batch model of the first seed."""
    base, seed = common.runs / "base", common.seeds[0]
    settings = settings_of(Row(BASELINE), common.training, common.examples, seed)
    train(settings, common.dataset.path, base)
    mined, report = mine_run(base, common.dataset, common.training.mining, 0, cluster=None)
    origin = Origin(
        model_version=report.model_version,
        fit_splits=report.fit_splits,
        generation=None,
        config=common.training.mining,
        seed=0,
        created_at=CREATED_AT,
    )
    table = common.runs / "hard-negatives"
    write_negatives(table, mined, common.dataset, origin)
    return table


def report(common: Common, title: str, results: list[dict[str, Any]]) -> None:
    """The table, with popularity and the best estimate where it is known; then JSON."""
    names = [f"recall@{k}" for k in common.ks]
    baseline, split = Baseline.POPULARITY, common.split
    popular = evaluate_baseline(baseline, common.dataset, split=split, ks=common.ks)
    ceilings = (common.dataset.ceilings or {}) if split == "test" else {}
    best = ceilings.get("best_estimate", {}).get("means", {})
    lines = []
    for name in dict.fromkeys(each["name"] for each in results):
        runs = [each for each in results if each["name"] == name]
        first = runs[0]
        counts = [f"{first[key]:,}" for key in ("epochs", "steps", "examples")]
        seconds = f"{np.mean([each['seconds'] for each in runs]):.0f}"
        lines.append([name, *counts, *(_spread(runs, each) for each in names), seconds])
    empty = ["", "", ""]
    lines.append(["popularity", *empty, *(f"{popular.means[each]:.4f}" for each in names), ""])
    if best:
        lines.append(["best estimate", *empty, *(f"{best[each]:.4f}" for each in names), ""])
    title = f"{title}, {common.dataset.name}, {split}, {len(common.seeds)} seed(s)"
    print_table(title, ["", "epochs", "steps", "examples seen", *names, "s"], lines)
    figures = {
        "title": title,
        "rows": common.dataset.rows,
        "examples": common.examples,
        "training": common.training.model_dump(mode="json"),
        "results": results,
        "popularity": {each: popular.means[each] for each in names},
        "best_estimate": {each: best[each] for each in names} if best else None,
    }
    text = json.dumps(figures, indent=2)
    if common.json_path is not None:
        common.json_path.write_text(text + "\n")
    click.echo(text)


def _spread(runs: Sequence[dict[str, Any]], name: str) -> str:
    values = [each[name] for each in runs]
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.4f}"


class Commands(click.Group):
    """Says what is wrong with a setting or with the data in one line, as `shardline` does."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ShardlineError, ValidationError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands)
@click.option(
    "--config", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Whose section `training` all rows share; without it, the defaults.",
)  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Data set folder.")
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="New folder for runs.")
@click.option("--epochs", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True)
@click.option(
    "--split", type=click.Choice(["val", "test"]), default="val", show_default=True,
    help="What is measured; test for synthetic data, whose ceilings are of test.",
)  # fmt: skip
@json_option
@click.pass_context
def main(
    context: click.Context,
    /,
    config: Path | None,
    data: Path,
    runs: Path,
    epochs: int,
    seeds: tuple[int, ...],
    split: str,
    json_path: Path | None,
) -> None:
    """Recall against one setting of training; prints a table, then JSON."""
    training = load_config(config).training.model_copy(update={"epochs": epochs})
    if training.num_workers != 1:
        raise ConfigError(
            "several ranks",
            field="training.num_workers",
            expected="1: these runs train in this process",
            got=str(training.num_workers),
        )
    if runs.exists():
        raise ConfigError(f"{runs}: exists already", hint="--runs names a new folder")
    dataset = open_dataset(data)
    if not len(dataset.positives(split).items):
        raise ConfigError("nothing to measure", field="split", expected=f"items in {split}")
    context.obj = Common(
        training=training,
        dataset=dataset,
        examples=len(train_lists(dataset, training.fitted_splits).items),
        runs=runs,
        seeds=tuple(dict.fromkeys(seeds)),
        split=split,
        json_path=json_path,
    )


@main.command("batch-size")
@click.option(
    "--batch-size", "sizes", type=click.IntRange(2, 1 << 20), multiple=True, default=BATCH_SIZES,
    show_default=True, help="Repeat it for several.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(min=1),
    help="Steps of every run, in whole epochs, instead of the same epochs.",
)  # fmt: skip
@click.pass_obj
def batch_size(common: Common, sizes: tuple[int, ...], steps: int | None) -> None:
    """At fixed epochs, or with --steps at fixed steps."""
    epochs = common.training.epochs
    rows = of_batch_sizes(sizes, common.examples, epochs=epochs, steps=steps)
    fixed = f"{epochs} epochs" if steps is None else f"about {steps} steps"
    report(common, f"batch size, {fixed}", compare(common, rows))


@main.command()
@click.option(
    "--temperature", "temperatures", multiple=True, default=TEMPERATURES, show_default=True,
    type=click.FloatRange(0.01, 1.0), help="Repeat it for several.",
)  # fmt: skip
@click.pass_obj
def temperature(common: Common, temperatures: tuple[float, ...]) -> None:
    """Held at each value, then learned."""
    report(common, "temperature", compare(common, of_temperatures(temperatures, common.training)))


@main.command()
@click.option(
    "--strategy", "names", type=click.Choice(list(STRATEGIES)), multiple=True,
    help="Repeat it for several.  [default: all]",
)  # fmt: skip
@click.pass_obj
def negatives(common: Common, names: tuple[str, ...]) -> None:
    """In-batch, hardest in batch, mined, and mixtures, at equal steps."""
    rows = [Row(name, loss=STRATEGIES[name]) for name in names or STRATEGIES]
    mined = any(_needs_mined(common, row) for row in rows)
    table = mined_table(common) if mined else None
    report(common, "negatives", compare(common, rows, table))


def _needs_mined(common: Common, row: Row) -> bool:
    return settings_of(row, common.training, common.examples, 0).loss.hard_negatives > 0


if __name__ == "__main__":
    main()
