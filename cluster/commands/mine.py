"""``mine``: hard negatives for the next training, found by a running cluster or in this process."""

import json
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from shardline.cluster.cli import Settings
from shardline.cluster.commands.address import address_of, key_file_option
from shardline.cluster.commands.model import data_option, default_run, run_option, unfinished_option
from shardline.cluster.commands.offline_search import open_search
from shardline.cluster.console import StageProgress
from shardline.cluster.serving.endpoint import Address
from shardline.cluster.store import Store
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import EMPTY_ID
from shardline.training.config.training_config import MiningConfig
from shardline.training.data.tables import Dataset, open_dataset
from shardline.training.evaluation.searchers import ExactSearch, open_cluster
from shardline.training.export import model_version
from shardline.training.mining.candidates import Mined
from shardline.training.mining.hard_negatives import Origin, check_target, write_negatives
from shardline.training.mining.miner import build_miner, mine_table
from shardline.training.model.checkpoint import check_dataset, load_best, open_data
from shardline.training.model.popularity import lengths_of


@dataclass(frozen=True, slots=True, kw_only=True)
class MiningReport:
    """Result of mining. An example is one user: embedded, searched, filtered, sampled.

    seconds and examples_per_s exclude loading and, with exact search, embedding the items.
    generation is None for exact search in this process.
    """

    examples: int
    negatives: int
    starved: int
    starved_share: float
    seconds: float
    examples_per_s: float
    model_version: str
    fit_splits: str
    generation: int | None


@click.command()
@data_option
@run_option
@unfinished_option
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write, for train."
)
@click.option("--url", help="Search a running cluster, which must serve this run's model.")
@click.option("--through-cluster", is_flag=True, help="Search this store's cluster.")
@key_file_option
@click.option("--generation", type=int, help="Search a generation's files in this process.")
@click.option("--per-user", type=int, help="Negatives per user; fewer: starved.  [default: 10]")
@click.option("--range-min", type=int, help="First rank used, without known items.  [default: 1]")
@click.option("--range-max", type=int, help="Last rank used.  [default: 100]")
@click.option("--margin", type=float, help="Share below the known items' score.  [default: 0.05]")
@click.option(
    "--reference",
    type=click.Choice(["lowest", "mean", "highest"]),
    help="Which score of a user's known items.  [default: mean]",
)
@click.option("--drop-val", is_flag=True, default=None, help="Never mine validation items.")
@click.option("--seed", default=0, show_default=True, help="Of the sample.")
@click.option("--overwrite", is_flag=True, help="Replace a table that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def mine(
    settings: Settings,
    /,
    data: Path,
    run: Path | None,
    unfinished: bool,
    out: Path,
    url: str | None,
    through_cluster: bool,
    key_file: Path | None,
    generation: int | None,
    seed: int,
    overwrite: bool,
    as_json: bool,
    **rules: Any,
) -> None:
    """Find hard negatives for every training user, for `train --hard`.

    The users are embedded by the run's best model and the nearest items searched: exactly in this
    process, with --generation by that generation's indexes, or with --url or --through-cluster by a
    running cluster. Known items, ranks outside the window and items too close to the known ones are
    dropped; of the rest a few are drawn.
    """
    if generation is not None and (url or through_cluster):
        raise InvalidInput(
            "a generation's files, or a cluster", field="--generation", hint="choose one"
        )
    for name, value in rules.items():
        if value is not None:
            settings.extra_overrides.append(f"training.mining.{name}={value}")
    config = settings.config.training.mining
    check_target(out, overwrite=overwrite)
    dataset, folder = open_dataset(data), run or default_run(settings, data)
    cluster = address_of(settings, url, key_file) if url or through_cluster else None
    files = None if generation is None else (settings.store, generation)
    with StageProgress() as progress:
        mined, report = mine_run(
            folder, dataset, config, seed,
            cluster=cluster, files=files, unfinished=unfinished, progress=progress,
        )  # fmt: skip
    origin = Origin(
        model_version=report.model_version,
        fit_splits=report.fit_splits,
        generation=report.generation,
        config=config,
        seed=seed,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_negatives(out, mined, dataset, origin, overwrite=overwrite)
    click.echo(json.dumps(asdict(report), indent=2) if as_json else f"{out}: {describe(report)}")


def mine_run(
    run_folder: Path,
    dataset: Dataset,
    config: MiningConfig,
    seed: int,
    *,
    cluster: Address | None,
    files: tuple[Store, int] | None = None,
    unfinished: bool = False,
    progress: Progress | None = None,
) -> tuple[Mined, MiningReport]:
    """All training users of a run's best model: by a cluster, by the generation of a store whose
    ``files`` are searched here, or, where both are None, exactly here.

    Raises:
        NotFound: no trained run. CorruptFile: its prepared data is not as it was written.
        DataError: the run was trained on another dataset, or has not ended and ``unfinished`` is
            not set.
        VersionMismatch: the cluster serves another model. Unavailable: it does not answer.
    """
    run, model = load_best(run_folder, unfinished=unfinished)
    check_dataset(run_folder, dataset.identity)
    version = model_version(run, model, dataset)
    miner = build_miner(model, open_data(run_folder), config, seed)
    # ranked as the exported vectors are, which a cluster serves
    lengths = lengths_of(dataset, run.config.fitted_splits, run.config.popularity_exponent)
    miner = replace(miner, item_vectors=miner.item_vectors * lengths[:, None])
    generation: int | None = None
    started = time.perf_counter()
    if files is not None:
        offline = open_search(*files, dataset.item_ids, version)
        started = time.perf_counter()  # loading is left out
        mined, generation = mine_table(offline, miner, progress), files[1]
    elif cluster is None:
        mined = mine_table(ExactSearch(miner.item_vectors), miner, progress)
    else:
        with cluster.client() as client:
            search = open_cluster(client, dataset.item_ids, version)
            mined, generation = mine_table(search, miner, progress), search.generation
    seconds = time.perf_counter() - started
    return mined, MiningReport(
        examples=len(mined.users),
        negatives=int((mined.items != EMPTY_ID).sum()),
        starved=mined.starved,
        starved_share=mined.starved_share,
        seconds=seconds,
        examples_per_s=len(mined.users) / seconds,
        model_version=version,
        fit_splits=run.config.fit_splits,
        generation=generation,
    )


def describe(report: MiningReport) -> str:
    """The report in one line."""
    by = "exact search" if report.generation is None else f"generation {report.generation}"
    return (
        f"{report.negatives:,} hard negatives of {report.examples:,} users, "
        f"{report.starved_share:.1%} starved, {report.examples_per_s:,.0f} examples/s "
        f"by {by}, model {report.model_version}"
    )
