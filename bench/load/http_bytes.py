"""Just enough HTTP/1.1 for a load generator: a request as bytes, where an answer ends, and what
little of it is looked at under load.

A general client spends more time on a header than the server takes to answer, on cores that both
share. Bodies are written after the public contract of ``/v1/search`` and not by the router's own
codec, so that one client can ask any version of the server.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgpack
import numpy as np

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import FloatArray, IdArray

MSGPACK = "application/msgpack"
HEAD_END = b"\r\n\r\n"
LENGTH = b"content-length:"
FOREIGN_BYTES = 40  # of an error page that is not ours, to tell whose it is


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request, ready to send."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


EMPTY = Request("GET", "/healthz")  # client, HAProxy, Serve, ASGI, and no search: the floor


@dataclass(frozen=True, slots=True)
class Head:
    """status; body at bytes start to total of the answer; closes: no further request."""

    status: int
    start: int
    total: int
    closes: bool


def address_of(url: str) -> tuple[str, int]:
    """(host, port) of an http URL; InvalidInput for any other."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise InvalidInput("not an address to load", field="url", expected="http://...", got=url)
    return parts.hostname, parts.port or 80


def message_of(request: Request, address: tuple[str, int]) -> bytes:
    """The request as it goes over the socket."""
    fields = (
        ("Host", f"{address[0]}:{address[1]}"),
        ("Content-Length", str(len(request.body))),
        *request.headers,
    )
    head = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return f"{request.method} {request.path} HTTP/1.1\r\n{head}\r\n".encode() + request.body


def search_request(
    content: Mapping[str, Any], headers: tuple[tuple[str, str], ...] = ()
) -> Request:
    """A msgpack search. content: the fields of the body; ``vectors`` is (n, dim) float32."""
    own = (("Content-Type", MSGPACK), ("Accept", MSGPACK))
    body = msgpack.packb(content, default=_packed)
    return Request("POST", "/v1/search", body, (*own, *headers))


def _packed(value: Any) -> Any:
    """numpy values in the form that the HTTP interface documents."""
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "shape": list(value.shape), "data": value.tobytes()}
    return value.item()


def results_of(body: bytes) -> tuple[IdArray, FloatArray]:
    """(ids, scores), both (n, k), of a msgpack answer; id -1 marks an empty slot."""
    content = msgpack.unpackb(body)
    ids, scores = (
        np.frombuffer(part["data"], dtype=part["dtype"]).reshape(part["shape"])
        for part in (content["ids"], content["scores"])
    )
    return ids, scores


def read_head(data: bytes | bytearray) -> Head | None:
    """The head at the start of ``data``; None while it is not complete.

    Raises:
        ValueError: this is no HTTP answer, or one without Content-Length.
    """
    end = data.find(HEAD_END)
    if end < 0:
        return None
    head = bytes(data[:end]).lower() + b"\r\n"
    if not head.startswith(b"http/1."):
        raise ValueError("not an HTTP answer")
    at = head.find(LENGTH)
    if at < 0:
        raise ValueError("an answer without Content-Length")
    at += len(LENGTH)
    length = int(head[at : head.index(b"\r\n", at)])
    return Head(
        status=int(head.split(b" ", 2)[1]),
        start=end + len(HEAD_END),
        total=end + len(HEAD_END) + length,
        closes=b"\r\nconnection: close" in head,
    )


def coverage_of(body: bytes) -> float:
    """The share of rows a msgpack answer saw; NaN for a body that does not say."""
    try:
        coverage = msgpack.unpackb(body)["coverage"]
        return float(coverage["rows_answered"] / max(coverage["rows_asked"], 1))
    except (ValueError, KeyError, TypeError, msgpack.UnpackException):
        return np.nan


def problem_of(body: bytes) -> str:
    """The code of a problem of ours; else that it is somebody else's, and how it begins."""
    try:
        return str(json.loads(body)["code"])
    except (ValueError, KeyError, TypeError):
        text = " ".join(body[:FOREIGN_BYTES].decode("ascii", "replace").split())
        return f"not ours: {text!r}"
