"""Filters mean what they mean to Qdrant's own engine, over random filters on columns of both.

Where it has no such operator, order of texts say, the filters here leave it out.
"""

import random
from collections.abc import Iterator
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import qdrant_edge as qdrant

from tests.filter_model import EPOCH, WORDS
from tests.unit.test_filters import mask_of

ROWS = 300
SCHEMA = pa.schema(
    {
        "count": pa.int64(),
        "price": pa.float64(),
        "title": pa.string(),
        "sold": pa.bool_(),
        "seen": pa.timestamp("ms", "UTC"),
        "tags": pa.list_(pa.string()),
        "sizes": pa.list_(pa.int64()),
    }
)
LISTS = ("tags", "sizes")
RANGES = {"$gt": "gt", "$gte": "gte", "$lt": "lt", "$lte": "lte"}
OPERATORS = ("$eq", "$ne", "$in", "$nin", "$exists")
OF_COLUMN: dict[str, tuple[str, ...]] = {
    "count": (*OPERATORS, *RANGES),
    "price": ("$eq", "$ne", "$exists", *RANGES),
    "title": (*OPERATORS, "$contains"),
    "sold": ("$eq", "$ne", "$exists"),
    "seen": ("$exists", *RANGES),
    "tags": (*OPERATORS, "$contains"),
    "sizes": (*OPERATORS, "$contains", *RANGES),
}


def random_value(rng: random.Random, column: str) -> Any:
    """A value of a column, or of an element of it."""
    if column == "sold":
        return rng.random() < 0.5
    if column == "price":
        return rng.choice((-1.5, 0.0, 0.1, 0.5, 2.0, 1e6))
    if column == "seen":
        return EPOCH.replace(tzinfo=UTC) + timedelta(milliseconds=500 * rng.randrange(-4, 5))
    return rng.choice(WORDS) if column in ("title", "tags") else rng.randrange(-3, 4)


def random_item(rng: random.Random) -> dict[str, Any]:
    item: dict[str, Any] = {}
    for column in SCHEMA.names:
        if rng.random() < 0.2:
            item[column] = None
        elif column in LISTS:
            item[column] = [random_value(rng, column) for _ in range(rng.randrange(4))]
        else:
            item[column] = random_value(rng, column)
    return item


def payload_of(rng: random.Random, item: dict[str, Any]) -> dict[str, Any]:
    """What is missing is null, or left out; a list that is missing is null."""
    left = {
        key: value
        for key, value in item.items()
        if value is not None or key in LISTS or rng.random() < 0.5
    }
    if left.get("sold") is not None:
        left["sold"] = int(left["sold"])  # true in its filters is 1 by the time they are applied
    if left.get("seen") is not None:
        left["seen"] = left["seen"].isoformat()
    return left


def random_filter(rng: random.Random, depth: int) -> dict[str, Any]:
    kind = rng.choice(("$and", "$or", "$not", "column", "column")) if depth else "column"
    if kind == "$not":
        return {kind: random_filter(rng, depth - 1)}
    if kind != "column":
        return {kind: [random_filter(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    columns = rng.sample(SCHEMA.names, rng.choice((1, 1, 2)))
    return {column: random_conditions(rng, column) for column in columns}


def random_conditions(rng: random.Random, column: str) -> dict[str, Any]:
    def operand(operator: str) -> Any:
        if operator == "$exists":
            return rng.random() < 0.5
        if operator in ("$in", "$nin"):
            return [random_value(rng, column) for _ in range(rng.randint(1, 3))]
        value = random_value(rng, column)
        return value.isoformat() if column == "seen" else value

    names = rng.sample(OF_COLUMN[column], rng.choice((1, 1, 2)))
    return {name: operand(name) for name in names}


def as_qdrant(item_filter: dict[str, Any]) -> qdrant.Filter:
    """The same filter for Qdrant."""
    parts = []
    for key, value in item_filter.items():
        if key == "$and":
            parts.append(qdrant.Filter(must=[as_qdrant(part) for part in value]))
        elif key == "$or":
            parts.append(qdrant.Filter(should=[as_qdrant(part) for part in value]))
        elif key == "$not":
            parts.append(qdrant.Filter(must_not=[as_qdrant(value)]))
        else:
            parts += [condition(key, name, operand) for name, operand in value.items()]
    return qdrant.Filter(must=parts)


def condition(column: str, operator: str, value: Any) -> Any:
    if operator in ("$ne", "$nin"):
        positive = condition(column, "$eq" if operator == "$ne" else "$in", value)
        return qdrant.Filter(must_not=[positive])
    if operator == "$exists":
        # an empty list exists here, and is not empty of value there
        is_list = column in LISTS
        missing = [(qdrant.IsNullCondition if is_list else qdrant.IsEmptyCondition)(column)]
        return qdrant.Filter(must_not=missing) if value else qdrant.Filter(must=missing)
    if operator in RANGES:
        ends = {RANGES[operator]: value}
        of_time = column == "seen"
        ranged = qdrant.RangeDateTime(**ends) if of_time else qdrant.RangeFloat(**ends)
        return qdrant.FieldCondition(column, range=ranged)
    if column == "price":  # it has no equality of floats
        return qdrant.FieldCondition(column, range=qdrant.RangeFloat(gte=value, lte=value))
    if operator == "$in":
        return qdrant.FieldCondition(column, match=qdrant.MatchAny(value))
    if operator == "$contains" and column == "title":
        return qdrant.FieldCondition(column, match=qdrant.MatchSubstring(value))
    return qdrant.FieldCondition(
        column, match=qdrant.MatchValue(int(value) if column == "sold" else value)
    )


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [random_item(rng) for _ in range(ROWS)]


@pytest.fixture(scope="module")
def engine(
    items: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[qdrant.EdgeShard]:
    rng = random.Random(1)
    path: Path = tmp_path_factory.mktemp("qdrant")
    params = qdrant.EdgeVectorParams(size=1, distance=qdrant.Distance.Dot)
    shard = qdrant.EdgeShard.create(
        str(path), qdrant.EdgeConfig(vectors=params, max_search_threads=1)
    )
    points = [qdrant.Point(row, [1.0], payload_of(rng, item)) for row, item in enumerate(items)]
    shard.update(qdrant.UpdateOperation.upsert_points(points))
    yield shard
    shard.close()


@pytest.mark.parametrize("seed", range(20))
def test_the_same_items_match(
    seed: int, items: list[dict[str, Any]], engine: qdrant.EdgeShard
) -> None:
    rng = random.Random(seed)
    table = pa.Table.from_pylist(items, SCHEMA)
    for _ in range(100):
        item_filter = random_filter(rng, 3)
        request = qdrant.ScrollRequest(
            limit=ROWS, filter=as_qdrant(item_filter), with_payload=False, with_vector=False
        )
        found = [record.id for record in engine.scroll(request)[0]]
        mask = mask_of(item_filter, table)
        assert sorted(found) == [row for row in range(ROWS) if mask[row]], item_filter
