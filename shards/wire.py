"""The wire: length-prefixed msgpack frames, and the handshake that proves the cluster secret.

Frame: 4 bytes payload length and 8 bytes request id, little-endian, then the payload, a msgpack
array ``[tag, field, field, ...]`` in the order of the message's fields. An array field travels as
``[dtype, shape, data]`` with raw little-endian bytes, so neither side ever makes Python lists of
numbers. Many requests may be in flight on one connection; the request id pairs answers with them,
and stands outside the payload so that a router need not decode before all answers are in.

Handshake, on every new connection, before any request:

    server -> Hello(protocol, shard, generation, epoch, nonce)
    client -> Proof(nonce, mac = HMAC(secret, ["client", all of Hello, address, client nonce]))
    server -> Welcome(mac = HMAC(secret, ["server", all of Hello, address, client nonce]))

``address`` is where the server listens, as the routing table names it. It does not travel: either
side takes what it knows itself. So whoever stands in between can pass a proof on neither to
another shard nor from another port, nor say that the answers are those of another generation.
"""

import hmac
import math
import secrets
import struct
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeAlias

import msgpack
import numpy as np

from shards.errors import ProtocolError
from shards.types import (
    ErrorReply,
    FetchReply,
    FetchRequest,
    Hello,
    Proof,
    SearchParams,
    SearchReply,
    SearchRequest,
    Welcome,
)

PROTOCOL_VERSION = 3
MAX_FRAME_BYTES = 64 << 20  # 2048 queries x k=2048 x 12 bytes is 50 MB: the largest legal answer
NONCE_BYTES = 16
HEADER = struct.Struct("<IQ")
# The array types that travel.
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("<f4", "<i8")}
MAX_NDIM = 2
MAX_ARRAY_ITEMS = 16  # msgpack's own arrays: a message's fields, the sizes of a shape
# An empty frame for request 0, which nobody asked: the shard is at work, and lives.
KEEP_ALIVE = HEADER.pack(0, 0)

ServerAddress: TypeAlias = tuple[str, int]  # host and port that the server listens on
Message: TypeAlias = (
    SearchRequest | SearchReply | FetchRequest | FetchReply | ErrorReply | Hello | Proof | Welcome
)
# A message's place in this tuple is its tag on the wire: append, never reorder.
MESSAGE_TYPES: tuple[type[Message], ...] = (
    Hello,
    Proof,
    Welcome,
    ErrorReply,
    SearchRequest,
    SearchReply,
    FetchRequest,
    FetchReply,
)
_TAGS = {kind: tag for tag, kind in enumerate(MESSAGE_TYPES)}
_FIELDS = {kind: tuple(f.name for f in fields(kind)) for kind in MESSAGE_TYPES}
_PARAM_FIELDS = tuple(f.name for f in fields(SearchParams))
# msgpack's header of an array of so many items, then the tag
_ERROR_START = bytes([0x90 | (1 + len(_FIELDS[ErrorReply])), _TAGS[ErrorReply]])


def encode_frame(request_id: int, message: Message) -> bytes:
    """One whole frame, header included; 0 <= request_id < 2**64.

    Raises:
        ProtocolError: larger than MAX_FRAME_BYTES.
    """
    kind = type(message)
    values = [_TAGS[kind], *(getattr(message, name) for name in _FIELDS[kind])]
    payload: bytes = msgpack.packb(values, default=_pack_value)
    if len(payload) > MAX_FRAME_BYTES:
        raise ProtocolError(
            "frame too large", expected=f"<= {MAX_FRAME_BYTES} bytes", got=f"{len(payload)} bytes"
        )
    return HEADER.pack(len(payload), request_id) + payload


def decode_payload(payload: bytes) -> Message:
    """The message of a frame. Its arrays are read-only views of bytes of their own.

    Raises:
        ProtocolError: not msgpack, not a known message, or fields of the wrong kind.
    """
    try:
        values = msgpack.unpackb(
            payload,
            use_list=False,
            ext_hook=_refuse_ext,
            max_array_len=MAX_ARRAY_ITEMS,
            max_map_len=0,
        )
    except ProtocolError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError("bad frame", expected="[tag, fields]", got=str(error)) from error
    tag = values[0] if type(values) is tuple and values else None
    if type(tag) is not int or not 0 <= tag < len(MESSAGE_TYPES):
        raise ProtocolError("bad frame", expected="a known tag", got=repr(tag)[:40])
    kind = MESSAGE_TYPES[tag]
    readers = _READERS[kind]
    if len(values) != 1 + len(readers):
        raise ProtocolError("bad frame", expected=f"the fields of {kind.__name__}")
    return kind(
        **{name: read(name, value) for (name, read), value in zip(readers, values[1:], strict=True)}
    )


def is_error(payload: bytes) -> bool:
    """Whether a payload is an ErrorReply, without decoding it."""
    return payload[:2] == _ERROR_START


class FrameSplitter:
    """Cuts a byte stream into the payloads of its frames; ``limit`` bounds one payload in bytes."""

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """(request id, payload) of the frames completed by ``data``, in order.

        Raises:
            ProtocolError: a frame announces more than the limit.
        """
        if self._buffer:
            self._buffer += data
            frames, used = self._split(self._buffer)
            del self._buffer[:used]
        else:  # as a rule ``data`` is whole frames, which need no buffer
            frames, used = self._split(data)
            self._buffer += data[used:]
        return frames

    def _split(self, data: bytes | bytearray) -> tuple[list[tuple[int, bytes]], int]:
        """The whole frames at the start of ``data``, and how many bytes they take."""
        frames = []
        start, size = 0, len(data)
        while size - start >= HEADER.size:
            length, request_id = HEADER.unpack_from(data, start)
            if length > self.limit:
                raise ProtocolError(
                    "frame too large", expected=f"<= {self.limit} bytes", got=f"{length} bytes"
                )
            end = start + HEADER.size + length
            if size < end:
                break
            frames.append((request_id, bytes(data[start + HEADER.size : end])))
            start = end
        return frames, start


def new_hello(*, shard: int, generation: int, epoch: int) -> Hello:
    """The first frame of a new connection, with a nonce of its own."""
    return Hello(
        protocol=PROTOCOL_VERSION,
        shard=shard,
        generation=generation,
        epoch=epoch,
        nonce=secrets.token_bytes(NONCE_BYTES),
    )


def welcome(message: Message, secret: bytes, hello: Hello, address: ServerAddress) -> Welcome:
    """The server's answer to the client's first frame, when that proves the secret.

    Raises:
        ProtocolError: not a Proof, the peer does not know the secret, or its proof is for another
            server than the one at ``address`` that said ``hello``.
    """
    if not isinstance(message, Proof):
        raise ProtocolError("handshake", expected="Proof", got=type(message).__name__)
    expected = _mac(secret, "client", hello, address, message.nonce)
    if not hmac.compare_digest(message.mac, expected):
        raise ProtocolError("no proof of the cluster secret for this server")
    return Welcome(mac=_mac(secret, "server", hello, address, message.nonce))


def prove(message: Message, secret: bytes, address: ServerAddress) -> tuple[Hello, Proof, bytes]:
    """The server's first frame as Hello, the Proof to send back, and the mac Welcome must carry.

    ``address`` is the one that was connected to.

    Raises:
        ProtocolError: not a Hello, or another protocol version.
    """
    if not isinstance(message, Hello):
        raise ProtocolError("handshake", expected="Hello", got=type(message).__name__)
    if message.protocol != PROTOCOL_VERSION:
        raise ProtocolError(
            "protocol version", expected=str(PROTOCOL_VERSION), got=str(message.protocol)
        )
    nonce = secrets.token_bytes(NONCE_BYTES)
    proof = Proof(nonce=nonce, mac=_mac(secret, "client", message, address, nonce))
    return message, proof, _mac(secret, "server", message, address, nonce)


def check_welcome(message: Message, mac: bytes) -> None:
    """Raises ProtocolError unless the server's second frame proves the secret."""
    if not isinstance(message, Welcome) or not hmac.compare_digest(message.mac, mac):
        raise ProtocolError("server does not know the cluster secret")


def _mac(secret: bytes, role: str, hello: Hello, address: ServerAddress, nonce: bytes) -> bytes:
    said = (getattr(hello, name) for name in _FIELDS[Hello])
    # packed, so that no two lists of values are the same bytes
    return hmac.digest(secret, msgpack.packb([role, *said, *address, nonce]), "sha256")


def _pack_value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        # a memoryview with a zero in its shape cannot be cast, and has no bytes anyway
        data = array.data.cast("B") if array.size else b""
        return array.dtype.str, array.shape, data
    if isinstance(value, SearchParams):
        return tuple(getattr(value, name) for name in _PARAM_FIELDS)
    raise TypeError(f"{type(value).__name__} does not travel on the wire")


def _array(name: str, value: Any) -> np.ndarray[Any, np.dtype[Any]]:
    if type(value) is not tuple or len(value) != 3:
        raise _wrong(name, "an array as [dtype, shape, data]", value)
    dtype, shape, data = value
    if type(dtype) is not str or dtype not in DTYPES:
        raise _wrong(name, f"dtype in {sorted(DTYPES)}", dtype)
    if type(shape) is not tuple or len(shape) > MAX_NDIM:
        raise _wrong(name, f"a shape of at most {MAX_NDIM} sizes", shape)
    wanted = DTYPES[dtype].itemsize
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_FRAME_BYTES:
            raise _wrong(name, "a shape of sizes >= 0", shape)
        wanted *= size
    if type(data) is not bytes or wanted != len(data):
        raise _wrong(name, f"the bytes of shape {shape}", data)
    return np.ndarray(shape, DTYPES[dtype], data)


def _params(name: str, value: Any) -> SearchParams:
    if type(value) is not tuple or len(value) != len(_PARAM_FIELDS):
        raise _wrong(name, "search params", value)
    if not all(item is None or (type(item) is int and item > 0) for item in value):
        raise _wrong(name, "integers > 0", value)
    return SearchParams(**dict(zip(_PARAM_FIELDS, value, strict=True)))


def _integer(name: str, value: Any) -> int:
    if type(value) is not int:
        raise _wrong(name, "an integer", value)
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _wrong(name, "a finite number", value)
    return float(value)


def _bytes(name: str, value: Any) -> bytes:
    if type(value) is not bytes:
        raise _wrong(name, "bytes", value)
    return value


def _text(name: str, value: Any) -> str:
    if type(value) is not str:
        raise _wrong(name, "text", value)
    return value


def _optional_text(name: str, value: Any) -> str | None:
    return None if value is None else _text(name, value)


def _wrong(name: str, expected: str, value: Any) -> ProtocolError:
    return ProtocolError("bad frame", field=name, expected=expected, got=repr(value)[:40])


_READER_OF: dict[str, Callable[[str, Any], Any]] = {
    "queries": _array,
    "ids": _array,
    "scores": _array,
    "item_ids": _array,
    "vectors": _array,
    "params": _params,
    "k": _integer,
    "rows": _integer,
    "protocol": _integer,
    "shard": _integer,
    "generation": _integer,
    "epoch": _integer,
    "timeout_ms": _number,
    "search_ms": _number,
    "nonce": _bytes,
    "mac": _bytes,
    "code": _text,
    "message": _text,
    "field": _optional_text,
}
# Of each message: its fields and what reads them, in the order they travel.
_READERS = {
    kind: tuple((name, _READER_OF[name]) for name in names) for kind, names in _FIELDS.items()
}


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ProtocolError("bad frame", expected="no msgpack extension types", got=f"type {code}")
