"""Items without vectors, for ``upsert``: files of any format as ids, features and attributes.

Columns that are called as features of the cluster's item encoder are those, all others attributes.
Text formats are read as ``shardline data import`` reads them, a whole file at a time.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from shardline.shards.core.errors import DataError, NotFound
from shardline.shards.core.schema import IdArray
from shardline.shards.live.item_attributes import column_values
from shardline.shards.storage.column_types import Unusable, feature_column, id_column
from shardline.shards.storage.foreign_vectors import ID_COLUMNS
from shardline.shards.storage.locations import Location
from shardline.shards.storage.table_parts import (
    PEEKED_BYTES,
    Part,
    format_of,
    open_parts,
    pandas_index,
)
from shardline.shards.storage.vector_files import ROWS_PER_BATCH
from shardline.training.data.table_files import TypeOverrides, read_table

OPTION = "FILES"
LISTS = ("multi_valued", "numeric")  # kinds of features whose values may be lists


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """item_ids (n,) int64; of each feature and attribute n values."""

    item_ids: IdArray
    features: Mapping[str, list[Any]]
    attributes: Mapping[str, list[Any]]


@dataclass(frozen=True)  # no slots, which would leave the cached property no place
class ItemTable:
    """A part file, or a file or folder of text. overrides: types of its columns."""

    source: Location
    part: Part | None
    overrides: TypeOverrides

    @cached_property
    def _text(self) -> pa.Table:
        return read_table(self.source, self.overrides)

    @property
    def names(self) -> list[str]:
        if self.part is None:
            return list(self._text.column_names)
        index = pandas_index(self.part.schema)
        return [name for name in self.part.schema.names if name not in index]

    @property
    def num_rows(self) -> int:
        return self._text.num_rows if self.part is None else self.part.num_rows

    def batches(
        self, kinds: Mapping[str, str], id_column: str | None = None
    ) -> Iterator[ItemBatch]:
        """All rows. kinds: name -> kind of the features.

        Raises:
            DataError: no column for a feature or the id, or a value that no feature takes.
        """
        names = self.names
        known = (id_column,) if id_column else ID_COLUMNS
        id_name = next((name for name in known if name in names), None)
        if id_name is None:
            raise self._no_column(" | ".join(known), "name it with --id-column")
        missing = next((name for name in kinds if name not in names), None)
        if missing is not None:
            raise self._no_column(missing, f"the cluster's item encoder takes {', '.join(kinds)}")
        others = [name for name in names if name != id_name and name not in kinds]
        for row, batch in self._record_batches(names):
            yield ItemBatch(
                item_ids=self._ids(batch.column(id_name), id_name, row),
                features={n: self._values(batch.column(n), n, row, kinds[n]) for n in kinds},
                attributes={name: column_values(batch.column(name)) for name in others},
            )

    def _record_batches(self, names: list[str]) -> Iterator[tuple[int, Any]]:
        if self.part is not None:
            yield from self.part.batches(names)
            return
        for start in range(0, self._text.num_rows, ROWS_PER_BATCH):
            yield start, self._text.slice(start, ROWS_PER_BATCH)

    def _ids(self, column: Any, name: str, start: int) -> IdArray:
        try:
            ids = id_column(_chunked(column))
        except Unusable as why:
            raise self._unusable(why, name, start) from why
        if ids.type != pa.int64():
            raise DataError(
                "ids that are not integers from 0 up",
                field=f"{self.source.path}: {name}",
                hint="the cluster knows its items by such numbers: see original_id",
            )
        numbers: IdArray = ids.to_numpy()
        return numbers

    def _values(self, column: Any, name: str, start: int, kind: str) -> list[Any]:
        try:
            values: list[Any] = feature_column(_chunked(column)).to_pylist()
        except Unusable as why:
            raise self._unusable(why, name, start) from why
        if kind not in LISTS or not any(isinstance(value, str) for value in values):
            return values
        return [self._listed(value, name, start + row) for row, value in enumerate(values)]

    def _listed(self, value: Any, name: str, row: int) -> Any:
        """A list in JSON, as text formats have lists, as one."""
        if not isinstance(value, str) or not value.lstrip().startswith("["):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(
                "not a list",
                field=f"{self.source.path}: {name}[{row}]",
                expected='a list in JSON, as in ["a", "b"]',
                got=value[:60],
            ) from error

    def _unusable(self, why: Unusable, name: str, start: int) -> DataError:
        row = "" if why.row is None else f"[{start + why.row}]"
        field = f"{self.source.path}: {name}{row}"
        return DataError("not usable", field=field, expected=why.expected, got=why.what)

    def _no_column(self, name: str, hint: str) -> DataError:
        field = f"{self.source.path}: {name}"
        return DataError("no such column", field=field, got=", ".join(self.names), hint=hint)


def open_items(sources: Sequence[str], types: Sequence[str]) -> list[ItemTable]:
    """The tables of files and folders, paths or URLs, those without rows left out.

    types: ``column=type`` for columns of text formats.

    Raises:
        NotFound: no such file. InvalidInput: no such type. DataError: not readable.
    """
    overrides = TypeOverrides.parse(tuple(types), ids=ID_COLUMNS)
    tables = []
    for source in sources:
        location = Location.of(source, OPTION)
        parts: list[Part | None] = [None]
        if _is_binary(location):
            parts = [*open_parts([source], option=OPTION)]
        for part in parts:
            place = location if part is None else part.location
            tables.append(ItemTable(place, part, overrides))
    return [table for table in tables if table.num_rows]


def _is_binary(location: Location) -> bool:
    """Whether a file, or a folder's first one, is Parquet or Arrow."""
    files = [location] if location.is_file else location.files() if location.is_folder else []
    if not files:
        raise NotFound(f"{location.path}: no such file, or an empty folder")
    with files[0].stream() as stream:
        return format_of(stream.read(PEEKED_BYTES)) is not None


def _chunked(column: Any) -> pa.ChunkedArray:
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
