"""``upsert``: writes the items of files to a running cluster, by vector."""

import time
from pathlib import Path

import click

from shardline.cluster.cli import Settings
from shardline.cluster.commands.address import address_of, key_file_option
from shardline.cluster.commands.query import json_option, url_option
from shardline.cluster.commands.write_report import say_written, written_before
from shardline.cluster.console import StageProgress
from shardline.router.client.answers import UpsertAnswer, together
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import DataError, ShardlineError
from shardline.shards.core.schema import ORIGINAL_ID


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--id-column", help="The id column, if not id, idx or item_id.")
@click.option("--vector-column", help="The vector column, if not emb, embedding or vector.")
@click.option(
    "--model-version",
    help="The model that the vectors are of: refused where the cluster serves another.",
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
    model_version: str | None,
    url: str | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Write items to a running cluster: add them, or replace those of the same ids.

    FILES are Parquet or Arrow files, folders of them or URLs, with an id and a vector per row; all
    other columns are attributes. What was written before an error stays: run the command again.
    """
    from shardline.shards.storage.foreign_vectors import read_foreign
    from shardline.shards.storage.table_parts import open_parts

    began, before, done = time.perf_counter(), 0, 0
    total: UpsertAnswer | None = None
    rows = sum(part.num_rows for part in open_parts(files, option="FILES"))
    batches = read_foreign(files, id_column=id_column, vector_column=vector_column)
    address = address_of(settings, url, key_file, scope=Scope.WRITE)
    try:
        with address.client() as client, StageProgress() as progress:

            def written(items: int) -> None:
                nonlocal done
                done = before + items
                progress("upsert", done, rows)

            for batch in batches:
                if ORIGINAL_ID in batch.attributes.schema.names:
                    raise DataError(
                        "ids that are not integers from 0 up",
                        field=", ".join(files),
                        hint="the cluster knows its items by such numbers: see original_id",
                    )
                answer = client.upsert(
                    item_ids=batch.item_ids,
                    vectors=batch.vectors,
                    attributes=dict(
                        zip(batch.attributes.schema.names, batch.attributes.columns, strict=True)
                    ),
                    model_version=model_version,
                    progress=written,
                )
                total, before = together(total, answer), done
    except ShardlineError as error:
        raise written_before(error, done) from error
    if total is None:
        raise DataError("no items", field=", ".join(files), expected="at least one row")
    say_written(total, time.perf_counter() - began, as_json)
