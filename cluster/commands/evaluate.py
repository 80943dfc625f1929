"""``evaluate``: metrics of a run or a cluster beside baselines and ceilings, also by segment."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from shardline.cluster.cli import Settings
from shardline.cluster.commands.address import address_of, key_file_option
from shardline.cluster.commands.budget import measure_budget, print_budget
from shardline.cluster.commands.model import data_option, default_run, run_option, unfinished_option
from shardline.cluster.commands.offline_search import OfflineGeneration, encoded_search
from shardline.cluster.commands.remote import evaluate_cluster
from shardline.cluster.commands.report import metric_rows, segment_rows
from shardline.cluster.console import StageProgress, print_table
from shardline.cluster.serving.endpoint import Address
from shardline.shards.core.errors import InvalidInput
from shardline.training.data.tables import Dataset, open_dataset
from shardline.training.evaluation.baselines import Baseline, evaluate_baseline
from shardline.training.evaluation.co_occurrence import evaluate_co_occurrence
from shardline.training.evaluation.cold import cold_baselines
from shardline.training.evaluation.evaluate import evaluate_exact, evaluate_through
from shardline.training.evaluation.ranking_metrics import DEFAULT_KS, MetricResult
from shardline.training.evaluation.user_queries import Candidates
from shardline.training.model.checkpoint import open_run

Columns = dict[str, MetricResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The users, items and cut-offs that all columns of one report are measured on."""

    dataset: Dataset
    split: str
    ks: tuple[int, ...]
    max_users: int | None
    with_segments: bool
    candidates: Candidates
    unfinished: bool
    other_data: bool
    without_own: bool  # nobody is shown themselves
    graded: bool  # weights of interactions are grades


@click.command()
@data_option
@run_option
@unfinished_option
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option(
    "--k", "ks", type=int, multiple=True, help="Cut-off, repeatable.  [default: 10 100 1000]"
)
@click.option("--url", help="Measure a running cluster instead, by the users' features.")
@click.option("--through-cluster", is_flag=True, help="Measure this store's cluster instead.")
@key_file_option
@click.option("--segments", is_flag=True, help="Also by item popularity and by new users.")
@click.option(
    "--candidates",
    type=click.Choice(["all", "cold"]),
    default="all",
    show_default=True,
    help="Rank all items, or only those without a train interaction.",
)
@click.option(
    "--budget", is_flag=True, help="Recall lost by the model and by the index, stage by stage."
)
@click.option(
    "--generation",
    type=int,
    help="Measure this generation's files instead; with --budget: of this one, not the live one.",
)
@click.option(
    "--without-own",
    is_flag=True,
    help="Do not show users the item of their own id; always so for a run of tied towers.",
)
@click.option(
    "--graded", is_flag=True, help="Also NDCG with 2^weight - 1 of the interactions' weights."
)
@click.option("--max-users", type=int, help="Measure only this many users.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def evaluate(
    settings: Settings,
    data: Path,
    run: Path | None,
    unfinished: bool,
    split: str,
    ks: tuple[int, ...],
    url: str | None,
    through_cluster: bool,
    key_file: Path | None,
    segments: bool,
    candidates: Candidates,
    budget: bool,
    generation: int | None,
    without_own: bool,
    graded: bool,
    max_users: int | None,
    as_json: bool,
) -> None:
    """Recall, MRR, NDCG and HitRate over the whole corpus, beside baselines and ceilings.

    With --run the run may have been trained on other data that has the same columns; what it
    learnt from may then be in the split it is measured on.

    Exact by default: every test user against every item except the user's known ones. With
    --url or --through-cluster the same users ask a running cluster, with --generation the indexes
    of that generation, in this process. --budget removes their approximations one by one.
    """
    through = bool(url or through_cluster)
    if generation is not None and not budget and (through or run is not None):
        raise InvalidInput(
            "a generation's files, a run, or a cluster", field="--generation", hint="choose one"
        )
    through_index = through or generation is not None
    _refuse_contradictions(budget, candidates, segments, through_index, unfinished)
    if graded and (budget or candidates == "cold"):
        raise InvalidInput(
            "--budget and --candidates cold have no graded metric", field="graded",
            hint="leave it out",
        )  # fmt: skip
    dataset = open_dataset(data)
    cutoffs = ks or DEFAULT_KS
    cluster = address_of(settings, url, key_file) if through else None
    if budget:
        with StageProgress() as progress:
            results = measure_budget(
                settings.store, dataset, split, cutoffs, progress,
                generation=generation, cluster=cluster, max_users=max_users,
                without_own=without_own,
            )  # fmt: skip
        print_budget(dataset, split, results, as_json=as_json)
        return
    subject: Address | Path | OfflineGeneration
    if generation is not None:
        subject = OfflineGeneration.open(settings.store, generation)
    else:
        subject = cluster or run or default_run(settings, data)
    is_tied = isinstance(subject, Path) and open_run(subject).config.towers.tied
    task = Task(
        dataset=dataset, split=split, ks=cutoffs, max_users=max_users,
        with_segments=segments, candidates=candidates, unfinished=unfinished,
        other_data=run is not None, without_own=without_own or is_tied, graded=graded,
    )  # fmt: skip
    with StageProgress() as progress:
        if isinstance(subject, Path):
            progress.note(f"run: {subject}")
        columns = measure(subject, task, progress) | measure_baselines(task, progress)
    # the ceilings are those of the whole test split, ranked as deep as the default cut-offs
    is_comparable = split == "test" and not ks and max_users is None and candidates == "all"
    ceilings = (dataset.ceilings or {}) if is_comparable else {}
    if as_json:
        click.echo(json.dumps(json_report(columns, ceilings), indent=2))
        return
    print_columns(dataset, split, columns, ceilings)


def measure(
    subject: Address | Path | OfflineGeneration, task: Task, progress: StageProgress
) -> Columns:
    """The measured column: of the cluster at an address, of a generation, or of a run's folder."""
    if isinstance(subject, OfflineGeneration):
        search = encoded_search(subject)
        found = evaluate_through(
            search,
            task.dataset,
            kinds=search.kinds,
            split=task.split,
            ks=task.ks,
            max_users=task.max_users,
            with_segments=task.with_segments,
            without_own=task.without_own,
            graded=task.graded,
            progress=progress,
        )
        return {f"generation {subject.manifest.generation}": found}
    if isinstance(subject, Address):
        with subject.client() as client:
            found = evaluate_cluster(
                client,
                task.dataset,
                task.split,
                task.ks,
                progress,
                max_users=task.max_users,
                with_segments=task.with_segments,
                without_own=task.without_own,
                graded=task.graded,
            )
        return {"cluster": found}
    found = evaluate_exact(
        subject,
        task.dataset,
        split=task.split,
        ks=task.ks,
        max_users=task.max_users,
        with_segments=task.with_segments,
        without_own=task.without_own,
        graded=task.graded,
        candidates=task.candidates,
        unfinished=task.unfinished,
        other_data=task.other_data,
        progress=progress,
    )
    return {"model": found}


def measure_baselines(task: Task, progress: StageProgress) -> Columns:
    """Popularity and SVD, of pairs of items co-occurrence too; or the baselines that exist for
    items without interactions."""
    if task.candidates == "cold":
        return cold_baselines(task.dataset, split=task.split, ks=task.ks, max_users=task.max_users)
    columns = {
        baseline.value: evaluate_baseline(
            baseline,
            task.dataset,
            split=task.split,
            ks=task.ks,
            max_users=task.max_users,
            with_segments=task.with_segments,
            without_own=task.without_own,
            graded=task.graded,
            progress=progress,
        )
        for baseline in Baseline
    }
    if task.dataset.item_to_item:
        columns["co-occurrence"] = evaluate_co_occurrence(
            task.dataset,
            split=task.split,
            ks=task.ks,
            max_users=task.max_users,
            with_segments=task.with_segments,
            graded=task.graded,
        )
    return columns


def print_columns(
    dataset: Dataset, split: str, columns: Columns, ceilings: Mapping[str, Any]
) -> None:
    """Prints the metrics of all columns, then one table per cut-off by segment, if asked for."""
    titles = {
        f"{name} ({column.about})" if column.about else name: column.means
        for name, column in columns.items()
    }
    first = next(iter(columns.values()))
    header, rows = metric_rows(titles, ceilings)
    print_table(f"{dataset.path.name}, {split} split, {first.users:,} users", header, rows)
    if first.segments:
        for metric in [n for n in first.means if n.startswith(("recall@", "ndcg@"))]:
            print_table(f"{metric} by segment", *segment_rows(columns, metric))


def json_report(columns: Columns, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """Means by column; with segments also users, relevant items and means of each."""
    report: dict[str, Any] = {name: column.means for name, column in columns.items()}
    report |= {"about": {n: c.about for n, c in columns.items() if c.about}, "ceilings": ceilings}
    if next(iter(columns.values())).segments:
        report["segments"] = {
            name: {
                segment: None
                if part is None
                else {"users": part.users, "relevant": part.relevant, **part.means}
                for segment, part in column.segments.items()
            }
            for name, column in columns.items()
        }
    return report


def _refuse_contradictions(
    budget: bool,
    candidates: str,
    segments: bool,
    through: bool,
    unfinished: bool,
) -> None:
    if unfinished and (budget or through):
        raise InvalidInput(
            "--unfinished is for a run; a generation says in its model's version what it is",
            field="unfinished",
            hint="leave out --budget, --generation, --url and --through-cluster",
        )  # fmt: skip
    if budget and (segments or candidates != "all"):
        raise InvalidInput("--budget ranks all items, whole", field="budget")
    if candidates == "cold" and (segments or through):
        raise InvalidInput(
            "cold candidates are ranked exactly, from a run", field="candidates",
            hint="leave out --segments, --generation, --url and --through-cluster",
        )  # fmt: skip
