"""A condition that a shard refuses is named by its path in the filter of the request."""

from typing import Any

import pyarrow as pa
import pytest

from shardline.router.filter_groups import at_query
from shardline.router.http.filter_paths import at_its_place
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.filter_language import check_filter, read_filter
from shardline.shards.filters.bound import bind

SCHEMA = pa.schema([("price", pa.float64()), ("name", pa.string()), ("a.b", pa.int64())])
LONG = "x" * 100


def refused(given: Any) -> InvalidInput:
    """What a shard says of the canonical form."""
    with pytest.raises(InvalidInput) as caught:
        bind(read_filter(check_filter(given)), SCHEMA)
    return caught.value


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"price": "1"}, "filter.price"),
        ({"price": {"$eq": "1"}}, "filter.price.$eq"),
        ({"price": {"$gt": 1, "$lt": "2"}}, "filter.price.$lt"),
        ({"a.b": "1"}, "filter.a.b"),
        ({"name": "n", "$or": [{"price": 1}, {"price": {"$lt": "2"}}]}, "filter.$or[1].price.$lt"),
        ({"$and": [{"price": {"$lt": 5}}, {"price": {"$lt": "4"}}]}, "filter.$and[1].price.$lt"),
        ({"$and": [{"name": "n"}, {"$not": {"name": 3}}]}, "filter.$and[1].$not.name"),
        ({"price": {"$not": {"$not": {"$in": [1, "b"]}}}}, "filter.price.$not.$not.$in"),
        ({"$or": [{"name": {"$in": ["a"]}}, {"name": {"$in": ["b", 2.0]}}]},
         "filter.$or[1].name.$in"),
        ({"$or": [{"price": 1}, {"$and": [{"cost": {"$gt": 1}}]}]}, "filter.$or[1].$and[0].cost"),
        ({"$or": [{"price": 1}, {LONG: {"$gt": 1}}]}, f"filter.$or[1].{LONG[:60]}..."),
        ({"price": {"$contains": "1"}}, "filter.price.$contains"),
        ({"$or": [{"name": 3.0}, {"name": 4}]}, None),
    ],
)  # fmt: skip
def test_the_path_is_that_of_the_request(given: Any, path: str | None) -> None:
    error = refused(given)
    placed = at_its_place(error, given)
    shown = {"filter.$or[0].name": "3", "filter.$or[1].name": "4"}
    assert placed.field == path or shown[str(placed.field)] == error.got
    assert (placed.message, placed.expected, placed.got, placed.hint) == (
        *(error.message, error.expected),
        *(error.got, error.hint),
    )


def test_of_many_conditions_the_one_with_the_wrong_value_is_named() -> None:
    parts: list[dict[str, Any]] = [{"price": {"$gt": number}} for number in range(100)]
    parts[71] = {"price": {"$gt": "71"}}
    assert at_its_place(refused({"$or": parts}), {"$or": parts}).field == "filter.$or[71].price.$gt"


def test_the_filter_of_one_query_of_several() -> None:
    filters = [None, {"name": "a"}, {"$or": [{"name": "a"}, {"price": {"$lt": "1"}}]}]
    error = at_query(refused(filters[2]), 2)
    assert error.field == "filter[2].price.$lt"
    assert at_its_place(error, filters).field == "filter[2].$or[1].price.$lt"


@pytest.mark.parametrize("field", [None, "k", "filter", "filters.a", "filter.other.$lt"])
def test_what_is_about_none_of_its_conditions_stays_as_it_is(field: str | None) -> None:
    error = InvalidInput("wrong", field=field, got="1")
    assert at_its_place(error, {"price": {"$lt": 1}}) is error
    assert at_its_place(error, None) is error
