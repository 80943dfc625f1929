"""What a router and its text process say to each other: length-prefixed msgpack over pipes.

process -> router, once    Hello or Failure
router -> process          a list of texts
process -> router          Vectors in the same order, WrongText, or Failure
"""

import struct
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import msgpack
import numpy as np

from shardline.shards.core.schema import FloatArray

LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Hello:
    """The encoder has loaded: its id, name, and the width of its vectors."""

    encoder: str
    name: str
    width: int


@dataclass(frozen=True, slots=True)
class Failure:
    """It has not, and the process ends; or these texts have failed, and it goes on. Code and text
    of the error."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Vectors:
    """(rows, width) float32, as bytes."""

    rows: int
    data: bytes

    @property
    def array(self) -> FloatArray:
        return np.frombuffer(self.data, np.float32).reshape(self.rows, -1)


@dataclass(frozen=True, slots=True)
class WrongText:
    """What is wrong with the text at ``place``; none of the list is encoded."""

    place: int
    message: str
    expected: str
    got: str


Reply: TypeAlias = Hello | Failure | Vectors | WrongText
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Hello, Failure, Vectors, WrongText)}


def pack_reply(reply: Reply) -> bytes:
    return frame([type(reply).__name__, asdict(reply)])


def read_reply(payload: bytes) -> Reply:
    kind, values = msgpack.unpackb(payload)
    reply: Reply = KINDS[kind](**values)
    return reply


def frame(content: Any) -> bytes:
    payload: bytes = msgpack.packb(content)
    return LENGTH.pack(len(payload)) + payload
