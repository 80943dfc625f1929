"""The HTTP API as one ASGI app: routes here, bodies in ``codec``, errors in ``problems``.

``RequestContext`` is the outermost layer: request id in and out, arrival time, and the promise
that every error leaves as a problem. Pure ASGI throughout, because each layer of starlette's
BaseHTTPMiddleware would cost more than a whole search's share of this process.
"""

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, TypeAlias

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shardline.router.contract import MethodNotAllowed
from shardline.router.experiments.assignment import ARM_HEADER, Experiments
from shardline.router.http.auth import Guard
from shardline.router.http.body import IS_READ, closing, read_body
from shardline.router.http.body_values import TakesLong, load_map
from shardline.router.http.codec import (
    NONE_FORCED,
    decode_query,
    encode,
    encode_answer,
    encode_item,
)
from shardline.router.http.disconnect import ended_by_client
from shardline.router.http.event_api import add_events
from shardline.router.http.filter_paths import at_its_place
from shardline.router.http.list_api import add_lists
from shardline.router.http.media import Media, answer_media, body_media
from shardline.router.http.openapi import (
    DESCRIPTION,
    ITEM_DOC,
    READY_DOC,
    SEARCH_DOC,
    STATUS_DOC,
    TITLE,
    docs_page,
    openapi_schema,
)
from shardline.router.http.problems import to_problem
from shardline.router.http.write_api import Endpoint, add_writes
from shardline.router.query import ResolvedQuery
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import InvalidInput, NotFound, ShardlineError
from shardline.shards.core.metrics import REQUESTS, Recorder

REQUEST_ID_HEADER = b"x-request-id"
# Printable and short, because it is repeated in answers and logs; anything else is replaced.
REQUEST_ID = re.compile(rb"[!-~]{1,128}")
REQUEST_ID_BITS = 64
# Bytes of a body decoded in the event loop, some milliseconds of JSON; more would hold up others.
DECODE_IN_LOOP = 256 << 10
TIMEOUT_TEXT = (
    "milliseconds from the request's arrival to its answer; left out, router.default_timeout_ms"
)
POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1: why a websocket was closed

Headers: TypeAlias = list[tuple[bytes, bytes]]


def create_app(service: SearchService, config: RouterConfig, guard: Guard | None = None) -> ASGIApp:
    """The whole HTTP API of one router. The caller applies tables to ``service`` and closes it.

    Without a ``guard`` no request needs a key.
    """
    app = FastAPI(
        title=TITLE,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    direct = {("POST", "/v1/search"): _add_search(app, service, config)}
    direct |= add_writes(app, service, config)
    add_lists(app, service, config)
    direct |= add_events(app, service, config)
    guard = guard or Guard()
    _add_reads(app, service, guard)
    _add_health(app, service)
    _add_docs(app)
    _answer_head(app)
    _translate_errors(app, config)
    return RequestContext(app, config, guard, direct=direct, recorder=service.recorder)


def _add_search(app: FastAPI, service: SearchService, config: RouterConfig) -> Endpoint:
    async def answer(scope: Scope, receive: Receive) -> tuple[bytes, Media]:
        headers = scope["shardline.headers"]
        media = body_media(headers.get(b"content-type", b"").decode("latin-1"))
        accepted = answer_media(headers.get(b"accept", b"").decode("latin-1"), media)
        forced = _forced_arms(headers, service.experiments)
        with ended_by_client(receive, body_timeout_ms=config.body_timeout_ms) as client:
            body = await read_body(headers, receive, config.max_body_bytes, service.arriving)
            scope[IS_READ] = True
            with service.admit():  # from here on it costs more than patience
                try:
                    query = await _decoded(body, media, service, forced, client)
                except InvalidInput as error:
                    service.count_rejected(error)
                    raise
                client.body_is_read()
                try:
                    found = await service.search(
                        query,
                        arrived_at=scope["shardline.arrived_at"],
                        began_at=scope["shardline.began_at"],
                        request_id=scope["shardline.request_id"],
                    )
                except InvalidInput as error:
                    raise await _placed(error, body, media) from error
                return encode_answer(found, accepted), accepted

    @app.post("/v1/search", **SEARCH_DOC)
    async def search(request: Request) -> Response:
        """The k items that score best against each query, and how much of the corpus was asked."""
        body, media = await answer(request.scope, request.receive)
        return Response(body, media_type=media)

    return answer


def _forced_arms(headers: Mapping[bytes, bytes], experiments: Experiments) -> Mapping[str, str]:
    given = headers.get(ARM_HEADER.encode())
    return NONE_FORCED if given is None else experiments.parsed(given.decode("latin-1"))


async def _decoded(
    body: bytes,
    media: Media,
    service: SearchService,
    forced: Mapping[str, str],
    client: ended_by_client,
) -> ResolvedQuery:
    decode = partial(
        decode_query,
        body,
        media,
        service.config,
        experiments=service.experiments,
        forced=forced,
    )
    if len(body) <= DECODE_IN_LOOP:
        with suppress(TakesLong):
            return decode(in_loop=True)
    client.pause()  # whoever leaves now counts as in flight while it decodes
    return await asyncio.to_thread(decode)


async def _placed(error: InvalidInput, body: bytes, media: Media) -> InvalidInput:
    """A complaint about a filter with its path in the body; any other as it is."""
    if error.field is None or not error.field.startswith("filter"):
        return error
    content = await asyncio.to_thread(load_map, body, media)
    return at_its_place(error, content.get("filter"))


def _add_reads(app: FastAPI, service: SearchService, guard: Guard) -> None:
    @app.get("/v1/items/{item_id}", **ITEM_DOC)
    async def item(
        request: Request,
        item_id: Annotated[int, Path(description="the item's id")],
        timeout_ms: Annotated[float | None, Query(description=TIMEOUT_TEXT)] = None,
    ) -> Response:
        """One item's stored vector, and the shard that holds it."""
        accepted = answer_media(request.headers.get("accept", ""), Media.JSON)
        with service.admit(), ended_by_client(request.receive):
            arrived_at = request.scope["shardline.arrived_at"]
            answer = await service.item(item_id, arrived_at=arrived_at, timeout_ms=timeout_ms)
        return Response(encode_item(answer, accepted), media_type=accepted)

    @app.get("/v1/status", **STATUS_DOC)
    async def status() -> Response:
        """What this router serves: generation, model, index, shards, the encoder's features, and
        warnings for who looks after it."""
        report = service.status()
        if (warning := guard.warning) is not None:
            report["warnings"].append({"about": "api_keys", **asdict(warning)})
        return _json(report)


def _add_health(app: FastAPI, service: SearchService) -> None:
    @app.get("/healthz", tags=["health"])
    async def healthz() -> Response:
        """200 while the process answers at all; `cluster_id` is null before the first table."""
        return _json({"status": "ok", "cluster_id": service.cluster_id})

    @app.get("/readyz", **READY_DOC)
    async def readyz() -> Response:
        """200 while there is a routing table and some shard answers."""
        ready, state = await service.heard_ready()
        response = _json(state, status=200 if ready else 503)
        if not ready:
            response.headers["retry-after"] = str(service.config.retry_after_s)
        return response


def _add_docs(app: FastAPI) -> None:
    """The description of whatever else has been added by now."""
    schema = openapi_schema(app)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return _json(schema)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(docs_page(schema), media_type="text/html")

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        """Whoever opens the address in a browser sees the description."""
        return RedirectResponse(f"{request.scope.get('root_path', '')}/docs", status_code=307)


def _answer_head(app: FastAPI) -> None:
    """HEAD wherever there is GET, as HTTP wants it (RFC 9110, 9.1): FastAPI, unlike starlette, adds
    none. After the description is made, which would list each of them twice."""
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")


class RequestContext:
    """Gives every request an id and an arrival time, and every error the form of a problem. Shuts
    out whoever has no key for what is asked, before a byte of the body is read.

    Endpoints in ``direct`` (method, path) are called and answered from here: FastAPI's way to one
    of them costs 0.2 ms, more than all the rest of a single query. It still declares, and so
    documents, them.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: RouterConfig,
        guard: Guard,
        direct: Mapping[tuple[str, str], Endpoint],
        recorder: Recorder,
    ) -> None:
        self._app = app
        self._config = config
        self._guard = guard
        self._direct = direct
        self._recorder = recorder
        self._ids = random.Random()  # seeded by the system: ids of two routers must differ

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none: nothing looks at what it asks for
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # reversed, because the first header of a name is the one that counts
        scope["shardline.headers"] = headers = dict(reversed(scope["headers"]))
        scope["shardline.request_id"] = request_id = self._request_id(headers)
        scope["shardline.arrived_at"] = asyncio.get_running_loop().time()  # deadlines count here
        scope["shardline.began_at"] = time.perf_counter()  # took_ms here: uvloop's clock is coarse
        method, path = scope["method"], scope["path"]
        if method == "HEAD":
            send = _without_body(send)
        try:
            self._guard.check(method, path, scope["headers"])
            endpoint = self._direct.get((method, path))
            if endpoint is None:
                await self._through_app(scope, receive, closing(scope, receive, send))
                return
            body, media = await endpoint(scope, receive)
        except ClientDisconnect:
            return  # there is nobody to answer
        except Exception as error:  # noqa: BLE001  the last border: whatever it is becomes a 500
            retry_after_s = self._config.retry_after_s
            problem = to_problem(error, request_id=request_id, retry_after_s=retry_after_s)
            send = closing(scope, receive, send)
            await self._answer(send, request_id, problem.status, problem.body, problem.headers)
            return
        await self._answer(send, request_id, 200, body, [(b"content-type", media.encode())])

    async def _through_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """By FastAPI's way; raises what has not been answered."""
        header = (REQUEST_ID_HEADER, scope["shardline.request_id"].encode())
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._recorder.count(REQUESTS, str(message["status"]))
                message["headers"].append(header)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # Starlette answers an unexpected error by the handler below, which logs it, and then
            # raises it again for a server to see: there is nothing left to do.
            if not started:
                raise

    async def _answer(
        self, send: Send, request_id: str, status: int, body: bytes, headers: Headers
    ) -> None:
        self._recorder.count(REQUESTS, str(status))
        length = (b"content-length", str(len(body)).encode())
        headers = [length, *headers, (REQUEST_ID_HEADER, request_id.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _request_id(self, headers: Mapping[bytes, bytes]) -> str:
        """The caller's, where it is fit to print, or one of our own."""
        given = headers.get(REQUEST_ID_HEADER)
        if given is not None and REQUEST_ID.fullmatch(given):
            return given.decode("ascii")
        return f"{self._ids.getrandbits(REQUEST_ID_BITS):0{REQUEST_ID_BITS // 4}x}"


def _without_body(send: Send) -> Send:
    """Of an answer to HEAD only the head goes out, with the length that GET's would have."""

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head


def _json(content: Any, status: int = 200) -> Response:
    return Response(encode(content, Media.JSON), status_code=status, media_type=Media.JSON)


def _problem(error: Exception, request_id: str, config: RouterConfig) -> Response:
    problem = to_problem(error, request_id=request_id, retry_after_s=config.retry_after_s)
    response = Response(problem.body, status_code=problem.status)
    response.raw_headers.extend(problem.headers)
    return response


def _translate_errors(app: FastAPI, config: RouterConfig) -> None:
    """Routes every error of the app through ``problems``, starlette's and FastAPI's own too."""

    def handler(
        translate: Callable[[Request, Any], Exception],
    ) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handle(request: Request, error: Exception) -> Response:
            request_id = request.scope["shardline.request_id"]
            response = _problem(translate(request, error), request_id, config)
            if isinstance(error, HTTPException) and error.headers:
                response.headers.update(error.headers)
            return response

        return handle

    for kind in (ShardlineError, Exception):
        app.add_exception_handler(kind, handler(lambda _, error: error))
    app.add_exception_handler(HTTPException, handler(_from_starlette))
    app.add_exception_handler(RequestValidationError, handler(_from_fastapi))


def _from_starlette(request: Request, error: HTTPException) -> Exception:
    if error.status_code == 404:
        return NotFound("no such path", got=request.url.path, hint="see /docs")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow")
        return MethodNotAllowed("method not allowed", expected=allowed, got=request.method)
    return error


def _from_fastapi(request: Request, error: RequestValidationError) -> Exception:
    first = error.errors()[0]
    expected = "a number" if first["type"] == "float_parsing" else "an integer"
    return InvalidInput(
        "wrong value", field=str(first["loc"][-1]), expected=expected, got=str(first["input"])
    )
