"""One column per case, of eight rows: what it becomes, or the words of refusal."""

import datetime as dt
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

ROWS = 8
DAY = dt.date(2026, 3, 1)
NOON = dt.datetime(2026, 3, 1, 12)

VECTOR = pa.list_(pa.float32(), 2)
STRINGS, WHOLE = pa.large_list(pa.string()), pa.large_list(pa.int64())
NUMBER, TEXT, TIME = pa.float64(), pa.string(), pa.timestamp("us")


def _rows(*values: Any) -> list[Any]:
    return [values[place % len(values)] for place in range(ROWS)]


def _uuids() -> pa.Array:
    raw = [uuid.UUID(int=place).bytes for place in range(ROWS)]
    return pa.ExtensionArray.from_storage(pa.uuid(), pa.array(raw, pa.binary(16)))


def _bad_text() -> pa.Array:
    return pa.array(_rows(b"a", b"b", b"\xc9"), pa.binary()).view(pa.string())


def _array(kind: pa.DataType, *values: Any) -> Callable[[], pa.Array]:
    return lambda: pa.array(_rows(*values), kind)


# name -> (the column, the type it is stored in)
TAKEN: dict[str, tuple[Callable[[], pa.Array], pa.DataType]] = {
    "bool": (_array(pa.bool_(), True, None), pa.bool_()),
    "int8": (_array(pa.int8(), 1, -2), pa.int8()),
    "uint8": (_array(pa.uint8(), 1, 255), pa.uint8()),
    "int64 beyond 2^53": (_array(pa.int64(), 2**53 + 1, 2**62), pa.int64()),
    "uint64 beyond 2^63": (_array(pa.uint64(), 2**63, 2**64 - 1, 0), pa.uint64()),
    "int with nulls": (_array(pa.int64(), 1, None, 3), pa.int64()),
    "float16": (_array(pa.float16(), np.float16(1.5), None), pa.float32()),
    "float32": (_array(pa.float32(), 1.5, 2.5), pa.float32()),
    "float with nan": (_array(pa.float64(), 1.0, float("nan")), NUMBER),
    "float near the limit": (_array(pa.float64(), 1.7e308, -1.7e308, 1.0), NUMBER),
    "smallest float": (_array(pa.float64(), 5e-324, 0.0), NUMBER),
    "only nulls": (_array(pa.null(), None), TEXT),
    "only null numbers": (_array(pa.float64(), None), NUMBER),
    "only nan": (_array(pa.float64(), float("nan")), NUMBER),
    "decimal128": (_array(pa.decimal128(10, 2), Decimal("1.25"), None), NUMBER),
    "decimal256": (_array(pa.decimal256(50, 3), Decimal("1.125")), NUMBER),
    "date32": (_array(pa.date32(), DAY, None), TIME),
    "date64": (_array(pa.date64(), DAY), TIME),
    "timestamp s": (_array(pa.timestamp("s"), NOON, None), TIME),
    "timestamp ms": (_array(pa.timestamp("ms"), NOON), TIME),
    "timestamp us": (_array(pa.timestamp("us"), NOON), TIME),
    "timestamp ns": (_array(pa.timestamp("ns"), 1_772_366_400_000_000_001), TIME),
    "timestamp of a zone": (_array(pa.timestamp("us", "Europe/Paris"), NOON), TIME),
    "time32": (_array(pa.time32("s"), dt.time(12)), NUMBER),
    "time64": (_array(pa.time64("ns"), dt.time(12), None), NUMBER),
    "duration": (_array(pa.duration("ms"), 1500, None), NUMBER),
    "string": (_array(pa.string(), "FR", None, ""), TEXT),
    "large_string": (_array(pa.large_string(), "FR", None), TEXT),
    "string_view": (_array(pa.string_view(), "FR", None), TEXT),
    "binary that is text": (_array(pa.binary(), "ü".encode(), None), TEXT),
    "large_binary that is text": (_array(pa.large_binary(), b"a"), TEXT),
    "binary_view that is text": (_array(pa.binary_view(), b"a", None), TEXT),
    "dictionary of strings": (lambda: pa.array(_rows("a", None)).dictionary_encode(), TEXT),
    "dictionary of ints": (lambda: pa.array(_rows(5, 6)).dictionary_encode(), pa.int64()),
    "dictionary of dates": (lambda: pa.array(_rows(DAY)).dictionary_encode(), TIME),
    "runs": (lambda: pa.RunEndEncodedArray.from_arrays([ROWS], pa.array(["a"])), TEXT),
    "uuid": (_uuids, TEXT),
    "list of strings": (_array(pa.list_(pa.string()), ["a", None], None, []), STRINGS),
    "large_list of strings": (_array(pa.large_list(pa.string()), ["a"], []), STRINGS),
    "list of string_view": (_array(pa.list_(pa.string_view()), ["a"], []), STRINGS),
    "list_view": (_array(pa.list_view(pa.string()), ["a"], None), STRINGS),
    "large_list_view": (_array(pa.large_list_view(pa.int64()), [1, 2], []), WHOLE),
    "list of ints": (_array(pa.list_(pa.int64()), [1, 2], None), WHOLE),
    "list of dictionary": (
        lambda: pa.array(_rows(["a"], []), pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        STRINGS,
    ),
    "list of bools": (_array(pa.list_(pa.bool_()), [True, False], []), pa.large_list(pa.int8())),
    "list of dates": (_array(pa.list_(pa.date32()), [DAY], []), STRINGS),
    "list of times": (_array(pa.list_(pa.timestamp("s")), [NOON], []), STRINGS),
    "list of nulls": (_array(pa.list_(pa.null()), [None], []), STRINGS),
    "list of floats of one length": (_array(pa.list_(pa.float64()), [1.0, 2.0], None), VECTOR),
    "list of decimals": (
        _array(pa.list_(pa.decimal128(4, 1)), [Decimal("1.5"), Decimal(2)]),
        VECTOR,
    ),
    "vector of float64": (_array(pa.list_(pa.float64(), 2), [1.0, 2.0], None), VECTOR),
    "vector of float16": (_array(pa.list_(pa.float16(), 2), [np.float16(1)] * 2), VECTOR),
    "vector of float32": (_array(pa.list_(pa.float32(), 2), [1.0, 2.0]), VECTOR),
    "vector of ints": (_array(pa.list_(pa.int32(), 2), [1, 2]), VECTOR),
    "list_view of floats": (_array(pa.list_view(pa.float32()), [1.0, 2.0]), VECTOR),
}

# name -> (the column, what the refusal says after the column's name)
REFUSED: dict[str, tuple[Callable[[], pa.Array], str]] = {
    "struct": (
        _array(pa.struct({"a": pa.int64()}), {"a": 1}),
        "expected values, lists of values, or vectors; got struct<a: int64>",
    ),
    "map": (
        _array(pa.map_(pa.string(), pa.int64()), [("a", 1)]),
        "expected values, lists of values, or vectors; got map<string, int64>",
    ),
    "list of lists": (
        _array(pa.list_(pa.list_(pa.int64())), [[1]]),
        "expected lists of values; got list<",
    ),
    "list of structs": (
        _array(pa.list_(pa.struct({"a": pa.int64()})), [{"a": 1}]),
        "expected lists of values; got list<",
    ),
    "vectors of several lengths": (
        _array(pa.list_(pa.float64()), [1.0], [1.0, 2.0]),
        "expected lists of numbers of one length; got list<",
    ),
    "empty vectors": (
        _array(pa.list_(pa.float64()), []),
        "expected lists of numbers of one length; got list<",
    ),
    "vector with nan": (
        _array(pa.list_(pa.float32(), 2), [1.0, 2.0], [1.0, float("nan")]),
        "expected vectors of finite float32 numbers; "
        "got a null, NaN, infinity or a larger number in row 1",
    ),
    "vector with null": (
        _array(pa.list_(pa.float32()), [1.0, None]),
        "expected vectors of finite float32 numbers; "
        "got a null, NaN, infinity or a larger number in row 0",
    ),
    "infinity": (
        _array(pa.float64(), 1.0, float("-inf")),
        "expected finite numbers; got an infinity in row 1",
    ),
    "bad utf-8": (_bad_text, "expected text in UTF-8; got other bytes in row 2"),
    "binary": (
        _array(pa.binary(), b"a", b"\xff\xfe"),
        "expected text in UTF-8; got other bytes in row 1",
    ),
    "fixed binary": (
        _array(pa.binary(4), b"\0\1\2\3"),
        "expected values, lists of values, or vectors; got fixed_size_binary[4]",
    ),
    "list of binaries": (
        _array(pa.list_(pa.binary()), [b"a"]),
        "expected lists of strings, integers or numbers; got list<",
    ),
    "interval": (
        lambda: pa.array([(1, 2, 3)] * ROWS, pa.month_day_nano_interval()),
        "expected values, lists of values, or vectors; got month_day_nano_interval",
    ),
}

# name -> (the user ids, the ids after the import, or the words of refusal)
IDS: dict[str, tuple[Callable[[], pa.Array], list[int] | str]] = {
    "int32": (lambda: pa.array(range(10, 18), pa.int32()), list(range(10, 18))),
    "uint64 beyond int64": (
        lambda: pa.array([2**63 + i for i in range(8)], pa.uint64()),
        list(range(8)),
    ),
    "small uint64": (lambda: pa.array(range(3, 11), pa.uint64()), list(range(3, 11))),
    "whole floats": (lambda: pa.array([float(i) for i in range(10, 18)]), list(range(10, 18))),
    "negative": (lambda: pa.array(range(-8, 0)), list(range(8))),
    "decimal": (
        lambda: pa.array([Decimal(i) for i in range(5, 13)], pa.decimal128(38, 0)),
        list(range(5, 13)),
    ),
    "large decimal": (
        lambda: pa.array([Decimal(10**30 + i) for i in range(8)], pa.decimal128(38, 0)),
        list(range(8)),
    ),
    "string": (lambda: pa.array([f"ü{i}日本" for i in range(8)]), list(range(8))),
    "string_view": (lambda: pa.array(list("abcdefgh"), pa.string_view()), list(range(8))),
    "large_string": (lambda: pa.array(list("abcdefgh"), pa.large_string()), list(range(8))),
    "dictionary": (lambda: pa.array(list("abcdefgh")).dictionary_encode(), list(range(8))),
    "uuid": (_uuids, list(range(8))),
    "binary": (lambda: pa.array([bytes([200, i]) for i in range(8)]), list(range(8))),
    "float with fractions": (
        lambda: pa.array([i + 0.5 for i in range(8)]),
        "user_id: not usable as ids; expected ids that are whole numbers; got 0.5 in row 0",
    ),
    "floats beyond 2^53": (
        lambda: pa.array([2.0**60 * (i + 1) for i in range(8)]),
        "user_id: not usable as ids; expected ids that are whole numbers",
    ),
    "nan": (
        lambda: pa.array([float("nan"), *map(float, range(7))]),
        "user_id: not usable as ids; expected ids that are whole numbers; got nan in row 0",
    ),
    "bool": (
        lambda: pa.array([True] * 8),
        "user_id: not usable as ids; expected integers or strings; got bool",
    ),
    "date": (
        lambda: pa.array([DAY] * 8),
        "user_id: not usable as ids; expected integers or strings; got date32[day]",
    ),
    "nulls": (lambda: pa.array([None, *range(7)]), "user_id: missing values"),
}

# name -> (the times, the ranks of the rows by time, or the words of refusal)
TIMES: dict[str, tuple[Callable[[], pa.Array], list[int] | str]] = {
    "uint64 across 2^63": (
        lambda: pa.array([2**63 + 1, 2**63 - 1, 2**64 - 1, 0], pa.uint64()),
        [2, 1, 3, 0],
    ),
    "float seconds": (lambda: pa.array([1.5, 1.25, -2.0, 1.75]), [2, 1, 0, 3]),
    "iso texts": (
        lambda: pa.array(
            ["2026-03-02", "2026-03-01 12:00:00", "2026-03-01T11:59:59.5", "2026-03-03"]
        ),
        [2, 1, 0, 3],
    ),
    "iso texts of zones": (
        lambda: pa.array(
            *[
                [
                    "2026-03-01T12:00:00Z",
                    "2026-03-01T12:00:00+02:00",
                    "2027-01-01T00:00:00Z",
                    "2025-01-01T00:00:00Z",
                ]
            ]
        ),
        [2, 1, 3, 0],
    ),
    "dates": (
        lambda: pa.array([DAY + dt.timedelta(days=i) for i in (2, 1, 0, 3)]),
        [2, 1, 0, 3],
    ),
    "timestamps ns": (lambda: pa.array([5, 4, 6, 3], pa.timestamp("ns")), [2, 1, 3, 0]),
    "decimals": (
        lambda: pa.array([Decimal("2.5"), Decimal("1.5"), Decimal("0.5"), Decimal("3.5")]),
        [2, 1, 0, 3],
    ),
    "words": (
        lambda: pa.array(["yesterday", "today", "now", "then"]),
        "timestamp: not usable as times; expected times as in 2026-03-01 12:00:00 (ISO 8601)",
    ),
    "nan": (lambda: pa.array([1.0, float("nan"), 2.0, 3.0]), "got 1 nulls, the first in row 1"),
    "bool": (lambda: pa.array([True] * 4), "expected integers, dates or times; got bool"),
    "huge floats": (lambda: pa.array([1e300, 1.0, 2.0, 3.0]), "expected times that fit 64 bits"),
}
