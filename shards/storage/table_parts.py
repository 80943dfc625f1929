"""Part files of one table, read in batches: Parquet, Arrow IPC files and streams.

The content of a file says its format, never its name. No exception of a library leaves this
module: a file that cannot be read, and a value that its type does not allow, are named.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from shardline.shards.core.errors import DataError, NotFound
from shardline.shards.storage.column_types import first_line, read_errors
from shardline.shards.storage.locations import Location
from shardline.shards.storage.vector_files import ROWS_PER_BATCH

Values = dict[str, "pa.Scalar[Any]"]  # one value per column, the same in every row
PEEKED_BYTES = 1 << 16
BINARY_TABLES = "Parquet, or an Arrow IPC file or stream"
# names that promise such a table; other files of a folder are passed over if they hold none
SUFFIXES = ("", ".parquet", ".arrow", ".feather", ".arrows", ".ipc")
WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d{0,16})")
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
TYPES_HINT = "in CSV and JSON, --types gives a column one type in all parts"


class TableFormat(Enum):
    """A binary format, by the bytes that its files begin with."""

    PARQUET = b"PAR1"
    IPC_FILE = b"ARROW1"
    IPC_STREAM = b"\xff\xff\xff\xff"


def format_of(start: bytes) -> TableFormat | None:
    """The format of a file that begins like this; None for text and everything else."""
    return next((form for form in TableFormat if start.startswith(form.value)), None)


@dataclass(frozen=True, slots=True)
class Part:
    """One file. ``schema`` has its columns, and those of the ``key=value`` folders it lies in."""

    location: Location
    form: TableFormat
    schema: pa.Schema
    folder_values: Values

    @property
    def path(self) -> str:
        return self.location.path

    @property
    def is_empty(self) -> bool:
        """Whether there are no rows."""
        return not self.schema.names or not any(self.batches(self.schema.names[:1]))

    @property
    def num_rows(self) -> int:
        """Rows of the file.

        Raises:
            DataError: not readable.
        """
        with read_errors(self.path, BINARY_TABLES):
            if self.form is TableFormat.PARQUET:
                with self.location.open() as file:
                    return int(pq.ParquetFile(file).metadata.num_rows)
            return sum(batch.num_rows for _, batch in self._read([], 0))

    def batches(
        self, columns: Sequence[str], first: int = 0
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Each batch of these columns, in their order, and the row of the file it starts with.

        From row ``first`` on. No batch is empty, none has more than ROWS_PER_BATCH rows, and every
        value is valid.

        Raises:
            DataError: not readable, or a value that its type does not allow, such as text that is
                not UTF-8.
        """
        with read_errors(self.path, BINARY_TABLES):
            stored = [c for c in columns if c not in self.folder_values]
            for begin, whole in self._read(stored, first):
                for cut in range(max(0, first - begin), whole.num_rows, ROWS_PER_BATCH):
                    batch = whole.slice(cut, ROWS_PER_BATCH)
                    for name, value in self.folder_values.items():
                        batch = batch.append_column(name, pa.repeat(value, batch.num_rows))
                    batch = batch.select(columns)
                    refuse_invalid(batch, self.path, begin + cut)
                    yield begin + cut, batch

    def _read(self, columns: list[str], first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches with the row each starts with; some that end before row ``first`` are left out,
        unread where the format allows it."""
        # Parquet is decoded from buffers; pages of a mapped file would count as our memory
        is_parquet = self.form is TableFormat.PARQUET
        location = self.location
        with location.system.open_input_file(self.path) if is_parquet else location.open() as file:
            start = 0
            if is_parquet:
                parquet = pq.ParquetFile(file, page_checksum_verification=True)
                sizes = [
                    parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)
                ]
                groups = list(range(len(sizes)))
                while groups and start + sizes[groups[0]] <= first:
                    start += sizes[groups.pop(0)]
                # one by one: a reader of several groups keeps all that it has read
                batches: Iterator[pa.RecordBatch] = itertools.chain.from_iterable(
                    parquet.iter_batches(
                        ROWS_PER_BATCH, row_groups=[group], columns=columns or None
                    )
                    for group in groups
                )
            else:
                included = [self.schema.get_field_index(name) for name in columns]
                options = pa.ipc.IpcReadOptions(included_fields=included or None)
                if self.form is TableFormat.IPC_FILE:
                    reader = pa.ipc.open_file(file, options=options)
                    batches = map(reader.get_batch, range(reader.num_record_batches))
                else:
                    batches = iter(pa.ipc.open_stream(file, options=options))
            for batch in batches:
                yield start, batch
                start += batch.num_rows


def open_parts(sources: Iterable[object], *, option: str) -> list[Part]:
    """The parts of files and folders, paths or URLs of an ``option``, those of a folder by path.

    Files of a folder are passed over if their names begin with ``_`` or ``.``, or if neither name
    nor content is one of a table.

    Raises:
        NotFound: no such file, or a folder without one. InvalidInput: a URL of an unknown kind.
        DataError: not readable, of no known format, or a column that occurs twice.
    """
    parts: list[Part] = []
    for source in sources:
        location = Location.of(source, option)
        if location.is_folder:
            files = location.files()
            found = list(map(_open, files, folder_columns(location, files)))
            if not any(found):
                raise NotFound(f"{location.path}: no Parquet or Arrow file in it")
            parts += filter(None, found)
        elif location.is_file:
            parts += filter(None, [_open(location, None)])
        else:
            raise NotFound(f"{location.path}: no such file or folder")
    return parts


def _open(location: Location, values: Values | None) -> Part | None:
    """The part; None for a file of a folder that is none. values: None outside a folder."""
    with read_errors(location.path, BINARY_TABLES):
        with location.stream() as stream:
            start = stream.read(PEEKED_BYTES)
        form = format_of(start)
        if form is None:
            if values is not None and PurePosixPath(location.path).suffix not in SUFFIXES:
                return None
            raise DataError(
                f"{location.path}: not readable",
                expected=BINARY_TABLES,
                got="another format" if start else "an empty file",
            )
        schema = _schema(location, form)
        refuse_repeated(schema.names, location.path)
    values = {name: value for name, value in (values or {}).items() if name not in schema.names}
    for name, value in values.items():
        schema = schema.append(pa.field(name, value.type))
    return Part(location, form, schema, values)


def _schema(location: Location, form: TableFormat) -> pa.Schema:
    with location.open() as file:
        if form is TableFormat.PARQUET:
            return pq.ParquetFile(file).schema_arrow
        if form is TableFormat.IPC_FILE:
            return pa.ipc.open_file(file).schema
        return pa.ipc.open_stream(file).schema


def folder_columns(folder: Location, parts: Sequence[Location]) -> list[Values]:
    """Of each part a value per ``key=value`` folder on the way to it, as Spark and Hive write them.

    A key has integers if all its values are; a code such as 007 is none.
    """
    texts = [_steps(folder, part) for part in parts]
    words = {
        key
        for each in texts
        for key, text in each.items()
        if text is not None and not WHOLE_NUMBER.fullmatch(text)
    }
    return [
        {
            key: pa.scalar(text, pa.string())
            if key in words
            else pa.scalar(None if text is None else int(text), pa.int64())
            for key, text in each.items()
        }
        for each in texts
    ]


def _steps(folder: Location, part: Location) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for step in PurePosixPath(part.path[len(folder.path) :].lstrip("/")).parts[:-1]:
        key, sign, value = step.partition("=")
        if sign and key:
            found.setdefault(unquote(key), None if value == HIVE_NULL else unquote(value))
    return found


def unified_types(
    parts: Iterable[tuple[str, pa.Schema]], hint: str = TYPES_HINT
) -> dict[str, pa.DataType]:
    """The type that holds each column of all parts, given with their paths; numbers widen.

    Raises:
        DataError: types that have nothing in common; names the column and both files.
    """
    known: dict[str, tuple[pa.Field[Any], str]] = {}
    for path, schema in parts:
        for each in schema:
            first, where = known.setdefault(each.name, (each, path))
            try:
                both = [pa.schema([first]), pa.schema([each])]
                widened = pa.unify_schemas(both, promote_options="permissive").field(0)
            except pa.ArrowException as error:
                raise DataError(
                    "part files disagree",
                    field=f"{path}: {each.name}",
                    expected=f"{first.type}, as in {where}",
                    got=str(each.type),
                    hint=hint,
                ) from error
            known[each.name] = (widened, where)
    return {name: field.type for name, (field, _) in known.items()}


def refuse_repeated(names: list[str], path: str) -> None:
    """DataError for a name that several columns have."""
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise DataError("column occurs twice", field=f"{path}: {repeated[0]}")


def pandas_index(schema: pa.Schema) -> set[str]:
    """Columns that were the index of a pandas frame: of its bookkeeping, no data."""
    try:
        told = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
        return {name for name in told.get("index_columns", []) if isinstance(name, str)}
    except (ValueError, AttributeError, TypeError):
        return set()


def refuse_invalid(batch: pa.RecordBatch, path: str, start: int) -> None:
    """DataError for a value that its type does not allow, with its row, counted from ``start``."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for row in range(len(column)):
                try:
                    column.slice(row, 1).validate(full=True)
                except pa.ArrowInvalid as reason:
                    # of a dictionary, whose values belong to no row, the first is as good as any
                    is_shared = pa.types.is_dictionary(column.type)
                    raise DataError(
                        "a value that its type does not allow",
                        field=f"{path}: {name}" + ("" if is_shared else f"[{start + row}]"),
                        expected=f"{column.type}, text in UTF-8",
                        got=first_line(reason),
                    ) from error
        raise
