"""Named lists: requests as method, path and body, and what comes back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlencode

import msgpack
import numpy as np

from shardline.router.client.conversions import packed, to_ids
from shardline.router.contract import array_of
from shardline.router.list_names import check_list_name
from shardline.shards.core.errors import InvalidInput, ProtocolError
from shardline.shards.core.schema import IdArray

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

LISTS_PATH = "/v1/lists"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ListAnswer:
    """A list as it is now, or was a moment ago. item_ids (n,) int64, rising, read-only; version
    counts the changes of the list since it was created."""

    name: str
    version: int
    item_ids: IdArray


@dataclass(frozen=True, slots=True, kw_only=True)
class ListWritten:
    """The change is durable on the store. version: None: there is no list of this name now. ids:
    how many are in it. existed: whether there was one before."""

    name: str
    version: int | None
    ids: int
    existed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ListNames:
    """A page of names; next: where the next one begins, None: nowhere."""

    names: tuple[str, ...]
    next: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRequest(Generic[T]):
    method: str
    path: str
    body: bytes
    read: Callable[[bytes], T]


def list_put(name: str, item_ids: "ArrayLike") -> ListRequest[ListWritten]:
    body = packed({"item_ids": to_ids(item_ids)})
    return ListRequest(method="PUT", path=_path(name), body=body, read=_read_written)


def list_change(
    name: str, add: "ArrayLike | None", remove: "ArrayLike | None"
) -> ListRequest[ListWritten]:
    given = {"add": add, "remove": remove}
    body = packed({field: to_ids(ids) for field, ids in given.items() if ids is not None})
    return ListRequest(method="POST", path=_path(name), body=body, read=_read_written)


def list_delete(name: str) -> ListRequest[ListWritten]:
    return ListRequest(method="DELETE", path=_path(name), body=b"", read=_read_written)


def list_get(name: str) -> ListRequest[ListAnswer]:
    return ListRequest(method="GET", path=_path(name), body=b"", read=_read_list)


def list_names(prefix: str, after: str | None) -> ListRequest[ListNames]:
    given = {"prefix": prefix} | ({} if after is None else {"after": after})
    path = f"{LISTS_PATH}?{urlencode(given)}"
    return ListRequest(method="GET", path=path, body=b"", read=_read_names)


def _path(name: str) -> str:
    """Raises InvalidInput. No character of a name needs an escape."""
    return f"{LISTS_PATH}/{check_list_name(name)}"


def _read_written(body: bytes) -> ListWritten:
    return _read(
        body,
        lambda content: ListWritten(
            name=content["name"],
            version=content["version"],
            ids=content["ids"],
            existed=content["existed"],
        ),
    )


def _read_list(body: bytes) -> ListAnswer:
    return _read(
        body,
        lambda content: ListAnswer(
            name=content["name"],
            version=content["version"],
            item_ids=array_of(content["item_ids"]).astype(np.int64, copy=False),
        ),
    )


def _read_names(body: bytes) -> ListNames:
    return _read(
        body,
        lambda content: ListNames(names=tuple(content["names"]), next=content["next"]),
    )


def _read(body: bytes, build: Callable[[Mapping[str, Any]], T]) -> T:
    try:
        return build(msgpack.unpackb(body))
    except (InvalidInput, TypeError, KeyError, ValueError, AttributeError) as error:
        raise ProtocolError("not an answer about a list", got=repr(error)) from error
