"""``gc``: removes what a store no longer needs, and erases what was deleted."""

import json
import os
from collections.abc import Collection
from dataclasses import asdict, replace

import click

from shardline.cluster.cli import Settings
from shardline.cluster.console import StageProgress
from shardline.cluster.control.publish_note import InUse, in_use_in
from shardline.cluster.housekeeping.erase import Erasure, compact_away, drop_superseded
from shardline.cluster.housekeeping.held import Held, held_generations, held_on_record
from shardline.cluster.housekeeping.removals import Policy, Removal, removals, remove
from shardline.cluster.serving.start_lock import removing
from shardline.cluster.store import Store
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.files import MANIFEST_NAME
from shardline.shards.live.compaction import NICENESS
from shardline.shards.storage.generation import read_generation

MIB = 1 << 20


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    help="Short for --set housekeeping.keep_generations=N: older generations to leave.",
)
@click.option(
    "--erase",
    is_flag=True,
    help="Have what was deleted or replaced leave every file of the generations in use, and remove "
    "all older generations.",
)
@click.option(
    "--embeddings",
    type=click.IntRange(min=0),
    metavar="N",
    help="Remove embedding sets too, all but the newest N.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_obj
def gc(
    settings: Settings,
    dry_run: bool,
    keep: int | None,
    erase: bool,
    embeddings: int | None,
    as_json: bool,
) -> None:
    """Remove old generations, kept log beyond its bound, and what killed commands have left.

    Never what is live, what a cluster has loaded, or a generation newer than the live one. A
    cluster may serve and take writes meanwhile.
    """
    if keep is not None:
        settings.extra_overrides.append(f"housekeeping.keep_generations={keep}")
    store = settings.store
    with removing(store):
        in_use = held_generations(settings.config, verbose=settings.verbose)
        erased: list[Erasure] = []
        if erase and not dry_run:
            with StageProgress() as progress:
                erased = _erased(store, in_use, progress)
            # minutes may have passed, and another generation be live
            in_use = held_generations(settings.config, verbose=settings.verbose)
        held = in_use.reasons
        policy = Policy(
            live=in_use.live,
            held=held,
            keep=0 if erase else settings.config.housekeeping.keep_generations,
            keep_log_bytes=settings.config.live.keep_log_bytes,
            keep_embeddings=embeddings,
            keep_event_bytes=settings.config.router.events_mib << 20 or None,
        )
        found = removals(store, policy)
        if not dry_run:
            found = [each for each in found if remove(store, each, lambda: _held_now(store, held))]
    if as_json:
        click.echo(json.dumps(_report(found, held, erased, dry_run), indent=2))
        return
    _print(found, dry_run)
    if erase:
        _print_erased(store, erased, held)


def _held_now(store: Store, held: Collection[int]) -> set[int]:
    """Those that were held, and those that are by now."""
    return {*held, *held_on_record(store).reasons}


def _erased(store: Store, in_use: Held, progress: StageProgress) -> list[Erasure]:
    """Of every shard of the generations in use, one after the other.

    Raises:
        Unavailable: a mirror reads the log that an erasure cuts.
    """
    is_served = in_use.served is not None
    if is_served and (reason := _followed(in_use.noted)) is not None:
        raise Unavailable(
            f"{reason}, from the log that an erasure cuts",
            hint="wait for the end of a publish; end what is kept with `shardline publish "
            "--finish`; `shardline status` shows both",
        )
    shards = [
        (number, shard)
        for number in sorted(in_use.reasons)
        if (store.generation(number) / MANIFEST_NAME).is_file()
        for shard in range(len(read_generation(store.generation(number)).shards))
    ]
    done: list[Erasure] = []
    if is_served:
        os.nice(NICENESS)  # searches come first
    for number, shard in shards:
        progress("erase", len(done), len(shards))
        done.append(compact_away(store, number, shard, is_loaded=is_served))
    progress("erase", len(done), len(shards))
    # after all of them: replicas have the same time to change over
    return [_dropped(store, each, is_served=is_served) for each in done]


def _dropped(store: Store, done: Erasure, *, is_served: bool) -> Erasure:
    """With the log behind it, unless somebody has begun to read that. Raises OSError."""
    reason = _followed(in_use_in(store.root)) if is_served and done.left is None else None
    if reason is not None:
        return replace(done, left=f"{reason} by now, from its log; try again after that")
    drop_superseded(store, done, is_loaded=is_served)
    return done


def _followed(noted: InUse) -> str | None:
    """Which generation is brought writes of another, or is about to be; None: there is none."""
    if noted.coming is not None:
        return f"generation {noted.coming} is being published"
    if noted.beside is not None:
        return f"generation {noted.beside} is kept for a rollback, and is brought all writes"
    return None


def _print(found: list[Removal], dry_run: bool) -> None:
    for removal in found:
        click.echo(f"{removal.kind}: {removal.path}, {removal.bytes / MIB:,.1f} MiB")
    said = "would be removed" if dry_run else "removed"
    total = sum(removal.bytes for removal in found)
    click.echo(f"{total / MIB:,.1f} MiB {said}" if found else "nothing to remove")


def _print_erased(store: Store, erased: list[Erasure], held: dict[int, str]) -> None:
    for each in erased:
        if each.left is not None:
            click.echo(f"not erased: generation {each.generation}, shard {each.shard}: {each.left}")
    newer = [number for number in store.generation_numbers() if number not in held]
    if newer:
        click.echo(
            f"generations {', '.join(map(str, newer))} are not in use, and keep what they were "
            "built from: publish or delete them"
        )
    sets = len(list(store.embeddings.glob(f"*/{MANIFEST_NAME}")))
    if sets:
        click.echo(
            f"{sets} embedding sets keep what they were exported with; `shardline gc --embeddings "
            "0` removes them"
        )


def _report(
    found: list[Removal], held: dict[int, str], erased: list[Erasure], dry_run: bool
) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "removed": [asdict(each) | {"path": str(each.path)} for each in found],
        "bytes": sum(each.bytes for each in found),
        "held": {str(number): why for number, why in sorted(held.items())},
        "erased": [asdict(each) for each in erased],
    }
