"""A table from a file or a folder of part files, local or behind a URL.

The content says the format: Parquet, Arrow IPC files and streams, JSON lines, and delimited text
with a header line, the last two plain or gzipped. A folder is one table: its files in the order of
their paths, those whose name begins with ``_`` or ``.`` left out, and ``key=value`` folders as
columns. Whatever a library says of a source that it cannot read becomes a DataError that names the
file.
"""

import contextlib
import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from shardline.shards.core.errors import DataError, InvalidInput, NotFound
from shardline.shards.storage.column_types import TABLES, read_errors
from shardline.shards.storage.locations import Location
from shardline.shards.storage.table_parts import (
    PEEKED_BYTES,
    TableFormat,
    folder_columns,
    format_of,
    refuse_invalid,
    refuse_repeated,
    unified_types,
)

# what a user may call a type on the command line
NAMED_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
}
DELIMITERS = ",\t;|"
CODE = re.compile(r"0\d+|-?\d{19,}")  # may be no int64, or would lose its zeros
# an empty field is none in any column; these are none where the others of the column are numbers
NULL_NUMBERS = ["", "null", "NULL", "NaN", "nan", "NA", "N/A", "n/a", "#N/A", "None", "-nan"]


@dataclass(slots=True)
class TypeOverrides:
    """Columns of text formats whose type is given, not inferred; ``used`` are those that exist.

    ids: columns of ids; ``codes`` are those in which numbers would lose leading zeros: texts.
    """

    types: Mapping[str, pa.DataType] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    ids: tuple[str, ...] = ()
    codes: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, given: tuple[str, ...], ids: tuple[str, ...] = ()) -> "TypeOverrides":
        """Of ``column=type`` texts. Raises InvalidInput for another form or an unknown type."""
        types = {}
        for text in given:
            column, _, name = text.rpartition("=")
            if not column or name not in NAMED_TYPES:
                raise InvalidInput(
                    "wrong value",
                    field="--types",
                    expected=f"column=type, a type of {', '.join(NAMED_TYPES)}",
                    got=repr(text),
                )
            types[column] = NAMED_TYPES[name]
        return cls(types, ids=ids)


def read_table(location: Location, overrides: TypeOverrides | None = None) -> pa.Table:
    """The whole table, its dictionaries decoded where part files have different ones.

    Raises:
        NotFound: nothing there. DataError: not readable, or part files that do not fit together.
    """
    overrides = overrides or TypeOverrides()
    if location.is_file:
        return _read_file(location, overrides)
    if not location.is_folder:
        raise NotFound(f"{location.path}: no such file")
    parts = location.files()
    if not parts:
        raise NotFound(f"{location.path}: no files in the folder")
    known = len(overrides.codes)
    tables = []
    for part, values in zip(parts, folder_columns(location, parts), strict=True):
        table = _decoded(_read_file(part, overrides))
        for name, value in values.items():
            if name not in table.column_names:
                table = table.append_column(name, pa.repeat(value, table.num_rows))
        tables.append(table)
    if len(overrides.codes) > known:  # parts that were read before one with such ids: once more
        return read_table(location, overrides)
    return _joined(tables, [part.path for part in parts])


def _read_file(location: Location, overrides: TypeOverrides) -> pa.Table:
    with read_errors(location.path):
        with location.stream() as stream:
            start = stream.read(PEEKED_BYTES)
        form = format_of(start)
        if form is None:
            table = _read_text(location, start, overrides)
        else:
            with location.open() as file:
                if form is TableFormat.PARQUET:
                    table = pq.ParquetFile(file).read()
                else:
                    is_file = form is TableFormat.IPC_FILE
                    reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
                    table = reader.read_all()
                    _refuse_damage(table, location.path)
        refuse_repeated(table.column_names, location.path)
        return table


def _refuse_damage(table: pa.Table, path: str) -> None:
    """Arrow maps its own files unchecked: an offset beyond the data would end the process.

    Whether texts are UTF-8 is looked at where columns become features, which may be dropped.
    """
    raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    start = 0
    for batch in table.to_batches():
        columns = [c.view(raw[c.type]) if c.type in raw else c for c in batch.columns]
        refuse_invalid(pa.RecordBatch.from_arrays(columns, batch.schema.names), path, start)
        start += batch.num_rows


def _read_text(location: Location, start: bytes, overrides: TypeOverrides) -> pa.Table:
    path = location.path
    compression = "gzip" if start[:2] == b"\x1f\x8b" else None
    if compression:
        with location.stream(compression) as stream:
            start = stream.read(PEEKED_BYTES)
    if not start.strip():
        raise DataError(f"{path}: empty", expected="a table")
    if b"\0" in start:
        raise DataError(
            f"{path}: of no known format",
            expected=TABLES,
            got="binary data",
        )
    with location.stream(compression) as stream:
        first = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if first == b"[":
            raise DataError(
                f"{path}: a JSON array", expected="JSON lines", hint="write one object per line"
            )
        if first == b"{":
            return _read_json(stream, overrides)
        return _read_delimited(stream, start, overrides)


def _read_delimited(stream: pa.NativeFile, start: bytes, overrides: TypeOverrides) -> pa.Table:
    text = start.decode("utf-8-sig", errors="replace").lstrip("\r\n")
    delimiter = _delimiter(text)
    header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    types = {name: kind for name, kind in overrides.types.items() if name in header}
    overrides.used.update(types)
    overrides.codes |= _codes(text, delimiter, set(overrides.ids) & set(header))
    types = dict.fromkeys(overrides.codes & set(header), pa.string()) | types
    table = pa.csv.read_csv(
        stream,
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types=types, null_values=NULL_NUMBERS),
    )
    nameless = [place for place, name in enumerate(table.column_names) if not name]
    for place in reversed(nameless):  # the index of a pandas frame, or commas that end the lines
        table = table.remove_column(place)
    for place, name in enumerate(table.column_names):
        column = table.column(place)
        if pa.types.is_string(column.type):  # a text "NA" may be Namibia, an empty one is none
            empty = pc.equal(column, "")
            table = table.set_column(
                place, name, pc.if_else(empty, pa.scalar(None, pa.string()), column)
            )
    return table


def _codes(text: str, delimiter: str, names: set[str]) -> set[str]:
    """Those of the columns that hold a code at the start of a file: 007, or beyond int64."""
    found: set[str] = set()
    with contextlib.suppress(csv.Error):  # the reader of the whole file will say it
        for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter):
            found |= {name for name in names if _is_code(row[name] or "")}
    return found


def _is_code(text: str) -> bool:
    if not CODE.fullmatch(text):
        return False
    return text[0] == "0" or not -(1 << 63) <= int(text) < 1 << 63


def _delimiter(text: str) -> str:
    """The candidate that cuts the header line into most fields; quoted ones do not count."""

    def fields(delimiter: str) -> int:
        return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), []))

    return max(DELIMITERS, key=fields)


def _read_json(stream: pa.NativeFile, overrides: TypeOverrides) -> pa.Table:
    content = stream.read()
    options = {"newlines_in_values": True}
    table = pa.json.read_json(
        pa.BufferReader(content), parse_options=pa.json.ParseOptions(**options)
    )
    given = [(name, kind) for name, kind in overrides.types.items() if name in table.column_names]
    overrides.used.update(name for name, _ in given)
    if given:  # as it stands in the file: a number or time made of the text first may be another
        options["explicit_schema"] = pa.schema(given)
        options = pa.json.ParseOptions(**options)
        table = pa.json.read_json(pa.BufferReader(content), parse_options=options)
    return table


def _decoded(table: pa.Table) -> pa.Table:
    """Without dictionaries: those of part files differ."""
    for place, each in enumerate(table.schema):
        if pa.types.is_dictionary(each.type):
            column = table.column(place).cast(each.type.value_type)
            table = table.set_column(place, each.name, column)
    return table


def _joined(tables: list[pa.Table], paths: list[str]) -> pa.Table:
    """One table; columns that a part lacks are null there, and numbers widen.

    Raises:
        DataError: as ``unified_types``.
    """
    unified_types((path, table.schema) for table, path in zip(tables, paths, strict=True))
    with read_errors(paths[0]):
        return pa.concat_tables(tables, promote_options="permissive")
