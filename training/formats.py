"""The formats of ``training.importers``: from files to a ``Source``, line by line checked.

Ids that are integers >= 0 are kept. Other ids are numbered 0, 1, ... in sorted order, and the
original is kept in a column ``original_id``.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from shards.errors import DataError, NotFound
from shards.schema import IdArray
from training.splits import SplitCodes
from training.table_checks import SPLITS
from training.tables import ORIGINAL_ID

# of MovieLens 100k, in the order of its flags
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
SHOWN = 5  # offending lines quoted in a report

OnError = Literal["raise", "skip"]


class Format(StrEnum):
    LIGHTGCN = "lightgcn"
    MOVIELENS_100K = "movielens-100k"
    PARQUET = "parquet"


class ImportConfig(BaseModel):
    """How to read a source. Column names and files apply to the Parquet format only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    on_error: OnError = Field(
        default="raise", description="malformed line: stop, or skip and count it"
    )
    seed: int = Field(default=0, ge=0, description="draws users and items of the splits")
    val_users: int = Field(default=2000, ge=0, description="users with items in val")
    val_per_user: int = Field(default=1, ge=1, description="train items that such a user gives")
    val_items: Literal["last", "random"] = Field(
        default="last", description="which: the last by time, or random ones, as the test split is"
    )
    cold_items: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the items that train does not see: all they have goes to test",
    )
    test_per_user: int = Field(
        default=4, ge=0, description="items of a user held out, where the source has no test split"
    )
    min_rating: int = Field(
        default=1, ge=1, le=5, description="MovieLens ratings below are left out"
    )
    users_file: str | None = Field(
        default="users.parquet", description="below the source; None derives users"
    )
    items_file: str | None = Field(
        default="items.parquet", description="below the source; None derives items"
    )
    interactions_file: str = Field(
        default="interactions.parquet", description="below the source, or the source itself"
    )
    user_column: str = Field(default="user_id", description="user id, in users and interactions")
    item_column: str = Field(default="item_id", description="item id, in items and interactions")
    time_column: str | None = Field(
        default="timestamp", description="integers; None takes the order of rows"
    )


@dataclass(slots=True, kw_only=True)
class ImportReport:
    """What was read, written and found wrong; ``examples`` are "file:line: message"."""

    users: int = 0
    items: int = 0
    interactions: dict[str, int] = field(default_factory=dict)
    malformed: int = 0
    duplicates: int = 0
    unknown_users: int = 0
    unknown_items: int = 0
    user_holes: int = 0
    item_holes: int = 0
    users_without_interactions: int = 0
    items_without_interactions: int = 0
    below_min_rating: int = 0
    examples: list[str] = field(default_factory=list)

    def note(self, message: str) -> None:
        if len(self.examples) < SHOWN:
            self.examples.append(message)


@dataclass(slots=True)
class Source:
    """A parsed source. codes is None where it brings no test split; where[i] locates row i."""

    users: pa.Table
    items: pa.Table
    user_ids: IdArray
    item_ids: IdArray
    times: IdArray
    codes: SplitCodes | None
    where: Callable[[int], str]


def read_lightgcn(source: Path, config: ImportConfig, report: ImportReport) -> Source:
    """train.txt and test.txt: a user and their items a line; the position is the timestamp."""
    users: list[int] = []
    items: list[int] = []
    times: list[int] = []
    codes: list[int] = []
    where: list[str] = []
    for code, name in ((0, "train.txt"), (2, "test.txt")):
        for number, line in _lines(source / name):
            try:
                user, *rest = (_natural(word) for word in line.split())
            except ValueError as error:
                _malformed(source / name, number, error, config, report)
                continue
            users += [user] * len(rest)
            items += rest
            times += range(len(rest))
            codes += [code] * len(rest)
            where += [f"{name}:{number}"] * len(rest)
    user_ids, item_ids = np.array(users, np.int64), np.array(items, np.int64)
    return Source(
        pa.table({"user_id": np.unique(user_ids)}),
        pa.table({"item_id": np.unique(item_ids)}),
        user_ids,
        item_ids,
        np.array(times, np.int64),
        np.array(codes, np.int8),
        where.__getitem__,
    )


def read_movielens(source: Path, config: ImportConfig, report: ImportReport) -> Source:
    """u.user, u.item, and the split ua.base / ua.test, or u.data where that is absent."""
    has_split = (source / "ua.base").exists() and (source / "ua.test").exists()
    files = ((0, "ua.base"), (2, "ua.test")) if has_split else ((0, "u.data"),)
    rows: list[list[int]] = []
    where: list[str] = []
    for code, name in files:
        for number, line in _lines(source / name):
            try:
                user, item, rating, time = (_natural(word) for word in line.split("\t"))
            except ValueError as error:
                _malformed(source / name, number, error, config, report)
                continue
            if rating < config.min_rating:
                report.below_min_rating += 1
                continue
            rows.append([user, item, time, code])
            where.append(f"{name}:{number}")
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return Source(
        _movielens_users(source / "u.user", config, report),
        _movielens_items(source / "u.item", config, report),
        table[:, 0],
        table[:, 1],
        table[:, 2],
        table[:, 3].astype(np.int8) if has_split else None,
        where.__getitem__,
    )


def _movielens_users(path: Path, config: ImportConfig, report: ImportReport) -> pa.Table:
    """id | age | gender | occupation | zip; of the zip code only the region, its first sign."""
    rows = []
    for number, line in _lines(path):
        try:
            user, age, gender, occupation, code = line.split("|")
            rows.append((_natural(user), _natural(age), gender, occupation, code[:1]))
        except ValueError as error:
            _malformed(path, number, error, config, report)
    names = ("user_id", "age", "gender", "occupation", "zip_region")
    types = (pa.int64(), pa.int32(), pa.string(), pa.string(), pa.string())
    return _columns(rows, names, types)


def _movielens_items(path: Path, config: ImportConfig, report: ImportReport) -> pa.Table:
    """id | title | release | video release | url | 19 genre flags, which become a list of names."""
    rows, genres = [], []
    for number, line in _lines(path):
        try:
            item, title, release, _, _, *flags = line.split("|")
            if len(flags) != len(GENRES) or not set(flags) <= {"0", "1"}:
                raise ValueError(
                    f"expected {len(GENRES)} genre flags 0 or 1, got {len(flags)} fields"
                )
            named = [genre for genre, flag in zip(GENRES, flags, strict=True) if flag == "1"]
            year = datetime.strptime(release, "%d-%b-%Y").year if release else 0
            rows.append((_natural(item), title, year, not release))
            genres.append(named)
        except ValueError as error:
            _malformed(path, number, error, config, report)
    known = [row[2] for row in rows if row[2]]
    middle = int(np.median(known)) if known else 0  # a missing year must not look like the year 0
    rows = [(*row[:2], row[2] or middle, row[3]) for row in rows]
    names = ("item_id", "title", "year", "year_missing")
    table = _columns(rows, names, (pa.int64(), pa.string(), pa.int32(), pa.bool_()))
    return table.append_column("genres", pa.array(genres, pa.list_(pa.string())))


def read_parquet(source: Path, config: ImportConfig, report: ImportReport) -> Source:
    """Three tables, or the interactions alone; a table that is not there is derived."""
    is_file = source.is_file()
    name = source.name if is_file else config.interactions_file
    table = _parquet(source if is_file else source / name)
    ids = {}
    features = {}
    for kind, column, file in (
        ("user", config.user_column, config.users_file),
        ("item", config.item_column, config.items_file),
    ):
        seen = _column(table, column, name)
        path = None if is_file or file is None else source / file
        listed = _parquet(path) if path is not None and path.exists() else None
        base = pa.chunked_array([seen.unique()])
        if listed is not None:
            base = _column(listed, column, str(file))
        if len(base.unique()) != len(base):
            raise DataError("ids occur twice", field=f"{file}: {column}", expected="unique ids")
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


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines that are not blank; latin-1 accepts every byte."""
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    with path.open(encoding="latin-1") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.rstrip("\n")


def _natural(word: str) -> int:
    """An integer >= 0 that fits int64, written in plain digits; else ValueError."""
    if not re.fullmatch(r"[0-9]{1,18}", word):
        raise ValueError(f"{word!r} is not an integer >= 0")
    return int(word)


def _malformed(
    path: Path, number: int, error: ValueError, config: ImportConfig, report: ImportReport
) -> None:
    message = f"{path.name}:{number}: {error}"
    if config.on_error == "raise":
        raise DataError(message, hint='on_error="skip" leaves such lines out') from error
    report.malformed += 1
    report.note(message)


def _columns(rows: list[Any], names: tuple[str, ...], types: tuple[Any, ...]) -> pa.Table:
    values = list(zip(*rows, strict=True)) or [()] * len(names)
    arrays = [pa.array(v, t) for v, t in zip(values, types, strict=True)]
    return pa.table(dict(zip(names, arrays, strict=True)))


def _parquet(path: Path) -> pa.Table:
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable as Parquet", got=str(error)) from error


def _column(table: pa.Table, column: str, name: str) -> pa.ChunkedArray:
    if column not in table.column_names:
        raise DataError(
            "missing column", field=f"{name}: {column}", got=", ".join(table.column_names)
        )
    if table[column].null_count:
        raise DataError(
            "missing values",
            field=f"{name}: {column}",
            expected="no nulls",
            got=f"{table[column].null_count} nulls",
        )
    return table[column]


READERS: dict[Format, Callable[[Path, ImportConfig, ImportReport], Source]] = {
    Format.LIGHTGCN: read_lightgcn,
    Format.MOVIELENS_100K: read_movielens,
    Format.PARQUET: read_parquet,
}
