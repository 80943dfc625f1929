"""What of numpy is sent, and as what; what is refused, by name; answers as tables."""

import datetime as dt
import sys
from dataclasses import replace
from datetime import date
from decimal import Decimal
from typing import Any

import msgpack
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from shardline.router.client.answers import SearchAnswer
from shardline.router.client.calls import search_body
from shardline.router.contract import Coverage, Reason
from shardline.router.http.codec import decode_query
from shardline.router.http.media import Media
from shardline.router.query import ResolvedQuery
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.filter_language import check_filter

ROWS = np.array([[1, 2, 3], [4, 5, 6]])


def sent(**fields: Any) -> ResolvedQuery:
    """The query as a server reads it."""
    return decode_query(search_body(**fields), Media.MSGPACK, RouterConfig())


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">i8", "i1", "u1", "<i4", "<u8"])
def test_vectors_of_every_number_type_arrive_as_float32(dtype: str) -> None:
    vectors = sent(vectors=ROWS.astype(dtype)).values
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, ROWS)


@pytest.mark.parametrize(
    "vectors",
    [ROWS.tolist(), np.asfortranarray(ROWS), np.repeat(ROWS, 2, axis=1)[:, ::2], tuple(ROWS)],
)
def test_vectors_of_every_layout_arrive_in_order(vectors: Any) -> None:
    np.testing.assert_array_equal(sent(vectors=vectors).values, ROWS)


@pytest.mark.parametrize("dtype", ["<i8", ">i8", "<i4", "u1", "<u8"])
def test_ids_of_every_integer_type_arrive_as_int64(dtype: str) -> None:
    ids = sent(item_ids=np.array([1, 200], dtype=dtype)).values
    assert (ids.dtype, ids.tolist()) == (np.int64, [1, 200])


def test_exclusions_arrive_as_arrays_of_ids() -> None:
    lists = [[3, 1, 3], np.array([9, 7], np.uint8), {5}, pd.Series([2, 1]), ()]
    query = sent(item_ids=[1] * 5, exclude=lists)
    assert [ids.tolist() for ids in query.excluded] == [[1, 3], [7, 9], [5], [1, 2], []]
    query = sent(item_ids=[1, 2], exclude=np.array([[4, 3], [2, 2]]))
    assert [ids.tolist() for ids in query.excluded] == [[3, 4], [2]]
    assert sent(features=[{"a": 1}], exclude_history=True).exclude_history


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("exclude[0]", value) for value in ([1, 2], [[1.5]], [["1"]], [[True]], [[[1]]])),
        ("exclude[1][1]", [[], [3, -1]]),
        ("exclude", 7),
        *(("vectors", ROWS.astype(kind)) for kind in (bool, complex, object, str, "M8[s]")),
        *(("vectors", value) for value in ([[1, 2], [3]], [1.0, 2.0], 5, [["1", "2"]], "text")),
        *(("item_ids", value) for value in ([1.5], ["1"], [True], [[1]], [2**63], [None], 7)),
        ("item_ids", np.array([2**64 - 1], np.uint64)),
        ("item_ids", [1, True]),
        ("item_ids", np.ma.masked_array([1, 2], [False, True])),
        ("vectors", np.ma.masked_array([[1.0, 2.0]], [[False, True]])),
        ("item_ids[1]", [3, -1]),
        ("features[1].part", [{"age": 1}, {"part": 1j}]),
        ("features[0].when", [{"when": np.array(["2026"], "M8[D]")}]),
        ("features[0].id", [{"id": 10**30}]),
        ("features[0].id", [{"id": [1, 10**30]}]),
        ("features[0].text", [{"text": "\ud800"}]),
        ("k", 10**30),
        ("timeout_ms", 1j),
    ],
)
def test_what_would_change_on_the_way_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        search_body(**{field.partition("[")[0]: value})
    assert caught.value.field == field


@pytest.mark.parametrize("values", [np.array([1, 200], object), pd.Series([1, 200])])
def test_ids_in_other_containers_arrive_as_int64(values: Any) -> None:
    ids = sent(item_ids=values).values
    assert (ids.dtype, ids.tolist()) == (np.int64, [1, 200])


def test_features_of_numpy_arrive_as_plain_values() -> None:
    row = {
        "half": np.array([0.5, 2], np.float16),
        "single": np.array([0.5, 2], np.float32),
        "small": np.array([1, 2], np.int8),
        "flags": np.array([True, False]),
        "words": np.array(["a", "b"]),
        "count": np.int64(7),
        "share": np.float32(0.25),
        "new": np.bool_(True),
        "day": date(2026, 1, 2),
        "hour": np.datetime64("2026-01-02T03"),
        "stamp": pd.Timestamp("2026-01-02 03:04", tz="UTC"),
        "never": pd.NaT,
        "no time": np.datetime64("NaT"),
        "price": Decimal("1.5"),
        "opens": dt.time(9, 30),
        "span": dt.timedelta(minutes=1),
        "numpy span": np.timedelta64(1500, "ms"),
        "no span": np.timedelta64("NaT"),
    }
    assert sent(features=[row]).values == [
        {
            "half": [0.5, 2.0],
            "single": [0.5, 2.0],
            "small": [1, 2],
            "flags": [True, False],
            "words": ["a", "b"],
            "count": 7,
            "share": 0.25,
            "new": True,
            "day": "2026-01-02",
            "hour": "2026-01-02T03",
            "stamp": "2026-01-02T03:04:00+00:00",
            "never": None,
            "no time": None,
            "price": 1.5,
            "opens": 34_200.0,
            "span": 60.0,
            "numpy span": 1.5,
            "no span": None,
        }
    ]


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow"])
def test_a_frame_has_a_query_per_row(kind: str) -> None:
    columns = {"age": [31.0, None], "country": ["FR", None], "history": [[1, 2], []]}
    table = pa.table(columns)
    frames = {"pandas": table.to_pandas, "polars": lambda: pl.DataFrame(columns)}
    frame = frames.get(kind, lambda: table)()
    assert sent(features=frame).values == table.to_pylist()


def test_missing_values_of_frames_are_null_and_series_are_lists() -> None:
    row = {"a": float("nan"), "b": np.float32("nan"), "c": pd.NA, "d": pd.Series([1, 2])}
    expected = {"a": None, "b": None, "c": None, "d": [1, 2], "e": ["x", "y"]}
    row |= {"e": np.array(["x", "y"], object)}
    assert sent(features=[row]).values == [expected]


def test_an_argument_that_there_is_not_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'vector'"):
        search_body(vector=ROWS)  # type: ignore[call-arg]


def test_what_is_not_given_is_not_sent() -> None:
    assert msgpack.unpackb(search_body(features=({"a": 1},))) == {"features": [{"a": 1}]}


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"a": np.int64(3)}, {"a": 3}),
        ({"a": {"$lt": np.float32(0.5)}}, {"a": {"$lt": 0.5}}),
        ({"a": {"$in": np.array([1, 2])}}, {"a": {"$in": [1, 2]}}),
        ({"a": {"$in": pd.Series(["x", "y"])}}, {"a": {"$in": ["x", "y"]}}),
        ({"a": {"$in": {5}}}, {"a": {"$in": [5]}}),
        ({"a": {"$in": range(3)}}, {"a": {"$in": [0, 1, 2]}}),
        ({"a": date(2026, 3, 1)}, {"a": "2026-03-01"}),
        ({"a": pd.Timestamp("2026-03-01 12:00")}, {"a": "2026-03-01T12:00:00"}),
        ({"a": {"$gte": np.datetime64("2026-03-01T12:00")}}, {"a": {"$gte": "2026-03-01T12:00"}}),
        ({"a": dt.timedelta(minutes=2)}, {"a": 120.0}),
        ({"a": Decimal("1.5")}, {"a": 1.5}),
        ({"$or": ({"a": True}, {"a": None})}, {"$or": [{"a": True}, {"a": None}]}),
    ],
)
def test_values_of_filters_arrive_in_the_forms_of_json(given: Any, plain: Any) -> None:
    assert sent(item_ids=[1], filter=given).options.filter == check_filter(plain)
    several = sent(item_ids=[1, 2, 3], filter=[given, None, {"b": 1}]).filters
    assert several == (check_filter(plain), b"", check_filter({"b": 1}))


@pytest.mark.parametrize(
    "condition", [float("nan"), {"$lt": np.float32("nan")}, {"$in": np.array([1.0, np.nan])}]
)
def test_nan_in_a_filter_is_refused_and_not_taken_for_null(condition: Any) -> None:
    with pytest.raises(InvalidInput, match="finite") as caught:
        sent(item_ids=[1], filter={"a": condition})
    assert (caught.value.field or "").startswith("filter.a")


def test_what_no_filter_can_hold_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidInput) as caught:
        search_body(item_ids=[1], filter={"a": object()})
    assert caught.value.field == "filter"


@pytest.fixture
def answer() -> SearchAnswer:
    return SearchAnswer(
        ids=np.array([[4, 2, -1], [-1, -1, -1], [7, 8, 9]]),
        scores=np.array([[0.5, 0.25, -np.inf], [-np.inf] * 3, [3, 2, 1]], np.float32),
        generation=3,
        model_version="m",
        coverage=Coverage(
            shards_asked=1, shards_answered=1, rows_asked=9, rows_answered=9, degraded=()
        ),
        took_ms=1.0,
        search_ms=0.5,
        request_id="r",
        reasons=(Reason(query=1, code="not_found", text="item 5 not found"),),
    )


COLUMNS = {
    "query": [0, 0, 2, 2, 2],
    "rank": [0, 1, 0, 1, 2],
    "id": [4, 2, 7, 8, 9],
    "score": [0.5, 0.25, 3.0, 2.0, 1.0],
}


def test_an_answer_is_a_table_of_a_row_per_result(answer: SearchAnswer) -> None:
    table = answer.to_arrow()
    assert table.to_pydict() == COLUMNS
    assert [str(kind) for kind in table.schema.types] == ["int64", "int64", "int64", "float"]
    frame = answer.to_pandas()
    assert frame.to_dict("list") == COLUMNS
    assert [str(kind) for kind in frame.dtypes] == ["int64", "int64", "int64", "float32"]


@pytest.mark.parametrize(("library", "verb"), [("pyarrow", "to_arrow"), ("pandas", "to_pandas")])
def test_a_table_without_its_library_says_what_to_install(
    answer: SearchAnswer, monkeypatch: pytest.MonkeyPatch, library: str, verb: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"pip install {library}"):
        getattr(answer, verb)()


@pytest.mark.parametrize(
    "fields", [{"features": {"a": 1}}, {"features": 5}, {"params": {"nprobe": 3}}]
)
def test_what_has_another_shape_is_refused_by_its_name(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        search_body(**fields)
    assert caught.value.field in fields


@pytest.mark.parametrize(
    "vectors",
    [
        pa.array(ROWS.tolist()),
        pa.FixedSizeListArray.from_arrays(pa.array(ROWS.ravel()), 3),
        pd.Series(list(ROWS)),
        pl.Series(ROWS.tolist()),
    ],
    ids=["arrow lists", "arrow vectors", "pandas", "polars"],
)
def test_columns_of_vectors_are_matrices(vectors: Any) -> None:
    np.testing.assert_array_equal(sent(vectors=vectors).values, ROWS)


def test_names_may_come_from_arrow() -> None:
    query = sent(item_ids=[1], return_=pa.array(["title"]))
    assert query.returned == ("title",)


def test_numpy_bools_are_no_ids() -> None:
    with pytest.raises(InvalidInput, match="a bool"):
        search_body(item_ids=[np.bool_(True), np.int64(3)])


def test_a_duration_is_no_number_of_milliseconds() -> None:
    for wrong in (dt.timedelta(milliseconds=500), np.timedelta64(500, "ms")):
        with pytest.raises(InvalidInput) as caught:
            search_body(item_ids=[1], timeout_ms=wrong)  # type: ignore[arg-type]
        assert caught.value.field == "timeout_ms"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2**64 - 1, None], [2**64 - 1, None]),
        ([[["a", 1]], None], ['[["a", 1]]', None]),
        ([1, "a"], ["1", '"a"']),
    ],
)
def test_every_attribute_has_a_column(answer: SearchAnswer, values: list, expected: list) -> None:
    many = replace(answer, attributes={"x": [values], "id": [[7, 8]], "attribute.id": [[9, 10]]})
    one = replace(many, ids=np.array([[5, 6]]), scores=np.zeros((1, 2), np.float32))
    table = one.to_arrow()
    assert table["x"].to_pylist() == expected
    assert table["id"].to_pylist() == [5, 6]
    assert table["attribute.id"].to_pylist() == [7, 8]
    assert table["attribute.attribute.id"].to_pylist() == [9, 10]
