"""``upsert``: writes the items of files to a running cluster, by vector or by features."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardline.cluster.cli import Settings
from shardline.cluster.commands.address import address_of, key_file_option
from shardline.cluster.commands.query import json_option, url_option
from shardline.cluster.commands.write_report import say_written, written_before
from shardline.cluster.console import StageProgress
from shardline.router.client.answers import UpsertAnswer, together
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import DataError, InvalidInput, ShardlineError
from shardline.shards.core.schema import ORIGINAL_ID

if TYPE_CHECKING:
    from shardline.cluster.commands.item_tables import ItemTable
    from shardline.router.client.sync_client import Client

VALUE = re.compile(r"features\.[^\[]*\[(\d+)\].*", re.DOTALL)  # as a server names what it refuses


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the command was given."""

    files: tuple[str, ...]
    id_column: str | None
    vector_column: str | None
    types: tuple[str, ...]


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--id-column", help="The id column, if not id, idx or item_id.")
@click.option("--vector-column", help="The vector column, if not emb, embedding or vector.")
@click.option(
    "--types",
    multiple=True,
    metavar="COLUMN=TYPE",
    help="The type of a column of text, as of `shardline data import`.",
)
@click.option(
    "--model-version",
    help="The model that the items are for: refused where the cluster serves another.",
)
@url_option
@key_file_option
@json_option
@click.pass_obj
def upsert(
    settings: Settings,
    files: tuple[str, ...],
    id_column: str | None,
    vector_column: str | None,
    types: tuple[str, ...],
    model_version: str | None,
    url: str | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Write items to a running cluster: add them, or replace those of the same ids.

    FILES are Parquet or Arrow files, folders of them or URLs, with an id per row. With a vector
    column, all other columns are attributes. Without one, columns called as features of the
    cluster's model are those, the cluster encodes them, and they are attributes too; CSV, TSV and
    JSON lines are read then as well. What was written before an error stays: run the command again.
    """
    given = Given(files=files, id_column=id_column, vector_column=vector_column, types=types)
    began, before, done = time.perf_counter(), 0, 0
    total: UpsertAnswer | None = None
    address = address_of(settings, url, key_file, scope=Scope.WRITE)
    try:
        with address.client() as client, StageProgress() as progress:
            rows, batches = _items_of(given, client)

            def written(items: int) -> None:
                nonlocal done
                done = before + items
                progress("upsert", done, rows)

            for fields in batches:
                try:
                    answer = client.upsert(**fields, model_version=model_version, progress=written)
                except InvalidInput as error:
                    raise _with_item(error, fields["item_ids"], done - before) from error
                total, before = together(total, answer), done
    except ShardlineError as error:
        raise written_before(error, done) from error
    if total is None:
        raise DataError("no items", field=", ".join(files), expected="at least one row")
    say_written(total, time.perf_counter() - began, as_json)


def _items_of(given: Given, client: "Client") -> tuple[int, Iterator[dict[str, Any]]]:
    """How many items there are, and the arguments of ``Client.upsert`` for a batch of them."""
    from shardline.cluster.commands.item_tables import open_items
    from shardline.shards.storage.foreign_vectors import VECTOR_COLUMNS

    known = (given.vector_column,) if given.vector_column else VECTOR_COLUMNS
    tables = open_items(given.files, given.types)
    rows = sum(table.num_rows for table in tables)
    has_vectors = any(name in table.names for table in tables for name in known)
    if has_vectors or given.vector_column:
        return rows, _by_vector(given)
    encoder = client.status().get("item_encoder") if tables else None
    if encoder is None and tables:
        raise DataError(
            "no such column",
            field=f"{tables[0].source.path}: {' | '.join(known)}",
            got=", ".join(tables[0].names),
            hint="name the vectors with --vector-column; features will not do, because the cluster "
            "has no item encoder",
        )
    kinds = {each["name"]: each["kind"] for each in encoder["features"]} if encoder else {}
    return rows, _by_features(tables, kinds, given.id_column)


def _by_features(
    tables: "list[ItemTable]", kinds: dict[str, str], id_column: str | None
) -> Iterator[dict[str, Any]]:
    for table in tables:
        for batch in table.batches(kinds, id_column):
            yield {
                "item_ids": batch.item_ids,
                "features": batch.features,
                "attributes": batch.attributes,
            }


def _by_vector(given: Given) -> Iterator[dict[str, Any]]:
    from shardline.shards.live.item_attributes import column_values
    from shardline.shards.storage.foreign_vectors import read_foreign

    batches = read_foreign(
        given.files, id_column=given.id_column, vector_column=given.vector_column
    )
    for batch in batches:
        names = batch.attributes.schema.names
        if ORIGINAL_ID in names:
            raise DataError(
                "ids that are not integers from 0 up",
                field=", ".join(given.files),
                hint="the cluster knows its items by such numbers: see original_id",
            )
        yield {
            "item_ids": batch.item_ids,
            "vectors": batch.vectors,
            "attributes": dict(
                zip(names, map(column_values, batch.attributes.columns), strict=True)
            ),
        }


def _with_item(error: InvalidInput, item_ids: Any, answered: int) -> ShardlineError:
    """Where a feature was refused, by its place in the request: the item that it is of."""
    found = VALUE.fullmatch(error.field or "")
    if found is None or answered + int(found[1]) >= len(item_ids):
        return error
    return DataError(
        error.message,
        field=error.field,
        expected=error.expected,
        got=error.got,
        hint=f"of item {item_ids[answered + int(found[1])]}",
    )
