"""LightGCN and MovieLens 100k, line by line: a malformed line is named, or skipped and counted."""

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.shards.core.errors import DataError, InvalidInput, NotFound
from shardline.training.data.formats import ImportConfig, ImportReport, Source

RATING = "rating"  # what MovieLens 100k calls the weight of an interaction
# of MovieLens 100k, in the order of its flags
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


def read_lightgcn(source: Path, config: ImportConfig, report: ImportReport) -> Source:
    """train.txt and test.txt: a user and their items per line; the position is the timestamp."""
    if config.weight_column is not None:
        raise InvalidInput("the format has no weights", field="--weight-column", got="lightgcn")
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
    if config.weight_column not in (None, RATING):
        raise InvalidInput(
            "no such column of interactions",
            field="--weight-column",
            expected=RATING,
            got=str(config.weight_column),
        )
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
            rows.append([user, item, time, code, rating])
            where.append(f"{name}:{number}")
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    return Source(
        _movielens_users(source / "u.user", config, report),
        _movielens_items(source / "u.item", config, report),
        table[:, 0],
        table[:, 1],
        table[:, 2],
        table[:, 3].astype(np.int8) if has_split else None,
        where.__getitem__,
        table[:, 4].astype(np.float32) if config.weight_column else None,
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
        raise DataError(message, hint="--on-error skip leaves such lines out") from error
    report.malformed += 1
    report.note(message)


def _columns(rows: list[Any], names: tuple[str, ...], types: tuple[Any, ...]) -> pa.Table:
    values = list(zip(*rows, strict=True)) or [()] * len(names)
    arrays = [pa.array(v, t) for v, t in zip(values, types, strict=True)]
    return pa.table(dict(zip(names, arrays, strict=True)))
