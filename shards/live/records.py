"""Records of live writes, and the bytes that a shard's log keeps of them.

Bytes of a record, little-endian: a head of fixed size, then item ids, vectors, attributes and key
without anything between them; the head says how long each is. Where an upsert brings features, they
stand before the key, behind their own length. Checksums are the log's.
"""

import struct
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from shardline.shards.core.errors import CorruptFile
from shardline.shards.core.schema import FloatArray, IdArray

# kind, bytes of the key, rows, dim, bytes of the attributes, seq, epoch
_HEAD = struct.Struct("<HHIIIQQ")
# A number is never used for another kind. The third is an upsert by features.
_UPSERT, _DELETE, _FEATURED = 1, 2, 3
_SIZE = struct.Struct("<I")  # of a third kind's features, before them, behind the attributes
_ID, _FLOAT = np.dtype("<i8"), np.dtype("<f4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Upsert:
    """item_ids (n,) int64, each once; vectors (n, dim) float32; attributes and features as in
    UpsertRequest."""

    item_ids: IdArray
    vectors: FloatArray
    attributes: bytes
    features: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """item_ids (n,) int64, each once."""

    item_ids: IdArray


Change: TypeAlias = Upsert | Delete


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One write to one shard; applied whole or not at all.

    seq: 1 for the shard's first write, then without gaps. epoch: of the primary that took it.
    key: what makes a repeated request one effect; "" for none.
    """

    seq: int
    epoch: int
    key: str
    change: Change


def encode_record(record: Record) -> bytes:
    """The arrays are copied once."""
    change = record.change
    key = record.key.encode()
    ids = np.ascontiguousarray(change.item_ids, dtype=_ID)
    if isinstance(change, Delete):
        head = _HEAD.pack(_DELETE, len(key), len(ids), 0, 0, record.seq, record.epoch)
        return b"".join((head, ids.data, key))
    vectors = np.ascontiguousarray(change.vectors, dtype=_FLOAT)
    rows, dim = vectors.shape
    assert rows == len(ids)
    sizes = (len(key), rows, dim, len(change.attributes))
    features = change.features
    head = _HEAD.pack(_FEATURED if features else _UPSERT, *sizes, record.seq, record.epoch)
    # an empty array has no contiguous buffer of bytes
    arrays = (ids.data, vectors.data) if vectors.size else (ids.tobytes(),)
    featured = (_SIZE.pack(len(features)), features) if features else ()
    return b"".join((head, *arrays, change.attributes, *featured, key))


def decode_record(data: bytes | memoryview) -> Record:
    """The record; its arrays are copies, so that they do not keep ``data`` alive.

    Raises:
        CorruptFile: not what ``encode_record`` makes.
    """
    view = memoryview(data)
    if len(view) < _HEAD.size:
        raise _nonsense(f"{_HEAD.size} bytes or more", f"{len(view)}")
    kind, key_bytes, rows, dim, attribute_bytes, seq, epoch = _HEAD.unpack_from(view)
    vectors_at = _HEAD.size + rows * _ID.itemsize
    attributes_at = vectors_at + rows * dim * _FLOAT.itemsize
    features_at = key_at = attributes_at + attribute_bytes
    if kind == _FEATURED:
        if len(view) < features_at + _SIZE.size:
            raise _nonsense(f"{features_at + _SIZE.size} bytes or more", f"{len(view)}")
        features_at += _SIZE.size
        key_at = features_at + _SIZE.unpack_from(view, features_at - _SIZE.size)[0]
    if len(view) != key_at + key_bytes:
        raise _nonsense(f"{key_at + key_bytes} bytes", f"{len(view)}")
    item_ids = np.frombuffer(view, _ID, rows, _HEAD.size).astype(np.int64)
    change: Change
    if kind in (_UPSERT, _FEATURED):
        values = np.frombuffer(view, _FLOAT, rows * dim, vectors_at).astype(np.float32)
        change = Upsert(
            item_ids=item_ids,
            vectors=values.reshape(rows, dim),
            attributes=bytes(view[attributes_at : attributes_at + attribute_bytes]),
            features=bytes(view[features_at:key_at]),
        )
    elif kind == _DELETE and not dim and not attribute_bytes:
        change = Delete(item_ids=item_ids)
    else:
        raise _nonsense("an upsert or a delete", f"kind {kind}")
    try:
        return Record(seq=seq, epoch=epoch, key=str(view[key_at:], "utf-8"), change=change)
    except UnicodeDecodeError as error:
        raise _nonsense("a key in UTF-8", str(error)) from error


def _nonsense(expected: str, got: str) -> CorruptFile:
    return CorruptFile("not a record of a write", expected=expected, got=got)
