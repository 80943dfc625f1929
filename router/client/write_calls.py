"""Writes of any size as requests: items in columns, cut to what a server takes at once, each with a
key of its own, so that it may be repeated.
"""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from shardline.router.client.conversions import MAX_GOT, milliseconds, packed, to_ids
from shardline.router.client.item_columns import Columns, WrittenItems, written_items
from shardline.router.contract import MAX_WRITE_ITEMS, WRITE_KEY
from shardline.shards.core.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

KEY_BYTES = 16
PLACES = 7  # digits that number the requests of one call, behind its key
MAX_KEY_CHARS = 128 - 1 - PLACES
# Of a request: half of what a server takes, by default, and of the values that it counts in lists
MAX_BODY_BYTES = 16 << 20
MAX_VALUES = 1 << 18
# Of features, that a server counts too: values in lists, and characters of texts, of which those of
# a text beyond ASCII count more
MAX_FEATURE_VALUES, MAX_CHARACTERS = 1 << 18, 1 << 20
BEYOND_ASCII = 10


class UpsertOptions(TypedDict, total=False):
    """What ``Client.upsert`` takes by name, as it describes it."""

    item_ids: "ArrayLike | None"
    vectors: "ArrayLike | None"
    features: Any
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
    features: Any = None,
    attributes: Any = None,
    model_version: str | None = None,
    timeout_ms: float | None = None,
    key: str | None = None,
    progress: object = None,
) -> Iterator[WriteRequest]:
    """Requests that write all items, in order; at least one.

    Raises:
        InvalidInput: neither items nor item_ids and vectors or features, columns of different
            lengths, or values that have no form in msgpack.
    """
    written = written_items(items, item_ids, vectors, features, attributes)
    shared = _shared(timeout_ms) | ({"model_version": model_version} if model_version else {})
    return _upserts(written, shared, _checked_key(key))


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


def _upserts(written: WrittenItems, shared: Mapping[str, Any], key: str) -> Iterator[WriteRequest]:
    at_once = _items_at_once(written)
    costs = _cumulated_costs(written.features or {}, len(written.item_ids))
    start = at = 0
    while start < len(written.item_ids) or at == 0:
        end = min(start + at_once, *(_affordable(cost, limit, start) for cost, limit in costs))
        body = _body(written, slice(start, end), shared)
        if len(body) > 2 * MAX_BODY_BYTES and end > start + 1:  # of long texts
            at_once = max(1, (end - start) // 2)
            continue
        yield WriteRequest(len(written.item_ids[start:end]), body, _numbered(key, at))
        start, at = end, at + 1


def _items_at_once(written: WrittenItems) -> int:
    columns = len(written.attributes) + len(written.features or {})
    row_bytes = 0 if written.vectors is None else 4 * written.vectors.shape[1]
    return min(
        MAX_WRITE_ITEMS,
        max(1, MAX_BODY_BYTES // (row_bytes or 1)),
        max(1, MAX_VALUES // max(1, columns)),
    )


def _cumulated_costs(features: Columns, rows: int) -> list[tuple[Any, int]]:
    """What the first 1, 2, ... items cost a server, and how much one request may."""
    values, characters = np.zeros((2, rows), np.int64)
    for column in features.values():
        for row, value in enumerate(column):
            if isinstance(value, list):
                values[row] += len(value)
                characters[row] += sum(map(_characters, value))
            else:
                characters[row] += _characters(value)
    return [
        (np.cumsum(values), MAX_FEATURE_VALUES),
        (np.cumsum(characters), MAX_CHARACTERS),
    ]


def _characters(value: Any) -> int:
    if not isinstance(value, str):
        return 0
    return len(value) if value.isascii() else BEYOND_ASCII * len(value)


def _affordable(cumulated: Any, limit: int, start: int) -> int:
    """The end of the items from ``start`` on that a request may have; one at least."""
    before = int(cumulated[start - 1]) if start else 0
    return max(start + 1, int(np.searchsorted(cumulated, before + limit, side="right")))


def _body(written: WrittenItems, rows: slice, shared: Mapping[str, Any]) -> bytes:
    content: dict[str, Any] = {"item_ids": written.item_ids[rows], **shared}
    if written.vectors is not None:
        content["vectors"] = written.vectors[rows]
    if written.features is not None:
        content["features"] = {name: values[rows] for name, values in written.features.items()}
    if written.attributes:
        content["attributes"] = {name: values[rows] for name, values in written.attributes.items()}
    try:
        return packed(content)
    except (TypeError, ValueError, OverflowError) as error:
        field = "features and attributes" if written.features else "attributes"
        raise InvalidInput("not to be sent", field=field, got=str(error)) from error


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
