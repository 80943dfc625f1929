"""A request's body, read from the server piece by piece and never beyond its limit.

Or not read at all: whoever is refused before may still be sending, and must not count as a request
in flight for that long, here or in HAProxy.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from shardline.router.contract import PayloadTooLarge, UnsupportedMediaType

MAX_LENGTH_DIGITS = 18
# How long an answer to an unread body is left to reach a client that is sending it: one that is
# closed on at once may see a broken connection instead.
LINGER_S = 1.0
IS_READ = "shardline.body_is_read"  # set in the scope of a request whose body was read


async def read_body(
    headers: Mapping[bytes, bytes],
    receive: Receive,
    limit: int,
    arriving: AbstractContextManager[None] = contextlib.nullcontext(),
) -> bytes:
    """The whole body, refused as soon as it is known to be of more than ``limit`` bytes.

    Within ``arriving`` from the first piece of a body of several to its last.

    Raises:
        PayloadTooLarge, UnsupportedMediaType (compressed), ClientDisconnect.
    """
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding != b"identity":
        raise UnsupportedMediaType(
            "compressed bodies are not supported",
            field="Content-Encoding",
            got=encoding.decode("latin-1"),
        )
    announced = headers.get(b"content-length", b"")
    # more digits than that are too large as well, and Python refuses to read very many
    if announced.isdigit() and (len(announced) > MAX_LENGTH_DIGITS or int(announced) > limit):
        raise _too_large(limit, f"{announced[:MAX_LENGTH_DIGITS].decode()} bytes")
    message = await receive()  # as ``_piece``, without a coroutine: most bodies have one piece
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    first: bytes = message.get("body", b"")
    size = len(first)
    if size > limit:
        raise _too_large(limit, "more")
    if not message.get("more_body", False):
        return first
    chunks, is_whole = [first], False
    with arriving:
        while not is_whole:
            chunk, is_whole = await _piece(receive)
            size += len(chunk)
            if size > limit:
                raise _too_large(limit, "more")
            chunks.append(chunk)
        return b"".join(chunks)


async def _piece(receive: Receive) -> tuple[bytes, bool]:
    """The next piece of a body, and whether it is the last."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), not message.get("more_body", False)


def closing(scope: Scope, receive: Receive, send: Send) -> Send:
    """``send`` for an answer to a request whose body may not have been read.

    In that case the server closes the connection after LINGER_S, or when the rest has come. Else it
    would wait for the rest, and HAProxy would count the request until its client gives up.
    """
    is_unread = False

    async def send_and_close(message: Message) -> None:
        nonlocal is_unread
        if message["type"] == "http.response.start":
            is_unread = not scope.get(IS_READ) and _announces(scope["shardline.headers"])
            if is_unread:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)
        elif is_unread and not message.get("more_body", False):
            await send({**message, "more_body": True})
            await _drop_rest(receive)
            await send({"type": "http.response.body", "body": b""})
        else:
            await send(message)

    return send_and_close


def _announces(headers: Mapping[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


async def _drop_rest(receive: Receive) -> None:
    until = asyncio.get_running_loop().time() + LINGER_S
    is_whole = False
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout_at(until):
            # looks at the clock too: pieces that are all there already never let a timer run
            while not is_whole and asyncio.get_running_loop().time() < until:
                _, is_whole = await _piece(receive)


def _too_large(limit: int, got: str) -> PayloadTooLarge:
    return PayloadTooLarge(
        "body too large",
        field="body",
        expected=f"<= {limit} bytes",
        got=got,
        hint="send the queries in several requests, or as msgpack",
    )
