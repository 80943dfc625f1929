"""A table from a file or a folder of part files, local or behind a URL.

The content says the format: Parquet, Arrow IPC files and streams, JSON lines, and delimited text
with a header line, the last two plain or gzipped. A folder is one table: its files in the order of
their paths, those whose name begins with ``_`` or ``.`` left out, and ``key=value`` folders as
columns. Whatever a library says of a source that it cannot read becomes a DataError that names the
file.
"""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from pyarrow import fs

from shardline.shards.core.errors import DataError, InvalidInput, NotFound
from shardline.training.data.column_types import NAMED_TYPES, read_errors

PEEKED_BYTES = 1 << 16
DELIMITERS = ",\t;|"
# an empty field is none in any column; these are none where the others of the column are numbers
NULL_NUMBERS = ["", "null", "NULL", "NaN", "nan", "NA", "N/A", "n/a", "#N/A", "None", "-nan"]


@dataclass(frozen=True, slots=True)
class Location:
    """A path in a file system; ``name`` is its last part, for messages."""

    system: fs.FileSystem
    path: str

    @classmethod
    def of(cls, source: object) -> "Location":
        """A local path, or a URL that pyarrow or fsspec knows (s3://, gs://, file://, ...).

        Raises:
            InvalidInput: a URL of no known kind, or a malformed one.
        """
        text = str(source)
        if "://" not in text:
            return cls(fs.LocalFileSystem(), text.rstrip("/") or "/")
        try:
            return cls(*_from_url(text))
        except (pa.ArrowException, ValueError, OSError, ImportError) as error:
            raise InvalidInput(
                "not a place to read from",
                field="--source",
                expected="a path, or a URL such as s3://bucket/folder or file:///folder",
                got=f"{text}: {_first_line(error)}",
                hint="URLs other than s3://, gs://, hdfs:// and file:// need fsspec installed",
            ) from error

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def parent(self) -> "Location":
        return Location(self.system, str(PurePosixPath(self.path).parent))

    def child(self, name: str) -> "Location":
        return Location(self.system, str(PurePosixPath(self.path) / name))

    @property
    def is_file(self) -> bool:
        return bool(self._info().type == fs.FileType.File)

    @property
    def is_folder(self) -> bool:
        return bool(self._info().type == fs.FileType.Directory)

    def named(self, stem: str) -> "Location | None":
        """The only file or folder in this folder that is called ``stem``, or ``stem.something``.

        Raises:
            DataError: there are several.
        """
        if self.child(stem)._info().type != fs.FileType.NotFound:
            return self.child(stem)
        found = sorted(
            entry.base_name
            for entry in self._entries(recursive=False)
            if entry.base_name.startswith(f"{stem}.")
        )
        if len(found) > 1:
            raise DataError(
                f"{self.path}: several tables called {stem}",
                got=", ".join(found),
                hint="--users-file, --items-file and --interactions-file say which",
            )
        return self.child(found[0]) if found else None

    def files(self) -> list[str]:
        """Paths below the folder, ascending, without those that tools keep for themselves."""
        start = len(self.path.rstrip("/")) + 1
        return sorted(
            entry.path
            for entry in self._entries(recursive=True)
            if entry.type == fs.FileType.File
            and not any(part[0] in "_." for part in PurePosixPath(entry.path[start:]).parts)
        )

    def _info(self) -> fs.FileInfo:
        with read_errors(self.path):
            return self.system.get_file_info(self.path)

    def _entries(self, *, recursive: bool) -> list[fs.FileInfo]:
        with read_errors(self.path):
            selector = fs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
            return list(self.system.get_file_info(selector))


@dataclass(slots=True)
class TypeOverrides:
    """Columns of text formats whose type is given, not inferred; ``used`` are those that exist."""

    types: Mapping[str, pa.DataType] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, given: tuple[str, ...]) -> "TypeOverrides":
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
        return cls(types)


def read_table(location: Location, overrides: TypeOverrides | None = None) -> pa.Table:
    """The whole table, its dictionaries decoded where part files have different ones.

    Raises:
        NotFound: nothing there. DataError: not readable, or part files that do not fit together.
    """
    overrides = overrides or TypeOverrides()
    if location.is_file:
        return _read_file(location.system, location.path, overrides)
    if not location.is_folder:
        raise NotFound(f"{location.path}: no such file")
    paths = location.files()
    if not paths:
        raise NotFound(f"{location.path}: no files in the folder")
    tables = []
    for path in paths:
        table = _decoded(_read_file(location.system, path, overrides))
        tables.append(_with_folder_columns(table, location.path, path))
    _refuse_repeated(tables, paths)
    return _joined(tables, paths)


def _read_file(system: fs.FileSystem, path: str, overrides: TypeOverrides) -> pa.Table:
    with read_errors(path):
        with system.open_input_stream(path, compression=None) as stream:
            start = stream.read(PEEKED_BYTES)
        if start[:4] == b"PAR1":
            with system.open_input_file(path) as file:
                table = pq.ParquetFile(file).read()
        elif start[:6] == b"ARROW1":
            with system.open_input_file(path) as file:
                table = pa.ipc.open_file(file).read_all()
        elif start[:4] == b"\xff\xff\xff\xff":
            with system.open_input_stream(path, compression=None) as stream:
                table = pa.ipc.open_stream(stream).read_all()
        else:
            table = _read_text(system, path, start, overrides)
    _refuse_repeated([table], [path])
    return table


def _read_text(
    system: fs.FileSystem, path: str, start: bytes, overrides: TypeOverrides
) -> pa.Table:
    compression = "gzip" if start[:2] == b"\x1f\x8b" else None
    if compression:
        with system.open_input_stream(path, compression=compression) as stream:
            start = stream.read(PEEKED_BYTES)
    if not start.strip():
        raise DataError(f"{path}: empty", expected="a table")
    if b"\0" in start:
        raise DataError(
            f"{path}: of no known format",
            expected="Parquet, Arrow, JSON lines, or delimited text in UTF-8",
            got="binary data",
        )
    with system.open_input_stream(path, compression=compression) as stream:
        first = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if first == b"[":
            raise DataError(
                f"{path}: a JSON array", expected="JSON lines", hint="write one object per line"
            )
        if first == b"{":
            return _read_json(stream, overrides)
        return _read_delimited(stream, start, overrides)


def _read_delimited(stream: pa.NativeFile, start: bytes, overrides: TypeOverrides) -> pa.Table:
    text = start.decode("utf-8-sig", errors="replace")
    delimiter = _delimiter(text)
    header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    types = {name: kind for name, kind in overrides.types.items() if name in header}
    overrides.used.update(types)
    table = pa.csv.read_csv(
        stream,
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types=types, null_values=NULL_NUMBERS),
    )
    for place, name in enumerate(table.column_names):
        column = table.column(place)
        if pa.types.is_string(column.type):  # a text "NA" may be Namibia, an empty one is none
            empty = pc.equal(column, "")
            table = table.set_column(
                place, name, pc.if_else(empty, pa.scalar(None, pa.string()), column)
            )
    return table


def _delimiter(text: str) -> str:
    """The candidate that cuts the header line into most fields; quoted ones do not count."""

    def fields(delimiter: str) -> int:
        return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), []))

    return max(DELIMITERS, key=fields)


def _read_json(stream: pa.NativeFile, overrides: TypeOverrides) -> pa.Table:
    table = pa.json.read_json(stream, parse_options=pa.json.ParseOptions(newlines_in_values=True))
    for name, kind in overrides.types.items():
        if name in table.column_names:
            overrides.used.add(name)
            place = table.column_names.index(name)
            table = table.set_column(place, name, table.column(place).cast(kind))
    return table


def _decoded(table: pa.Table) -> pa.Table:
    """Without dictionaries: those of part files differ."""
    for place, each in enumerate(table.schema):
        if pa.types.is_dictionary(each.type):
            column = table.column(place).cast(each.type.value_type)
            table = table.set_column(place, each.name, column)
    return table


def _with_folder_columns(table: pa.Table, folder: str, path: str) -> pa.Table:
    """With a column for each ``key=value`` folder on the way, as Spark and Hive write them."""
    for part in PurePosixPath(path[len(folder) :].lstrip("/")).parts[:-1]:
        key, sign, value = part.partition("=")
        if sign and key and key not in table.column_names:
            whole = value.lstrip("-").isascii() and value.lstrip("-").isdigit()
            scalar: pa.Scalar[Any] = (
                pa.scalar(None, pa.string())
                if value == "__HIVE_DEFAULT_PARTITION__"
                else pa.scalar(int(value) if whole and len(value) < 18 else value)
            )
            table = table.append_column(key, pa.repeat(scalar, table.num_rows))
    return table


def _joined(tables: list[pa.Table], paths: list[str]) -> pa.Table:
    """One table; columns that a part lacks are null there, and numbers widen.

    Raises:
        DataError: a column whose types have nothing in common; names it and both files.
    """
    first: dict[str, tuple[pa.Field[Any], str]] = {}
    for table, path in zip(tables, paths, strict=True):
        for each in table.schema:
            known, where = first.setdefault(each.name, (each, path))
            try:
                both = [pa.schema([known]), pa.schema([each])]
                widened = pa.unify_schemas(both, promote_options="permissive").field(0)
            except pa.ArrowException as error:
                raise DataError(
                    "part files disagree",
                    field=f"{path}: {each.name}",
                    expected=f"{known.type}, as in {where}",
                    got=str(each.type),
                ) from error
            first[each.name] = (widened, where)
    with read_errors(paths[0]):
        return pa.concat_tables(tables, promote_options="permissive")


def _refuse_repeated(tables: list[pa.Table], paths: list[str]) -> None:
    for table, path in zip(tables, paths, strict=True):
        names = table.column_names
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise DataError("column occurs twice", field=f"{path}: {repeated}")


def _from_url(url: str) -> tuple[fs.FileSystem, str]:
    try:
        system, path = fs.FileSystem.from_uri(url)
    except pa.ArrowInvalid:
        import fsspec

        handler, path = fsspec.core.url_to_fs(url)
        system = fs.PyFileSystem(fs.FSSpecHandler(handler))
    return system, path.rstrip("/") or "/"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
