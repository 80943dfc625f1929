"""Bodies of events to rows: each is looked at for itself, and the first wrong one refuses all."""

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from shardline.router.contract import MAX_EVENTS
from shardline.router.experiments.assignment import Experiments
from shardline.router.experiments.stored_event import OWN, Event
from shardline.router.http.body_values import TakesLong, load_map
from shardline.router.http.event_models import EventBody, EventsBody
from shardline.router.http.media import Media
from shardline.router.http.problems import (
    from_validation,
    short,
    short_name,
    unknown_field,
    wrong_type,
)
from shardline.shards.core.errors import InvalidInput

FIELDS = tuple(EventBody.model_fields)
BODY_FIELDS = tuple(EventsBody.model_fields)
MAX_AHEAD_S = 86_400.0  # of a time that a caller gives; beyond it the unit is another one
_validate = TypeAdapter(EventBody).validator.validate_python


def decode_events(
    body: bytes,
    media: Media,
    experiments: Experiments,
    *,
    at_once: int | None = None,
    wall: Callable[[], float] = time.time,
) -> list[Event]:
    """The events of a request. at_once: so many may be decoded in the event loop; None: all, this
    is another thread.

    Raises:
        TakesLong: there are more than ``at_once``; or as ``load_map``. PayloadTooLarge: likewise.
        InvalidInput: does not parse; or an event has an unknown field, one of the wrong type or out
            of range, or neither key nor request_id.
    """
    content = load_map(body, media, in_loop=at_once is not None)
    for name in content:
        if name not in BODY_FIELDS:
            raise unknown_field(short_name(name), BODY_FIELDS)
    given = content.get("events")
    if not isinstance(given, list):
        raise wrong_type("events", "a list of events", given)
    if not 0 < len(given) <= MAX_EVENTS:
        raise InvalidInput(
            "wrong number of events",
            field="events",
            expected=f"1 to {MAX_EVENTS}",
            got=str(len(given)),
            hint="send more in several requests" if given else None,
        )
    if at_once is not None and len(given) > at_once:
        raise TakesLong
    now = wall()
    return [_event(each, f"events[{row}]", experiments, now) for row, each in enumerate(given)]


def _event(given: Any, where: str, experiments: Experiments, now: float) -> Event:
    if not isinstance(given, dict):
        raise wrong_type(where, "a map of fields", given)
    for name in given:
        if name not in FIELDS:
            raise unknown_field(f"{where}.{short_name(name)}", FIELDS)
    try:
        parsed: EventBody = _validate(given)
    except ValidationError as error:
        refused = from_validation(error, FIELDS)
        refused.field = f"{where}.{refused.field}"
        raise refused from error
    if parsed.event in OWN:
        raise InvalidInput(
            "the router stores these itself",
            field=f"{where}.event",
            expected=f"another name than {' and '.join(OWN)}",
            got=parsed.event,
        )
    if parsed.key is None and parsed.request_id is None:
        raise InvalidInput(
            "an event of no search",
            field=f"{where}.key",
            expected="the experiment_key of its searches, or a request_id",
            got="neither",
        )
    arms = parsed.arms
    if arms is None:
        arms = {} if parsed.key is None else dict(experiments.arms_of(parsed.key))
    return Event(
        event=parsed.event,
        at=now if parsed.at is None else _seconds(parsed.at, f"{where}.at", now),
        key=parsed.key,
        request_id=parsed.request_id,
        event_id=parsed.event_id,
        item_id=parsed.item_id,
        value=parsed.value,
        arms=arms,
    )


def _seconds(given: float | str, field: str, now: float) -> float:
    """Since 1970."""
    at = given if isinstance(given, int | float) else _parsed(given, field)
    if not 0 <= at <= now + MAX_AHEAD_S:
        raise InvalidInput(
            "out of range",
            field=field,
            expected="seconds since 1970, at most a day ahead",
            got=short(repr(given)),
        )
    return float(at)


def _parsed(text: str, field: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            return moment.timestamp()
    except (ValueError, OverflowError):
        moment = None
    raise InvalidInput(
        "not a time",
        field=field,
        expected="seconds since 1970, or ISO 8601 with an offset, as 2026-03-01T12:30:00+01:00",
        got=short(repr(text)),
    )
