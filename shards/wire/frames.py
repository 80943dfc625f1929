"""The wire: length-prefixed frames, and what is in them.

Frame: 4 bytes payload length and 8 bytes request id, little-endian, then the payload: one of the
fixed layouts of ``search_layout``, or a msgpack array ``[tag, field, field, ...]`` in the order of
the message's fields. An array field of the latter travels as ``[dtype, shape, data]`` with raw
little-endian bytes, so neither side ever makes Python lists of numbers. Many requests may be in
flight on one connection; the request id pairs answers with them, and stands outside the payload
so that a router need not decode before all answers are in. How a connection begins is in
``handshake``.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeAlias

import msgpack
import numpy as np

from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.messages import (
    ErrorReply,
    FetchReply,
    FetchRequest,
    Hello,
    Proof,
    SearchReply,
    SearchRequest,
    Welcome,
)
from shardline.shards.wire import search_layout

PROTOCOL_VERSION = 4
MAX_FRAME_BYTES = 64 << 20  # 2048 queries x k=2048 x 12 bytes is 50 MB: the largest legal answer
HEADER = struct.Struct("<IQ")
# The array types that travel.
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("<f4", "<i8")}
MAX_NDIM = 2
MAX_ARRAY_ITEMS = 16  # msgpack's own arrays: a message's fields, the sizes of a shape
# An empty frame for request 0, which nobody asked: the shard is at work, and lives.
KEEP_ALIVE = HEADER.pack(0, 0)

Message: TypeAlias = (
    SearchRequest | SearchReply | FetchRequest | FetchReply | ErrorReply | Hello | Proof | Welcome
)
# The messages in msgpack by their tag. A number is never used for another message.
MESSAGE_TYPES: dict[int, type[Message]] = {
    0: Hello,
    1: Proof,
    2: Welcome,
    3: ErrorReply,
    6: FetchRequest,
    7: FetchReply,
}
_TAGS = {kind: tag for tag, kind in MESSAGE_TYPES.items()}
_FIELDS = {kind: tuple(f.name for f in fields(kind)) for kind in _TAGS}
# msgpack's header of an array of so many items, then the tag
_ERROR_START = bytes([0x90 | (1 + len(_FIELDS[ErrorReply])), _TAGS[ErrorReply]])


def encode_frame(request_id: int, message: Message) -> bytes:
    """One whole frame, header included; 0 <= request_id < 2**64.

    Raises:
        ProtocolError: larger than MAX_FRAME_BYTES.
    """
    kind = type(message)
    pack = search_layout.PACK.get(kind)
    if pack is None:
        values = [_TAGS[kind], *(getattr(message, name) for name in _FIELDS[kind])]
        payload: bytes = msgpack.packb(values, default=_pack_value)
    else:
        payload = b"".join(pack(message))
    if len(payload) > MAX_FRAME_BYTES:
        raise ProtocolError(
            "frame too large", expected=f"<= {MAX_FRAME_BYTES} bytes", got=f"{len(payload)} bytes"
        )
    return HEADER.pack(len(payload), request_id) + payload


def decode_payload(payload: bytes) -> Message:
    """The message of a frame. Its arrays are read-only views of bytes of their own.

    Raises:
        ProtocolError: neither a layout nor msgpack, not a known message, or fields of the wrong
            kind.
    """
    read = search_layout.READ.get(payload[0]) if payload else None
    if read is not None:
        return read(payload)
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
    if type(tag) is not int or tag not in MESSAGE_TYPES:
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
        if not self._buffer and len(data) >= HEADER.size:  # as a rule it is one whole frame
            length, request_id = HEADER.unpack_from(data)
            if length == len(data) - HEADER.size and length <= self.limit:
                return [(request_id, data[HEADER.size :])]
        if self._buffer:
            self._buffer += data
            frames, used = self._split(self._buffer)
            del self._buffer[:used]
        else:  # whole frames need no buffer
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


def _pack_value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        # a memoryview with a zero in its shape cannot be cast, and has no bytes anyway
        data = array.data.cast("B") if array.size else b""
        return array.dtype.str, array.shape, data
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
    "item_ids": _array,
    "vectors": _array,
    "protocol": _integer,
    "shard": _integer,
    "generation": _integer,
    "epoch": _integer,
    "timeout_ms": _number,
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
