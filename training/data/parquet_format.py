"""Parquet tables of users, items and interactions, or of interactions alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shardline.shards.core.errors import DataError, InvalidInput, NotFound
from shardline.shards.core.schema import IdArray
from shardline.training.data.formats import ImportConfig, ImportReport, Source
from shardline.training.data.splits import SplitCodes
from shardline.training.data.table_checks import SPLITS
from shardline.training.data.tables import ORIGINAL_ID


def read_parquet(source: Path, config: ImportConfig, report: ImportReport) -> Source:
    """Three tables, or the interactions alone; a table that is not there is derived.

    Where the source is the interactions' file, tables beside it are read only if they are named.

    Raises:
        NotFound: no interactions there, or no table of a name that was asked for.
        InvalidInput: the source is the interactions' file, and another one is named.
        DataError: a table that is no Parquet, or is not as docs/DATA.md says.
    """
    is_file = source.is_file()
    if is_file and "interactions_file" in config.model_fields_set:
        raise InvalidInput(
            "the source is a file itself",
            field="--interactions-file",
            hint="name its folder with --source, or leave out --interactions-file",
        )
    name = source.name if is_file else config.interactions_file
    folder = source.parent if is_file else source
    table = _parquet(folder / name)
    ids = {}
    features = {}
    for kind, column, file in (
        ("user", config.user_column, config.users_file),
        ("item", config.item_column, config.items_file),
    ):
        seen = _column(table, column, name)
        # a file that was asked for by name has to be there, the default one need not
        is_named = f"{kind}s_file" in config.model_fields_set
        path = None if file is None or (is_file and not is_named) else folder / file
        listed = _parquet(path) if path is not None and (is_named or path.exists()) else None
        base = pa.chunked_array([seen.unique()])
        if listed is not None:
            base = _column(listed, column, str(file))
            _refuse_other_ids(seen, base, f"{name}: {column}", str(file))
        if len(base.unique()) != len(base):
            raise DataError(
                "ids occur twice", field=f"{file}: {column}", expected="one row for each id"
            )
        mapping = _Mapping(base)
        ids[kind] = mapping(seen)
        features[kind] = _with_ids(listed, column, f"{kind}_id", mapping, base)
    return Source(
        features["user"],
        features["item"],
        ids["user"],
        ids["item"],
        _times(table, config.time_column, name),
        _codes(table, name),
        lambda row: f"{name}: row {row}",
    )


class _Mapping:
    """Original ids to int64 ids; -1 for ids that the table does not list."""

    def __init__(self, ids: pa.ChunkedArray) -> None:
        kept = pa.types.is_integer(ids.type) and (len(ids) == 0 or pc.min(ids).as_py() >= 0)
        self.keeps = kept
        self._ids = {value: value for value in ids.to_pylist()} if kept else {}
        if not kept:
            self._ids = {value: row for row, value in enumerate(sorted(set(ids.to_pylist())))}

    def __call__(self, ids: pa.ChunkedArray) -> IdArray:
        distinct = ids.combine_chunks().dictionary_encode()
        values = [self._ids.get(value, -1) for value in distinct.dictionary.to_pylist()]
        codes = distinct.indices.to_numpy()
        mapped: IdArray = np.array(values, dtype=np.int64)[codes]
        return mapped


def _refuse_other_ids(
    seen: pa.ChunkedArray, listed: pa.ChunkedArray, field: str, file: str
) -> None:
    """DataError where one side has numbers and the other texts: none of them would be found."""
    if pa.types.is_integer(seen.type) != pa.types.is_integer(listed.type):
        raise DataError(
            "ids of another type",
            field=field,
            expected=f"{listed.type}, as in {file}",
            got=str(seen.type),
        )


def _with_ids(
    listed: pa.Table | None, column: str, key: str, mapping: _Mapping, base: pa.ChunkedArray
) -> pa.Table:
    """The feature table under our key; a derived table has only its ids."""
    columns = {key: pa.array(mapping(base))}
    if not mapping.keeps:
        columns[ORIGINAL_ID] = base
    for name, values in _other_columns(listed, column).items():
        if name in columns:
            raise DataError("column name is taken", field=name, hint="rename it in the source")
        columns[name] = values
    return pa.table(columns)


def _other_columns(listed: pa.Table | None, column: str) -> dict[str, pa.ChunkedArray]:
    if listed is None:
        return {}
    return {name: listed[name] for name in listed.column_names if name != column}


def _times(table: pa.Table, column: str | None, name: str) -> IdArray:
    if column is None:
        return np.arange(len(table), dtype=np.int64)
    times = _column(table, column, name)
    if pa.types.is_timestamp(times.type):
        times = times.cast(pa.int64())
    if not pa.types.is_integer(times.type):
        raise DataError(
            "wrong type",
            field=f"{name}: {column}",
            expected="integer or timestamp",
            got=str(times.type),
        )
    values: IdArray = times.to_numpy().astype(np.int64)
    return values


def _codes(table: pa.Table, name: str) -> SplitCodes | None:
    if "split" not in table.column_names:
        return None
    labels = _column(table, "split", name).to_pylist()
    places = {label: code for code, label in enumerate(SPLITS)}
    unknown = set(labels) - places.keys()
    if unknown:
        raise DataError(
            "unknown split",
            field=f"{name}: split",
            expected=" | ".join(SPLITS),
            got=repr(sorted(unknown, key=str)[0]),
        )
    return np.array([places[label] for label in labels], dtype=np.int8)


def _parquet(path: Path) -> pa.Table:
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: not readable as Parquet",
            got=str(error).splitlines()[0],
            hint="docs/DATA.md shows how CSV becomes Parquet",
        ) from error


def _column(table: pa.Table, column: str, name: str) -> pa.ChunkedArray:
    if column not in table.column_names:
        raise DataError(
            "missing column",
            field=f"{name}: {column}",
            got=", ".join(table.column_names),
            hint="--user-column, --item-column and --time-column name yours; "
            "--time-column none takes the order of the rows",
        )
    if table[column].null_count:
        raise DataError(
            "missing values",
            field=f"{name}: {column}",
            expected="no nulls",
            got=f"{table[column].null_count} nulls",
        )
    return table[column]
