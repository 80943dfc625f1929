"""The two messages of every search, as fixed layouts instead of msgpack.

A query costs one request and as many replies as there are shards, so here it pays to do without a
parser: reading one is a single ``struct`` call and a view of the bytes for each array. The first
byte tells a layout from msgpack, whose messages all begin with an array header (0x90 and up).
Little-endian; arrays lie row after row and begin at a multiple of the size of their
numbers.

    request   kind u32, n u32, dim u32, k u32, timeout_ms f64,
              nprobe u32, ef_search u32, rerank_factor u32, tail u32, excluded u32, zero u32,
              excluded i64 (excluded), queries f32 (n, dim),
              counts i32 (n) if excluded > 0, options in msgpack (tail bytes)
    reply     kind u32, n u32, k u32, zero u32, generation u64, seq u64, rows u64, search_ms f64,
              others_share f64, matched i64, counts u32, zero u32,
              ids i64 (n, k), scores f32 (n, k), excluded i32 (counts), which is 0 or n

A search parameter of 0 is one that was not given. Ids that queries exclude lie one query after the
other; counts say how many each has. The tail is a map of those ``SearchOptions`` that
differ from their defaults, and empty for nearly every search. An option that the receiver does not
know is refused: a filter that is ignored would be a wrong answer.
"""

import struct
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeAlias

import msgpack
import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.exclusions import Excluded
from shardline.shards.core.messages import (
    NO_FILTER,
    NO_OPTIONS,
    NO_PARAMS,
    SearchOptions,
    SearchParams,
    SearchReply,
    SearchRequest,
)
from shardline.shards.core.schema import Ranked
from shardline.shards.wire.readers import (
    Payload,
    counts_of,
    pack_value,
    packed_counts,
    readers_of,
    unpack,
)

REQUEST = struct.Struct("<IIIIdIIIIII")
REPLY = struct.Struct("<IIIIQQQddqII")
REQUEST_KIND = 4
REPLY_KIND = 5
_START = struct.Struct("<IIIIQ")  # of a reply: kind to generation
REPLY_START_BYTES = _START.size
FLOAT = np.dtype("<f4")
INT = np.dtype("<i8")
COUNT = np.dtype("<i4")
MAX_MS = 1e12  # a generation of people; NaN is not below it either

Packed: TypeAlias = tuple[int, tuple[bytes | memoryview, ...]]

OPTION_READERS = dict(readers_of(SearchOptions))
OPTION_COUNTS = counts_of(SearchOptions)
OPTION_DEFAULTS = tuple((field.name, field.default) for field in fields(SearchOptions))


def pack_request(request: SearchRequest) -> Packed:
    """The size of a payload, and its bytes in parts.

    Raises:
        ProtocolError: a value that the layout cannot hold.
    """
    queries, params, excluded = request.queries, request.params, request.excluded
    n, dim = queries.shape
    if 0 in (params.nprobe, params.ef_search, params.rerank_factor):
        raise ProtocolError("a search parameter does not fit the layout", got="0")
    tail = b"" if request.options is NO_OPTIONS else _pack_options(request.options)
    num_excluded = 0 if excluded is None else len(excluded.ids)
    try:
        head = REQUEST.pack(
            *(REQUEST_KIND, n, dim, request.k, request.timeout_ms, params.nprobe or 0),
            *(params.ef_search or 0, params.rerank_factor or 0, len(tail), num_excluded, 0),
        )
    except struct.error as error:
        raise ProtocolError("the request does not fit its layout", got=str(error)) from error
    size = REQUEST.size + 4 * n * dim + len(tail)
    vectors = np.ascontiguousarray(queries, FLOAT).data
    if excluded is None or not num_excluded:
        return size, (head, vectors, tail)
    assert len(excluded.counts) == n
    ids = np.ascontiguousarray(excluded.ids, INT).data
    counts = np.ascontiguousarray(excluded.counts, COUNT).data
    return size + 8 * num_excluded + 4 * n, (head, ids, vectors, counts, tail)


def pack_reply(reply: SearchReply) -> Packed:
    """The size of a payload, and its bytes in parts."""
    ids, scores = reply.ranked
    assert ids.shape == scores.shape
    n, k = ids.shape
    excluded = reply.excluded
    assert excluded is None or len(excluded) == n
    counted = 0 if excluded is None else n
    head = REPLY.pack(
        *(REPLY_KIND, n, k, 0, reply.generation, reply.seq, reply.rows),
        *(reply.search_ms, reply.others_share, reply.matched, counted, 0),
    )
    ids, scores = np.ascontiguousarray(ids, INT), np.ascontiguousarray(scores, FLOAT)
    size = REPLY.size + 12 * n * k + 4 * counted
    if excluded is None:
        return size, (head, ids.data, scores.data)
    return size, (head, ids.data, scores.data, np.ascontiguousarray(excluded, COUNT).data)


def reply_start(n: int, k: int, generation: int) -> bytes:
    """The first REPLY_START_BYTES of every reply of n x k results of that generation."""
    return _START.pack(REPLY_KIND, n, k, 0, generation)


def read_request(payload: Payload) -> SearchRequest:
    """Its arrays are views of the payload.

    Raises:
        ProtocolError: too short, too long, or a value that no request has.
    """
    if len(payload) < REQUEST.size:
        raise _wrong("a whole SearchRequest", len(payload))
    kind, n, dim, k, timeout_ms, nprobe, ef_search, rerank, tail, excluded, zero = (
        REQUEST.unpack_from(payload)
    )
    vectors_start = REQUEST.size + 8 * excluded
    counts_start = vectors_start + 4 * n * dim
    tail_start = counts_start + (4 * n if excluded else 0)
    if len(payload) != tail_start + tail or kind != REQUEST_KIND or zero:
        raise _wrong(f"a SearchRequest of {n} x {dim} numbers", len(payload))
    if not abs(timeout_ms) <= MAX_MS:
        raise ProtocolError("bad frame", field="timeout_ms", expected="milliseconds")
    params = NO_PARAMS
    if nprobe or ef_search or rerank:
        params = SearchParams(
            nprobe=nprobe or None, ef_search=ef_search or None, rerank_factor=rerank or None
        )
    return SearchRequest(
        queries=np.ndarray((n, dim), FLOAT, payload, vectors_start),
        k=k,
        timeout_ms=timeout_ms,
        params=params,
        options=_read_options(payload[tail_start:]) if tail else NO_OPTIONS,
        excluded=_read_excluded(payload, n, excluded, counts_start) if excluded else None,
    )


def read_reply(payload: Payload) -> SearchReply:
    """Its arrays are views of the payload.

    Raises:
        ProtocolError: too short, too long, or a value that no reply has.
    """
    if len(payload) < REPLY.size:
        raise _wrong("a whole SearchReply", len(payload))
    kind, n, k, zero, generation, seq, rows, search_ms, others, matched, counted, zeros = (
        REPLY.unpack_from(payload)
    )
    counts_start = REPLY.size + 12 * n * k
    is_whole = len(payload) == counts_start + 4 * counted and counted in (0, n)
    if not is_whole or kind != REPLY_KIND or zero or zeros:
        raise _wrong(f"a SearchReply of {n} x {k} results", len(payload))
    if not abs(search_ms) <= MAX_MS:
        raise ProtocolError("bad frame", field="search_ms", expected="milliseconds")
    if not 0 <= others <= 1:
        raise ProtocolError("bad frame", field="others_share", expected="0 to 1")
    if not NO_FILTER <= matched <= rows:
        raise ProtocolError("bad frame", field="matched", expected=f"{NO_FILTER} to {rows}")
    ids = np.ndarray((n, k), INT, payload, REPLY.size)
    scores = np.ndarray((n, k), FLOAT, payload, REPLY.size + 8 * n * k)
    return SearchReply(
        ranked=Ranked(ids, scores),
        rows=rows,
        generation=generation,
        seq=seq,
        search_ms=search_ms,
        others_share=others,
        matched=matched,
        excluded=_read_counts(payload, n, counts_start, rows) if counted else None,
    )


def _read_excluded(payload: Payload, n: int, num_ids: int, counts_start: int) -> Excluded:
    ids = np.ndarray((num_ids,), INT, payload, REQUEST.size)
    counts = _read_counts(payload, n, counts_start, num_ids)
    if int(counts.sum(dtype=np.int64)) != num_ids:
        raise ProtocolError("bad frame", field="excluded", expected=f"{num_ids} ids in all")
    return Excluded(counts, ids)


def _read_counts(payload: Payload, n: int, start: int, most: int) -> NDArray[np.int32]:
    """(n,) int32, each of them 0 to ``most``."""
    counts: NDArray[np.int32] = np.ndarray((n,), COUNT, payload, start)
    if n and not (counts.min() >= 0 and counts.max() <= most):
        raise ProtocolError("bad frame", field="excluded", expected=f"counts from 0 to {most}")
    return counts


def _pack_options(options: SearchOptions) -> bytes:
    given = {
        name: packed_counts(value) if name in OPTION_COUNTS else value
        for name, default in OPTION_DEFAULTS
        if (value := getattr(options, name)) != default
    }
    packed: bytes = msgpack.packb(given, default=pack_value) if given else b""
    return packed


def _read_options(tail: Payload) -> SearchOptions:
    given = unpack(tail, max_map_len=len(OPTION_READERS))
    if type(given) is not dict or not given.keys() <= OPTION_READERS.keys():
        raise ProtocolError(
            "bad frame",
            field="options",
            expected=f"a map of {', '.join(OPTION_READERS)}",
            got=repr(given)[:40],
        )
    return SearchOptions(
        **{name: OPTION_READERS[name](name, value) for name, value in given.items()}
    )


def _wrong(expected: str, got: int) -> ProtocolError:
    return ProtocolError("bad frame", expected=expected, got=f"{got} bytes")


PACK: dict[type, Callable[[Any], Packed]] = {
    SearchRequest: pack_request,
    SearchReply: pack_reply,
}
READ: dict[int, Callable[[Payload], SearchRequest | SearchReply]] = {
    REQUEST_KIND: read_request,
    REPLY_KIND: read_reply,
}
