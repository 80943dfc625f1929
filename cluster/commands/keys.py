"""``keys``: lists and changes the key file of a store's cluster; routers follow it."""

from pathlib import Path

import click

from shardline.cluster.cli import Settings
from shardline.cluster.console import print_table
from shardline.cluster.serving.serving_keys import add_key, key_file_of, remove_key
from shardline.router.http.api_keys import Scope, read_keys
from shardline.shards.core.errors import NotFound

scope_option = click.option(
    "--scope",
    type=click.Choice([each.value for each in Scope]),
    default=Scope.SEARCH.value,
    show_default=True,
    help="What the key is good for: to search and read; to write items too; for all.",
)


@click.group()
def keys() -> None:
    """List and change the API keys of this store's cluster. Routers follow within seconds.

    To replace a key: `add` one, give it to its users, then `remove` the old one.
    """


@keys.command("list")
@click.pass_obj
def list_keys(settings: Settings) -> None:
    """Scope and fingerprint of each key; the keys themselves are not shown."""
    path = _path(settings)
    rows = [(key.scope.value, key.fingerprint) for key in read_keys(path)]
    print_table(str(path), ("scope", "fingerprint"), rows)


@keys.command()
@scope_option
@click.pass_obj
def show(settings: Settings, scope: str) -> None:
    """Print the first key of a scope."""
    path = _path(settings)
    for key in read_keys(path):
        if key.scope.value == scope:
            click.echo(key.secret)
            return
    raise NotFound(f"{path}: no key of scope {scope}", hint=f"shardline keys add --scope {scope}")


@keys.command()
@scope_option
@click.pass_obj
def add(settings: Settings, scope: str) -> None:
    """Add a new key, and print it."""
    click.echo(add_key(_path(settings), Scope(scope)).secret)


@keys.command()
@click.argument("fingerprint")
@click.pass_obj
def remove(settings: Settings, fingerprint: str) -> None:
    """Remove the key with this fingerprint; the beginning of it is enough."""
    path = _path(settings)
    remove_key(path, fingerprint)
    click.echo(f"{path}: removed; {len(read_keys(path))} left")


def _path(settings: Settings) -> Path:
    return key_file_of(settings.config)
