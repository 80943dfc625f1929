"""``train``, ``evaluate``, ``export``: the model's part of the main job."""

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from cluster.cli import Settings
from cluster.commands.report import metric_rows
from cluster.config import ShardlineConfig
from cluster.console import StageProgress, print_table
from cluster.endpoint import find_endpoint
from cluster.launch import cores, ray_for
from router.client import Client
from shards.errors import InvalidInput
from shards.schema import IdArray
from shards.types import SearchParams
from training.baselines import Baseline, evaluate_baseline
from training.evaluate import evaluate_exact, evaluate_through
from training.export import export as export_embeddings
from training.launch import TrainResult
from training.launch import train as train_model
from training.metrics import DEFAULT_KS, MetricResult
from training.tables import Dataset, open_dataset

EVALUATION_TIMEOUT_MS = 10_000.0  # a batch of deep queries over a flat corpus takes its time

data_option = click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Folder of the data set."
)
run_option = click.option(
    "--run",
    type=click.Path(path_type=Path),
    help="Folder of the run.  [default: <store>/runs/<name of the data set's folder>]",
)


@click.command()
@data_option
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    help="Folder to write.  [default: <store>/runs/<name of the data set's folder>]",
)
@click.option("--workers", type=int, help="Short for --set training.num_workers=N.")
@click.option("--epochs", type=int, help="Short for --set training.epochs=N.")
@click.option("--resume", is_flag=True, help="Go on from the run's newest checkpoint.")
@click.pass_obj
def train(
    settings: Settings,
    data: Path,
    run: Path | None,
    workers: int | None,
    epochs: int | None,
    resume: bool,
) -> None:
    """Train the two towers, data-parallel, with negatives gathered from every rank."""
    for key, value in (("num_workers", workers), ("epochs", epochs)):
        if value is not None:
            settings.extra_overrides.append(f"training.{key}={value}")
    run = run or default_run(settings, data)
    config = settings.config
    with StageProgress() as progress, ray_for_training(config, verbose=settings.verbose):
        result = train_with_progress(config, data, run, progress, resume=resume)
    click.echo(describe_run(result))


@click.command()
@data_option
@run_option
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option(
    "--k", "ks", type=int, multiple=True, help="Cut-off, repeatable.  [default: 10 100 1000]"
)
@click.option("--url", help="Measure a running cluster instead, by the users' features.")
@click.option("--through-cluster", is_flag=True, help="The same, for this store's cluster.")
@click.option("--max-users", type=int, help="Only so many users, for a quick look.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def evaluate(
    settings: Settings,
    data: Path,
    run: Path | None,
    split: str,
    ks: tuple[int, ...],
    url: str | None,
    through_cluster: bool,
    max_users: int | None,
    as_json: bool,
) -> None:
    """Recall, MRR, NDCG and HitRate over the whole corpus, beside baselines and ceilings.

    Exact by default: every test user against every item, the items known before left out. With
    --url or --through-cluster the same users ask a running cluster.
    """
    dataset = open_dataset(data)
    cutoffs = ks or DEFAULT_KS
    columns: dict[str, MetricResult] = {}
    with StageProgress() as progress:
        if url or through_cluster:
            with Client(url or find_endpoint(settings.store).url) as client:
                columns["cluster"] = evaluate_cluster(
                    client, dataset, split, cutoffs, progress, max_users=max_users
                )
        else:
            folder = run or default_run(settings, data)
            columns["model"] = evaluate_exact(
                folder,
                dataset,
                split=split,
                ks=cutoffs,
                max_users=max_users,
                progress=progress,
            )
        for baseline in Baseline:
            columns[baseline.value] = evaluate_baseline(
                baseline,
                dataset,
                split=split,
                ks=cutoffs,
                max_users=max_users,
                progress=progress,
            )
    # the ceilings are those of the whole test split, ranked as deep as the default cut-offs
    is_comparable = split == "test" and not ks and max_users is None
    ceilings = (dataset.ceilings or {}) if is_comparable else {}
    if as_json:
        report: dict[str, Any] = {name: result.means for name, result in columns.items()}
        click.echo(json.dumps(report | {"ceilings": ceilings}, indent=2))
        return
    users = next(iter(columns.values())).users
    header, rows = metric_rows({name: r.means for name, r in columns.items()}, ceilings)
    print_table(f"{dataset.name}, {split} split, {users:,} users", header, rows)


@click.command()
@data_option
@run_option
@click.pass_obj
def export(settings: Settings, data: Path, run: Path | None) -> None:
    """Write the embeddings of all items, and the query encoder, as an embedding set."""
    with StageProgress() as progress:
        embeddings = export_embeddings(
            run or default_run(settings, data),
            data,
            settings.store.root,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            progress=progress,
        )
    click.echo(
        f"{embeddings.folder}: {embeddings.rows:,} items x {embeddings.dim}, "
        f"model {embeddings.model_version}"
    )


def default_run(settings: Settings, data: Path) -> Path:
    """Where a data set's model is trained to, and looked for."""
    return settings.store.runs / data.resolve().name


def ray_for_training(
    config: ShardlineConfig, *, verbose: bool
) -> contextlib.AbstractContextManager[object]:
    """Ray for several ranks; nothing for one, which trains in this process."""
    workers = config.training.num_workers
    if workers == 1:
        return contextlib.nullcontext()
    num_cpus = max(cores(), workers + 1)
    return ray_for(config.cluster.address, num_cpus=num_cpus, verbose=verbose)


def train_with_progress(
    config: ShardlineConfig, data: Path, run: Path, progress: StageProgress, *, resume: bool
) -> TrainResult:
    """Trains a run, turning the lines of its log into a bar and a line per validation."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            progress("train", event["step"], event["total_steps"])
            progress.detail(
                f"epoch {event['epoch']}  loss {event['loss']:.3f}  "
                f"in-batch accuracy {event['in_batch_accuracy']:.3f}  "
                f"{event['examples_per_s']:,.0f} examples/s"
            )
        elif event["event"] == "validation":
            recall = next(name for name in event if name.startswith("recall@"))
            progress.note(f"epoch {event['epoch']}: validation {recall} {event[recall]:.4f}")

    return train_model(config.training, data, run, on_event=on_event, resume=resume)


def evaluate_cluster(
    client: Client,
    dataset: Dataset,
    split: str,
    ks: tuple[int, ...],
    progress: StageProgress,
    *,
    max_users: int | None = None,
    params: SearchParams | None = None,
) -> MetricResult:
    """The metrics of a running cluster's answers to the users' features, over HTTP."""

    def search(features: list[dict[str, Any]], k: int) -> IdArray:
        answer = client.search(
            features=features,
            k=k,
            params=params,
            min_coverage=1.0,
            timeout_ms=EVALUATION_TIMEOUT_MS,
        )
        return answer.ids

    return evaluate_through(
        search,
        dataset,
        kinds=encoder_kinds(client),
        split=split,
        ks=ks,
        max_users=max_users,
        progress=progress,
    )


def encoder_kinds(client: Client) -> dict[str, str]:
    """Name and kind of the features that a cluster's query encoder takes.

    Raises:
        InvalidInput: it serves imported vectors and has no encoder.
    """
    encoder = client.status()["encoder"]
    if encoder is None:
        raise InvalidInput("this cluster serves imported vectors: it has no query encoder")
    return {feature["name"]: feature["kind"] for feature in encoder["features"]}


def describe_run(result: TrainResult) -> str:
    """Where the run lies and what was kept, in one line."""
    best = (
        f"best validation recall {result.best_value:.4f} after epoch {result.best_epoch}"
        if result.best_value is not None
        else "no validation split, the last epoch is kept"
    )
    return f"{result.run_folder}: {result.epochs} epochs, {result.steps} steps, {best}"
