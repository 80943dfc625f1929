"""``delete``: takes items out of a running cluster, by their ids."""

import csv
import time
from pathlib import Path

import click
import numpy as np

from shardline.cluster.cli import Settings
from shardline.cluster.commands.address import address_of, key_file_option
from shardline.cluster.commands.query import json_option, url_option
from shardline.cluster.commands.write_report import say_written
from shardline.cluster.console import StageProgress
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import DataError, InvalidInput
from shardline.shards.core.schema import IdArray, check_ids

TEXT = (".csv", ".txt")


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILES | --ids IDS")
@click.option("--ids", "are_ids", is_flag=True, help="The arguments are ids: --ids 1 2, or 1,2.")
@click.option("--id-column", help="The id column of files, if not id, idx or item_id.")
@url_option
@key_file_option
@json_option
@click.pass_obj
def delete(
    settings: Settings,
    files: tuple[str, ...],
    are_ids: bool,
    id_column: str | None,
    url: str | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Delete items of a running cluster. Those that are not there are counted, and are no error.

    FILES are Parquet or Arrow files, folders of them or URLs, or text: CSV with a header, or one id
    per line. Nothing else of them is read.
    """
    began = time.perf_counter()
    item_ids = _typed(files) if are_ids else _ids_of(files, id_column)
    if not len(item_ids):
        raise DataError("no items", field=", ".join(files), expected="at least one id")
    address = address_of(settings, url, key_file, scope=Scope.WRITE)
    with address.client() as client, StageProgress() as progress:
        answer = client.delete(
            item_ids, progress=lambda done: progress("delete", done, len(item_ids))
        )
    say_written(answer, time.perf_counter() - began, as_json)


def _typed(words: tuple[str, ...]) -> IdArray:
    words = tuple(word for each in words for word in each.split(",") if word)
    for word in words:
        if not (word.isascii() and word.isdigit()):
            raise click.BadParameter(
                f"{word!r} is not an id, an integer from 0 up", param_hint="IDS"
            )
    return check_ids(list(map(int, words)), field="IDS")


def _ids_of(files: tuple[str, ...], id_column: str | None) -> IdArray:
    texts = [file for file in files if file.endswith(TEXT)]
    tables = [file for file in files if not file.endswith(TEXT)]
    found = [_ids_of_text(Path(file), id_column) for file in texts]
    if tables:
        found.append(_ids_of_tables(tables, id_column))
    return np.concatenate(found)


def _ids_of_tables(files: list[str], id_column: str | None) -> IdArray:
    from shardline.shards.storage.foreign_ids import read_ids
    from shardline.shards.storage.foreign_vectors import id_column_of
    from shardline.shards.storage.table_parts import open_parts

    parts = [part for part in open_parts(files, option="FILES") if not part.is_empty]
    ids = read_ids([(part, id_column_of(part, id_column)) for part in parts])
    if ids.originals is not None:
        raise DataError("ids that are not integers from 0 up", field=", ".join(files))
    return ids.numbers


def _ids_of_text(path: Path, id_column: str | None) -> IdArray:
    """One id per line, or the id column of a CSV file, which is named in its first line."""
    from shardline.shards.storage.foreign_vectors import ID_COLUMNS

    known = (id_column,) if id_column else ID_COLUMNS
    place = 0
    ids = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not row:
                continue
            names = [name for name in known if name in row]
            if number == 1 and names:
                place = row.index(names[0])
                continue
            word = row[place].strip() if place < len(row) else ""
            if not (word.isascii() and word.isdigit()):
                raise DataError(
                    "not an id",
                    field=f"{path}:{number}",
                    expected=f"an integer from 0 up, or a header with {' or '.join(known)}",
                    got=repr(word[:60]),
                )
            ids.append(int(word))
    try:
        return check_ids(ids)
    except InvalidInput as error:
        raise DataError(error.message, field=str(path), got=error.got) from error
