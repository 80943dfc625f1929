"""The language of filters: what is one, its canonical form, and what is refused, with its path."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import msgpack
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.filter_language import (
    EVERYTHING,
    MAX_CLAUSES,
    MAX_DEPTH,
    MAX_FILTER_BYTES,
    MAX_IN_VALUES,
    MAX_SUBSTRINGS,
    AllOf,
    AnyOf,
    Condition,
    Negation,
    Operator,
    check_filter,
    narrowed,
    read_filter,
)
from tests.filter_model import filter_of

PAGE = (Path(__file__).parents[2] / "docs" / "FILTERS.md").read_text(encoding="utf-8")
SCHEMA = pa.schema(
    {"a": pa.int64(), "b": pa.string(), "c": pa.list_(pa.float64()), "d": pa.date32()}
)


def test_reads_what_was_checked() -> None:
    packed = check_filter(
        {"price": {"$lt": 20}, "$not": {"$or": [{"a": 1}, {"b": {"$in": ["y", "x"]}}]}}
    )
    read = read_filter(packed)
    assert isinstance(read, AllOf)
    assert set(read.parts) == {
        Condition("price", Operator.LT, 20),
        Negation(AnyOf((Condition("a", Operator.EQ, 1), Condition("b", Operator.IN, ("x", "y"))))),
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1}, {"a": {"$eq": 1}}),
        ({"a": None}, {"a": {"$eq": None}}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": 0}, {"a": -0.0}),
        ({"a": {"$gt": 1, "$lt": 5}}, {"$and": [{"a": {"$lt": 5}}, {"a": {"$gt": 1}}]}),
        ({"a": 1, "b": 2}, {"$and": [{"b": 2}, {"$and": [{"a": 1}, {"b": 2}]}]}),
        ({"$or": [{"a": 1}, {"b": 2}]}, {"$or": [{"b": 2}, {"$or": [{"a": 1}]}, {"b": 2}]}),
        ({"a": {"$not": {"$gt": 1}}}, {"$not": {"a": {"$gt": 1}}}),
        ({"a": {"$in": [3, 1, 2.0]}}, {"a": {"$in": [1, 2, 3, 1.0]}}),
        ({"a": {"$in": ["x", None, 1, True]}}, {"a": {"$in": [True, 1, None, "x", 1]}}),
        ({"a": {"$in": ["x", "y"]}}, {"a": {"$in": ["y", "x", "y"]}}),
        ({}, {"$and": [{}, {}]}),
    ],
)
def test_equal_filters_are_equal_bytes(first: Any, second: Any) -> None:
    assert check_filter(first) == check_filter(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": 1}, {"a": True}),
        ({"a": {"$in": [1]}}, {"a": {"$in": [True]}}),
        ({"a": {"$in": [0, False]}}, {"a": {"$in": [0]}}),
        ({"a": 1}, {"a": "1"}),
        ({"a": {"$in": [None]}}, {"a": {"$in": []}}),
        ({"a": 2**53}, {"a": 2**53 + 1}),
        ({"$or": [{"a": 1}, {"b": 2}]}, {"$and": [{"a": 1}, {"b": 2}]}),
        ({"a": 1}, {"$not": {"a": 1}}),
    ],
)
def test_other_filters_are_other_bytes(first: Any, second: Any) -> None:
    assert check_filter(first) != check_filter(second)


def test_one_packer_packs_a_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one takes longer than packing with it."""
    made: list[msgpack.Packer] = []

    def packer() -> msgpack.Packer:
        made.append(real())
        return made[-1]

    real = msgpack.Packer
    monkeypatch.setattr(msgpack, "Packer", packer)
    check_filter({"$or": [{"a": 1}, {"b": 2, "$not": {"c": {"$in": [3]}}}]})
    assert len(made) == 1


def test_an_empty_filter_is_none() -> None:
    assert check_filter({}) == b""
    assert read_filter(b"") == EVERYTHING
    assert read_filter(check_filter({"$not": {}})) == Negation(EVERYTHING)


@pytest.mark.parametrize("seed", range(10))
def test_the_canonical_form_is_that_of_itself(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        packed = check_filter(filter_of(rng, SCHEMA))
        value = msgpack.unpackb(packed)
        assert check_filter(value) == packed
        assert read_filter(check_filter(json.loads(json.dumps(value)))) == read_filter(packed)


def nested(levels: int, key: str) -> dict[str, Any]:
    made: dict[str, Any] = {"$gt": 1} if key == "column" else {"a": 1, "b": 2}
    for _ in range(levels):
        made = {"$not": made} if key in ("$not", "column") else {key: [made, {"c": 3, "d": 4}]}
    return {"a": made} if key == "column" else made


REFUSED = [
    (None, "filter", "got null"),
    ([], "filter", "got a list"),
    ("price < 20", "filter", "expected a map of columns and conditions; got 'price < 20'"),
    ({1: 2}, "filter", "got 1"),
    ({"price": {"$less": 3}}, "filter.price.$less", "expected one of $eq, $ne, $in, $nin, $gt"),
    ({"price": {"amount": 3}}, "filter.price.amount", "no such operator"),
    ({"price": {}}, "filter.price", "got an empty map"),
    ({"price": [1, 2]}, "filter.price", "$in takes a list"),
    ({"$gt": 3}, "filter.$gt", 'as in {"column": {"$gt": ...}}'),
    ({"$nor": [{"a": 1}]}, "filter.$nor", "expected a column, $and, $or or $not"),
    ({"$and": []}, "filter.$and", "got an empty list"),
    ({"$or": {"a": 1}}, "filter.$or", "expected a list of filters; got a map"),
    ({"$or": [{"a": 1}, 5]}, "filter.$or[1]", "got 5"),
    ({"$and": [{"$or": [{"a": {"$lt": None}}]}]}, "filter.$and[0].$or[0].a.$lt", "got null"),
    ({"$not": [{"a": 1}]}, "filter.$not", "got a list"),
    ({"a": {"$not": 5}}, "filter.a.$not", "expected a map of operators and values; got 5"),
    ({"a": {"$not": {}}}, "filter.a.$not", "got an empty map"),
    ({"a": {"$in": 5}}, "filter.a.$in", "expected a list of values; got 5"),
    ({"a": {"$in": [1, [2]]}}, "filter.a.$in[1]", "got a list"),
    ({"a": {"$nin": [{"b": 1}]}}, "filter.a.$nin[0]", "got a map"),
    ({"a": {"$eq": {"b": 1}}}, "filter.a.$eq", "got a map"),
    ({"a": {"$eq": b"x"}}, "filter.a.$eq", "got bytes"),
    ({"a": {"$contains": None}}, "filter.a.$contains", "got null"),
    ({"a": {"$exists": 1}}, "filter.a.$exists", "expected true or false; got 1"),
    ({"a": {"$exists": None}}, "filter.a.$exists", "got null"),
    ({"a": {"$gt": math.nan}}, "filter.a.$gt", "expected a finite number; got nan"),
    ({"a": {"$in": [1.0, math.inf]}}, "filter.a.$in[1]", "expected a finite number; got inf"),
    ({"a": 2**64}, "filter.a", "got an integer of 65 bits"),
    ({"a": {"$in": [1, -(2**63) - 1]}}, "filter.a.$in[1]", "got an integer of 64 bits"),
    ({"a": 10**10_000}, "filter.a", "got an integer of 33220 bits"),
    ({"a": "\ud800"}, "filter", "a text that UTF-8 cannot hold"),
    ({"\ud800": 1}, "filter", "a text that UTF-8 cannot hold"),
    ({"a" * 1000: {"$x": 1}}, f"filter.{'a' * 60}....$x", "no such operator"),
    ({"a": {"$exists": "x" * 1000}}, "filter.a.$exists", "xx..."),
    ({"a": {"$in": list(range(MAX_IN_VALUES + 1))}}, "filter.a.$in", "expected at most 10000"),
    ({f"c{i}": i for i in range(1000)}, "filter.c256", "at most 256 in a filter"),
    ({"$or": [{}] * (MAX_CLAUSES + 1)}, "filter.$or[256]", "at most 256 in a filter"),
    (
        {"$or": [{"a": {"$contains": str(i)}} for i in range(MAX_SUBSTRINGS + 1)]},
        *("filter.$or[16].a.$contains", "at most 16 with $contains in a filter"),
    ),
    ({"a": "x" * MAX_FILTER_BYTES}, "filter", "expected at most 512 KiB in msgpack"),
    (nested(MAX_DEPTH + 1, "$and"), f"filter{'.$and[0]' * 16}.$and", "at most 16 levels"),
    (nested(MAX_DEPTH + 1, "$not"), f"filter{'.$not' * 17}", "at most 16 levels"),
    (nested(MAX_DEPTH + 1, "column"), f"filter.a{'.$not' * 17}", "at most 16 levels"),
    (nested(100, "$or"), f"filter{'.$or[0]' * 16}.$or", "at most 16 levels"),
]


@pytest.mark.parametrize(("value", "field", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refused_with_the_path_of_what_is_wrong(value: Any, field: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_filter(value)
    assert caught.value.field == field
    assert words in caught.value.details
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("key", ["$and", "$or", "$not", "column"])
def test_the_limits_themselves_are_permitted(key: str) -> None:
    assert read_filter(check_filter(nested(MAX_DEPTH, key)))
    many = check_filter({"a": {"$in": list(range(MAX_IN_VALUES))}})
    condition = read_filter(many)
    assert isinstance(condition, Condition)
    assert condition.value == tuple(range(MAX_IN_VALUES))
    assert read_filter(check_filter({f"c{i}": i for i in range(MAX_CLAUSES)}))
    texts = {f"c{i}": {"$contains": "a"} for i in range(MAX_SUBSTRINGS)}
    assert read_filter(check_filter(texts))


def test_a_body_of_any_depth_is_refused_without_going_down() -> None:
    deep: dict[str, Any] = {"a": 1}
    for _ in range(100_000):
        deep = {"$not": deep}
    with pytest.raises(InvalidInput, match="nested too deeply"):
        check_filter(deep)
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(InvalidInput, match="not a value"):
        check_filter({"a": {"$eq": value}})


@pytest.mark.parametrize(
    "packed",
    [
        b"\xc1",
        b"\x81",
        msgpack.packb([1]),
        msgpack.packb({1: 2}),
        msgpack.packb({"a": {"$eq": b"x"}}),
        msgpack.packb({"a": 1}) + b"x",
        msgpack.packb({"a": msgpack.Timestamp(1)}),
        b"\x91" * 2000,
        b"x" * (MAX_FILTER_BYTES + 1),
    ],
)
def test_bytes_that_are_no_filter_are_refused(packed: bytes) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_filter(packed)
    assert str(caught.value.field).startswith("filter")


KEYS = st.sampled_from(["a", "b", "$and", "$or", "$not", *Operator]) | st.text(max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=20,
)


@given(JSON)
def test_any_json_is_a_filter_or_refused(value: Any) -> None:
    try:
        packed = check_filter(value)
    except InvalidInput as error:
        assert str(error.field).startswith("filter")
    else:
        assert check_filter(msgpack.unpackb(packed) if packed else {}) == packed


def test_the_page_says_what_there_is() -> None:
    table = PAGE.partition("| operator |")[2].partition("\n\n")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name for cell in first_cells for name in re.findall(r"`(.*?)`", cell)} == {
        *Operator,
        *("$and", "$or", "$not"),
    }
    limits = PAGE.partition("## Limits")[2].partition("\n\nNumbers")[0]
    assert [int(each.replace(",", "")) for each in re.findall(r"\| ([\d,]+) \|", limits)] == [
        *(MAX_CLAUSES, MAX_SUBSTRINGS, MAX_DEPTH, MAX_IN_VALUES, MAX_FILTER_BYTES)
    ]


def test_the_filters_of_the_page_are_filters() -> None:
    blocks = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    spans = [span for span in re.findall(r"`(\{.+?\})`", PAGE) if "..." not in span]
    assert len(blocks) >= 1
    assert len(spans) >= 8
    for text in (*blocks, *spans):
        check_filter(json.loads(text))


@pytest.mark.parametrize(
    "filter_map",
    [{}, {"a": 1}, {"a": 1, "b": "x"}, {"$or": [{"a": 1}, {"b": "x"}]}, {"$not": {"a": 1}}],
)
def test_a_narrowed_filter_is_one_with_the_condition_besides(filter_map: dict[str, Any]) -> None:
    left_out = {"b": ["y", "x", "y"], "d": ["2026-03-01"]}
    expected = {"$and": [filter_map, {"b": {"$nin": ["x", "y"]}}, {"d": {"$nin": ["2026-03-01"]}}]}
    assert narrowed(check_filter(filter_map), left_out) == check_filter(expected)
    assert narrowed(check_filter(filter_map), {}) == check_filter(filter_map)


def test_a_filter_is_narrowed_within_the_limits() -> None:
    largest = check_filter({"$and": [{"a": {"$gt": number}} for number in range(MAX_CLAUSES)]})
    with pytest.raises(InvalidInput, match="too many conditions"):
        narrowed(largest, {"a": [1]})
    with pytest.raises(InvalidInput, match="too large"):
        narrowed(b"", {"b": ["x" * MAX_FILTER_BYTES]})
    with pytest.raises(InvalidInput, match="no operator"):
        narrowed(b"", {"$b": ["x"]})
    deepest: dict[str, Any] = {"a": 1}
    for _ in range(MAX_DEPTH // 2):
        deepest = {"$not": {"$or": [deepest, {"b": "x"}]}}
    assert narrowed(check_filter(deepest), {"a": [2]})
