"""The two messages of every search, as fixed layouts instead of msgpack.

A query costs one request and as many replies as there are shards, so here it pays to do without a
parser: reading one is a single ``struct`` call and a view of the bytes for each array. The first
byte tells a layout from msgpack, whose messages all begin with an array header (0x90 and up).
Little-endian; arrays lie row after row and begin at a multiple of 8 bytes.

    request   kind u32, n u32, dim u32, k u32, timeout_ms f64,
              nprobe u32, ef_search u32, rerank_factor u32, zero u32, queries f32 (n, dim)
    reply     kind u32, n u32, k u32, zero u32, rows u64, search_ms f64,
              ids i64 (n, k), scores f32 (n, k)

A search parameter of 0 is one that was not given.
"""

import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.messages import NO_PARAMS, SearchParams, SearchReply, SearchRequest

REQUEST = struct.Struct("<IIIIdIIII")
REPLY = struct.Struct("<IIIIQd")
REQUEST_KIND = 4
REPLY_KIND = 5
FLOAT = np.dtype("<f4")
INT = np.dtype("<i8")
MAX_MS = 1e12  # a generation of people; NaN is not below it either

Part: TypeAlias = bytes | memoryview


def pack_request(request: SearchRequest) -> tuple[Part, ...]:
    """Raises ProtocolError for values that the layout cannot hold."""
    queries, params = request.queries, request.params
    n, dim = queries.shape
    if 0 in (params.nprobe, params.ef_search, params.rerank_factor):
        raise ProtocolError("a search parameter does not fit the layout", got="0")
    try:
        head = REQUEST.pack(
            *(REQUEST_KIND, n, dim, request.k, request.timeout_ms),
            *(params.nprobe or 0, params.ef_search or 0, params.rerank_factor or 0, 0),
        )
    except struct.error as error:
        raise ProtocolError("the request does not fit its layout", got=str(error)) from error
    return head, np.ascontiguousarray(queries, FLOAT).data


def pack_reply(reply: SearchReply) -> tuple[Part, ...]:
    """The bytes of a payload, in parts."""
    assert reply.ids.shape == reply.scores.shape
    n, k = reply.ids.shape
    head = REPLY.pack(REPLY_KIND, n, k, 0, reply.rows, reply.search_ms)
    ids = np.ascontiguousarray(reply.ids, INT)
    return head, ids.data, np.ascontiguousarray(reply.scores, FLOAT).data


def read_request(payload: bytes) -> SearchRequest:
    """``queries`` is a read-only view of the payload.

    Raises:
        ProtocolError: too short, too long, or a value that no request has.
    """
    if len(payload) < REQUEST.size:
        raise _wrong("a whole SearchRequest", len(payload))
    kind, n, dim, k, timeout_ms, nprobe, ef_search, rerank, zero = REQUEST.unpack_from(payload)
    if len(payload) != REQUEST.size + 4 * n * dim or kind != REQUEST_KIND or zero:
        raise _wrong(f"a SearchRequest of {n} x {dim} numbers", len(payload))
    if not abs(timeout_ms) <= MAX_MS:
        raise ProtocolError("bad frame", field="timeout_ms", expected="milliseconds")
    params = NO_PARAMS
    if nprobe or ef_search or rerank:
        params = SearchParams(
            nprobe=nprobe or None, ef_search=ef_search or None, rerank_factor=rerank or None
        )
    queries = np.ndarray((n, dim), FLOAT, payload, REQUEST.size)
    return SearchRequest(queries=queries, k=k, timeout_ms=timeout_ms, params=params)


def read_reply(payload: bytes) -> SearchReply:
    """``ids`` and ``scores`` are read-only views of the payload.

    Raises:
        ProtocolError: too short, too long, or a value that no reply has.
    """
    if len(payload) < REPLY.size:
        raise _wrong("a whole SearchReply", len(payload))
    kind, n, k, zero, rows, search_ms = REPLY.unpack_from(payload)
    if len(payload) != REPLY.size + 12 * n * k or kind != REPLY_KIND or zero:
        raise _wrong(f"a SearchReply of {n} x {k} results", len(payload))
    if not abs(search_ms) <= MAX_MS:
        raise ProtocolError("bad frame", field="search_ms", expected="milliseconds")
    ids = np.ndarray((n, k), INT, payload, REPLY.size)
    scores = np.ndarray((n, k), FLOAT, payload, REPLY.size + 8 * n * k)
    return SearchReply(ids=ids, scores=scores, rows=rows, search_ms=search_ms)


def _wrong(expected: str, got: int) -> ProtocolError:
    return ProtocolError("bad frame", expected=expected, got=f"{got} bytes")


PACK: dict[type, Callable[[Any], tuple[Part, ...]]] = {
    SearchRequest: pack_request,
    SearchReply: pack_reply,
}
READ: dict[int, Callable[[bytes], SearchRequest | SearchReply]] = {
    REQUEST_KIND: read_request,
    REPLY_KIND: read_reply,
}
