"""The endpoints that write: PUT and DELETE of /v1/items.

A write whose body has arrived goes on when its client leaves: it ends at its deadline in any case,
and a client that is gone cannot say whether it wants half of it.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol, TypeAlias, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope

from shardline.router.contract import WRITE_KEY, WRITE_KEY_HEADER
from shardline.router.http.body import IS_READ, read_body
from shardline.router.http.body_values import TakesLong
from shardline.router.http.disconnect import ended_by_client
from shardline.router.http.media import Media, answer_media, body_media
from shardline.router.http.openapi import DELETE_DOC, UPSERT_DOC
from shardline.router.http.write_codec import decode_delete, decode_upsert, encode_written
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.router.written import Deletes, Upserts, WriteAnswer
from shardline.shards.core.errors import InvalidInput

# Bytes of a body decoded, split and encoded for the shards in the event loop: items are walked one
# by one, some milliseconds of them
DECODE_IN_LOOP = 64 << 10
KEY_BITS = 128

Endpoint: TypeAlias = Callable[[Scope, Receive], Awaitable[tuple[bytes, Media]]]
T = TypeVar("T", Upserts, Deletes)
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)


class Decode(Protocol[T_co]):
    def __call__(
        self, body: bytes, media: Media, config: RouterConfig, *, in_loop: bool = False
    ) -> T_co: ...


class Write(Protocol[T_contra]):
    def __call__(
        self,
        given: T_contra,
        key: str,
        *,
        arrived_at: float,
        began_at: float,
        request_id: str,
        in_loop: bool,
    ) -> Awaitable[WriteAnswer]: ...


def add_writes(
    app: FastAPI, service: SearchService, config: RouterConfig
) -> dict[tuple[str, str], Endpoint]:
    """The routes, for the description, and their endpoints by (method, path)."""
    upsert_items = _endpoint(service, config, decode_upsert, service.writes.upsert)
    delete_items = _endpoint(service, config, decode_delete, service.writes.delete)

    @app.put("/v1/items", **UPSERT_DOC)
    async def upsert(request: Request) -> Response:
        """Adds items, or replaces those of the same ids. Every item is written, or it is an error
        that says which shards have not acknowledged theirs; repeated with the same Idempotency-Key
        it writes nothing twice."""
        body, media = await upsert_items(request.scope, request.receive)
        return Response(body, media_type=media)

    @app.delete("/v1/items", **DELETE_DOC)
    async def delete(request: Request) -> Response:
        """Deletes items, as PUT writes them."""
        body, media = await delete_items(request.scope, request.receive)
        return Response(body, media_type=media)

    return {("PUT", "/v1/items"): upsert_items, ("DELETE", "/v1/items"): delete_items}


def _endpoint(
    service: SearchService, config: RouterConfig, decode: Decode[T], write: Write[T]
) -> Endpoint:
    keys = random.SystemRandom()  # those of two routers must differ

    async def answer(scope: Scope, receive: Receive) -> tuple[bytes, Media]:
        headers = scope["shardline.headers"]
        media = body_media(headers.get(b"content-type", b"").decode("latin-1"))
        accepted = answer_media(headers.get(b"accept", b"").decode("latin-1"), media)
        given_key = headers.get(WRITE_KEY_HEADER.lower().encode())
        key = f"{keys.getrandbits(KEY_BITS):x}" if given_key is None else _key_of(given_key)
        with ended_by_client(receive, body_timeout_ms=config.body_timeout_ms):
            body = await read_body(headers, receive, config.max_body_bytes, service.arriving)
            scope[IS_READ] = True
        with service.writes.admit():
            given = await _decoded(decode, body, media, config)
            written = await write(
                given,
                key,
                arrived_at=scope["shardline.arrived_at"],
                began_at=scope["shardline.began_at"],
                request_id=scope["shardline.request_id"],
                in_loop=len(body) <= DECODE_IN_LOOP,
            )
            return encode_written(written, accepted), accepted

    return answer


def _key_of(header: bytes) -> str:
    key = header.decode("latin-1").strip()
    if not WRITE_KEY.fullmatch(key):
        raise InvalidInput(
            "not a key",
            field=WRITE_KEY_HEADER,
            expected="1 to 128 printable characters of ASCII, no spaces",
            got=f"{len(key)} characters",
        )
    return key


async def _decoded(decode: Decode[T], body: bytes, media: Media, config: RouterConfig) -> T:
    if len(body) <= DECODE_IN_LOOP:
        with suppress(TakesLong):
            return decode(body, media, config, in_loop=True)
    return await asyncio.to_thread(decode, body, media, config)
