"""``generations``: lists and deletes the generations of a store."""

import json
from collections.abc import Callable
from typing import Any

import click

from shardline.cluster.cli import Settings
from shardline.cluster.console import print_table
from shardline.cluster.control.publish_note import InUse, in_use_in
from shardline.cluster.housekeeping.held import Held
from shardline.cluster.housekeeping.removals import bytes_of, remove_generation
from shardline.cluster.serving.endpoint import noted_generation, serving_now
from shardline.cluster.serving.served import served_generation
from shardline.cluster.serving.start_lock import removing
from shardline.cluster.store import Store
from shardline.shards.core.errors import InvalidInput, NotFound, ShardlineError
from shardline.shards.core.files import MANIFEST_NAME, abandoned_folders
from shardline.shards.storage.generation import read_generation

MIB = 1 << 20


@click.group()
def generations() -> None:
    """List the generations of this store, and delete those that are no longer needed."""


@generations.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.pass_obj
def list_generations(settings: Settings, as_json: bool) -> None:
    """Number, state, age, rows, shards, index, model and size of each, oldest first."""
    store = settings.store
    named = {
        "live": _named(_live, store),
        "served": _named(lambda _: served_generation(settings.config), store),
        "beside": _named(lambda _: _noted(settings).beside, store),
    }
    found = [_described(store, number, named) for number in store.generation_numbers()]
    for folder in abandoned_folders(store.generations):
        size = bytes_of(folder) / MIB
        click.echo(
            f"{folder}: {size:,.1f} MiB of a build that was killed, which the next one removes",
            err=True,
        )
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        click.echo(f"{store.generations}: no generations; `shardline build` makes one")
        return
    rows = [
        (
            *(str(each["generation"]), each["state"], each["created_at"]),
            *(_counted(each["rows"]), _counted(each["shards"]), each["index"]),
            *(each["model_version"], f"{each['bytes'] / MIB:,.1f}"),
        )
        for each in found
    ]
    header = ("generation", "state", "created", "rows", "shards", "index", "model", "MiB")
    print_table(str(store.generations), header, rows)


@generations.command()
@click.argument("number", type=click.IntRange(min=1))
@click.pass_obj
def delete(settings: Settings, number: int) -> None:
    """Delete a generation that is neither live nor served, and what was written to it."""
    store = settings.store
    folder = store.generation(number)
    if not (folder / MANIFEST_NAME).is_file():
        known = ", ".join(map(str, store.generation_numbers()))
        raise NotFound(f"{folder}: no such generation", expected=f"one of {known or 'none'}")
    with removing(store):  # no cluster starts meanwhile
        held = _held(settings, served_generation(settings.config, verbose=settings.verbose))
        if number in held:
            raise _in_use(number, held[number])
        size = bytes_of(folder) + bytes_of(store.writes(number))
        # under the store's lock, which a controller may wait for: no cluster is asked
        if not remove_generation(store, number, lambda: _held(settings, noted_generation(store))):
            raise _in_use(number, "in use by now")
    click.echo(f"{folder}: deleted, {size / MIB:,.1f} MiB")


def _held(settings: Settings, served: int | None) -> dict[int, str]:
    """Number -> why it may not be deleted."""
    noted = _noted(settings)  # before CURRENT, which a switch changes first
    store = settings.store
    return Held(live=_live(store), noted=noted, served=served).reasons


def _in_use(number: int, what: str) -> InvalidInput:
    return InvalidInput(
        f"generation {number} is {what}",
        hint="publish another one first; `shardline publish --finish` ends what is kept for a "
        "rollback",
    )


def _named(which: Callable[[Store], int | None], store: Store) -> int | None:
    """The number; None, and a warning, where the file that names it is damaged, or the cluster that
    knows it does not answer."""
    try:
        return which(store)
    except ShardlineError as error:
        click.echo(f"warning: {error}", err=True)
        return None


def _live(store: Store) -> int | None:
    try:
        return store.current()
    except NotFound:
        return None


def _noted(settings: Settings) -> InUse:
    """What a cluster of this store has loaded beside the live one; of a launched cluster that has
    ended, had."""
    store, is_launched = settings.store, settings.config.cluster.address != "local"
    is_known = is_launched or serving_now(store) is not None
    return in_use_in(store.root) if is_known else InUse()


def _described(store: Store, number: int, named: dict[str, int | None]) -> dict[str, Any]:
    """named: from each state to the generation that is in it."""
    folder = store.generation(number)
    states = [state for state, which in named.items() if which == number]
    described: dict[str, Any] = {
        "generation": number,
        "state": ", ".join(states),
        "created_at": "",
        "rows": None,
        "shards": None,
        "index": "",
        "model_version": "",
        "bytes": bytes_of(folder) + bytes_of(store.writes(number)),
    }
    try:
        manifest = read_generation(folder)
    except ShardlineError as error:  # it can still be deleted
        return described | {"state": f"unreadable: {error.code}"}
    return described | {
        "created_at": manifest.created_at,
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "index": manifest.spec.kind,
        "model_version": manifest.model_version,
    }


def _counted(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
