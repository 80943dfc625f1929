"""The endpoint that stores events: POST /v1/events.

Events are acknowledged when they are on the disk. As with writes, those whose body has arrived are
stored though their client leaves.
"""

import asyncio
from contextlib import suppress

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope

from shardline.router.experiments.stored_event import Event
from shardline.router.http.body import IS_READ, read_body
from shardline.router.http.body_values import TakesLong
from shardline.router.http.codec import encode
from shardline.router.http.disconnect import ended_by_client
from shardline.router.http.event_codec import decode_events
from shardline.router.http.media import Media, answer_media, body_media
from shardline.router.http.openapi import EVENTS_DOC
from shardline.router.http.write_api import Endpoint
from shardline.router.limits import write_timeout_ms
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService

# Of a body that is decoded in the event loop: its bytes, and its events, 15 to 60 us each
DECODE_IN_LOOP = 16 << 10
EVENTS_IN_LOOP = 32
PATH = "/v1/events"


def add_events(
    app: FastAPI, service: SearchService, config: RouterConfig
) -> dict[tuple[str, str], Endpoint]:
    """The route, for the description, and its endpoint by (method, path)."""

    async def answer(scope: Scope, receive: Receive) -> tuple[bytes, Media]:
        headers = scope["shardline.headers"]
        media = body_media(headers.get(b"content-type", b"").decode("latin-1"))
        accepted = answer_media(headers.get(b"accept", b"").decode("latin-1"), media)
        with ended_by_client(receive, body_timeout_ms=config.body_timeout_ms):
            body = await read_body(headers, receive, config.max_body_bytes, service.arriving)
            scope[IS_READ] = True
        with service.writes.admit():  # the wait for the disk is bounded by the log of events
            events = await _decoded(service, body, media)
        timeout_s = write_timeout_ms(config, None) / 1000
        await service.events.add(events, timeout_s, size=len(body))
        content = {"events": len(events), "request_id": scope["shardline.request_id"]}
        return encode(content, accepted), accepted

    @app.post(PATH, **EVENTS_DOC)
    async def post(request: Request) -> Response:
        """Stores what came of searches. Every event is on the disk, or it is an error; one with an
        event_id counts once, however often it is sent."""
        body, media = await answer(request.scope, request.receive)
        return Response(body, media_type=media)

    return {("POST", PATH): answer}


async def _decoded(service: SearchService, body: bytes, media: Media) -> list[Event]:
    if len(body) <= DECODE_IN_LOOP:
        with suppress(TakesLong):
            return decode_events(body, media, service.experiments, at_once=EVENTS_IN_LOOP)
    return await asyncio.to_thread(decode_events, body, media, service.experiments)
