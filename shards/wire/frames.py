"""The wire: length-prefixed frames, and what is in them.

Frame: 4 bytes payload length and 8 bytes request id, little-endian, then the payload: one of the
fixed layouts of ``search_layout``, or a msgpack array ``[tag, field, field, ...]`` in the order of
the message's fields, each read by what its annotation says (``readers``). Many requests may be in
flight on one connection; the request id pairs answers with them, and stands outside the payload
so that a router need not decode before all answers are in. How a connection begins is in
``handshake``.
"""

import struct
from typing import Any, TypeAlias

import msgpack

from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.messages import (
    AttributesReply,
    AttributesRequest,
    DeleteRequest,
    ErrorReply,
    FetchReply,
    FetchRequest,
    Hello,
    Proof,
    SearchReply,
    SearchRequest,
    UpsertRequest,
    Welcome,
    WriteReply,
)
from shardline.shards.wire import search_layout
from shardline.shards.wire.readers import (
    Payload,
    counts_of,
    pack_value,
    packed_counts,
    readers_of,
    unpack,
)

PROTOCOL_VERSION = 10
MAX_FRAME_BYTES = 64 << 20  # 2048 queries x k=2048 x 12 bytes is 50 MB: the largest legal answer
HEADER = struct.Struct("<IQ")
CHEAP_COPY_BYTES = 16 << 10  # up to here numpy's extra work for a memoryview costs more than a copy
# An empty frame for request 0, which nobody asked: the shard is at work, and lives.
KEEP_ALIVE = HEADER.pack(0, 0)

Message: TypeAlias = (
    SearchRequest
    | SearchReply
    | FetchRequest
    | FetchReply
    | AttributesRequest
    | AttributesReply
    | UpsertRequest
    | DeleteRequest
    | WriteReply
    | ErrorReply
    | Hello
    | Proof
    | Welcome
)
# The messages in msgpack by their tag. A number is never used for another message.
MESSAGE_TYPES: dict[int, type[Message]] = {
    0: Hello,
    1: Proof,
    2: Welcome,
    3: ErrorReply,
    6: FetchRequest,
    7: FetchReply,
    8: AttributesRequest,
    9: AttributesReply,
    10: UpsertRequest,
    11: DeleteRequest,
    12: WriteReply,
}
_TAGS = {kind: tag for tag, kind in MESSAGE_TYPES.items()}
_READERS = {kind: readers_of(kind) for kind in _TAGS}
_COUNTS = {kind: counts_of(kind) for kind in _TAGS}
# msgpack's header of an array of so many items, then the tag
_ERROR_START = bytes([0x90 | (1 + len(_READERS[ErrorReply])), _TAGS[ErrorReply]])


def encode_frame(request_id: int, message: Message) -> bytes:
    """One whole frame, header included; 0 <= request_id < 2**64. Arrays are copied once.

    Raises:
        ProtocolError: larger than MAX_FRAME_BYTES.
    """
    kind = type(message)
    pack = search_layout.PACK.get(kind)
    if pack is None:
        values: list[Any] = [_TAGS[kind]]
        for name, _ in _READERS[kind]:
            value = getattr(message, name)
            values.append(packed_counts(value) if name in _COUNTS[kind] else value)
        payload: bytes = msgpack.packb(values, default=pack_value)
        if len(payload) > MAX_FRAME_BYTES:
            raise _too_large(len(payload))
        return HEADER.pack(len(payload), request_id) + payload
    size, parts = pack(message)
    if size > MAX_FRAME_BYTES:
        raise _too_large(size)
    return b"".join((HEADER.pack(size, request_id), *parts))


def _too_large(size: int) -> ProtocolError:
    return ProtocolError(
        "frame too large", expected=f"<= {MAX_FRAME_BYTES} bytes", got=f"{size} bytes"
    )


def decode_payload(payload: Payload) -> Message:
    """The message of a frame. Arrays of a search are views of the payload.

    Raises:
        ProtocolError: neither a layout nor msgpack, not a known message, or fields of the wrong
            kind.
    """
    read = search_layout.READ.get(payload[0]) if payload else None
    if read is not None:
        return read(payload)
    values = unpack(payload)
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


def is_error(payload: Payload) -> bool:
    """Whether a payload is an ErrorReply, without decoding it."""
    return payload[:2] == _ERROR_START


class FrameSplitter:
    """Cuts a byte stream into the payloads of its frames; ``limit`` bounds one payload in bytes.

    A large frame that came in one piece is a view of that piece. One that spans several is put
    together in a buffer of its own size, so that its bytes are copied once.
    """

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self.limit = limit
        self._head = b""  # the first bytes of a header that is not whole yet
        self._frame: bytearray | None = None  # the payload being put together
        self._filled = 0
        self._request_id = 0

    def feed(self, data: bytes) -> list[tuple[int, Payload]]:
        """(request id, payload) of the frames completed by ``data``, in order.

        Raises:
            ProtocolError: a frame announces more than the limit.
        """
        if self._frame is None and not self._head and len(data) >= HEADER.size:
            length, request_id = HEADER.unpack_from(data)
            if length == len(data) - HEADER.size and length <= self.limit:  # as a rule
                whole = data if length <= CHEAP_COPY_BYTES else memoryview(data)
                return [(request_id, whole[HEADER.size :])]
        return self._split(data)

    def _split(self, data: bytes) -> list[tuple[int, Payload]]:
        frames: list[tuple[int, Payload]] = []
        view = memoryview(self._head + data)
        self._head, start = b"", 0
        while True:
            if self._frame is not None:
                start += self._fill(view[start:])
                if self._filled < len(self._frame):
                    return frames
                frames.append((self._request_id, memoryview(self._frame)))
                self._frame = None
            if len(view) - start < HEADER.size:
                self._head = bytes(view[start:])
                return frames
            length, request_id = HEADER.unpack_from(view, start)
            if length > self.limit:
                raise ProtocolError(
                    "frame too large", expected=f"<= {self.limit} bytes", got=f"{length} bytes"
                )
            start += HEADER.size
            if len(view) - start >= length:
                frames.append((request_id, view[start : start + length]))
                start += length
            else:
                self._frame, self._filled, self._request_id = bytearray(length), 0, request_id

    def _fill(self, data: memoryview) -> int:
        """Takes what the frame under way lacks from the start of ``data``; how many bytes."""
        assert self._frame is not None
        taken = min(len(self._frame) - self._filled, len(data))
        self._frame[self._filled : self._filled + taken] = data[:taken]
        self._filled += taken
        return taken
