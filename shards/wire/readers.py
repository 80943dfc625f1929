"""From msgpack values to the fields of a message: one reader per type, chosen by the annotation.

A peer cannot hand over a shape that the receiver did not expect: every reader refuses what is not
of its type. An array travels as ``[dtype, shape, data]`` with raw little-endian bytes.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeAlias, get_type_hints

import msgpack
import numpy as np

from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.messages import MAX_RETURNED
from shardline.shards.core.schema import FloatArray, IdArray

Payload: TypeAlias = bytes | memoryview
Reader: TypeAlias = Callable[[str, Any], Any]
Counts: TypeAlias = tuple[int, ...]

# msgpack's own arrays: a message's fields, a shape's sizes, names of attributes and the original id
MAX_ARRAY_ITEMS = MAX_RETURNED + 1
MAX_SIZE = 64 << 20  # of one dimension of an array: no frame holds more bytes than that


def readers_of(kind: type) -> tuple[tuple[str, Reader], ...]:
    """The fields of a dataclass in their order, each with what reads it."""
    hints = get_type_hints(kind)
    return tuple((field.name, READER_OF[hints[field.name]]) for field in fields(kind))


def counts_of(kind: type) -> frozenset[str]:
    """The fields of a dataclass that are tuples of integers: ``packed_counts`` is their form."""
    return frozenset(name for name, hint in get_type_hints(kind).items() if hint == Counts)


def packed_counts(counts: Counts) -> IdArray:
    """An array, because there may be more of them than MAX_ARRAY_ITEMS."""
    return np.array(counts, dtype="<i8")


def unpack(payload: Payload, *, max_map_len: int = 0) -> Any:
    """msgpack without extension types, with lists as tuples.

    Raises:
        ProtocolError: not msgpack, or larger than any message of ours.
    """
    try:
        return msgpack.unpackb(
            payload,
            use_list=False,
            ext_hook=_refuse_ext,
            max_array_len=MAX_ARRAY_ITEMS,
            max_map_len=max_map_len,
        )
    except ProtocolError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError("bad frame", expected="msgpack", got=str(error)) from error


def pack_value(value: Any) -> Any:
    """msgpack's ``default``: the form in which an array travels."""
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        # a memoryview with a zero in its shape cannot be cast, and has no bytes anyway
        data = array.data.cast("B") if array.size else b""
        return array.dtype.str, array.shape, data
    raise TypeError(f"{type(value).__name__} does not travel on the wire")


def _array(dtype: str, ndim: int) -> Reader:
    kind = np.dtype(dtype)

    def read(name: str, value: Any) -> np.ndarray[Any, np.dtype[Any]]:
        if type(value) is not tuple or len(value) != 3:
            raise _wrong(name, "an array as [dtype, shape, data]", value)
        if value[0] != dtype:
            raise _wrong(name, f"dtype {dtype}", value[0])
        shape, data = value[1:]
        if type(shape) is not tuple or len(shape) != ndim:
            raise _wrong(name, f"a shape of {ndim} sizes", shape)
        wanted = kind.itemsize
        for size in shape:
            if type(size) is not int or not 0 <= size <= MAX_SIZE:
                raise _wrong(name, "a shape of sizes >= 0", shape)
            wanted *= size
        if type(data) is not bytes or wanted != len(data):
            raise _wrong(name, f"the bytes of shape {shape}", data)
        return np.ndarray(shape, kind, data)

    return read


def _of_type(kind: type, called: str) -> Reader:
    def read(name: str, value: Any) -> Any:
        if type(value) is not kind:  # bool is an int to isinstance
            raise _wrong(name, called, value)
        return value

    return read


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _wrong(name, "a finite number", value)
    return float(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if type(value) is not tuple or not {str}.issuperset(map(type, value)):
        raise _wrong(name, "texts", value)
    return value


def _counts(name: str, value: Any) -> Counts:
    return tuple(_ids(name, value).tolist())


def _optional(read: Reader) -> Reader:
    return lambda name, value: None if value is None else read(name, value)


def _wrong(name: str, expected: str, value: Any) -> ProtocolError:
    return ProtocolError("bad frame", field=name, expected=expected, got=repr(value)[:40])


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ProtocolError("bad frame", expected="no msgpack extension types", got=f"type {code}")


_text = _of_type(str, "text")
_ids = _array("<i8", 1)
READER_OF: dict[Any, Reader] = {
    bool: _of_type(bool, "true or false"),
    int: _of_type(int, "an integer"),
    float: _number,
    bytes: _of_type(bytes, "bytes"),
    str: _text,
    str | None: _optional(_text),
    tuple[str, ...]: _texts,
    Counts: _counts,
    IdArray: _ids,
    FloatArray: _array("<f4", 2),
}
