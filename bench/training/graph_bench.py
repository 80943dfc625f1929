"""What a configuration gains from the interactions as features: audience, SVD start; on validation.

The arms are made from any configuration of ids: its item tower also reads the users of each item,
pooled as its query tower pools the items of each user, and the id tables begin at an SVD of the
interactions. Every arm has the same epochs, schedule and seed, and is measured after its last epoch
on the validation split; test is never looked at. The first arm is the configuration as it is. An
arm that does not pay stays in the table.

    audience                 a training row's own user is left out of the audience of its item
    audience, own user kept  the row reads what serving will read (``keep_target``)
    audience of 50, mean     bounded as by default
    SVD start                ``id_start: svd``
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from shardline.bench.training.published_tables import changed, measured, print_ablation
from shardline.cluster.config import load_config
from shardline.shards.core.errors import ConfigError
from shardline.training.config.tower_config import AudienceFeature, HistoryFeature, TowerConfig
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import Dataset, open_dataset

UNBOUNDED = 1000  # users per item; longer audiences than that are rare in the public data sets


def arms(config: TrainingConfig) -> dict[str, TrainingConfig]:
    """Name -> configuration; its features must be named.

    Raises:
        ConfigError: features are left to be inferred, or the item tower has an audience already.
    """
    towers = config.towers
    if towers.query.features is None or towers.item.features is None:
        raise ConfigError("features are not named", field="training.towers", expected="features")
    if towers.item.audience is not None or config.id_start != "random":
        raise ConfigError(
            "the configuration has an ingredient that is to be added",
            field="training.towers.item.features, training.id_start",
            expected="no audience, and random",
        )
    history = (f for f in towers.query.features if isinstance(f, HistoryFeature))
    pooling = next((feature.pooling for feature in history), "mean")
    wide = {"pooling": pooling, "max_length": UNBOUNDED}
    left_out = AudienceFeature.model_validate(wide)
    found = {
        "as it is": config,
        "audience": with_audience(config, left_out),
        "audience of 50, mean": with_audience(config, AudienceFeature()),
        "SVD start": changed(config, {"id_start": "svd"}),
        "audience, SVD start": changed(with_audience(config, left_out), {"id_start": "svd"}),
    }
    if pooling != "attention":
        found["audience, own user kept"] = with_audience(
            config, AudienceFeature.model_validate(wide | {"keep_target": True})
        )
    return found


def with_audience(config: TrainingConfig, feature: AudienceFeature) -> TrainingConfig:
    """The configuration with one more feature of the item tower."""
    item: TowerConfig = config.towers.item
    features = [each.model_dump() for each in (*(item.features or ()), feature)]
    return changed(config, {"towers": {"item": {"features": features}}})


def compare(
    config: TrainingConfig, dataset: Dataset, folder: Path, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A row per arm, in order: Recall@20 and NDCG@20 on validation, CPU seconds; ``only`` these."""
    variants = arms(config)
    unknown = set(only) - variants.keys()
    if unknown:
        raise ConfigError(
            "no such arm", field="--arm", expected=", ".join(variants), got=", ".join(unknown)
        )
    rows = []
    for place, (name, variant) in enumerate(variants.items()):
        if not only or name in only:
            figures = measured(variant, dataset, folder / str(place), "val", lambda line: None)
            rows.append({"change": name, "epochs": variant.epochs, **figures})
            click.echo(json.dumps(rows[-1]))
    return rows


@click.command()
@click.option("--config", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Imported data set.")
@click.option("--epochs", type=click.IntRange(min=1), help="Instead of the configuration's.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--arm", "only", multiple=True, help="Of the arms only these.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures too.")
def main(
    config: Path,
    data: Path,
    epochs: int | None,
    seed: int,
    only: tuple[str, ...],
    json_path: Path | None,
) -> None:
    """Train a configuration with and without its interactions as features, and print the table."""
    dataset = open_dataset(data)
    if not len(dataset.positives("val").items):
        raise ConfigError("no validation split to measure on", hint="import the data with one")
    settings = load_config(config).training
    settings = changed(settings, {"epochs": epochs or settings.epochs, "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(settings, dataset, Path(folder), only)
    print_ablation(f"{config.stem}, validation, seed {seed}", rows)
    if json_path is not None:
        json_path.write_text(json.dumps({"config": str(config), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
