"""The HTTP bodies of events, as ``models`` has those of searches."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, SkipValidation

from shardline.router.contract import MAX_EVENTS
from shardline.router.experiments.assignment import MAX_KEY_CHARS
from shardline.router.experiments.experiment_config import MAX_EXPERIMENTS, NAME
from shardline.router.experiments.stored_event import KIND, MAX_ID_CHARS, OWN
from shardline.router.http.text_fields import KeyText

LIMITED: dict[str, Any] = {"minItems": 1, "maxItems": MAX_EVENTS}
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class EventBody(_Body):
    """What came of a search. It has a key or a request_id, or both."""

    event: str = Field(
        pattern=f"^{KIND.pattern}$",
        description=f"its kind, any name: click, purchase; not {' or '.join(OWN)}",
    )
    key: KeyText | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_KEY_CHARS,
        description="the experiment_key of the searches that it belongs to",
    )
    request_id: KeyText | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_ID_CHARS,
        description="that of the answer that it belongs to",
    )
    event_id: KeyText | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_ID_CHARS,
        description="an id of the caller's: events of the same one are one event, however often it "
        "is sent",
    )
    item_id: int | None = Field(default=None, ge=0, lt=2**63)
    value: FiniteFloat | None = Field(
        default=None, description="a number that reports add up, as a price"
    )
    at: FiniteFloat | str | None = Field(
        default=None,
        description="when it happened: seconds since 1970, or ISO 8601 with an offset, at most a "
        "day ahead; left out, when it arrives",
    )
    arms: dict[Name, Name] | None = Field(
        default=None,
        max_length=MAX_EXPERIMENTS,
        description="the arms of the answer; left out, those that the key gets now",
    )


class EventsBody(_Body):
    """Events to store."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        json_schema_extra={
            "example": {"events": [{"key": "user-7", "event": "click", "item_id": 5}]}
        },
    )

    events: Annotated[list[EventBody], SkipValidation] = Field(json_schema_extra=LIMITED)


class EventsResponse(_Body):
    """All events of the request are on the disk."""

    events: int
    request_id: str
