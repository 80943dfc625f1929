"""The boundary of foreign columns: any Arrow column as what features, ids, times, vectors take.

Behind it there are booleans, integers, floats, strings, timestamps, lists of strings or integers,
and vectors of float32; a missing value is a null. A column that cannot be one of these is refused
with its type and the reason; no exception of a library leaves this module.
"""

import csv
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shardline.shards.core.errors import DataError
from shardline.shards.core.schema import IdArray

TABLES = "Parquet, Arrow, JSON lines, or delimited text in UTF-8"  # what files may hold
TIME = pa.timestamp("us")
WHOLE = 2.0**53  # beyond, a float does not tell integers apart
SIGN = np.uint64(1 << 63)
# what the libraries raise for values and types that they cannot take
LIBRARY_ERRORS = (
    *(pa.ArrowException, csv.Error),
    *(OSError, ValueError, TypeError, ArithmeticError, LookupError, EOFError),
)


class Unusable(Exception):
    """Why a column cannot be taken: what was expected, and what it has instead, in which row."""

    def __init__(self, expected: str, what: str, row: int | None = None) -> None:
        super().__init__(expected, what, row)
        self.expected, self.what, self.row = expected, what, row

    @property
    def got(self) -> str:
        return self.what if self.row is None else f"{self.what} in row {self.row}"


@contextmanager
def read_errors(path: str, expected: str = TABLES) -> Iterator[None]:
    """Whatever a library says of a file becomes a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (*LIBRARY_ERRORS, MemoryError, NotImplementedError) as error:
        raise DataError(
            f"{path}: not readable", expected=expected, got=first_line(error)
        ) from error


def feature_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as one of the types of this module.

    Raises:
        Unusable: a type or a value that no feature takes; the row is named where it is one value.
    """
    try:
        return _feature(_plain(column))
    except LIBRARY_ERRORS as error:
        raise Unusable("values that fit their type", first_line(error)) from error


def id_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The ids as int64, or as uint64 or strings where they are none; no nulls.

    Raises:
        Unusable: nulls, numbers with a fraction, or a type that identifies nothing.
    """
    try:
        return _id(_plain(column))
    except LIBRARY_ERRORS as error:
        raise Unusable("integers or strings", first_line(error)) from error


def time_column(column: pa.ChunkedArray) -> IdArray:
    """(n,) int64 in the order of the times: integers as they are, others in microseconds.

    Raises:
        Unusable: nulls, or values that are no times.
    """
    try:
        return _time(_plain(column))
    except LIBRARY_ERRORS as error:
        raise Unusable("integers, dates or times", first_line(error)) from error


def vector_column(column: pa.Array, *, dim: int | None = None) -> NDArray[Any]:
    """(n, dim) numbers, of integers or floats; of the first row's length where dim is None.

    Raises:
        Unusable: no lists of numbers, a null, or a vector of another length; the row is named.
    """
    try:
        return _matrix(column, dim)
    except LIBRARY_ERRORS as error:
        raise Unusable("lists of numbers", first_line(error)) from error


def _matrix(column: pa.Array, dim: int | None) -> NDArray[Any]:
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):  # a tensor
        return _matrix(column.storage, dim)
    if pa.types.is_dictionary(kind):
        return _matrix(column.dictionary_decode(), dim)
    if pa.types.is_run_end_encoded(kind):
        return _matrix(pc.run_end_decode(column), dim)
    if column.null_count:
        raise Unusable("no nulls", "a null", pc.index(column.is_null(), True).as_py())
    if not _is_any_list(kind):
        raise Unusable("lists of numbers", str(kind)[:120])
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    elements = _plain(pa.chunked_array([column.flatten()]))
    if elements.null_count:
        place = pc.index(elements.is_null(), True).as_py()
        row = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
        raise Unusable("no nulls", "a null inside a vector", row)
    if pa.types.is_decimal(elements.type):
        elements = elements.cast(pa.float64())
    if not (pa.types.is_integer(elements.type) or pa.types.is_floating(elements.type)):
        raise Unusable("lists of numbers", str(kind)[:120])
    width = int(lengths[0]) if dim is None else dim
    wrong = np.flatnonzero(lengths != (width or -1))
    if len(wrong):
        expected = f"vectors of {width} numbers, as the others" if width else "vectors of numbers"
        raise Unusable(expected, f"{lengths[wrong[0]]} numbers", int(wrong[0]))
    matrix: NDArray[Any] = elements.to_numpy().reshape(-1, width)
    return matrix


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without encodings and wrappers: dictionaries, runs, views, large offsets, extensions."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        is_uuid = kind.extension_name == "arrow.uuid"
        storage = pa.chunked_array([c.storage for c in column.chunks], type=kind.storage_type)
        return _uuids(storage) if is_uuid else _plain(storage)
    if pa.types.is_dictionary(kind):
        return _plain(column.cast(kind.value_type))
    if pa.types.is_run_end_encoded(kind):
        chunks = [pc.run_end_decode(chunk) for chunk in column.chunks]
        return _plain(pa.chunked_array(chunks, type=kind.value_type))
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.string())
    if pa.types.is_string(column.type):
        _refuse_bad_text(column)
        return column
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return column.cast(pa.binary())
    if pa.types.is_float16(kind):
        return column.cast(pa.float32())
    return column


def _feature(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_null(kind):
        return column.cast(pa.string())
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_string(kind):
        return column
    if pa.types.is_floating(kind):
        return _without_nan(column)
    if pa.types.is_decimal(kind):
        return _without_nan(column.cast(pa.float64()))
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return _as_time(column)
    if pa.types.is_time(kind) or pa.types.is_duration(kind):
        return _in_seconds(column)
    if pa.types.is_binary(kind):
        _refuse_bad_text(column)
        return column.cast(pa.string())
    if _is_any_list(kind):
        return _list(column)
    raise Unusable("values, lists of values, or vectors", str(kind)[:120])


def _list(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists of strings or integers without their nulls, lists of fractions as float32 vectors."""
    kind = column.type
    is_fixed = pa.types.is_fixed_size_list(kind)
    rows = pa.large_list(kind.value_type)
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        lists = pa.array(column.to_pylist(), rows)  # Arrow's own cast of them is wrong (26.0)
    else:
        lists = column.cast(rows).combine_chunks()
    lengths = pc.list_value_length(lists)
    elements = _plain(pa.chunked_array([lists.flatten()], type=kind.value_type))
    kind = elements.type
    if _is_any_list(kind) or pa.types.is_nested(kind):
        raise Unusable("lists of values", str(column.type)[:120])
    if pa.types.is_binary(kind):
        raise Unusable("lists of strings, integers or numbers", str(column.type)[:120])
    if pa.types.is_null(kind):
        elements = elements.cast(pa.string())
    elif pa.types.is_boolean(kind):
        elements = elements.cast(pa.int8())
    elif pa.types.is_decimal(kind) or pa.types.is_floating(kind):
        return _vectors(elements.cast(pa.float64()), lengths, str(column.type))
    elif not (pa.types.is_integer(kind) or pa.types.is_string(kind)):
        elements = _as_text(elements)
    if is_fixed and pa.types.is_integer(elements.type):
        return _vectors(elements.cast(pa.float64(), safe=False), lengths, str(column.type))
    filled = pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False)
    if elements.null_count:  # of a list, what is missing is left out
        owners = np.repeat(np.arange(len(filled)), filled)[elements.is_valid().to_numpy()]
        filled = np.bincount(owners, minlength=len(filled))
        elements = elements.drop_null()
    offsets = pa.array(np.concatenate([[0], np.cumsum(filled)]), pa.int64())
    made = pa.LargeListArray.from_arrays(
        offsets, elements.combine_chunks(), mask=lengths.is_null() if lengths.null_count else None
    )
    return pa.chunked_array([made])


def _as_text(elements: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dates and the like as they are written; times as queries bring them, in ISO 8601."""
    if not pa.types.is_timestamp(elements.type):
        return elements.cast(pa.string())
    times = _as_time(elements).to_pylist()
    return pa.chunked_array([[None if t is None else t.isoformat() for t in times]], pa.string())


def _vectors(elements: pa.ChunkedArray, lengths: pa.Array, got: str) -> pa.ChunkedArray:
    """One fixed-size list of float32 per row; a null row stays one."""
    widths = lengths.drop_null().unique()
    if len(widths) != 1 or not widths[0].as_py():
        what = f"{widths[0].as_py()} and {widths[1].as_py()}" if len(widths) > 1 else "0"
        if not len(widths):
            return pa.chunked_array([pa.nulls(len(lengths), pa.string())])
        raise Unusable("lists of numbers of one length", f"{got} with {what} numbers")
    width = widths[0].as_py()
    present = np.flatnonzero(~lengths.is_null().to_numpy(zero_copy_only=False))
    with np.errstate(over="ignore"):
        given = elements.to_numpy().astype(np.float32).reshape(-1, width)
    bad = np.flatnonzero(~np.isfinite(given).all(axis=1))
    if len(bad):
        raise Unusable(
            "vectors of finite float32 numbers",
            "a null, NaN, infinity or a larger number",
            int(present[bad[0]]),
        )
    values = np.zeros((len(lengths), width), np.float32)
    values[present] = given
    made = pa.FixedSizeListArray.from_arrays(
        pa.array(values.ravel()), width, mask=lengths.is_null() if lengths.null_count else None
    )
    return pa.chunked_array([made])


def _id(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if column.null_count:
        raise Unusable("no nulls", "a null", pc.index(column.is_null(), True).as_py())
    if pa.types.is_integer(kind):
        return _narrow(column)
    if pa.types.is_string(kind):
        return column
    if pa.types.is_decimal(kind) or pa.types.is_floating(kind):
        return _whole(column)
    if pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return pa.chunked_array([list(map(_text_or_hex, column.to_pylist()))], pa.string())
    if pa.types.is_null(kind):
        return column.cast(pa.int64())  # no rows, or there would be nulls
    raise Unusable("integers or strings", str(kind)[:120])


def _text_or_hex(value: bytes) -> str:
    """Of each id by itself: two tables that share only some must read these the same."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()


def _whole(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Floats or decimals that are all integers, as int64; as text where they are too large."""
    values = column.to_pylist()
    is_float = pa.types.is_floating(column.type)
    for row, value in enumerate(values):
        finite = np.isfinite(value) if is_float else value.is_finite()
        if not finite or value != int(value) or (is_float and abs(value) > WHOLE):
            raise Unusable("ids that are whole numbers", str(value), row)
    whole = [int(value) for value in values]
    if all(-(1 << 63) <= value < 1 << 63 for value in whole):
        return pa.chunked_array([whole], pa.int64())
    return pa.chunked_array([list(map(str, whole))], pa.string())


def _narrow(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """As int64, as uint64 where a value is beyond it."""
    largest = pc.max(column).as_py()
    return column if largest is not None and largest >= 1 << 63 else column.cast(pa.int64())


def _time(column: pa.ChunkedArray) -> IdArray:
    kind = column.type
    if pa.types.is_null(kind) and not len(column):
        return np.empty(0, dtype=np.int64)
    if pa.types.is_floating(kind):
        column = _without_nan(column)
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise Unusable("no nulls", f"{column.null_count} nulls, the first", row)
    if pa.types.is_uint64(kind) and len(column) and pc.max(column).as_py() >= 1 << 63:
        shifted: IdArray = (column.to_numpy() ^ SIGN).view(np.int64)  # the same order, signed
        return shifted
    if pa.types.is_string(kind):
        column = _parsed_times(column)
    elif pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    kind = column.type
    if pa.types.is_floating(kind):
        values = column.to_numpy().astype(np.float64)
        if (values != np.trunc(values)).any():
            values = values * 1e6  # seconds with a fraction, in microseconds
        if len(values) and np.abs(values).max() >= 2.0**63:
            raise Unusable("times that fit 64 bits", f"{np.abs(values).max():g}")
        rounded: IdArray = np.rint(values).astype(np.int64)
        return rounded
    if pa.types.is_date(kind) or (pa.types.is_timestamp(kind) and kind.unit != "ns"):
        column = _as_time(column).cast(pa.int64())
    elif pa.types.is_timestamp(kind):
        column = column.cast(pa.int64())
    if not pa.types.is_integer(column.type):
        raise Unusable("integers, dates or times", str(kind)[:120])
    times: IdArray = column.cast(pa.int64()).to_numpy()
    return times


def _parsed_times(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """ISO 8601 texts as times; a zone counts where all have one."""
    for kind in (TIME, pa.timestamp("us", "UTC")):
        try:
            return column.cast(kind)
        except pa.ArrowInvalid as error:
            reason = first_line(error)
    raise Unusable("times as in 2026-03-01 12:00:00 (ISO 8601)", reason)


def _as_time(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """In microseconds since 1970 without a zone, a fraction of them cut off."""
    if not pa.types.is_timestamp(column.type):
        return column.cast(TIME)
    zoneless = column.cast(pa.timestamp(column.type.unit))
    return zoneless.cast(TIME, safe=column.type.unit != "ns")


def _in_seconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Times of day and durations, as float64."""
    per_second = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}[column.type.unit]
    width = pa.int32() if pa.types.is_time32(column.type) else pa.int64()
    return pc.divide(column.cast(width).cast(pa.float64(), safe=False), per_second)


def _without_nan(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """NaN as null; an infinity is refused."""
    bad = pc.index(pc.fill_null(pc.is_inf(column), False), True).as_py()
    if bad >= 0:
        raise Unusable("finite numbers", "an infinity", bad)
    missing = pc.fill_null(pc.is_nan(column), False)
    if not pc.any(missing, min_count=0).as_py():
        return column
    return pc.if_else(missing, pa.scalar(None, column.type), column)


def _uuids(column: pa.ChunkedArray) -> pa.ChunkedArray:
    def text(value: bytes | None) -> str | None:
        if value is None:
            return None
        digits = value.hex()
        cuts = (0, 8, 12, 16, 20, 32)
        return "-".join(digits[start:end] for start, end in itertools.pairwise(cuts))

    return pa.chunked_array([list(map(text, column.to_pylist()))], pa.string())


def _refuse_bad_text(column: pa.ChunkedArray) -> None:
    """Unusable, with the row, where a value is not UTF-8."""
    try:
        column.cast(pa.binary()).cast(pa.string())  # this cast looks at every byte
    except pa.ArrowInvalid:
        for row, value in enumerate(column.cast(pa.binary()).to_pylist()):
            try:
                value is None or value.decode()
            except UnicodeDecodeError:
                raise Unusable("text in UTF-8", "other bytes", row) from None


def _is_any_list(kind: pa.DataType) -> bool:
    checks = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(pa.types, f"is_{check}")(kind) for check in checks)


def first_line(error: BaseException) -> str:
    """What a library says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
