"""The endpoints of named lists: /v1/lists and /v1/lists/{name}.

A write whose body has arrived goes on when its client leaves, as writes of items do.
"""

import asyncio
import time
from contextlib import suppress
from typing import Annotated, Protocol, TypeVar

from fastapi import FastAPI, Path, Query, Request, Response
from starlette.types import Scope

from shardline.router.http.auth import LIST_PREFIX
from shardline.router.http.body import IS_READ, read_body
from shardline.router.http.body_values import TakesLong
from shardline.router.http.disconnect import ended_by_client
from shardline.router.http.list_codec import (
    decode_list_body,
    decode_list_change,
    encode_list_answer,
    encode_list_names,
    encode_list_written,
)
from shardline.router.http.media import Media, answer_media, body_media
from shardline.router.http.openapi import (
    LIST_CHANGE_DOC,
    LIST_DELETE_DOC,
    LIST_DOC,
    LIST_NAMES_DOC,
    LIST_PUT_DOC,
)
from shardline.router.limits import default_timeout_ms, write_timeout_ms
from shardline.router.list_names import NAME_PATTERN, NAME_RULE, check_list_name, check_prefix
from shardline.router.lists.list_names_page import check_position
from shardline.router.lists.list_store import Written
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import InvalidInput, NotFound

DECODE_IN_LOOP = 64 << 10  # bytes of a body, a millisecond of JSON
MAX_PAGE = 1000  # names
# described, and checked here: FastAPI would say only that they are wrong
Name = Annotated[
    str,
    Path(
        description=f"the list's name: {NAME_RULE}",
        json_schema_extra={"pattern": f"^{NAME_PATTERN}$"},
    ),
]
Prefix = Annotated[str, Query(description="what the names begin with; empty for all")]
After = Annotated[str, Query(description="`next` of the page before; empty for the first")]
Limit = Annotated[
    int,
    Query(
        description="names per page at most", json_schema_extra={"minimum": 1, "maximum": MAX_PAGE}
    ),
]
T_co = TypeVar("T_co", covariant=True)


class Decode(Protocol[T_co]):
    def __call__(
        self, body: bytes, media: Media, config: RouterConfig, *, in_loop: bool = False
    ) -> T_co: ...


def add_lists(app: FastAPI, service: SearchService, config: RouterConfig) -> None:
    _add_list_reads(app, service, config)
    _add_list_writes(app, service, config)


def _add_list_reads(app: FastAPI, service: SearchService, config: RouterConfig) -> None:
    def until(request: Request) -> float:
        arrived_at: float = request.scope["shardline.arrived_at"]
        return arrived_at + default_timeout_ms(config, 1) / 1000

    @app.get("/v1/lists", **LIST_NAMES_DOC)
    async def names(
        request: Request, prefix: Prefix = "", after: After = "", limit: Limit = MAX_PAGE
    ) -> Response:
        """The names of the lists there are, page by page."""
        accepted = answer_media(request.headers.get("accept", ""), Media.JSON)
        check_prefix(prefix)
        check_position(after)
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidInput(
                "out of range", field="limit", expected=f"1 to {MAX_PAGE}", got=str(limit)
            )
        with service.admit(), ended_by_client(request.receive):
            page = await service.lists.names(prefix, after, limit, until(request))
        request_id = request.scope["shardline.request_id"]
        return Response(encode_list_names(page, request_id, accepted), media_type=accepted)

    @app.get("/v1/lists/{name:path}", **LIST_DOC)
    async def read(request: Request, name: Name) -> Response:
        """The ids of one list."""
        accepted = answer_media(request.headers.get("accept", ""), Media.JSON)
        name = _whole_name(request)
        with service.admit(), ended_by_client(request.receive):
            found = await service.lists.read(name, until(request))
        if not found.exists:
            raise NotFound(f"no list {name}", field="name")
        request_id = request.scope["shardline.request_id"]
        return Response(encode_list_answer(name, found, request_id, accepted), media_type=accepted)


def _add_list_writes(app: FastAPI, service: SearchService, config: RouterConfig) -> None:
    def until(request: Request) -> float:
        arrived_at: float = request.scope["shardline.arrived_at"]
        return arrived_at + write_timeout_ms(config, None) / 1000

    @app.put("/v1/lists/{name:path}", **LIST_PUT_DOC)
    async def put(request: Request, name: Name) -> Response:
        """Replaces the list, or creates it."""
        accepted = _accepted(request)
        name = _whole_name(request)
        body = await _body(request, service, config)
        with service.writes.admit():
            ids = await _decoded(decode_list_body, body, request, config)
            written = await service.lists.put(name, ids, until(request))
        return _answer(request.scope, name, written, accepted)

    @app.post("/v1/lists/{name:path}", **LIST_CHANGE_DOC)
    async def change(request: Request, name: Name) -> Response:
        """Adds ids to the list and removes some, in one step; a list that does not exist is taken
        for an empty one. No change of others that comes at the same time is lost."""
        accepted = _accepted(request)
        name = _whole_name(request)
        body = await _body(request, service, config)
        with service.writes.admit():
            given = await _decoded(decode_list_change, body, request, config)
            written = await service.lists.change(name, given, until(request))
        return _answer(request.scope, name, written, accepted)

    @app.delete("/v1/lists/{name:path}", **LIST_DELETE_DOC)
    async def delete(request: Request, name: Name) -> Response:
        """Deletes the list; that it does not exist is no error."""
        accepted = answer_media(request.headers.get("accept", ""), Media.JSON)
        name = _whole_name(request)
        with service.writes.admit():
            written = await service.lists.delete(name, until(request))
        return _answer(request.scope, name, written, accepted)


def _whole_name(request: Request) -> str:
    """The name in the path. The one that a route gives lacks a line feed at its end.

    Raises:
        InvalidInput: it is none.
    """
    path: str = request.scope["path"]
    return check_list_name(path.removeprefix(LIST_PREFIX))


def _accepted(request: Request) -> Media:
    return answer_media(request.headers.get("accept", ""), _media(request))


def _media(request: Request) -> Media:
    return body_media(request.headers.get("content-type", ""))


async def _body(request: Request, service: SearchService, config: RouterConfig) -> bytes:
    headers = request.scope["shardline.headers"]
    with ended_by_client(request.receive, body_timeout_ms=config.body_timeout_ms):
        body = await read_body(headers, request.receive, config.max_body_bytes, service.arriving)
    request.scope[IS_READ] = True
    return body


async def _decoded(
    decode: Decode[T_co], body: bytes, request: Request, config: RouterConfig
) -> T_co:
    media = _media(request)
    if len(body) <= DECODE_IN_LOOP:
        with suppress(TakesLong):
            return decode(body, media, config, in_loop=True)
    return await asyncio.to_thread(decode, body, media, config)


def _answer(scope: Scope, name: str, written: Written, media: Media) -> Response:
    took_ms = (time.perf_counter() - scope["shardline.began_at"]) * 1000
    body = encode_list_written(name, written, took_ms, scope["shardline.request_id"], media)
    return Response(body, media_type=media)
