"""``delete``: takes items out of a running cluster, by their ids."""

import csv
import time
from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np

from shardline.cluster.cli import Settings
from shardline.cluster.commands.address import address_of, key_file_option
from shardline.cluster.commands.query import json_option, url_option
from shardline.cluster.commands.write_report import say_written, written_before
from shardline.cluster.console import StageProgress
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import DataError, ShardlineError
from shardline.shards.core.schema import IdArray, check_ids

TEXT = (".csv", ".txt")
MAX_ID = 2**63 - 1  # ids are int64
SHOWN = 60  # characters of a wrong word in an error


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
    item_ids = typed_ids(files) if are_ids else ids_of_files(files, id_column)
    if not len(item_ids):
        raise DataError("no items", field=", ".join(files), expected="at least one id")
    address = address_of(settings, url, key_file, scope=Scope.WRITE)
    done = 0
    with address.client() as client, StageProgress() as progress:

        def deleted(items: int) -> None:
            nonlocal done
            done = items
            progress("delete", items, len(item_ids))

        try:
            answer = client.delete(item_ids, progress=deleted)
        except ShardlineError as error:
            raise written_before(error, done, "deleted") from error
    say_written(answer, time.perf_counter() - began, as_json)


def typed_ids(words: tuple[str, ...]) -> IdArray:
    """Ids as arguments of a command: 1 2, or 1,2. Raises click.BadParameter."""
    ids = []
    for word in (word for each in words for word in each.split(",") if word):
        number = _id_of(word)
        if number is None:
            raise click.BadParameter(
                f"{word[:SHOWN]!r} is not an id, an integer from 0 to {MAX_ID}", param_hint="IDS"
            )
        ids.append(number)
    return check_ids(ids, field="IDS")


def _id_of(word: str) -> int | None:
    """None where the word is no integer from 0 to MAX_ID."""
    # the length first: Python refuses to read some thousands of digits
    digits = word.lstrip("0") or word[:1]
    if not (word.isascii() and word.isdigit()) or len(digits) > len(str(MAX_ID)):
        return None
    number = int(digits)
    return number if number <= MAX_ID else None


def ids_of_files(files: tuple[str, ...], id_column: str | None) -> IdArray:
    """The ids in tables or texts, as ``delete`` describes them. Raises DataError."""
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
    """One id per line, or the id column of a CSV file, which is named in its first line.

    UTF-8, with a byte order mark or without.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return check_ids(_ids_of_rows(csv.reader(file), path, id_column))
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8", field=str(path), got=str(error)) from error
    except csv.Error as error:
        raise DataError("not CSV", field=str(path), got=str(error)) from error


def _ids_of_rows(rows: Iterable[list[str]], path: Path, id_column: str | None) -> list[int]:
    from shardline.shards.storage.foreign_vectors import ID_COLUMNS

    known = (id_column,) if id_column else ID_COLUMNS
    place = 0
    ids = []
    for number, row in enumerate(rows, start=1):
        if not row:
            continue
        names = [name for name in known if name in row]
        if number == 1 and names:
            place = row.index(names[0])
            continue
        word = row[place].strip() if place < len(row) else ""
        item_id = _id_of(word)
        if item_id is None:
            header = f"or a header with {' or '.join(known)}"
            raise DataError(
                "not an id",
                field=f"{path}:{number}",
                expected=f"an integer from 0 to {MAX_ID}, {header}",
                got=repr(word[:SHOWN]),
            )
        ids.append(item_id)
    return ids
