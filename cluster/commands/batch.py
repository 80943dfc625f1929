"""``batch``: many queries answered at once, from a generation's files or by a live cluster."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from shardline.cluster.batch.batch_job import Wanted, checked_wanted, job_of
from shardline.cluster.batch.batch_report import BatchReport, timed_job
from shardline.cluster.batch.generation_items import GenerationItems
from shardline.cluster.batch.loaded_shards import cores
from shardline.cluster.batch.local_batch import (
    BatchPlan,
    Room,
    check_filter_fits,
    columns_of,
    run_local,
    shard_groups,
)
from shardline.cluster.batch.part_files import ClaimedFolder, claimed_folder
from shardline.cluster.batch.spans import default_block_rows
from shardline.cluster.cli import Settings
from shardline.cluster.commands.address import address_of, key_file_option
from shardline.cluster.commands.batch_live import answer_live
from shardline.cluster.commands.batch_progress import NotedProgress, RateProgress
from shardline.cluster.commands.batch_sources import Asked, generation_encoder, open_source
from shardline.cluster.commands.query import filter_map
from shardline.cluster.console import StageProgress, print_table
from shardline.cluster.preflight.check import mib
from shardline.cluster.preflight.free_memory import free_memory
from shardline.cluster.preflight.servable import servable_generation
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import (
    MAX_EF_SEARCH,
    MAX_NPROBE,
    MAX_RERANK_FACTOR,
    SearchParams,
)
from shardline.shards.core.name_lists import split_names
from shardline.shards.index.resolve import FIELD_KINDS
from shardline.shards.storage.generation import read_generation

SLOT_BYTES = 12  # of a result: its id and score
LIMITS = {
    "nprobe": MAX_NPROBE,
    "ef_search": MAX_EF_SEARCH,
    "rerank_factor": MAX_RERANK_FACTOR,
}


@click.command()
@click.option(
    "--queries",
    multiple=True,
    help="File, folder or URL of queries: Parquet, Arrow or CSV. Repeatable.",
)
@click.option("--features", is_flag=True, help="--queries holds users' features, not vectors.")
@click.option(
    "--users",
    type=click.Path(path_type=Path),
    help="A data set: all its users, or those whose ids are in --queries.",
)
@click.option("--items", is_flag=True, help="All items of the generation: item-to-item.")
@click.option("--id-column", help="Column of --queries with the ids.  [default: looked for]")
@click.option(
    "--vector-column", help="Column of --queries with the vectors.  [default: looked for]"
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for the results."
)
@click.option("-k", "--k", default=100, show_default=True, help="Results per query.")
@click.option("--return", "returned", help="Attributes of the items to add, as in title,price.")
@click.option("--original-ids", is_flag=True, help="Add the ids that items had before import.")
@click.option(
    "--filter",
    "given_filter",
    help='Only items that match, e.g. \'{"price": {"$lt": 20}}\'; see docs/FILTERS.md.',
)
@click.option(
    "--params",
    multiple=True,
    metavar="NAME=N",
    help=f"A search parameter, as in nprobe=32: {', '.join(LIMITS)}. Repeatable.",
)
@click.option("--live", is_flag=True, help="Ask this store's running cluster, yielding to others.")
@click.option("--url", help="Ask the running cluster at this address, yielding to others.")
@key_file_option
@click.option("--generation", type=int, help="The generation.  [default: the live one]")
@click.option("--cpus", type=click.IntRange(min=1), help="Cores to use.  [default: all]")
@click.option(
    "--memory",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="Memory to use; what does not fit is read in passes.  [default: what is free]",
)
@click.option(
    "--block-rows",
    type=click.IntRange(min=1),
    help="Queries per block and part.  [default: at most 8,192, see docs/BATCH.md]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_obj
def batch(
    settings: Settings,
    /,
    out: Path,
    k: int,
    returned: str | None,
    original_ids: bool,
    given_filter: str | None,
    params: tuple[str, ...],
    live: bool,
    url: str | None,
    key_file: Path | None,
    generation: int | None,
    cpus: int | None,
    memory: int | None,
    block_rows: int | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Answer many queries: the top K of each, as Parquet files.

    Queries are vectors or features in files, users of a data set, or all items. Started again
    with the same options, a job that was interrupted goes on where it was.
    """
    is_live, is_on_ray = url is not None or live, settings.config.cluster.address != "local"
    refuse_unused(
        generation=generation, key_file=key_file, cpus=cpus, memory=memory,
        is_live=is_live, is_on_ray=is_on_ray,
    )  # fmt: skip
    given = Asked(**asked).on_all_hosts()
    given.check()
    out = out.absolute()
    given.refuse_inside(out)
    wanted = checked_wanted(
        Wanted(
            k=k,
            params=search_params(params),
            attributes=tuple(split_names("--return", returned)) if returned else (),
            original_ids=original_ids,
            drops_own=given.items,
            filter=None if given_filter is None else filter_map(given_filter),
        )
    )
    if is_live:
        with StageProgress() as progress, claimed_folder(out) as claimed:
            report = answer_live(
                *(given, wanted, claimed, address_of(settings, url, key_file), settings.store),
                RateProgress(progress),
                block_rows=block_rows,
            )
    else:
        number = servable_generation(settings.store, generation)
        folder = settings.store.generation(number)
        with StageProgress() as progress, claimed_folder(out) as claimed:
            plan = offline_plan(given, wanted, folder, claimed, progress.note, block_rows)
            if is_on_ray:
                from shardline.cluster.commands.batch_ray import answer_on

                report = answer_on(settings.config, plan, claimed, RateProgress(progress), cpus)
                print_report(report, as_json=as_json)
                return
            available = free_memory().available_bytes if memory is None else memory << 20
            room = Room(cpus=cpus or cores(), available_bytes=available)
            report = answer_here(plan, claimed, RateProgress(progress), room)
    print_report(report, as_json=as_json)


def refuse_unused(
    *,
    generation: int | None,
    key_file: Path | None,
    cpus: int | None,
    memory: int | None,
    is_live: bool,
    is_on_ray: bool,
) -> None:
    """Raises InvalidInput for an option that changes nothing where the job runs."""
    reasons = {
        "--generation": "a cluster serves one" if is_live and generation is not None else None,
        "--cpus": "the cluster's own are used" if is_live and cpus is not None else None,
        "--key-file": "no cluster is asked without --live or --url"
        if not is_live and key_file is not None
        else None,
        "--memory": "only a job in one process reads shards in passes"
        if (is_live or is_on_ray) and memory is not None
        else None,
    }
    for option, reason in reasons.items():
        if reason is not None:
            way = "--live" if is_live else "a job on Ray" if is_on_ray else "a job offline"
            raise InvalidInput(f"{option} has no effect in {way}: {reason}", hint="leave it out")


def offline_plan(
    asked: Asked,
    wanted: Wanted,
    folder: Path,
    claimed: ClaimedFolder,
    note: Callable[[str], None],
    block_rows: int | None,
) -> BatchPlan:
    """The job on the generation in ``folder``. Raises as ``open_source``."""
    manifest = read_generation(folder)
    for line in without_effect(wanted.params, str(manifest.index.kind)):
        note(line)
    source = open_source(
        asked,
        dim=manifest.dim,
        metric=manifest.metric,
        items=lambda: GenerationItems(folder, manifest, claimed.work),
        encoder=lambda: generation_encoder(folder, manifest),
        work=claimed.work,
        note=note,
    )
    # an unknown attribute is refused here, before anything is written
    check_filter_fits(folder, manifest, wanted)
    columns = columns_of(folder, manifest, wanted, verify=False)
    added = columns.bytes_per_item if columns is not None else 0.0
    rows = block_rows or default_block_rows(wanted.searched_k, added)
    job = job_of(source, folder, manifest, wanted, rows)
    return BatchPlan(
        job=job, source=source, folder=folder, manifest=manifest, attribute_bytes=added
    )


def answer_here(
    plan: BatchPlan, claimed: ClaimedFolder, progress: NotedProgress, room: Room
) -> BatchReport:
    """The job in this process, from checks to the manifest of its result."""
    groups = shard_groups(plan, room)
    if len(groups) > 1:
        progress.note(
            f"{len(plan.manifest.shards)} shards in {len(groups)} passes: "
            f"{mib(room.available_bytes)} of memory do not hold all at once"
        )
    warn_of_space(plan, claimed.path, progress)
    with timed_job(plan.job, claimed, progress, way="local") as run:
        if run.todo:
            run.passes = run_local(plan, run.output, run.todo, run.parts, room)
    return run.report


def warn_of_space(plan: BatchPlan, out: Path, progress: NotedProgress) -> None:
    """Says where the disk may become full. How far ids and attributes compress is not known."""
    size = plan.job.rows * plan.job.wanted.k * SLOT_BYTES
    free = shutil.disk_usage(out).free
    if size > free:
        progress.note(
            f"warning: about {mib(size)} of results before compression, and {mib(free)} free at "
            f"{out}; a job that fills the disk can be started again once there is room"
        )


def search_params(given: tuple[str, ...]) -> SearchParams:
    """Of ``name=number`` texts. Raises InvalidInput: another form, an unknown name, its range."""
    values: dict[str, int] = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in LIMITS or not (number.isascii() and number.isdigit()):
            raise InvalidInput(
                "wrong value",
                field="--params",
                expected=f"name=number, a name of {', '.join(LIMITS)}",
                got=repr(text),
            )
        if not 1 <= int(number) <= LIMITS[name]:
            raise InvalidInput(
                "out of range",
                field=f"--params {name}",
                expected=f"1 to {LIMITS[name]}",
                got=number,
            )
        values[name] = int(number)
    return SearchParams(**values)


def without_effect(params: SearchParams, kind: str) -> list[str]:
    """A line for each parameter that an index of this kind does not have, and so ignores."""
    return [
        f"warning: {name} changes nothing: the index is of kind {kind}"
        for name in LIMITS
        if getattr(params, name) is not None and kind not in FIELD_KINDS[name]
    ]


def print_report(report: BatchReport, *, as_json: bool) -> None:
    """The report as JSON, or a table for people."""
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
        return
    rows = [
        ("queries", f"{report.queries:,}"),
        ("results per query", f"{report.k}"),
        ("parts", f"{report.parts:,}"),
        ("parts of an earlier run", f"{report.resumed_parts:,}"),
        ("answered in this run", f"{report.searched:,}"),
        ("seconds", f"{report.seconds:,.1f}"),
        ("queries/s", f"{report.queries_per_s:,.0f}"),
        ("MiB written", f"{report.bytes / 2**20:,.1f}"),
        ("passes over the shards", f"{report.passes}"),
        ("peak memory, MiB", f"{report.peak_rss_bytes / 2**20:,.0f}"),
    ]
    title = f"{report.output}: generation {report.generation}, {report.way}"
    print_table(title, ("", ""), rows)
