"""Attributes of written items: every type of Arrow, what is refused, and the way into columns."""

import datetime as dt
import time
import uuid
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardline.bench.vectors import manifold
from shardline.router.client.conversions import plain, to_attribute
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import Metric
from shardline.shards.live.attribute_values import arrow_array
from shardline.shards.live.attributes import (
    check_attributes,
    decoded_schema,
    packed_rows,
    written_table,
)
from shardline.shards.live.compaction import attributes_of_rows
from shardline.shards.live.item_attributes import ItemAttributes, column_values
from shardline.shards.live.live_rows import live_rows
from shardline.shards.live.state import ShardState, apply
from shardline.shards.storage.generation import read_attribute_file, write_attributes
from shardline.shards.storage.vector_files import open_ipc, write_table
from tests.engine import build_main
from tests.live_model import delete, upsert

U7 = str(uuid.UUID(int=7))
STRUCT = pa.struct([("a", pa.date32()), ("b", pa.list_(pa.float32()))])
MAP = pa.map_(pa.string(), pa.int64())
# type -> values written, and what they are in answers where that differs
TAKEN: list[tuple[pa.DataType, list[Any], list[Any] | None]] = [
    (pa.bool_(), [True, False], None),
    (pa.int8(), [-128, 127], None),
    (pa.uint8(), [0, 255], None),
    (pa.int64(), [-(2**63), 2**63 - 1], None),
    (pa.uint64(), [0, 2**64 - 1], None),
    (pa.float16(), [1.5, 2], [1.5, 2.0]),
    (pa.float32(), [0.1, -7], [float(np.float32(0.1)), -7.0]),
    (pa.float64(), [0.1, 2**60], [0.1, float(2**60)]),
    (pa.string(), ["", "ü"], None),
    (pa.large_string(), ["a", "b"], None),
    (pa.string_view(), ["a", "longer than what a view holds"], None),
    (pa.binary(), ["ab", "ü"], None),
    (pa.large_binary(), ["ab", ""], None),
    (pa.binary_view(), ["ab", ""], None),
    (pa.binary(2), ["ab", "ü"], None),
    (pa.date32(), ["2026-03-01", "1969-12-31"], None),
    (pa.date64(), ["2026-03-01", "20260302"], ["2026-03-01", "2026-03-02"]),
    (pa.timestamp("s"), ["2026-03-01T12:00:01", "2026-03-01"],
     ["2026-03-01T12:00:01", "2026-03-01T00:00:00"]),
    (pa.timestamp("ms"), ["2026-03-01T12:00:01.250000", "1969-12-31T23:59:59.999"],
     ["2026-03-01T12:00:01.250000", "1969-12-31T23:59:59.999000"]),
    (pa.timestamp("us"), ["2026-03-01T12:00:01.000001", "0001-01-01T00:00:00"], None),
    (pa.timestamp("ns"), ["2026-03-01T12:00:01.000001", "1700-01-01T00:00:00"], None),
    (pa.timestamp("ns"), ["2026-03-01T12:00:01.123456789", "1969-12-31T23:59:59.000000001"],
     None),
    (pa.timestamp("ns", "+02:00"), ["2026-03-01T12:00:01.123456789Z", "2026-03-01T00:00:00Z"],
     ["2026-03-01T14:00:01.123456789+02:00", "2026-03-01T02:00:00+02:00"]),
    (pa.timestamp("us"), ["2026-03-01 12:00:01.123456000", "20260301T120001,5"],
     ["2026-03-01T12:00:01.123456", "2026-03-01T12:00:01.500000"]),
    (pa.timestamp("us", "UTC"), ["2026-03-01T12:00:00+02:00", "2026-03-01T12:00:00Z"],
     ["2026-03-01T10:00:00+00:00", "2026-03-01T12:00:00+00:00"]),
    (pa.timestamp("s", "+02:00"), ["2026-03-01T12:00:00+00:00", "2026-03-01T12:00:00+02:00"],
     ["2026-03-01T14:00:00+02:00", "2026-03-01T12:00:00+02:00"]),
    (pa.time32("s"), [0, 86_399], [0.0, 86_399.0]),
    (pa.time32("ms"), [0.25, 1], [0.25, 1.0]),
    (pa.time64("us"), [45_000.00025, 86_399.999999], None),
    (pa.time64("ns"), [45_000.00025, 1.5], None),
    (pa.time64("ns"), [86_399.999999999, "0.000000001"], [86_399.999999999, 1e-9]),
    (pa.duration("ns"), [-0.123456789, "1000000000.123456789"], None),
    (pa.duration("s"), [2**53 + 1, "-9007199254740993"], ["9007199254740993", "-9007199254740993"]),
    (pa.duration("ms"), [0.1 + 0.2, "1"], [0.3, 1.0]),
    (pa.duration("s"), [-5, 3600], [-5.0, 3600.0]),
    (pa.duration("us"), [0.000001, 3600.5], None),
    (pa.decimal128(5, 2), [1.5, -2], [1.5, -2.0]),
    (pa.decimal128(38, 20), [0.1, 123456789012.5], None),
    (pa.decimal256(50, 3), [1.125, 1e30], None),
    (pa.decimal128(38, 20), ["0.12345678901234567890", "-1.5"], ["0.12345678901234567890", -1.5]),
    (pa.decimal128(25, 0), [2**63 + 1, "1234567890123456789012345"],
     ["9223372036854775809", "1234567890123456789012345"]),
    (pa.decimal128(5, -2), [100, 1234500], [100.0, 1234500.0]),
    (pa.dictionary(pa.int8(), pa.string()), ["a", "b"], None),
    (pa.dictionary(pa.int8(), pa.date32()), ["2026-03-01", "2026-03-02"], None),
    (pa.run_end_encoded(pa.int32(), pa.int64()), [1, 1], None),
    (pa.list_(pa.string()), [["a", None], []], None),
    (pa.large_list(pa.int64()), [[1, 2], [None]], None),
    (pa.list_view(pa.int64()), [[1, 2], []], None),
    (pa.list_(pa.float32(), 2), [[1, 2], [0.5, 4]], [[1.0, 2.0], [0.5, 4.0]]),
    (pa.list_(pa.list_(pa.date32())), [[["2026-03-01"], None], []], None),
    (pa.list_(pa.dictionary(pa.int8(), pa.string())), [["a"], ["b", None]], None),
    (pa.list_(pa.timestamp("ns")), [["2026-03-01T12:00:01.123456789", None], []], None),
    (pa.struct([("t", pa.timestamp("ns")), ("d", pa.decimal128(30, 20))]),
     [{"t": "2026-03-01T12:00:01.123456789", "d": "1.00000000000000000001"}, {"d": 2}],
     [{"t": "2026-03-01T12:00:01.123456789", "d": "1.00000000000000000001"},
      {"t": None, "d": 2.0}]),
    (pa.map_(pa.string(), pa.duration("ns")), [[["a", 0.5], ["b", None]], []], None),
    (pa.dictionary(pa.int8(), pa.timestamp("ns")), ["2026-03-01T12:00:01.123456789"] * 2, None),
    (pa.run_end_encoded(pa.int32(), pa.decimal128(30, 20)), ["1.00000000000000000001"] * 2, None),
    (STRUCT, [{"a": "2026-03-01", "b": [1.5, None]}, {}],
     [{"a": "2026-03-01", "b": [1.5, None]}, {"a": None, "b": None}]),
    (MAP, [[["a", 1], ["b", None]], []], None),
    (pa.uuid(), [U7, U7.replace("-", "")], [U7, U7]),
]  # fmt: skip
REFUSED: list[tuple[pa.DataType, Any]] = [
    *((pa.bool_(), value) for value in (1, 0.0, "true", [True])),
    *((pa.int8(), value) for value in (128, -129, 1.0, True, "1", [1])),
    *((pa.uint32(), value) for value in (-1, 2**32)),
    *((pa.int64(), value) for value in (2**63, 1.5)),
    *((pa.float32(), value) for value in ("1", True, 1e39, float("nan"), float("inf"))),
    (pa.float16(), 1e5),
    *((pa.string(), value) for value in (1, b"a", ["a"], {"a": 1})),
    *((pa.binary(), value) for value in (1, b"ab")),
    *((pa.binary(2), value) for value in ("a", "abc", "üü")),
    *((pa.date32(), value) for value in ("2026-02-30", "today", 20_000, "2026-03-01T00:00:00")),
    *((pa.timestamp("s"), value) for value in ("2026-03-01T00:00:00.5", "x", 5)),
    (pa.timestamp("s"), "2026-03-01T00:00:00+00:00"),
    # digits that the column, or nobody, has room for are refused, not cut off
    *((pa.timestamp("us"), f"2026-03-01T00:00:00.{digits}") for digits in ("0000001", "123456789")),
    *((pa.timestamp(unit), "2026-03-01T00:00:00.0000000001") for unit in ("us", "ns")),
    (pa.timestamp("us", "UTC"), "2026-03-01T00:00:00.1234567+01:00"),
    (pa.timestamp("us", "UTC"), "2026-03-01T00:00:00+01:00:00.1234567"),
    *((pa.time64("us"), value) for value in (43_200.0000301, 43_200.00000001)),
    (pa.time32("ms"), 43_200.00001),
    *((pa.duration("s"), value) for value in (1e9 + 0.25, "1000000000.25", "1e3", "٣")),
    *((pa.timestamp("ns"), value) for value in ("1600-01-01T00:00:00", "2300-01-01T00:00:00")),
    *((pa.timestamp("us", "UTC"), value) for value in ("2026-03-01T00:00:00", "2026-03-01")),
    *((pa.time32("s"), value) for value in (-1, 86_400, 0.5, "12:00:00")),
    *((pa.duration("ms"), value) for value in (1e-4, 1e300, "1.0001", "", True)),
    *((pa.decimal128(5, 2), value) for value in (1000, 1.234, "1.555", "1,5", 1e-9, True)),
    *((pa.decimal128(5, -2), value) for value in (150, 1e9)),
    *((pa.dictionary(pa.int8(), pa.string()), value) for value in (1, ["a"])),
    *((pa.list_(pa.int8()), value) for value in (1, "a", [300], {"a": 1})),
    *((pa.list_(pa.float32(), 2), value) for value in ([1.0], [1.0, 2.0, 3.0], [1.0, "a"])),
    *((STRUCT, value) for value in ({"c": 1}, [1], {"a": 5})),
    *((MAP, value) for value in ({"a": 1}, [["a"]], [[None, 1]], [["a", "b"]])),
    *((pa.uuid(), value) for value in ("7", 7)),
    (pa.null(), 1),
    (pa.month_day_nano_interval(), [1, 2, 3]),
]  # fmt: skip


def pack(**columns: list[Any]) -> bytes:
    return msgpack.packb(columns)


def ids_of(count: int) -> np.ndarray:
    return np.arange(100, 100 + count)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    TAKEN,
    ids=lambda v: str(v) if isinstance(v, pa.DataType) else "",
)
def test_every_type_is_taken_in_the_form_of_answers(kind, values, expected, tmp_path) -> None:
    """Answers give the same before and after it became part of a file, and take it back."""
    schema = pa.schema([("other", pa.int64()), ("a", kind)])
    written, expected = [*values, None], [*(expected or values), None]
    checked = check_attributes(pack(a=written), ids_of(3), schema)
    assert msgpack.unpackb(checked) == {"a": expected}
    assert check_attributes(checked, ids_of(3), schema) == checked
    packed = packed_rows(checked, 3, schema.names)
    assert [msgpack.unpackb(each)[1] for each in packed[:2]] == expected[:2]
    assert packed[2] == b""
    table = written_table(packed, schema)
    assert table.schema == decoded_schema(schema)
    table.validate(full=True)
    write_table(tmp_path / "a.arrow", table)
    table = open_ipc(tmp_path / "a.arrow").read_all()
    assert ItemAttributes(table).values("a", np.arange(3)) == expected


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.timestamp("ns"), ["2026-03-01T12:00:01.123456789", None]),
        (pa.time64("ns"), [1.123456789, None]),
        (pa.duration("ns"), ["1000000000.123456789", 0.5]),
        (pa.decimal128(38, 20), ["0.12345678901234567890", 1.5]),
        (pa.list_(pa.decimal128(38, 20)), [["0.12345678901234567890", None], None]),
        (pa.dictionary(pa.int8(), pa.timestamp("ns")), ["2026-03-01T12:00:01.123456789"] * 2),
        (pa.date32(), ["2026-03-01", None]),
        (pa.string(), ["a", None]),
    ],
    ids=str,
)
def test_columns_of_files_are_written_as_they_are(kind, values) -> None:
    """By `shardline upsert`."""
    column = arrow_array(values, kind)
    for each_form in (column, pa.chunked_array([column])):
        sent = [to_attribute(each) for each in column_values(each_form)]
        packed = msgpack.packb({"a": sent}, default=plain)
        checked = check_attributes(packed, ids_of(2), pa.schema([("a", kind)]))
        assert msgpack.unpackb(checked) == {"a": values}


@pytest.mark.parametrize(("kind", "value"), REFUSED, ids=lambda v: str(v)[:60])
def test_a_value_of_another_type_is_refused_with_column_type_and_item(kind, value) -> None:
    schema = pa.schema([("a", kind)])
    with pytest.raises(InvalidInput, match="attribute of item 102") as caught:
        check_attributes(pack(a=[None, None, value]), ids_of(3), schema)
    assert caught.value.field == "attributes.a"
    assert caught.value.expected
    assert caught.value.got
    assert len(caught.value.got) <= 200


@pytest.mark.parametrize(
    ("attributes", "field", "expected"),
    [
        (b"\xc1", "attributes", "msgpack"),
        (msgpack.packb([1, 2]), "attributes", "names and lists of values"),
        (msgpack.packb({1: ["a"]}), "attributes", "msgpack"),
        (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), "attributes.a", "a list of 2"),
        (msgpack.packb({"a": [msgpack.ExtType(5, b"x"), None]}), "attributes.a", "a text"),
        (pack(a=["x"]), "attributes.a", "a list of 2"),
        (pack(a=["x", "y", "z"]), "attributes.a", "a list of 2"),
        (pack(a="xy"), "attributes.a", "a list of 2"),
        (pack(price=[1, 2]), "attributes.price", "one of a, b"),
        (pack(a=["x", "y"], b=[1, "2"]), "attributes.b", None),
    ],
)
def test_what_is_no_columns_of_the_shard_is_refused(attributes, field, expected) -> None:
    schema = pa.schema([("a", pa.string()), ("b", pa.int64())])
    with pytest.raises(InvalidInput) as caught:
        check_attributes(attributes, ids_of(2), schema)
    assert caught.value.field == field
    assert caught.value.expected == (expected or caught.value.expected)


def test_no_attributes_are_always_right_and_others_need_columns() -> None:
    none, schema = ItemAttributes().schema, pa.schema([("a", pa.string())])
    for attributes in (b"", pack()):
        assert check_attributes(attributes, ids_of(2), none) == b""
        assert check_attributes(attributes, ids_of(2), schema) == b""
    assert check_attributes(pack(a=[None, None]), ids_of(2), schema) == b""
    with pytest.raises(InvalidInput, match="none, as this generation has none"):
        check_attributes(pack(a=[1, 2]), ids_of(2), none)
    assert packed_rows(b"", 2, none.names) == [b"", b""]
    assert written_table([], schema).num_rows == 0
    assert written_table([b"", b""], schema).column("a").to_pylist() == [None, None]


VALUES = {
    "n": (pa.int32(), st.integers(-(2**31), 2**31 - 1)),
    "f": (pa.float32(), st.floats(width=32, allow_nan=False, allow_infinity=False)),
    "s": (pa.string(), st.text("aü€\U0001f600\n", max_size=5)),
    "t": (
        pa.timestamp("us"),
        st.datetimes(min_value=dt.datetime(1, 1, 1)).map(lambda moment: moment.isoformat()),
    ),
    "d": (pa.decimal128(9, 3), st.integers(-(10**8), 10**8).map(lambda n: n / 1000)),
    "l": (
        pa.list_(pa.date32()),
        st.lists(st.none() | st.dates().map(dt.date.isoformat), max_size=4),
    ),
}
SCHEMA = pa.schema([(name, kind) for name, (kind, _) in VALUES.items()])


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 5), st.sets(st.sampled_from(sorted(VALUES))))
def test_any_columns_come_back_as_they_were_written(data, rows: int, names: set[str]) -> None:
    columns = {
        name: data.draw(st.lists(st.none() | VALUES[name][1], min_size=rows, max_size=rows))
        for name in sorted(names)
    }
    checked = check_attributes(msgpack.packb(columns), ids_of(rows), SCHEMA)
    table = written_table(packed_rows(checked, rows, SCHEMA.names), SCHEMA)
    for name in SCHEMA.names:
        got = ItemAttributes(table).values(name, np.arange(rows))
        assert got == columns.get(name, [None] * rows)


def read(state: ShardState, ids: list[int], *names: str) -> tuple[list[int], list[list[Any]]]:
    found, packed = state.attributes_of(np.array(ids), names, time.monotonic() + 60, 1 << 20)
    unpacker = msgpack.Unpacker()
    unpacker.feed(packed)
    columns = [[] for _ in names]
    for column in columns:
        while len(column) < len(found):
            column += unpacker.unpack()
    return found.tolist(), columns


@pytest.fixture
def state() -> ShardState:
    """200 items of which item 2i has title "i" and size i."""
    table = pa.table({"title": [str(row) for row in range(200)], "size": np.arange(200)})
    main = build_main(manifold(200, 4, 2, seed=1), metric=Metric.DOT, kind="flat")
    return ShardState.of(main, np.arange(0, 400, 2), ItemAttributes(table))


def test_attributes_of_new_replaced_and_deleted_items(state) -> None:
    """An upsert replaces the whole item: what it does not bring is null."""
    rows = manifold(4, 4, 2, seed=2)
    records = [
        upsert(1, [4, 1], rows[:2], pack(title=["four", "one"], size=[40, None])),
        upsert(2, [6, 3], rows[2:], pack(title=[None, "three"])),
        upsert(3, [8], rows[:1]),
        delete(4, [10, 3]),
        upsert(5, [1], rows[3:], pack(size=[11])),
        delete(6, [8]),
        upsert(7, [8], rows[:1], pack(title=["eight"])),
    ]
    after, _ = apply(state, records)
    asked = [12, 10, 8, 7, 6, 4, 3, 2, 1, 0]
    assert read(after, asked, "title", "size") == (
        [12, 8, 6, 4, 2, 1, 0],
        [["6", "eight", None, "four", "1", None, "0"], [6, None, None, 40, 1, 11, 0]],
    )
    assert read(after, asked, "original_id")[1] == [[12, 8, 6, 4, 2, 1, 0]]
    assert read(after, [3, 10], "title") == ([], [[]])
    assert read(state, [10, 8, 4, 3, 1], "title") == ([10, 8, 4], [["5", "4", "2"]])
    with pytest.raises(InvalidInput, match="no such attribute"):
        read(after, [1, 4], "price")


def test_many_values_of_main_and_delta_keep_their_order(state) -> None:
    ids = list(range(0, 400, 3))
    records = [upsert(1, ids, manifold(len(ids), 4, 2, seed=3), pack(size=[-item for item in ids]))]
    after, _ = apply(state, records)
    asked = np.random.default_rng(1).permutation(400).tolist()
    here = [item for item in asked if item % 2 == 0 or item % 3 == 0]
    sizes = [-item if item % 3 == 0 else item // 2 for item in here]
    assert read(after, asked, "size") == (here, [sizes])
    assert after.attributes_of(np.array(asked), ["size"], time.monotonic() + 60, 100) is None


def test_an_original_id_that_is_an_attribute_is_that_of_the_write(state) -> None:
    table = pa.table({"original_id": [f"sku-{row}" for row in range(200)]})
    named = replace(state, attributes=ItemAttributes(table))
    change = pack(original_id=["sku-new"])
    after, _ = apply(named, [upsert(1, [5], manifold(1, 4, 2, seed=2), change)])
    assert read(after, [5, 6], "original_id") == ([5, 6], [["sku-new", "sku-3"]])


def test_written_items_may_have_more_values_than_a_dictionary_counts(tmp_path) -> None:
    """What becomes of them in a new main index, and in what a build from the live rows reads."""
    kind = pa.dictionary(pa.int8(), pa.string())
    names = pa.array([f"n{row % 100}" for row in range(200)])
    stored = pa.table({"name": names.dictionary_encode().cast(kind)})
    main = build_main(manifold(200, 4, 2, seed=1), metric=Metric.DOT, kind="flat")
    state = ShardState.of(main, np.arange(0, 400, 2), ItemAttributes(stored))
    ids, written = np.arange(1, 600, 2), [f"w{row}" for row in range(300)]
    state, _ = apply(state, [upsert(1, ids, manifold(300, 4, 2, seed=2), pack(name=written))])
    rows = live_rows(state)
    values = dict(zip(np.arange(0, 400, 2).tolist(), names.to_pylist(), strict=True))
    values |= zip(ids.tolist(), written, strict=True)
    expected = [values[item] for item in rows.item_ids.tolist()]
    write_attributes(tmp_path / "a.arrow", attributes_of_rows(state, rows))
    table = read_attribute_file(tmp_path / "a.arrow", rows=500)
    assert table["name"].to_pylist() == expected
    blocks = [block.attributes for block in rows.blocks(170)]
    assert pa.Table.from_batches(blocks)["name"].to_pylist() == expected
    # and again over what was compacted
    main = build_main(manifold(500, 4, 2, seed=3), metric=Metric.DOT, kind="flat")
    again = ShardState.of(main, rows.item_ids, ItemAttributes(table))
    again, _ = apply(again, [upsert(1, [3], manifold(1, 4, 2, seed=2), pack(name=["new"]))])
    assert attributes_of_rows(again, live_rows(again))["name"][3].as_py() == "new"
