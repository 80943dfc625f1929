"""Events of any number as requests, cut to what a server takes at once.

Each event has an id, so that a request that is sent again adds nothing.
"""

import secrets
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import msgpack

from shardline.router.client.conversions import MAX_GOT, packed, records
from shardline.router.contract import MAX_EVENTS
from shardline.shards.core.errors import InvalidInput, ProtocolError

ID_BYTES = 12


def event_requests(events: Any) -> Iterator[bytes]:
    """Bodies of requests that store all events, in order; none where there are no events.

    Raises:
        InvalidInput: an event is no map, or has a value without a form in msgpack.
    """
    given = list(records(events))
    base = secrets.token_hex(ID_BYTES)
    rows = [_event(each, f"events[{row}]", f"{base}-{row}") for row, each in enumerate(given)]
    for start in range(0, len(rows), MAX_EVENTS):
        yield _body(rows[start : start + MAX_EVENTS])


def read_events(body: bytes) -> int:
    """How many events a request has stored. Raises ProtocolError: the body is no answer."""
    try:
        return int(msgpack.unpackb(body)["events"])
    except (TypeError, KeyError, ValueError) as error:
        raise ProtocolError("not an answer to events", got=repr(error)) from error


def _event(given: Any, where: str, event_id: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InvalidInput(
            "not an event", field=where, expected="a map of fields", got=repr(given)[:MAX_GOT]
        )
    event = {name: value for name, value in given.items() if value is not None}
    event.setdefault("event_id", event_id)
    at = event.get("at")
    if isinstance(at, datetime):
        if at.tzinfo is None:
            raise InvalidInput(
                "a time without a zone",
                field=f"{where}.at",
                expected="a datetime with tzinfo, or seconds since 1970",
                got=repr(at)[:MAX_GOT],
            )
        event["at"] = at.timestamp()
    return event


def _body(rows: Iterable[dict[str, Any]]) -> bytes:
    try:
        return packed({"events": rows})
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput("not to be sent", field="events", got=str(error)) from error
