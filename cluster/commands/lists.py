"""``lists``: named lists of items that searches leave out, in a running cluster."""

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import click

from shardline.cluster.cli import Settings
from shardline.cluster.commands.address import address_of, key_file_option
from shardline.cluster.commands.delete import ids_of_files, typed_ids
from shardline.cluster.commands.query import json_option, url_option
from shardline.router.client.list_calls import ListWritten
from shardline.router.client.sync_client import Client
from shardline.router.http.api_keys import Scope
from shardline.shards.core.schema import IdArray

SHOWN = 20  # ids that ``show`` prints for people


@click.group()
def lists() -> None:
    """Lists of items, by name, that a search can leave out: seen, blocked, sold out.

    Searches name them: `shardline query --exclude-list blocked`. See docs/LISTS.md.
    """


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (click.pass_obj, json_option, key_file_option, url_option):
        command = option(command)
    return command


def _id_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--id-column", help="The id column of files, if not id, idx or item_id."),
        click.option(
            "--file",
            "are_files",
            is_flag=True,
            help="The arguments are files, as `shardline delete` takes them.",
        ),
        click.argument("ids", nargs=-1, metavar="IDS | --file FILES"),
        click.argument("name"),
    ):
        command = option(command)
    return command


@lists.command()
@_id_options
@_options
def put(
    settings: Settings,
    name: str,
    ids: tuple[str, ...],
    are_files: bool,
    id_column: str | None,
    url: str | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Replace the list NAME by these ids, or create it. Without ids it is empty."""
    found = _ids(ids, are_files, id_column)
    with _client(settings, url, key_file, Scope.WRITE) as client:
        _say(client.put_list(name, found), as_json)


@lists.command()
@_id_options
@_options
def add(
    settings: Settings,
    name: str,
    ids: tuple[str, ...],
    are_files: bool,
    id_column: str | None,
    url: str | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Add ids to the list NAME, which is created if it does not exist."""
    found = _ids(ids, are_files, id_column)
    with _client(settings, url, key_file, Scope.WRITE) as client:
        _say(client.change_list(name, add=found), as_json)


@lists.command()
@_id_options
@_options
def remove(
    settings: Settings,
    name: str,
    ids: tuple[str, ...],
    are_files: bool,
    id_column: str | None,
    url: str | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Take ids out of the list NAME. Those that are not in it are no error."""
    found = _ids(ids, are_files, id_column)
    with _client(settings, url, key_file, Scope.WRITE) as client:
        _say(client.change_list(name, remove=found), as_json)


@lists.command()
@click.argument("name")
@_options
def delete(
    settings: Settings, name: str, url: str | None, key_file: Path | None, as_json: bool
) -> None:
    """Delete the list NAME. That there is none is no error."""
    with _client(settings, url, key_file, Scope.WRITE) as client:
        _say(client.delete_list(name), as_json)


@lists.command()
@click.argument("name")
@_options
def show(
    settings: Settings, name: str, url: str | None, key_file: Path | None, as_json: bool
) -> None:
    """Show the ids of the list NAME; all of them with --json."""
    with _client(settings, url, key_file) as client:
        found = client.get_list(name)
    ids = found.item_ids.tolist()
    if as_json:
        click.echo(json.dumps({"name": name, "version": found.version, "item_ids": ids}))
        return
    click.echo(f"{name}: {len(ids):,} ids, version {found.version}")
    more = f" and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else ""
    if ids:
        click.echo(" ".join(map(str, ids[:SHOWN])) + more)


@lists.command()
@click.argument("prefix", default="")
@click.option(
    "--limit", type=click.IntRange(min=1), default=10_000, show_default=True, help="Most names."
)
@_options
def names(
    settings: Settings,
    prefix: str,
    limit: int,
    url: str | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """List the names of lists, those that begin with PREFIX, in no order."""
    with _client(settings, url, key_file) as client:
        found = list(islice(client.lists(prefix), limit + 1))
    if as_json:
        click.echo(json.dumps({"names": found[:limit], "is_all": len(found) <= limit}))
        return
    for name in found[:limit]:
        click.echo(name)
    if len(found) > limit:
        click.echo(f"there are more than {limit:,}: --limit", err=True)


def _client(
    settings: Settings, url: str | None, key_file: Path | None, scope: Scope = Scope.SEARCH
) -> Client:
    return address_of(settings, url, key_file, scope=scope).client()


def _ids(words: tuple[str, ...], are_files: bool, id_column: str | None) -> IdArray:
    if are_files and not words:
        raise click.UsageError("--file needs the names of files")
    return ids_of_files(words, id_column) if are_files else typed_ids(words)


def _say(written: ListWritten, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(written)))
    elif written.version is None:
        click.echo(f"{written.name}: {'deleted' if written.existed else 'there is no such list'}")
    else:
        how = "changed" if written.existed else "created"
        click.echo(f"{written.name}: {how}, {written.ids:,} ids, version {written.version}")
