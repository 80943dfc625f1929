"""The HTTP bodies of writes, as ``models`` has those of searches.

Items are not walked by pydantic: ``write_codec`` looks at them, at a fraction of the cost.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, SkipValidation

from shardline.router.contract import MAX_WRITE_ITEMS

LIMITED: dict[str, Any] = {"maxItems": MAX_WRITE_ITEMS, "minItems": 1}
TIMEOUT = "milliseconds from the request's arrival to its answer; left out, router.write_timeout_ms"
TABLE_VERSION = "of the routing table that was used: with generation it says what seq counts"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ItemBody(_Body):
    """An item to write. It replaces the whole item of that id, where there is one."""

    item_id: int = Field(ge=0, lt=2**63)
    vector: list[float] | None = Field(
        default=None, description="of the index's dimension, in the space of its model"
    )
    features: dict[str, Any] | None = Field(
        default=None,
        description="instead of vector: all features of the model's item tower, null where one is "
        "not known; /v1/status names them. Every item of a request has the same of both",
    )
    attributes: dict[str, Any] | None = Field(
        default=None,
        description="of the catalogue's columns those that the item has; others are null, or its "
        "feature of the same name",
    )


class UpsertBody(_Body):
    """Either items, or item_ids with vectors or features, and attributes with them. Of items with
    the same id the last one wins."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        json_schema_extra={
            "example": {
                "items": [{"item_id": 7, "vector": [0.1, 0.2], "attributes": {"title": "Pitfall"}}]
            }
        },
    )

    items: Annotated[list[ItemBody] | None, SkipValidation] = Field(
        default=None, json_schema_extra=LIMITED
    )
    item_ids: Annotated[list[int] | None, SkipValidation] = Field(
        default=None,
        description="instead of items, as in msgpack arrays are shortest",
        json_schema_extra=LIMITED,
    )
    vectors: Annotated[list[list[float]] | None, SkipValidation] = Field(
        default=None, description="with item_ids: a row per item"
    )
    features: Annotated[dict[str, list[Any]] | None, SkipValidation] = Field(
        default=None,
        description="with item_ids, instead of vectors: of each feature a value per item, or null",
    )
    attributes: Annotated[dict[str, list[Any]] | None, SkipValidation] = Field(
        default=None, description="with item_ids: of each attribute a value per item, or null"
    )
    model_version: str | None = Field(
        default=None,
        description="the model that the items are for; 409 where the index is of another",
    )
    timeout_ms: FiniteFloat | None = Field(default=None, description=TIMEOUT)


class DeleteBody(_Body):
    """Items to delete; those that do not exist are counted, and are no error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        json_schema_extra={"example": {"item_ids": [7, 8]}},
    )

    item_ids: Annotated[list[int], SkipValidation] = Field(json_schema_extra=LIMITED)
    timeout_ms: FiniteFloat | None = Field(default=None, description=TIMEOUT)


class _WriteResponse(_Body):
    rows: int = Field(description="different items that were written")
    duplicates: int = Field(description="items of the request that a later one has replaced")
    seq: list[int | None] = Field(
        description="of each shard, by its number, how many writes it has applied with this one; "
        "null where it had no part in it; a search that asks for these numbers sees the items"
    )
    generation: int
    table_version: int = Field(description=TABLE_VERSION)
    model_version: str
    took_ms: float = Field(description="milliseconds from arrival to answer")
    request_id: str


class UpsertResponse(_WriteResponse):
    """Every item is durable on the store; in searches that ask for its `seq` at once, in all others
    within about a second."""

    created: int
    updated: int


class DeleteResponse(_WriteResponse):
    """The deletes are durable on the store; in searches that ask for their `seq` at once, in all
    others within about a second."""

    deleted: int
    missing: int = Field(description="items that did not exist")


class FailedPartBody(_Body):
    """Items that their shard has not acknowledged."""

    shard: int
    code: str = Field(description="stable")
    text: str = Field(description="for people")
    items: int
