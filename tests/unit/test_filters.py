"""Filters bound to columns and evaluated: equal to plain Python, row by row, for every type."""

import random
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from shardline.shards.core.errors import DeadlineExceeded, InvalidInput
from shardline.shards.core.filter_language import check_filter, read_filter
from shardline.shards.filters import matching
from shardline.shards.filters.bound import bind
from shardline.shards.filters.matching import Mask, matches
from tests.filter_model import filter_of, holds, stored_value

SCALARS = (
    *(pa.bool_(), pa.int8(), pa.uint8(), pa.int64(), pa.uint64()),
    *(pa.float16(), pa.float32(), pa.float64()),
    *(pa.decimal32(6, 2), pa.decimal128(20, 1), pa.decimal256(50, 3)),
    *(pa.string(), pa.large_string(), pa.string_view()),
    *(pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(2)),
    *(pa.date32(), pa.date64(), pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("ms", "UTC")),
    *(pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.duration("ms"), pa.duration("us")),
    *(pa.dictionary(pa.int8(), pa.string()), pa.run_end_encoded(pa.int32(), pa.int64())),
)
LISTS = (
    *(pa.list_(pa.int64()), pa.large_list(pa.string()), pa.list_(pa.float32(), 2)),
    *(pa.list_view(pa.int64()), pa.large_list_view(pa.string())),
    *(pa.list_(pa.bool_()), pa.list_(pa.date32()), pa.list_(pa.dictionary(pa.int8(), pa.string()))),
)


def mask_of(item_filter: Any, table: pa.Table, ids: Any = None) -> Mask:
    bound = bind(read_filter(check_filter(item_filter)), table.schema)
    ids = np.arange(table.num_rows) if ids is None else np.array(ids, np.int64)
    return matches(bound, table, ids)


def rows_of(item_filter: Any, **columns: Any) -> list[int]:
    """The rows that match, of columns of equal lengths."""
    return np.flatnonzero(mask_of(item_filter, pa.table(columns))).tolist()


def array_of(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_run_end_encoded(kind):
        return pc.run_end_encode(pa.array(values, kind.value_type), run_end_type=kind.run_end_type)
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values, kind)


def random_column(rng: random.Random, kind: pa.DataType, chunks: list[int]) -> pa.ChunkedArray:
    """Random values, in chunks of these lengths, each a slice of something longer."""
    made = []
    for rows in chunks:
        values = [stored_value(rng, kind) for _ in range(rows + 3)]
        made.append(array_of(values, kind).slice(2, rows))
    return pa.chunked_array(made, kind)


def random_table(rng: random.Random, kinds: list[pa.DataType], rows: int) -> pa.Table:
    columns = {}
    for i, kind in enumerate(kinds):
        first = rng.randrange(rows + 1)
        chunks = [rows] if rng.random() < 0.5 else [first, 0, rows - first]
        columns[f"c{i}"] = random_column(rng, kind, chunks)
    return pa.table(columns)


def check_equal(rng: random.Random, table: pa.Table, filters: int) -> None:
    rows = table.to_pylist()
    for _ in range(filters):
        item_filter = filter_of(rng, table.schema)
        expected = [holds(item_filter, row, table.schema) for row in rows]
        assert mask_of(item_filter, table).tolist() == expected, item_filter


@pytest.mark.parametrize("kind", [*SCALARS, *LISTS], ids=str)
def test_equal_to_plain_python_for_every_type(kind: pa.DataType) -> None:
    rng = random.Random(str(kind))
    for _ in range(5):
        check_equal(rng, random_table(rng, [kind], rng.choice((0, 1, 40))), 30)


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_plain_python_over_several_columns(seed: int) -> None:
    rng = random.Random(seed)
    table = random_table(rng, rng.sample([*SCALARS, *LISTS], 5), 60)
    check_equal(rng, table, 100)


def test_missing_values() -> None:
    prices = [1.0, None, 3.0]
    assert rows_of({"price": {"$lt": 5}}, price=prices) == [0, 2]
    assert rows_of({"price": {"$ne": 1}}, price=prices) == [1, 2]
    assert rows_of({"price": {"$nin": [1, 3]}}, price=prices) == [1]
    assert rows_of({"price": {"$not": {"$lt": 2}}}, price=prices) == [1, 2]
    assert rows_of({"$not": {"price": {"$lt": 2}}}, price=prices) == [1, 2]
    assert rows_of({"price": None}, price=prices) == [1]
    assert rows_of({"price": {"$ne": None}}, price=prices) == [0, 2]
    assert rows_of({"price": {"$in": [None, 1]}}, price=prices) == [0, 1]
    assert rows_of({"price": {"$exists": True}}, price=prices) == [0, 2]
    assert rows_of({"price": {"$exists": False}}, price=prices) == [1]


def test_lists_are_tested_by_their_elements() -> None:
    tags = pa.array([["red", "new"], [], None, ["new"], ["red", None]])
    assert rows_of({"tags": "red"}, tags=tags) == [0, 4]
    assert rows_of({"tags": {"$contains": "red"}}, tags=tags) == [0, 4]
    assert rows_of({"tags": {"$contains": "re"}}, tags=tags) == []
    assert rows_of({"tags": {"$ne": "red"}}, tags=tags) == [1, 2, 3]
    assert rows_of({"tags": {"$in": ["new", "old"]}}, tags=tags) == [0, 3]
    assert rows_of({"tags": {"$exists": True}}, tags=tags) == [0, 1, 3, 4]
    assert rows_of({"tags": None}, tags=tags) == [2, 4]
    # an element for each of the two, not one for both
    sizes = pa.array([[1, 9], [5], [1]])
    assert rows_of({"sizes": {"$gt": 4, "$lt": 6}}, sizes=sizes) == [0, 1]
    assert rows_of({"sizes": {"$gt": 4, "$lt": 3}}, sizes=sizes) == [0]


def test_what_lies_beneath_a_missing_list_counts_for_nothing() -> None:
    values, missing = pa.array([7, 7, 1, 7]), pa.array([True, False, True])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 3, 4], pa.int32()), values, mask=missing)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array([7, 7, 1, 2, 7, 7]), 2, mask=missing)
    for column in (lists, fixed):
        assert column.null_count == 2
        assert rows_of({"c": 7}, c=column) == ([1] if column is lists else [])
        assert rows_of({"c": {"$gt": 0}}, c=column) == [1]
    views = pa.ListViewArray.from_arrays(
        pa.array([0, 9, 1], pa.int32()), pa.array([2, 9, 1], pa.int32()), values, mask=missing
    )
    assert rows_of({"c": 7}, c=views.slice(2)) == []


@pytest.mark.parametrize("block", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("kind", [each for each in LISTS if "string" in str(each)][:2], ids=str)
def test_lists_are_tested_in_blocks(
    block: int, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "BLOCK", block)
    rng = random.Random(block)
    for _ in range(10):
        check_equal(rng, random_table(rng, [kind, pa.list_(pa.float32(), 2)], 20), 10)


def test_floats_are_compared_in_their_width() -> None:
    narrow = pa.array([0.1, 0.2, float("inf"), float("nan"), -0.0], pa.float32())
    assert rows_of({"x": 0.1}, x=narrow) == [0]
    assert rows_of({"x": {"$lte": 0.1}}, x=narrow) == [0, 4]
    assert rows_of({"x": {"$in": [0.2, 0.3]}}, x=narrow) == [1]
    assert rows_of({"x": {"$gt": 1e300}}, x=narrow) == [2]
    assert rows_of({"x": {"$lt": 1e300}}, x=narrow) == [0, 1, 4]
    assert rows_of({"x": {"$gt": -1e300}}, x=narrow) == [0, 1, 2, 4]
    assert rows_of({"x": {"$in": [1e300, 0]}}, x=narrow) == [4]
    assert rows_of({"x": {"$exists": True}}, x=narrow) == [0, 1, 2, 3, 4]
    assert rows_of({"x": {"$not": {"$gte": 0}}}, x=narrow) == [3]


def test_a_bound_beyond_the_largest_float_of_a_width_may_round_to_it() -> None:
    half = pa.array([65504, float("inf"), 1, -65504], pa.float16())
    for number in (65504, 65510):
        assert rows_of({"x": number}, x=half) == [0]
        assert rows_of({"x": {"$in": [number, 2]}}, x=half) == [0]
        assert rows_of({"x": {"$gte": number}}, x=half) == [0, 1]
        assert rows_of({"x": {"$lt": number}}, x=half) == [2, 3]
        assert rows_of({"x": {"$lte": -number}}, x=half) == [3]
    assert rows_of({"x": 65520}, x=half) == []
    assert rows_of({"x": {"$lt": 65520}}, x=half) == [0, 2, 3]
    assert rows_of({"x": {"$gte": 65520}}, x=half) == [1]


def test_decimals_are_taken_as_texts_too() -> None:
    """Of more digits than a float of JSON keeps."""
    texts = ["12345678901234567890123.45", "12345678901234567890123.46", "-0.10"]
    prices = pa.array([Decimal(text) for text in texts], pa.decimal128(38, 2))
    for row, text in enumerate(texts):
        assert rows_of({"price": text}, price=prices) == [row]
    assert rows_of({"price": {"$in": ["-0.1", texts[1] + "0"]}}, price=prices) == [1, 2]
    assert rows_of({"price": {"$gt": texts[0]}}, price=prices) == [1]
    assert rows_of({"price": {"$gte": "12345678901234567890123.455"}}, price=prices) == [1]
    large = pa.array([2**64, 2**64 + 1], pa.decimal128(38, 0))
    assert rows_of({"n": str(2**64 + 1)}, n=large) == [1]


def test_integers_are_compared_exactly() -> None:
    big = pa.array([2**53, 2**53 + 1, 2**63 - 1], pa.int64())
    assert rows_of({"n": 2**53 + 1}, n=big) == [1]
    assert rows_of({"n": {"$gt": 2**53}}, n=big) == [1, 2]
    assert rows_of({"n": {"$lt": 2.0**63}}, n=big) == [0, 1, 2]
    assert rows_of({"n": {"$in": [2**53 + 1, 2**63]}}, n=big) == [1]
    small = pa.array([1, 2, 3, None], pa.int8())
    assert rows_of({"n": {"$lt": 2.5}}, n=small) == [0, 1]
    assert rows_of({"n": {"$gt": 2.5}}, n=small) == [2]
    assert rows_of({"n": 2.5}, n=small) == []
    assert rows_of({"n": {"$lt": 1000}}, n=small) == [0, 1, 2]
    assert rows_of({"n": {"$in": [1000, 2.5]}}, n=small) == []
    unsigned = pa.array([2**64 - 1], pa.uint64())
    assert rows_of({"n": 2**64 - 1}, n=unsigned) == [0]
    assert rows_of({"n": {"$gt": -1}}, n=unsigned) == [0]


def test_texts_are_compared_as_they_are() -> None:
    titles = ["Old lamp", "lamp", "", None, "naïve"]
    assert rows_of({"title": {"$contains": "lamp"}}, title=titles) == [0, 1]
    assert rows_of({"title": {"$contains": "Lamp"}}, title=titles) == []
    assert rows_of({"title": {"$contains": ".*"}}, title=titles) == []
    assert rows_of({"title": {"$contains": ""}}, title=titles) == [0, 1, 2, 4]
    assert rows_of({"title": {"$gte": "lamp"}}, title=titles) == [1, 4]
    assert rows_of({"title": ""}, title=titles) == [2]


def test_times_in_their_zone() -> None:
    kind = pa.timestamp("s", "Europe/Berlin")
    seen = pa.array([0, 3600], kind)
    assert rows_of({"seen": "1970-01-01T01:00:00+01:00"}, seen=seen) == [0]
    assert rows_of({"seen": {"$gt": "1970-01-01T00:00:00.5Z"}}, seen=seen) == [1]
    local = pa.array([0, 86400], pa.timestamp("ns"))
    assert rows_of({"day": {"$gt": "1970-01-01"}}, day=local) == [1]
    span = pa.array([1_000_000, 1_000_001], pa.duration("us"))
    assert rows_of({"span": {"$gt": 1}}, span=span) == [1]
    assert rows_of({"span": 1.000001}, span=span) == [1]


def test_times_are_told_apart_by_nanoseconds() -> None:
    moments = pa.array([-1, 0, 1, 123456789], pa.timestamp("ns"))
    assert rows_of({"at": "1970-01-01T00:00:00.123456789"}, at=moments) == [3]
    assert rows_of({"at": "19700101T000000.000000001"}, at=moments) == [2]
    assert rows_of({"at": {"$gt": "1970-01-01T00:00:00.0000000"}}, at=moments) == [2, 3]
    assert rows_of({"at": {"$lt": "1969-12-31T23:59:59.999999999"}}, at=moments) == []
    assert rows_of({"at": "1969-12-31 23:59:59,999999999"}, at=moments) == [0]
    seen = moments.cast(pa.timestamp("ns", "UTC"))
    assert rows_of({"at": "1970-01-01T01:00:00.000000001+01:00"}, at=seen) == [2]
    assert rows_of({"at": {"$lte": "1970-01-01T00:00:00.00000000Z"}}, at=seen) == [0, 1]
    coarse = pa.array([0, 1], pa.timestamp("us"))
    assert rows_of({"at": {"$gt": "1970-01-01T00:00:00.000000999"}}, at=coarse) == [1]
    assert rows_of({"at": "1970-01-01T00:00:00.000000999"}, at=coarse) == []
    with pytest.raises(InvalidInput, match="at most 9 digits of a second's fraction"):
        rows_of({"at": "1970-01-01T00:00:00.0000000001"}, at=moments)


def test_the_item_id_is_a_column() -> None:
    table = pa.table({"price": [1, 2, 3]})
    assert mask_of({"item_id": {"$in": [20, 7]}}, table, [5, 7, 20]).tolist() == [0, 1, 1]
    assert mask_of({"item_id": {"$lt": 6}, "price": 1}, table, [5, 7, 20]).tolist() == [1, 0, 0]
    assert mask_of({"item_id": 7}, pa.table({}), [5, 7]).tolist() == [0, 1]
    assert mask_of({"item_id": {"$exists": True}}, pa.table({}), [5, 7]).tolist() == [1, 1]
    own = pa.table({"item_id": ["a", "b"]})
    assert mask_of({"item_id": "a"}, own, [5, 7]).tolist() == [1, 0]


def test_every_row_and_none() -> None:
    table = pa.table({"n": [1, None]})
    assert mask_of({}, table).tolist() == [1, 1]
    assert mask_of({"$not": {}}, table).tolist() == [0, 0]
    assert mask_of({"n": {"$in": []}}, table).tolist() == [0, 0]
    assert mask_of({"n": {"$nin": []}}, table).tolist() == [1, 1]


def test_a_column_of_nulls_takes_any_value() -> None:
    nothing = pa.nulls(2)
    assert rows_of({"x": {"$gt": 5}}, x=nothing) == []
    assert rows_of({"x": {"$contains": "a"}}, x=nothing) == []
    assert rows_of({"x": {"$ne": True}}, x=nothing) == [0, 1]
    assert rows_of({"x": None}, x=nothing) == [0, 1]
    assert rows_of({"x": "a"}, x=pa.array([[None], []], pa.list_(pa.null()))) == []
    assert rows_of({"x": None}, x=pa.array([[None], []], pa.list_(pa.null()))) == [0]


OPAQUE = {
    "struct": pa.array([{"a": 1}, None]),
    "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
    "nested": pa.array([[[1]], None]),
    "uuid": pa.array([b"0" * 16, None], pa.uuid()),
    "union": pa.UnionArray.from_sparse(
        pa.array([0, 0], pa.int8()), [pa.array([1, None]), pa.array(["a", "b"])]
    ),
    "interval": pa.array([pa.MonthDayNano([1, 2, 3]), None]),
}


@pytest.mark.parametrize("column", OPAQUE.values(), ids=OPAQUE)
def test_other_types_exist_or_not(column: pa.Array) -> None:
    assert rows_of({"x": {"$exists": True}}, x=column) == [0]
    assert rows_of({"x": {"$exists": False}}, x=column) == [1]
    for item_filter in ({"x": 1}, {"x": {"$gt": 1}}, {"x": {"$contains": "a"}}, {"x": None}):
        with pytest.raises(InvalidInput, match=r"one of \$exists, as x is of type"):
            rows_of(item_filter, x=column)


def test_an_encoded_column_may_have_nulls_in_its_values() -> None:
    codes = pa.array([0, 1, None], pa.int8())
    column = pa.DictionaryArray.from_arrays(codes, pa.array(["a", None]))
    assert rows_of({"x": {"$exists": True}}, x=column) == [0]
    assert rows_of({"x": None}, x=column) == [1, 2]
    assert rows_of({"x": {"$ne": "a"}}, x=column) == [1, 2]
    empty = pa.DictionaryArray.from_arrays(pa.array([None], pa.int8()), pa.array([], pa.string()))
    assert rows_of({"x": {"$ne": "a"}}, x=empty) == [0]


TYPES = {
    "count": pa.int32(),
    "price": pa.decimal128(8, 2),
    "title": pa.string(),
    "code": pa.binary(),
    "sold": pa.bool_(),
    "day": pa.date32(),
    "seen": pa.timestamp("ms", "UTC"),
    "made": pa.timestamp("ms"),
    "time": pa.time32("s"),
    "tags": pa.list_(pa.string()),
    "kind": pa.dictionary(pa.int8(), pa.string()),
}


@pytest.mark.parametrize(
    ("item_filter", "field", "words"),
    [
        ({"prise": 1}, "filter.prise", "no such column; expected one of item_id, count, price, "),
        ({"$or": [{"count": 1}, {"x": 1}]}, "filter.x", "no such column"),
        ({"count": "1"}, "filter.count.$eq", "expected a number, as count is of type int32; got"),
        ({"count": True}, "filter.count.$eq", "expected a number"),
        ({"count": {"$in": [1, "b", 3]}}, "filter.count.$in", "got 'b'"),
        ({"count": {"$nin": [1, "b", 3]}}, "filter.count.$nin", "got 'b'"),
        ({"count": {"$contains": 1}}, "filter.count.$contains", "expected one of $eq, $ne, $in"),
        ({"price": True}, "filter.price.$eq", "expected a number, as price is of type decimal"),
        *(
            ({"price": {"$gt": text}}, "filter.price.$gt", "expected a number, or its digits as a")
            for text in ("five", "1e5", "1/2", "", ".5", "nan", "1_0", "٣", "1" * 201)
        ),
        ({"title": {"$ne": 5}}, "filter.title.$ne", "expected a text, as title is of type string"),
        ({"title": {"$contains": 5}}, "filter.title.$contains", "got 5"),
        ({"code": 5}, "filter.code.$eq", "expected bytes, as a text in UTF-8"),
        ({"sold": 1}, "filter.sold.$eq", "expected true or false, as sold is of type bool; got 1"),
        ({"sold": {"$in": [True, 0]}}, "filter.sold.$in", "got 0"),
        ({"sold": {"$gt": False}}, "filter.sold.$gt", "expected one of $eq, $ne, $in, $nin, $ex"),
        ({"day": "soon"}, "filter.day.$eq", "expected a date as 2026-03-01"),
        ({"day": 20}, "filter.day.$eq", "expected a date as 2026-03-01"),
        ({"seen": "2026-03-01T12:30:00"}, "filter.seen.$eq", "expected a time as 2026-03-01T12:30"),
        ({"made": "2026-03-01T12:30:00Z"}, "filter.made.$eq", "without an offset"),
        ({"time": "12:30"}, "filter.time.$eq", "expected a number"),
        ({"tags": {"$contains": 5}}, "filter.tags.$contains", "as tags is of type list<"),
        ({"tags": {"$not": {"$gt": 5}}}, "filter.tags.$gt", "expected a text"),
        ({"kind": 5}, "filter.kind.$eq", "expected a text, as kind is of type dictionary<"),
        ({"item_id": "7"}, "filter.item_id.$eq", "as item_id is of type int64"),
    ],
)
def test_wrong_columns_and_values_are_named(item_filter: Any, field: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        bind(read_filter(check_filter(item_filter)), pa.schema(TYPES))
    assert caught.value.field == field
    assert words in caught.value.details


def test_without_attributes_there_is_the_item_id() -> None:
    with pytest.raises(InvalidInput, match="expected one of item_id; got 'price'"):
        bind(read_filter(check_filter({"price": 1})), pa.schema([]))


def test_a_message_names_the_first_of_very_many_columns() -> None:
    wide = pa.schema([(f"column{i}", pa.int8()) for i in range(1000)])
    with pytest.raises(InvalidInput, match="column48 and 951 more"):
        bind(read_filter(check_filter({"price": 1})), wide)


def test_the_mask_is_the_callers_own() -> None:
    table = pa.table({"sold": [True, False], "n": [1, 2]})
    for item_filter in ({"sold": True}, {"n": {"$gt": 0}}, {"$not": {"n": 1}}, {}):
        mask = mask_of(item_filter, table)
        assert mask.dtype == np.bool_
        mask[:] = False
    assert table["sold"].to_pylist() == [True, False]


def test_many_listed_values() -> None:
    """As many as a filter takes, of each way that they are compared."""
    ids = np.arange(0, 40_000, 2)
    table = pa.table({"n": ids, "x": ids / 8, "text": ids.astype(str)})
    listed = np.arange(0, 30_000, 3)
    expected = np.isin(ids, listed)
    assert (mask_of({"n": {"$in": listed.tolist()}}, table, ids) == expected).all()
    assert (mask_of({"item_id": {"$in": listed.tolist()}}, table, ids) == expected).all()
    assert (mask_of({"x": {"$nin": (listed / 8).tolist()}}, table, ids) == ~expected).all()
    assert (mask_of({"text": {"$in": listed.astype(str).tolist()}}, table, ids) == expected).all()


@pytest.mark.parametrize("seed", range(10))
def test_filters_for_other_types_are_refused_or_evaluated(seed: int) -> None:
    rng = random.Random(seed)
    opaque = [column.type for column in OPAQUE.values()]
    for _ in range(20):
        kinds = rng.sample([*SCALARS, *LISTS], 6)
        table = pa.table(
            {
                **{f"c{i}": random_column(rng, kind, [10]) for i, kind in enumerate(kinds[:4])},
                "c4": pa.nulls(10, rng.choice(opaque[:4])),
            }
        )
        others = pa.schema([(f"c{i}", kind) for i, kind in enumerate(rng.sample(kinds, 5))])
        for _ in range(10):
            item_filter = filter_of(rng, others, 1)
            try:
                mask = mask_of(item_filter, table)
            except InvalidInput as error:
                assert str(error.field).startswith("filter.c"), item_filter
            else:
                assert mask.shape == (10,)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()])
def test_texts_are_looked_through_in_pieces_between_looks(kind: pa.DataType, monkeypatch) -> None:
    monkeypatch.setattr(matching, "TEXTS", 3)
    values = [None, *"abcabcab", None, *"aab"]
    column = pa.chunked_array([values[:8], values[8:]], kind)
    table = pa.table({"a": column, "b": pa.array(range(13))})
    given = {"$or": [{"a": {"$contains": "a"}}, {"b": {"$lt": 0}}, {"$not": {"b": {"$gt": -1}}}]}
    bound = bind(read_filter(check_filter(given)), table.schema)
    looks: list[int] = []
    mask = matches(bound, table, np.arange(13), lambda: looks.append(1))
    assert mask.tolist() == [value == "a" for value in values]
    assert len(looks) == 3 + 2 + 2


def test_what_a_look_raises_ends_the_evaluation(monkeypatch) -> None:
    monkeypatch.setattr(matching, "TEXTS", 2)
    looked: list[int] = []

    def look() -> None:
        looked.append(1)
        if len(looked) == 3:
            raise DeadlineExceeded("over")

    table = pa.table({"a": list("abcdefgh")})
    bound = bind(read_filter(check_filter({"a": {"$contains": "a"}})), table.schema)
    with pytest.raises(DeadlineExceeded):
        matches(bound, table, np.arange(8), look)
    assert len(looked) == 3
