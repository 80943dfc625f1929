"""The wire: length-prefixed msgpack frames, and the handshake that proves the cluster secret.

Frame: 4 bytes little-endian payload length, then a msgpack array ``[tag, request_id, fields]``.
``fields`` is a map of the message's fields; an array travels as ``{"dtype", "shape", "data"}`` with
raw little-endian bytes, so neither side ever makes Python lists of numbers. Many requests may be
in flight on one connection; ``request_id`` pairs answers with them.

Handshake, on every new connection, before any request:

    server -> Hello(protocol, shard, generation, epoch, nonce)
    client -> Proof(nonce, mac = HMAC(secret, "client" + server nonce + client nonce))
    server -> Welcome(mac = HMAC(secret, "server" + client nonce + server nonce))
"""

import hmac
import math
import secrets
import struct
from dataclasses import fields
from types import NoneType
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

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 64 << 20  # 2048 queries x k=2048 x 12 bytes is 50 MB: the largest legal answer
NONCE_BYTES = 16
HEADER = struct.Struct("<I")
WIRE_DTYPES = frozenset({"<f4", "<i8"})

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


def encode_frame(request_id: int, message: Message) -> bytes:
    """One whole frame, length prefix included.

    Raises:
        ProtocolError: larger than MAX_FRAME_BYTES.
    """
    kind = type(message)
    content = {name: getattr(message, name) for name in _FIELDS[kind]}
    payload: bytes = msgpack.packb((_TAGS[kind], request_id, content), default=_pack_value)
    if len(payload) > MAX_FRAME_BYTES:
        raise ProtocolError(
            "frame too large", expected=f"<= {MAX_FRAME_BYTES} bytes", got=f"{len(payload)} bytes"
        )
    return HEADER.pack(len(payload)) + payload


def decode_payload(payload: bytes) -> tuple[int, Message]:
    """(request_id, message) of a frame's payload. Arrays are read-only views of the payload.

    Raises:
        ProtocolError: not msgpack, not a known message, or fields of the wrong kind.
    """
    try:
        tag, request_id, content = msgpack.unpackb(
            payload, object_hook=_unpack_value, strict_map_key=True, ext_hook=_refuse_ext
        )
    except ProtocolError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError("bad frame", expected="[tag, id, fields]", got=str(error)) from error
    if type(tag) is not int or not 0 <= tag < len(MESSAGE_TYPES) or type(request_id) is not int:
        raise ProtocolError(
            "bad frame", expected="a known tag and an integer id", got=repr(tag)[:40]
        )
    kind = MESSAGE_TYPES[tag]
    if not isinstance(content, dict) or set(content) != set(_FIELDS[kind]):
        raise ProtocolError("bad frame", expected=f"the fields of {kind.__name__}")
    if kind is SearchRequest:
        content["params"] = _search_params(content["params"])
    _check_scalars(kind, content)
    return request_id, kind(**content)


class FrameSplitter:
    """Cuts a byte stream into the payloads of its frames; ``limit`` bounds one payload in bytes."""

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads completed by ``data``, in order.

        Raises:
            ProtocolError: a frame announces more than the limit.
        """
        buffer = self._buffer
        buffer += data
        payloads = []
        start = 0
        while len(buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(buffer, start)
            if length > self.limit:
                raise ProtocolError(
                    "frame too large", expected=f"<= {self.limit} bytes", got=f"{length} bytes"
                )
            end = start + HEADER.size + length
            if len(buffer) < end:
                break
            payloads.append(bytes(buffer[start + HEADER.size : end]))
            start = end
        del buffer[:start]
        return payloads


def new_hello(*, shard: int, generation: int, epoch: int) -> Hello:
    """The first frame of a new connection, with a nonce of its own."""
    return Hello(
        protocol=PROTOCOL_VERSION,
        shard=shard,
        generation=generation,
        epoch=epoch,
        nonce=secrets.token_bytes(NONCE_BYTES),
    )


def welcome(message: Message, secret: bytes, hello: Hello) -> Welcome:
    """The server's answer to the client's first frame, when that proves the secret.

    Raises:
        ProtocolError: not a Proof, or the peer does not know the secret.
    """
    if not isinstance(message, Proof):
        raise ProtocolError("handshake", expected="Proof", got=type(message).__name__)
    if not hmac.compare_digest(message.mac, _mac(secret, b"client", hello.nonce, message.nonce)):
        raise ProtocolError("peer does not know the cluster secret")
    return Welcome(mac=_mac(secret, b"server", message.nonce, hello.nonce))


def prove(message: Message, secret: bytes) -> tuple[Hello, Proof, bytes]:
    """The server's first frame as Hello, the Proof to send back, and the mac Welcome must carry.

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
    proof = Proof(nonce=nonce, mac=_mac(secret, b"client", message.nonce, nonce))
    return message, proof, _mac(secret, b"server", nonce, message.nonce)


def check_welcome(message: Message, mac: bytes) -> None:
    """Raises ProtocolError unless the server's second frame proves the secret."""
    if not isinstance(message, Welcome) or not hmac.compare_digest(message.mac, mac):
        raise ProtocolError("server does not know the cluster secret")


def _mac(secret: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(secret, role + first + second, "sha256")


def _pack_value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        # a memoryview with a zero in its shape cannot be cast, and has no bytes anyway
        data = array.data.cast("B") if array.size else b""
        return {"dtype": array.dtype.str, "shape": array.shape, "data": data}
    if isinstance(value, SearchParams):
        return {name: getattr(value, name) for name in _PARAM_FIELDS}
    raise TypeError(f"{type(value).__name__} does not travel on the wire")


def _unpack_value(value: dict[str, Any]) -> Any:
    if value.keys() != {"dtype", "shape", "data"}:
        return value
    dtype, shape, data = value["dtype"], value["shape"], value["data"]
    if dtype not in WIRE_DTYPES or not isinstance(data, bytes) or not isinstance(shape, list):
        raise ProtocolError("bad array", expected=f"dtype in {sorted(WIRE_DTYPES)}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ProtocolError("bad array", expected="a shape of sizes >= 0", got=repr(shape))
    if math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise ProtocolError("bad array", expected=f"shape {shape}", got=f"{len(data)} bytes")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _search_params(value: Any) -> SearchParams:
    if not isinstance(value, dict) or set(value) != set(_PARAM_FIELDS):
        raise ProtocolError("bad frame", expected="search params")
    if not all(item is None or (type(item) is int and item > 0) for item in value.values()):
        raise ProtocolError("bad frame", expected="search params that are integers > 0")
    return SearchParams(**value)


_SCALARS: dict[str, type | tuple[type, ...]] = {
    "k": int,
    "rows": int,
    "protocol": int,
    "shard": int,
    "generation": int,
    "epoch": int,
    "timeout_ms": (int, float),
    "search_ms": (int, float),
    "nonce": bytes,
    "mac": bytes,
    "code": str,
    "message": str,
    "field": (str, NoneType),
}


def _check_scalars(kind: type[Message], content: dict[str, Any]) -> None:
    for name, value in content.items():
        expected = _SCALARS.get(name)
        if expected is not None and (not isinstance(value, expected) or isinstance(value, bool)):
            raise ProtocolError(
                "bad frame", field=f"{kind.__name__}.{name}", got=type(value).__name__
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ProtocolError("bad frame", field=f"{kind.__name__}.{name}", got=str(value))


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ProtocolError("bad frame", expected="no msgpack extension types", got=f"type {code}")
