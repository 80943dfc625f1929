"""Tables of users, items and interactions, or of interactions alone, however they are stored."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shardline.shards.core.errors import DataError, InvalidInput, NotFound
from shardline.shards.core.name_lists import joined_names
from shardline.shards.core.schema import ORIGINAL_ID, FloatArray, IdArray
from shardline.shards.storage.column_types import (
    Unusable,
    feature_column,
    id_column,
    time_column,
)
from shardline.shards.storage.locations import Location
from shardline.shards.storage.table_parts import pandas_index
from shardline.training.data.formats import SHOWN, ImportConfig, ImportReport, Source
from shardline.training.data.splits import SplitCodes
from shardline.training.data.table_checks import SPLITS
from shardline.training.data.table_files import TypeOverrides, read_table

HISTORY = "history"  # what queries call their past items: no column of users may be called so


def read_tables(source: object, config: ImportConfig, report: ImportReport) -> Source:
    """Three tables, or the interactions alone; a table that is not there is derived.

    source: a path or URL. Where it is the interactions' file, tables beside it are read only if
    they are named.

    Raises:
        NotFound: no interactions there, or no table of a name that was asked for.
        InvalidInput: the source is the interactions' file, and another one is named; a column
            named by an option that no table has.
        DataError: a table that cannot be read, or is not as docs/DATA.md says.
    """
    named = (config.user_column, config.item_column, config.time_column)
    if len(set(named)) < len(named):
        raise InvalidInput(
            "one column named twice",
            field="--user-column, --item-column, --time-column",
            expected="three columns",
            got=", ".join(map(str, named)),
        )
    reader = _Reader(Location.of(source), config)
    name, table = reader.interactions()
    ids: dict[str, IdArray] = {}
    called: list[pa.ChunkedArray] = []
    features: dict[str, pa.Table] = {}
    refused: list[_Refused] = []
    for kind, column, file in (
        ("user", config.user_column, config.users_file),
        ("item", config.item_column, config.items_file),
    ):
        seen = _ids(table, column, name)
        called.append(seen)
        found = reader.features(f"{kind}s", file)
        base, listed, where = pa.chunked_array([seen.unique()]), None, name
        if found is None and file is not None:
            report.warn(reader.without_table(f"{kind}s"))
        if found is not None:
            where, listed = found
            base = _ids(listed, column, where)
            _refuse_other_ids(seen, base, name, column, where)
        _refuse_repeated_ids(base, f"{where}: {column}")
        mapping = _Mapping(base)
        ids[kind] = mapping(seen)
        columns = reader.feature_columns(listed, column, where, is_user=kind == "user")
        refused += columns.refused
        features[kind] = _with_ids(columns.taken, f"{kind}_id", mapping, base)
    _refuse(refused)
    reader.check_options()
    return Source(
        features["user"],
        features["item"],
        ids["user"],
        ids["item"],
        _times(table, config.time_column, name),
        _codes(table, name),
        lambda row: f"{name}: row {row} ({', '.join(str(each[row]) for each in called)})",
        _weights(table, config.weight_column, name),
    )


class _Refused:
    """A column that no feature takes, and why."""

    def __init__(self, where: str, column: str, why: Unusable) -> None:
        self.where, self.column, self.why = where, column, why


class _Columns:
    """The feature columns of one table: those that are taken, and those that are not."""

    def __init__(self) -> None:
        self.taken: dict[str, pa.ChunkedArray] = {}
        self.refused: list[_Refused] = []


class _Reader:
    """Finds and reads the tables of a source; keeps which options were of use."""

    def __init__(self, source: Location, config: ImportConfig) -> None:
        self._source = source
        self._config = config
        self._overrides = TypeOverrides.parse(
            config.types, ids=(config.user_column, config.item_column)
        )
        self._columns: set[str] = set()
        self._read_names: set[str] = set()

    def interactions(self) -> tuple[str, pa.Table]:
        """Its name for messages, and the table."""
        source, config = self._source, self._config
        is_named = "interactions_file" in config.model_fields_set
        if source.is_file:
            if is_named:
                raise InvalidInput(
                    "the source is a file itself",
                    field="--interactions-file",
                    hint="name its folder with --source, or leave out --interactions-file",
                )
            return source.name, self._read(source)
        found = source.named(config.interactions_file)
        if found is None:
            if is_named or not source.is_folder:
                raise NotFound(f"{source.child(config.interactions_file).path}: no such file")
            if source.named("users") or source.named("items") or not source.files():
                raise NotFound(
                    f"{source.path}: no interactions there",
                    hint="--interactions-file names the file or folder of part files",
                )
            found = source  # part files of the interactions themselves
        return found.name, self._read(found)

    def features(self, stem: str, file: str | None) -> tuple[str, pa.Table] | None:
        """The table of users or items, if there is one. One asked for by name has to be there."""
        if file is None:
            return None
        source = self._source
        is_named = f"{stem}_file" in self._config.model_fields_set
        if not is_named and (source.is_file or not self._is_parent):
            return None
        folder = source.parent if source.is_file else source
        found = folder.named(file)
        if found is None:
            if is_named:
                raise NotFound(f"{folder.child(file).path}: no such file")
            return None
        return found.name, self._read(found)

    @property
    def _is_parent(self) -> bool:
        """Whether the source holds tables, and is not the part files of one."""
        return self._source.named(self._config.interactions_file) is not None

    def without_table(self, stem: str) -> str:
        """What to say where no table was found; which files were passed over."""
        said = f"no table of {stem}: they are those of the interactions, without features"
        if self._source.is_file or not self._is_parent:
            return said
        passed = sorted({file.name for file in self._source.files()} - self._read_names)
        return said + (f"; not read: {', '.join(passed[:SHOWN])} (--{stem}-file)" if passed else "")

    def feature_columns(
        self, table: pa.Table | None, key: str, where: str, *, is_user: bool
    ) -> _Columns:
        """All but the key and what was not wanted, as features take them."""
        columns = _Columns()
        if table is None:
            return columns
        config, index = self._config, pandas_index(table.schema)
        self._columns |= set(table.column_names)
        for name in table.column_names:
            unwanted = name in config.drop or (config.only is not None and name not in config.only)
            if name == key or name in index or unwanted:
                continue
            try:
                if is_user and name == HISTORY:
                    raise Unusable("another name: a query's past items are called so", "a column")
                columns.taken[name] = feature_column(table[name])
            except Unusable as why:
                columns.refused.append(_Refused(where, name, why))
        return columns

    def check_options(self) -> None:
        """Raises InvalidInput for a column of an option that no table has: a slip of the pen."""
        wanted = [("--drop", name, self._columns) for name in self._config.drop]
        wanted += [("--only", name, self._columns) for name in self._config.only or ()]
        wanted += [("--types", name, self._overrides.used) for name in self._overrides.types]
        for option, name, known in wanted:
            if name not in known:
                raise InvalidInput(
                    "no such column",
                    field=option,
                    expected=f"some of {joined_names(sorted(self._columns))}"
                    if option != "--types"
                    else "a column of a CSV or JSON file",
                    got=name,
                )

    def _read(self, location: Location) -> pa.Table:
        self._read_names.add(location.name)
        return read_table(location, self._overrides)


def _refuse(refused: list[_Refused]) -> None:
    """DataError for all of them at once, with what would leave them out."""
    if not refused:
        return
    names = list(dict.fromkeys(each.column for each in refused))
    first, *more = refused
    also = "".join(
        f"; {each.where}: {each.column} ({each.why.expected} expected, got {each.why.got})"
        for each in more
    )
    raise DataError(
        "column cannot be a feature" if not more else f"{len(refused)} columns cannot be features",
        field=f"{first.where}: {first.column}",
        expected=first.why.expected,
        got=f"{first.why.got}{also}",
        hint=f"--drop {joined_names(names)} leaves {'it' if len(names) == 1 else 'them'} out",
    )


class _Mapping:
    """Original ids to int64 ids; -1 for ids that the table does not list."""

    def __init__(self, ids: pa.ChunkedArray) -> None:
        is_small = pa.types.is_int64(ids.type)
        self.keeps = is_small and (len(ids) == 0 or pc.min(ids).as_py() >= 0)
        values = ids.to_pylist()
        if self.keeps:
            self._ids = {value: value for value in values}
        else:
            self._ids = {value: row for row, value in enumerate(sorted(set(values)))}

    def __call__(self, ids: pa.ChunkedArray) -> IdArray:
        distinct = ids.combine_chunks().dictionary_encode()
        values = [self._ids.get(value, -1) for value in distinct.dictionary.to_pylist()]
        codes = distinct.indices.to_numpy()
        mapped: IdArray = np.array(values, dtype=np.int64)[codes]
        return mapped


def _refuse_repeated_ids(ids: pa.ChunkedArray, field: str) -> None:
    values = ids.combine_chunks().dictionary_encode()
    codes = values.indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    repeats = np.setdiff1d(np.arange(len(codes)), first)
    if len(repeats):
        row = int(repeats[0])
        earlier = int(np.flatnonzero(codes == codes[row])[0])
        raise DataError(
            "ids occur twice",
            field=field,
            expected="one row for each id",
            got=f"{ids[row]} in rows {earlier} and {row}",
        )


def _refuse_other_ids(
    seen: pa.ChunkedArray, listed: pa.ChunkedArray, name: str, column: str, file: str
) -> None:
    """DataError where one side has numbers and the other texts: none of them would be found."""
    if pa.types.is_integer(seen.type) != pa.types.is_integer(listed.type) and len(seen):
        override = joined_names([f"{column}=string"])
        raise DataError(
            "ids of another type",
            field=f"{name}: {column}",
            expected=f"{listed.type}, as in {file}",
            got=str(seen.type),
            hint=f"--types {override} reads both as text, in CSV and JSON",
        )


def _with_ids(
    taken: dict[str, pa.ChunkedArray], key: str, mapping: _Mapping, base: pa.ChunkedArray
) -> pa.Table:
    """The feature table under our key; a derived table has only its ids."""
    columns = {key: pa.array(mapping(base))}
    if not mapping.keeps:
        columns[ORIGINAL_ID] = base
    for name, values in taken.items():
        if name in (key, ORIGINAL_ID):
            hint = f"rename it in the source, or --drop {name} leaves it out"
            raise DataError("column name is taken", field=name, hint=hint)
        columns[name] = values
    return pa.table(columns)


def _ids(table: pa.Table, column: str, name: str) -> pa.ChunkedArray:
    try:
        return id_column(_column(table, column, name))
    except Unusable as why:
        raise DataError(
            "not usable as ids", field=f"{name}: {column}", expected=why.expected, got=why.got
        ) from why


def _times(table: pa.Table, column: str | None, name: str) -> IdArray:
    if column is None:
        return np.arange(len(table), dtype=np.int64)
    try:
        return time_column(_column(table, column, name))
    except Unusable as why:
        raise DataError(
            "not usable as times",
            field=f"{name}: {column}",
            expected=why.expected,
            got=why.got,
            hint="write them in ISO 8601, as in 2026-03-01 12:00:00; "
            "--time-column none takes the order of the rows",
        ) from why


def _weights(table: pa.Table, column: str | None, name: str) -> FloatArray | None:
    """(n,) float32, NaN for null; what is negative or infinite is refused when it is written."""
    if column is None:
        return None
    try:
        found = feature_column(_present(table, column, name))
        if pa.types.is_boolean(found.type):
            found = found.cast(pa.int8())
        if not (pa.types.is_integer(found.type) or pa.types.is_floating(found.type)):
            raise Unusable("numbers >= 0", str(found.type))
    except Unusable as why:
        raise DataError(
            "not usable as weights", field=f"{name}: {column}", expected=why.expected, got=why.got
        ) from why
    weights: FloatArray = found.cast(pa.float64()).to_numpy().astype(np.float32)
    return weights


def _codes(table: pa.Table, name: str) -> SplitCodes | None:
    if "split" not in table.column_names:
        return None
    try:
        labels = id_column(table["split"]).to_pylist()
    except Unusable as why:
        raise DataError(
            "not usable as splits", field=f"{name}: split", expected=why.expected, got=why.got
        ) from why
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


def _column(table: pa.Table, column: str, name: str) -> pa.ChunkedArray:
    found = _present(table, column, name)
    if found.null_count:
        raise DataError(
            "missing values",
            field=f"{name}: {column}",
            expected="no nulls",
            got=f"{found.null_count} nulls, the first in row "
            f"{pc.index(found.is_null(), True).as_py()}",
        )
    return found


def _present(table: pa.Table, column: str, name: str) -> pa.ChunkedArray:
    if column not in table.column_names:
        raise DataError(
            "missing column",
            field=f"{name}: {column}",
            got=", ".join(table.column_names),
            hint="--user-column, --item-column and --time-column name yours, each by one name for "
            "all tables; --time-column none takes the order of the rows",
        )
    return table[column]
