"""``snapshot`` and ``restore``: copies of a generation with its writes, and back into a store."""

import json
from contextlib import suppress
from functools import partial

import click

from shardline.cluster.backup.backup_folder import BackupFolder
from shardline.cluster.backup.restore import restore_snapshot
from shardline.cluster.backup.snapshot_manifest import Snapshot, read_snapshot
from shardline.cluster.backup.take_snapshot import take_snapshot
from shardline.cluster.cli import Settings
from shardline.cluster.console import StageProgress
from shardline.cluster.housekeeping.held import held_generations
from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.machine import check_store
from shardline.cluster.serving.going_live import cluster_there, made_live
from shardline.cluster.spread import Progress
from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, NotFound

MIB = 1 << 20
RESPREAD_COPIES = 4  # of a snapshot: as it was, rows on their way, the new shards, attributes twice

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")


@click.command()
@click.argument("dest")
@click.option("--generation", type=click.IntRange(min=1), help="Not the live one, but this one.")
@as_json_option
@click.pass_obj
def snapshot(settings: Settings, dest: str, generation: int | None, as_json: bool) -> None:
    """Copy the live generation, and all writes to it until now, to the folder or URL DEST.

    A cluster may serve and take writes meanwhile. Of each shard the copy holds a prefix of its
    writes; across shards there is no order. DEST must be new or empty; what an earlier try has left
    there, not finished, is replaced.
    """
    store = settings.store
    number = store.current() if generation is None else generation
    with StageProgress() as progress:
        taken = take_snapshot(
            store, number, dest, progress, is_loaded=partial(_is_loaded, settings, number)
        )
    if as_json:
        click.echo(json.dumps(_report(taken, dest), indent=2))
        return
    click.echo(
        f"{dest}: generation {number}, {len(taken.seqs)} shards, model "
        f"{taken.generation.model_version}, {taken.bytes / MIB:,.1f} MiB"
    )
    click.echo(f"writes per shard: {', '.join(map(str, taken.seqs))}")


@click.command()
@click.argument("source", metavar="SRC")
@click.option(
    "--shards",
    type=click.IntRange(min=1, max=4096),
    help="Another number of shards than the snapshot has: rows are spread anew.",
)
@click.option(
    "--no-publish",
    is_flag=True,
    help="Leave the live generation as it is, as is done while a cluster serves the store.",
)
@as_json_option
@click.pass_obj
def restore(
    settings: Settings, source: str, shards: int | None, no_publish: bool, as_json: bool
) -> None:
    """Make the snapshot in the folder or URL SRC the next generation of this store.

    Every file is verified. It becomes the live generation, unless a cluster serves the store, or
    the live generation has writes that it lacks: then `shardline publish` changes over to it.
    """
    config, store = settings.config, settings.store
    found = read_snapshot(BackupFolder(source))
    copies = 1 if shards in (None, len(found.seqs)) else RESPREAD_COPIES
    enforce([check_store(store, copies * found.bytes)])
    with StageProgress() as progress:
        number = _restored(settings, source, shards, progress)
    go_live = cluster_there if no_publish else made_live
    reason = go_live(config, number, verbose=settings.verbose)
    state = "live" if _is_live(store, number) else "not live"
    if as_json:
        report = _report(found, source) | {"restored_as": number, "state": state}
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(f"generation {number}: {source}, {shards or len(found.seqs)} shards; {state}")
    if reason is not None:
        click.echo(reason)


def _restored(settings: Settings, source: str, shards: int | None, progress: Progress) -> int:
    threads = settings.config.cluster.threads_per_shard
    made = restore_snapshot(
        settings.store, source, num_shards=shards, threads=threads, progress=progress
    )
    return made.generation


def _is_loaded(settings: Settings, number: int) -> bool:
    """Whether a cluster has the generation loaded, or may have it.

    Raises: as ``held_generations``.
    """
    held = held_generations(settings.config, verbose=settings.verbose)
    return held.served is not None and number in held.reasons


def _is_live(store: Store, number: int) -> bool:
    with suppress(NotFound, CorruptFile):
        return store.current() == number
    return False


def _report(taken: Snapshot, url: str) -> dict[str, object]:
    return {
        "url": url,
        "generation": taken.generation.generation,
        "model_version": taken.generation.model_version,
        "created_at": taken.created_at,
        "shards": len(taken.seqs),
        "writes_per_shard": list(taken.seqs),
        "bytes": taken.bytes,
    }
