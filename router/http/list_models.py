"""The HTTP bodies of lists, as ``models`` has those of searches."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SkipValidation

from shardline.router.list_names import LARGEST_LIST

LIMITED: dict[str, Any] = {"maxItems": LARGEST_LIST}
VERSION = "counts the changes of the list since it was created; null: there is none of this name"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ListBody(_Body):
    """The whole list. Order and repetition of ids mean nothing."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        json_schema_extra={"example": {"item_ids": [7, 8]}},
    )

    item_ids: Annotated[list[int], SkipValidation] = Field(
        description="at most router.max_list_ids; they need not be ids of items that exist",
        json_schema_extra=LIMITED,
    )


class ListChangeBody(_Body):
    """What is to be in the list, and what not any more; the rest stays. At least one of them."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        json_schema_extra={"example": {"add": [9], "remove": [7]}},
    )

    add: Annotated[list[int], SkipValidation] = Field(default=[], json_schema_extra=LIMITED)
    remove: Annotated[list[int], SkipValidation] = Field(
        default=[], description="none of `add`", json_schema_extra=LIMITED
    )


class ListResponse(_Body):
    """A list as it is now, or was `router.lists_fresh_ms` ago at the most."""

    name: str
    version: int = Field(description="counts the changes of the list since it was created")
    item_ids: list[int] = Field(description="rising")
    request_id: str


class ListWrittenResponse(_Body):
    """The change is durable on the store; this router goes by it at once, all others within
    `router.lists_fresh_ms`."""

    name: str
    version: int | None = Field(description=VERSION)
    ids: int = Field(description="how many are in the list now")
    existed: bool = Field(description="whether there was a list of this name before")
    took_ms: float = Field(description="milliseconds from arrival to answer")
    request_id: str


class ListNamesResponse(_Body):
    """Names of lists, in no order that means anything."""

    names: list[str]
    next: str | None = Field(
        description="as `after` it asks for the next page; null: this is the last. A page may have "
        "no names and not be the last, if few names begin with the prefix"
    )
    request_id: str
