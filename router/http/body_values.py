"""Bytes of a body to plain values, and lists of numbers to arrays; bounded in memory and time.

Arrays: in msgpack ``{"dtype": "<f4", "shape": [n, d], "data": bin}`` or plain lists, in JSON plain
lists. Nothing else is taken for a number: no strings, no booleans, no ragged rows.
"""

from typing import Any

import msgpack
import numpy as np
import orjson

from shardline.router.contract import ARRAY_KEYS, array_of
from shardline.router.http.body_cost import COUNTED_FROM, UNCOUNTED_LENGTH, refuse_costly
from shardline.router.http.media import Media
from shardline.router.http.problems import wrong_type
from shardline.router.limits import too_many
from shardline.shards.core.errors import InvalidInput

NUMBERS = frozenset({int, float})
INTEGERS = frozenset({int})
# Bytes of msgpack whose values are counted in the event loop: 15 ms where each is another token
COUNTED_IN_LOOP = 32 << 10
# Lists, maps and timestamps of a larger body that is unpacked there: each takes up to a microsecond
FEW = 4096
TIMESTAMPS = (b"\xd6\xff", b"\xd7\xff", b"\xc7\x0c\xff")
MAX_LISTED_DIM = 1 << 16
ARRAY_AT_ONCE = 1 << 18  # numbers of lists that become an array in one step


class TakesLong(Exception):
    """A body that is to be decoded by another thread than the event loop's."""


def load_map(body: bytes, media: Media, *, in_loop: bool = False) -> dict[Any, Any]:
    """The values of a body, which is a map of fields. Keys of msgpack may be bytes.

    Raises:
        TakesLong: ``in_loop``, and its values must be counted first, for which it is too large.
        InvalidInput: does not parse, or is no map.
        PayloadTooLarge: would take too much memory or time.
    """
    if len(body) > COUNTED_FROM:
        refuse_costly(body, media)
    content = _load_json(body) if media is Media.JSON else _load_msgpack(body, in_loop)
    if not isinstance(content, dict):
        raise InvalidInput(
            "not an object",
            field="body",
            expected="a map of fields",
            got=type(content).__name__,
        )
    return content


def to_matrix(value: Any, field: str, max_rows: int, what: str = "queries") -> Any:
    """A numpy array as it is, or lists of numbers as (n, d) float64.

    Raises:
        InvalidInput: something else, or lists of more than ``max_rows``, which are called ``what``.
    """
    if isinstance(value, np.ndarray):
        return _with_ndim(field, value, 2)
    if not isinstance(value, list):
        raise wrong_type(field, "a list of rows", value)
    if len(value) > max_rows:
        raise too_many(field, len(value), max_rows, what)
    for row, numbers in enumerate(value):
        if not isinstance(numbers, list):
            raise wrong_type(
                f"{field}[{row}]", "a list of numbers", numbers, "even one query is a list of one"
            )
        if len(numbers) > MAX_LISTED_DIM:
            raise InvalidInput(
                "too many numbers",
                field=f"{field}[{row}]",
                expected=f"<= {MAX_LISTED_DIM}",
                got=str(len(numbers)),
            )
        if not NUMBERS.issuperset(map(type, numbers)):
            wrong = next(item for item in numbers if type(item) not in NUMBERS)
            raise wrong_type(f"{field}[{row}]", "numbers", wrong)
        if len(numbers) != len(value[0]):
            raise InvalidInput(
                "rows of different lengths",
                field=f"{field}[{row}]",
                expected=f"{len(value[0])} numbers, as in row 0",
                got=f"{len(numbers)} numbers",
            )
    try:
        if value and len(value) * len(value[0]) > ARRAY_AT_ONCE:
            return _row_by_row(value)
        return np.array(value, dtype=np.float64).reshape(len(value), -1 if value else 0)
    except OverflowError as error:
        raise InvalidInput("number too large", field=field, expected="float32") from error


def _row_by_row(rows: list[Any]) -> Any:
    """(n, d) float64; empties the list on the way, because both of them whole would be too much."""
    matrix = np.empty((len(rows), len(rows[0])), np.float64)
    for row, numbers in enumerate(rows):
        matrix[row] = numbers
        rows[row] = None
    return matrix


def _with_ndim(field: str, array: np.ndarray[Any, Any], ndim: int) -> np.ndarray[Any, Any]:
    if array.ndim != ndim:
        raise InvalidInput(
            "wrong shape", field=field, expected=f"{ndim}-d array", got=f"{array.ndim}-d array"
        )
    return array


def to_ids(value: Any, field: str, max_rows: int, what: str = "queries") -> Any:
    """A numpy array as it is, or the list of integers.

    Raises:
        InvalidInput: as ``to_matrix``.
    """
    if isinstance(value, np.ndarray):
        return _with_ndim(field, value, 1)
    if not isinstance(value, list):
        raise wrong_type(field, "a list of integers", value)
    if len(value) > max_rows:
        raise too_many(field, len(value), max_rows, what)
    if not INTEGERS.issuperset(map(type, value)):
        row = next(row for row, item in enumerate(value) if type(item) is not int)
        raise wrong_type(f"{field}[{row}]", "an integer", value[row])
    return value


def _load_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(
            "not JSON",
            field="body",
            got=f"{error.msg} at line {error.lineno} column {error.colno}",
        ) from error


def _load_msgpack(body: bytes, in_loop: bool) -> Any:
    if len(body) > COUNTED_FROM:
        return _unpack(body, len(body))
    is_large = in_loop and len(body) > COUNTED_IN_LOOP
    if is_large and sum(map(body.count, TIMESTAMPS)) > FEW:
        raise TakesLong
    try:
        return _unpack(body, UNCOUNTED_LENGTH, _FewContainers() if is_large else None)
    except InvalidInput:
        if len(body) <= UNCOUNTED_LENGTH:
            raise
    if is_large:
        raise TakesLong
    refuse_costly(body, Media.MSGPACK)  # it may be for a longer list only
    return _unpack(body, len(body))


class _FewContainers:
    """Hooks of msgpack that give up a body of many lists and maps."""

    def __init__(self) -> None:
        self._left = FEW

    def pairs(self, pairs: list[tuple[str, Any]]) -> Any:
        self._count()
        return _unpack_map(pairs)

    def items(self, items: list[Any]) -> list[Any]:
        self._count()
        return items

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise TakesLong


def _unpack(body: bytes, max_length: int, few: _FewContainers | None = None) -> Any:
    try:
        return msgpack.unpackb(
            body,
            object_pairs_hook=_unpack_map if few is None else few.pairs,
            list_hook=None if few is None else few.items,
            strict_map_key=True,
            ext_hook=_refuse_ext,
            max_array_len=max_length,
            max_map_len=max_length,
        )
    except InvalidInput:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise InvalidInput(
            "not msgpack", field="body", got=str(error) or type(error).__name__
        ) from error


def _unpack_map(pairs: list[tuple[str, Any]]) -> Any:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise InvalidInput("a key comes twice", field="body", expected="distinct keys")
    return array_of(content) if content.keys() == ARRAY_KEYS else content


def _refuse_ext(code: int, data: bytes) -> Any:
    raise InvalidInput("msgpack extension types are not supported", field="body", got=str(code))
