"""Writes of any size as requests: items in columns, cut to what a server takes at once, each with a
key of its own, so that it may be repeated.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from shardline.router.client.conversions import (
    MAX_GOT,
    listed,
    milliseconds,
    packed,
    refuse_hidden,
    to_ids,
    to_json,
    to_matrix,
)
from shardline.router.contract import MAX_WRITE_ITEMS, WRITE_KEY
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import FloatArray, IdArray

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

KEY_BYTES = 16
PLACES = 7  # digits that number the requests of one call, behind its key
MAX_KEY_CHARS = 128 - 1 - PLACES
# Of a request: half of what a server takes, by default, and of the values that it counts in lists
MAX_BODY_BYTES = 16 << 20
MAX_VALUES = 1 << 18
ID_NAME, VECTOR_NAME, ATTRIBUTES = "item_id", "vector", "attributes"


class UpsertOptions(TypedDict, total=False):
    """What ``Client.upsert`` takes by name, as it describes it."""

    item_ids: "ArrayLike | None"
    vectors: "ArrayLike | None"
    attributes: Any
    model_version: str | None
    timeout_ms: float | None
    key: str | None
    progress: "Callable[[int], None] | None"


class UpsertFields(UpsertOptions, total=False):
    items: Any


class DeleteOptions(TypedDict, total=False):
    """What ``Client.delete`` takes by name besides the ids."""

    timeout_ms: float | None
    key: str | None
    progress: "Callable[[int], None] | None"


class DeleteFields(DeleteOptions):
    item_ids: "ArrayLike"


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """``items`` of them in a body of msgpack, and the key that makes it one effect however often it
    is sent."""

    items: int
    body: bytes
    key: str


def upsert_requests(
    *,
    items: Any = None,
    item_ids: Any = None,
    vectors: Any = None,
    attributes: Any = None,
    model_version: str | None = None,
    timeout_ms: float | None = None,
    key: str | None = None,
    progress: object = None,
) -> Iterator[WriteRequest]:
    """Requests that write all items, in order; at least one.

    Raises:
        InvalidInput: neither items nor item_ids and vectors, columns of different lengths, or
            values that have no form in msgpack.
    """
    if (items is None) == (item_ids is None) or (items is not None and vectors is not None):
        raise InvalidInput(
            "one form of items is needed", field="items", expected="items, or item_ids and vectors"
        )
    if items is not None:
        item_ids, vectors, attributes = _columns_of_items(items)
    if vectors is None:
        raise InvalidInput("no vectors", field="vectors", expected="a row per item", got="none")
    ids, matrix = to_ids(item_ids), to_matrix(vectors)
    columns = {name: _values(values, name) for name, values in _columns(attributes).items()}
    lengths = {"vectors": len(matrix)} | {
        f"attributes.{name}": len(values) for name, values in columns.items()
    }
    for field, length in lengths.items():
        if length != len(ids):
            raise InvalidInput(
                "columns of different lengths",
                field=field,
                expected=f"{len(ids)}, as item_ids has",
                got=str(length),
            )
    shared = _shared(timeout_ms) | ({"model_version": model_version} if model_version else {})
    return _upserts(ids, matrix, columns, shared, _checked_key(key))


def delete_requests(
    *,
    item_ids: Any,
    timeout_ms: float | None = None,
    key: str | None = None,
    progress: object = None,
) -> Iterator[WriteRequest]:
    """Requests that delete all items, in order; at least one. Raises InvalidInput."""
    ids, shared, base = to_ids(item_ids), _shared(timeout_ms), _checked_key(key)
    parts = [
        ids[start : start + MAX_WRITE_ITEMS]
        for start in range(0, max(1, len(ids)), MAX_WRITE_ITEMS)
    ]
    return (
        WriteRequest(len(part), packed({"item_ids": part, **shared}), _numbered(base, at))
        for at, part in enumerate(parts)
    )


def _upserts(
    ids: IdArray,
    matrix: FloatArray,
    columns: Mapping[str, list[Any]],
    shared: Mapping[str, Any],
    key: str,
) -> Iterator[WriteRequest]:
    at_once = min(
        MAX_WRITE_ITEMS,
        max(1, MAX_BODY_BYTES // (4 * matrix.shape[1] or 1)),
        max(1, MAX_VALUES // max(1, len(columns))),
    )
    start = at = 0
    while start < len(ids) or at == 0:
        end = start + at_once
        body = _body(ids[start:end], matrix[start:end], columns, slice(start, end), shared)
        if len(body) > 2 * MAX_BODY_BYTES and at_once > 1:  # of long texts
            at_once //= 2
            continue
        yield WriteRequest(len(ids[start:end]), body, _numbered(key, at))
        start, at = end, at + 1


def _body(
    ids: IdArray,
    matrix: FloatArray,
    columns: Mapping[str, list[Any]],
    rows: slice,
    shared: Mapping[str, Any],
) -> bytes:
    content: dict[str, Any] = {"item_ids": ids, "vectors": matrix, **shared}
    if columns:
        content["attributes"] = {name: values[rows] for name, values in columns.items()}
    try:
        return packed(content)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput("not to be sent", field="attributes", got=str(error)) from error


def _columns_of_items(items: Any) -> tuple[Any, Any, Any]:
    """ids, vectors, attributes: of a table, whose other columns are attributes, or of maps."""
    if _is_table(items):
        columns = _columns(items)
        for name in (ID_NAME, VECTOR_NAME):
            if name not in columns:
                raise InvalidInput(
                    "no such column", field=f"items.{name}", got=", ".join(map(str, columns))
                )
        return columns.pop(ID_NAME), listed(columns.pop(VECTOR_NAME)), columns
    rows = list(items)
    for row, item in enumerate(rows):
        known = isinstance(item, Mapping) and {ID_NAME, VECTOR_NAME} <= item.keys()
        if not known or item.keys() - {ID_NAME, VECTOR_NAME, ATTRIBUTES}:
            raise InvalidInput(
                "not an item",
                field=f"items[{row}]",
                expected=f"{ID_NAME}, {VECTOR_NAME} and maybe {ATTRIBUTES}",
                got=repr(item)[:MAX_GOT],
            )
    given = [item.get(ATTRIBUTES) or {} for item in rows]
    names = dict.fromkeys(name for each in given for name in each)
    attributes = {name: [each.get(name) for each in given] for name in names}
    vectors = [item[VECTOR_NAME] for item in rows]
    return [item[ID_NAME] for item in rows], vectors, attributes


def _is_table(value: Any) -> bool:
    return any(hasattr(value, name) for name in ("to_dicts", "column_names", "to_dict", "schema"))


def _columns(values: Any) -> dict[str, Any]:
    """Of a map of columns, or a table of pyarrow, pandas or polars."""
    if values is None:
        return {}
    if isinstance(values, Mapping):
        return dict(values)
    names = getattr(values, "column_names", None) or list(getattr(values, "columns", ()))
    if not names or not all(isinstance(name, str) for name in names):
        raise InvalidInput(
            "not columns",
            field="attributes",
            expected="a map of names to lists, or a table",
            got=repr(values)[:MAX_GOT],
        )
    is_arrow = hasattr(values, "column_names")
    return {name: values.column(name) if is_arrow else values[name] for name in names}


def _values(values: Any, name: str) -> list[Any]:
    """Of an attribute, as JSON has them; NaN is how frames write what is missing."""
    refuse_hidden(f"attributes.{name}", values)
    if isinstance(values, str | bytes) or not (
        isinstance(values, Sequence | np.ndarray) or hasattr(values, "__len__")
    ):
        raise InvalidInput(
            "not a column",
            field=f"attributes.{name}",
            expected="a list with a value per item",
            got=repr(values)[:MAX_GOT],
        )
    plain = values.tolist() if isinstance(values, np.ndarray) else listed(values)
    return [_value(each) for each in plain]


def _value(value: Any) -> Any:
    if isinstance(value, list | tuple | np.ndarray):
        return [_value(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): _value(each) for name, each in value.items()}
    return to_json(value)


def _shared(timeout_ms: float | None) -> dict[str, Any]:
    return {} if timeout_ms is None else {"timeout_ms": milliseconds(timeout_ms)}


def _checked_key(key: str | None) -> str:
    if key is None:
        return secrets.token_hex(KEY_BYTES)
    if not WRITE_KEY.fullmatch(key) or len(key) > MAX_KEY_CHARS:
        raise InvalidInput(
            "not a key",
            field="key",
            expected=f"1 to {MAX_KEY_CHARS} printable characters of ASCII, no spaces",
            got=repr(key)[:MAX_GOT],
        )
    return key


def _numbered(key: str, at: int) -> str:
    return f"{key}-{at:0{PLACES}}" if at else key
