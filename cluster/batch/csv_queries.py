"""Query files opened, whatever their format: delimited text becomes an Arrow file of its own first.

Text has no types. Those of its columns are inferred from the start of the file, a value further on
that does not fit is refused by name, and a column of JSON lists becomes one of lists.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv

from shardline.cluster.batch.query_files import File
from shardline.shards.core.errors import DataError, NotFound
from shardline.shards.storage.column_types import first_line, read_errors
from shardline.shards.storage.locations import Location
from shardline.shards.storage.table_parts import (
    PEEKED_BYTES,
    Part,
    TableFormat,
    format_of,
    open_parts,
    refuse_repeated,
)

OPTION = "--queries"
TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".gz")
DELIMITERS = ",\t;|"
INFERRED_BYTES = 16 << 20  # of the start of a file, which the types are inferred from
GZIP = b"\x1f\x8b"


def open_query_files(sources: Iterable[object], scratch: Path) -> list[File]:
    """The files of paths and URLs, those of a folder by path; text is converted in ``scratch``.

    Raises:
        NotFound: no such file, or a folder without one. DataError: of no known format, or damaged.
        InvalidInput: a URL of an unknown kind.
    """
    files: list[File] = []
    for source in sources:
        location = Location.of(source, OPTION)
        texts = [each for each in _files_of(location) if _is_text(each)]
        if not texts:
            files += [File(part, part.path, part.location.sha256()) for part in _parts(source)]
            continue
        for each in texts:
            target = scratch / f"text-{len(files):05d}.arrow"
            files.append(File(_converted(each, target), each.path, each.sha256()))
    return files


def _parts(source: object) -> list[Part]:
    return open_parts([source], option=OPTION)


def _files_of(location: Location) -> list[Location]:
    if location.is_folder:
        return location.files()
    if not location.is_file:
        raise NotFound(f"{location.path}: no such file or folder")
    return [location]


def _is_text(location: Location) -> bool:
    if PurePosixPath(location.path).suffix.lower() not in TEXT_SUFFIXES:
        return False
    return format_of(_start(location, None)) is None


def _start(location: Location, compression: str | None) -> bytes:
    with read_errors(location.path), location.stream(compression) as stream:
        return bytes(stream.read(PEEKED_BYTES))


def _converted(location: Location, target: Path) -> Part:
    """The text as an Arrow file at ``target``, a batch at a time."""
    compression = "gzip" if _start(location, None).startswith(GZIP) else None
    start = _start(location, compression).decode("utf-8-sig", errors="replace")
    header = start.partition("\n")[0]
    if not header.strip():
        raise DataError(f"{location.path}: empty", expected="a line with the names of the columns")
    with read_errors(location.path), location.stream(compression) as stream:
        reader = pa.csv.open_csv(
            stream,
            read_options=pa.csv.ReadOptions(block_size=INFERRED_BYTES),
            parse_options=pa.csv.ParseOptions(
                delimiter=max(DELIMITERS, key=header.count), newlines_in_values=True
            ),
            convert_options=pa.csv.ConvertOptions(null_values=[""], strings_can_be_null=True),
        )
        refuse_repeated(reader.schema.names, location.path)
        schema = _write(location, reader, target)
    return Part(Location.of(target, OPTION), TableFormat.IPC_FILE, schema, {})


def _write(location: Location, reader: Any, target: Path) -> pa.Schema:
    """The schema of what was written: that of the first batch."""
    batches = _batches(location, reader)
    first = next(batches, None)
    if first is None:
        raise DataError("no rows", field=location.path, expected="at least one query")
    lists = [name for name in first.schema.names if _holds_lists(first.column(name))]
    first = _with_lists(first, lists, location, 0)
    row = first.num_rows
    with pa.ipc.new_file(str(target), first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            batch = _with_lists(batch, lists, location, row)
            with read_errors(location.path):
                writer.write_batch(batch.cast(first.schema))
            row += batch.num_rows
    return first.schema


def _with_lists(
    batch: pa.RecordBatch, lists: list[str], location: Location, row: int
) -> pa.RecordBatch:
    columns = [
        _parsed(column, location, name, row) if name in lists else column
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _batches(location: Location, reader: Any) -> Iterator[pa.RecordBatch]:
    while True:
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{location.path}: not readable",
                expected="values of the types that the start of the file has",
                got=first_line(error),
                hint="write the table as Parquet, which keeps types",
            ) from error
        if batch.num_rows:
            yield batch


def _holds_lists(column: pa.Array) -> bool:
    if not pa.types.is_string(column.type):
        return False
    first = next((value for value in column.to_pylist() if value), "")
    return first.lstrip().startswith("[")


def _parsed(column: pa.Array, location: Location, name: str, start: int) -> pa.Array:
    values: list[Any] = []
    for row, text in enumerate(column.to_pylist()):
        try:
            values.append(json.loads(text) if text else None)
        except ValueError as error:
            raise DataError(
                "not a list",
                field=f"{location.path}: {name}[{start + row}]",
                expected="a list in JSON, as in [0.1, 0.2]",
                got=text[:60],
            ) from error
    try:
        return (
            pa.array(values, pa.list_(pa.float64())) if _are_numbers(values) else pa.array(values)
        )
    except (pa.ArrowException, TypeError) as error:
        raise DataError(
            "lists of mixed values", field=f"{location.path}: {name}", got=first_line(error)
        ) from error


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether the first list has fractions: vectors, and no lists of ids or words."""
    first: Any = next((value for value in values if value), [])
    return isinstance(first, list) and any(isinstance(each, float) for each in first)
