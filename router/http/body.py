"""A request's body, read from the server piece by piece and never beyond its limit."""

from collections.abc import Mapping

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from shardline.router.contract import PayloadTooLarge, UnsupportedMediaType

MAX_LENGTH_DIGITS = 18


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """The whole body, refused as soon as it is known to be of more than ``limit`` bytes.

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
    chunks: list[bytes] = []
    size = 0
    is_whole = False
    while not is_whole:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        is_whole = not message.get("more_body", False)
        size += len(chunk)
        if size > limit:
            raise _too_large(limit, "more")
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(limit: int, got: str) -> PayloadTooLarge:
    return PayloadTooLarge(
        "body too large",
        field="body",
        expected=f"<= {limit} bytes",
        got=got,
        hint="send the queries in several requests, or as msgpack",
    )
