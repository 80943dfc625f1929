"""Query files opened, whatever their format: delimited text becomes an Arrow file of its own first.

Text has no types. Ids stay as they are written: they are integers only if every one of all text
files is, in the form that an integer is printed in. The types of other columns are inferred from
the start of the file, a value further on that does not fit is refused by name, and a column of JSON
lists becomes one of lists.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv

from shardline.cluster.batch.query_files import ID_COLUMNS
from shardline.cluster.batch.unchanged_file import File, refuse_changed
from shardline.shards.core.errors import DataError, NotFound
from shardline.shards.core.files import disk_errors
from shardline.shards.storage.column_types import LIBRARY_ERRORS, first_line, read_errors
from shardline.shards.storage.locations import Location
from shardline.shards.storage.table_parts import (
    PEEKED_BYTES,
    SUFFIXES,
    Part,
    TableFormat,
    Values,
    folder_columns,
    format_of,
    open_parts,
    refuse_repeated,
)

logger = logging.getLogger(__name__)

OPTION = "--queries"
TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".gz")
DELIMITERS = ",\t;|"
INFERRED_BYTES = 16 << 20  # of the start of a file, which the types are inferred from
GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class _Source:
    """A file as it was given; ``part`` where it is a binary table, else it is text.

    values: of the ``key=value`` folders that text lies in.
    """

    location: Location
    part: Part | None
    values: Values


def open_query_files(
    sources: Iterable[object],
    scratch: Path,
    id_column: str | None = None,
    note: Callable[[str], None] = logger.info,
) -> list[File]:
    """The files of paths and URLs, those of a folder by path; text is converted in ``scratch``.

    id_column: None: the first of ID_COLUMNS that a text file has. note: prints a line before each
    text, because its rows are parsed one by one.

    Raises:
        NotFound: no such file, or a folder without one. DataError: of no known format, or damaged,
            or a folder of text and binary tables. InvalidInput: a URL of an unknown kind.
    """
    found = [each for source in sources for each in _files_of(Location.of(source, OPTION), source)]
    versions = [each.location.version() for each in found]
    names = (id_column,) if id_column else ID_COLUMNS
    ids = [_id_column(each, names) if each.part is None else None for each in found]
    named = [(each.location, name) for each, name in zip(found, ids, strict=True) if name]
    kind = pa.int64() if all(_are_integers(*each) for each in named) else pa.string()
    files: list[File] = []
    for place, (each, name, version) in enumerate(zip(found, ids, versions, strict=True)):
        given, part = each.location.path, each.part
        if part is None:
            note(f"reading text: {given}")
            target = scratch / f"text-{place:05d}.arrow"
            part = _converted(each, target, {} if name is None else {name: kind})
        sha256 = each.location.sha256()
        if each.part is None:  # only the converted copy is read from here on
            refuse_changed(each.location, version, given)
            version = part.location.version()
        files.append(File(part=part, name=given, sha256=sha256, version=version))
    return files


def _files_of(location: Location, source: object) -> list[_Source]:
    """Raises DataError: text and binary tables in one folder, of which one may be no query file."""
    if location.is_file:
        if _is_text(location):
            return [_Source(location, None, {})]
        return [_Source(part.location, part, {}) for part in open_parts([source], option=OPTION)]
    if not location.is_folder:
        raise NotFound(f"{location.path}: no such file or folder")
    files = location.files()
    if not files:
        raise NotFound(
            f"{location.path}: no file in it",
            hint="files and folders whose names begin with _ or . are passed over",
        )
    texts = [each for each in files if _is_text(each)]
    if not texts:
        return [_Source(part.location, part, {}) for part in open_parts([source], option=OPTION)]
    other = next((each for each in files if each not in texts and _is_table(each)), None)
    if other is not None:
        raise DataError(
            f"{location.path}: text and other files in one folder",
            expected="queries of one kind: text, or Parquet and Arrow",
            got=f"{texts[0].name} and {other.name}",
            hint="name the files that are queries, one --queries each",
        )
    return [
        _Source(text, None, values)
        for text, values in zip(texts, folder_columns(location, texts), strict=True)
    ]


def _is_table(location: Location) -> bool:
    """Whether a file of a folder is one of a table, or its name says so."""
    is_named = PurePosixPath(location.path).suffix.lower() in SUFFIXES
    return is_named or format_of(_start(location, None)) is not None


def _is_text(location: Location) -> bool:
    if PurePosixPath(location.path).suffix.lower() not in TEXT_SUFFIXES:
        return False
    return format_of(_start(location, None)) is None


def _start(location: Location, compression: str | None) -> bytes:
    with read_errors(location.path), location.stream(compression) as stream:
        return bytes(stream.read(PEEKED_BYTES))


def _id_column(source: _Source, names: Sequence[str]) -> str | None:
    """The first of the names that is a column of a text file itself."""
    with _reader_of(source.location, pa.csv.ConvertOptions()) as reader:
        return next((name for name in names if name in reader.schema.names), None)


def _are_integers(location: Location, column: str) -> bool:
    """Whether every id is an integer as it is printed: not 007, +7, or above 64 bits. Without any
    id, no."""
    options = pa.csv.ConvertOptions(
        include_columns=[column],
        column_types={column: pa.string()},
        null_values=[""],
        strings_can_be_null=True,
    )
    found = 0
    with _reader_of(location, options) as reader:
        for batch in _batches(location, reader):
            texts = batch.column(0)
            try:
                printed = texts.cast(pa.int64()).cast(pa.string())
            except pa.ArrowInvalid:
                return False
            if not printed.equals(texts):
                return False
            found += len(texts) - texts.null_count
    return found > 0


def _converted(source: _Source, target: Path, types: dict[str, pa.DataType]) -> Part:
    """The text as an Arrow file at ``target``, a batch at a time. types: of ids, as declared."""
    options = pa.csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
    with _reader_of(source.location, options) as reader:
        schema = _write(source.location, reader, target, types)
    values = {name: value for name, value in source.values.items() if name not in schema.names}
    for name, value in values.items():
        schema = schema.append(pa.field(name, value.type))
    return Part(Location.of(target, OPTION), TableFormat.IPC_FILE, schema, values)


@contextmanager
def _reader_of(location: Location, options: pa.csv.ConvertOptions) -> Iterator[Any]:
    """A reader of the text's batches. Raises DataError: not readable, or a column twice."""
    compression = "gzip" if _start(location, None).startswith(GZIP) else None
    start = _start(location, compression).decode("utf-8-sig", errors="replace")
    header = start.partition("\n")[0]
    if not header.strip():
        raise DataError(f"{location.path}: empty", expected="a line with the names of the columns")
    with ExitStack() as stack:
        with read_errors(location.path):
            reader = pa.csv.open_csv(
                stack.enter_context(location.stream(compression)),
                read_options=pa.csv.ReadOptions(block_size=INFERRED_BYTES),
                parse_options=pa.csv.ParseOptions(
                    delimiter=max(DELIMITERS, key=header.count), newlines_in_values=True
                ),
                convert_options=options,
            )
            refuse_repeated(reader.schema.names, location.path)
        yield reader  # what goes wrong while it is used may be another file's


def _write(location: Location, reader: Any, target: Path, types: Collection[str]) -> pa.Schema:
    """The schema of what was written: that of the first batch. types: columns that stay as is."""
    batches = _batches(location, reader)
    first = next(batches, None)
    if first is None:
        raise DataError("no rows", field=location.path, expected="at least one query")
    inferred = [name for name in first.schema.names if name not in types]
    lists = [name for name in inferred if _holds_lists(first.column(name))]
    first = _with_lists(first, lists, location, 0)
    row = first.num_rows
    with disk_errors(target.parent), pa.ipc.new_file(str(target), first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            batch = _with_lists(batch, lists, location, row)
            with read_errors(location.path):
                batch = batch.cast(first.schema)
            writer.write_batch(batch)
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
            with read_errors(location.path, "values of the types that the start of the file has"):
                batch = reader.read_next_batch()
        except StopIteration:
            return
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
        except (ValueError, RecursionError) as error:
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
    except LIBRARY_ERRORS as error:
        raise DataError(
            "lists of mixed values", field=f"{location.path}: {name}", got=first_line(error)
        ) from error


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether the first list has fractions: vectors, and no lists of ids or words."""
    first: Any = next((value for value in values if value), [])
    return isinstance(first, list) and any(isinstance(each, float) for each in first)
