"""Bodies of writes to lists to plain data, and answers about lists to bodies."""

from typing import Any

import numpy as np
from pydantic import TypeAdapter

from shardline.router.http.body_values import load_map, to_ids
from shardline.router.http.codec import encode, to_microseconds
from shardline.router.http.list_models import ListBody, ListChangeBody
from shardline.router.http.media import Media
from shardline.router.http.write_codec import checked_fields
from shardline.router.lists.list_change import ListChange
from shardline.router.lists.list_file import StoredList
from shardline.router.lists.list_names_page import NamesPage
from shardline.router.lists.list_store import Written
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import IdArray, check_ids

LIST_FIELDS = tuple(ListBody.model_fields)
CHANGE_FIELDS = tuple(ListChangeBody.model_fields)
_validate_list = TypeAdapter(ListBody).validator.validate_python
_validate_change = TypeAdapter(ListChangeBody).validator.validate_python


def decode_list_body(
    body: bytes, media: Media, config: RouterConfig, *, in_loop: bool = False
) -> IdArray:
    """The ids of a whole list, rising, each once.

    Raises:
        TakesLong: as ``load_map``.
        InvalidInput: does not parse, an unknown field, no ids, or more than there may be.
        PayloadTooLarge: would take too much memory or time.
    """
    content = load_map(body, media, in_loop=in_loop)
    parsed = checked_fields(content, LIST_FIELDS, _validate_list)
    return _ids(parsed.item_ids, "item_ids", config)


def decode_list_change(
    body: bytes, media: Media, config: RouterConfig, *, in_loop: bool = False
) -> ListChange:
    """What to add and what to remove. Raises as ``decode_list_body``."""
    content = load_map(body, media, in_loop=in_loop)
    parsed = checked_fields(content, CHANGE_FIELDS, _validate_change)
    change = ListChange(
        add=_ids(parsed.add, "add", config), remove=_ids(parsed.remove, "remove", config)
    )
    if not change.add.size and not change.remove.size:
        raise InvalidInput(
            "nothing to change", field="add", expected="ids in add or in remove", got="none"
        )
    both = np.intersect1d(change.add, change.remove, assume_unique=True)
    if both.size:
        raise InvalidInput(
            "an id is to be added and removed",
            field="remove",
            expected="none of the ids of add",
            got=str(both[0]),
        )
    return change


def encode_list_answer(name: str, stored: StoredList, request_id: str, media: Media) -> bytes:
    content = {"name": name, "version": stored.version, "item_ids": stored.ids}
    return encode({**content, "request_id": request_id}, media)


def encode_list_written(
    name: str, written: Written, took_ms: float, request_id: str, media: Media
) -> bytes:
    content: dict[str, Any] = {
        "name": name,
        "version": written.now.version if written.now.exists else None,
        "ids": len(written.now.ids),
        "existed": written.before.exists,
        "took_ms": to_microseconds(took_ms),
        "request_id": request_id,
    }
    return encode(content, media)


def encode_list_names(page: NamesPage, request_id: str, media: Media) -> bytes:
    return encode({"names": page.names, "next": page.next, "request_id": request_id}, media)


def _ids(value: Any, field: str, config: RouterConfig) -> IdArray:
    given = to_ids(value, field, config.max_list_ids, "ids")
    if len(given) > config.max_list_ids:  # an array, which ``to_ids`` leaves as it is
        raise InvalidInput(
            "too many ids",
            field=field,
            expected=f"<= {config.max_list_ids}, router.max_list_ids",
            got=str(len(given)),
        )
    return np.unique(check_ids(given, field=field))
