"""Writes for tests of the log: small records that differ, and how to compare them."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from shardline.shards.live.records import Delete, Record, Upsert, encode_record


@cache
def a_record(seq: int, *, epoch: int = 1, rows: int = 2, dim: int = 3, key: str = "") -> Record:
    """Another content for every seq, epoch and key; every third is a delete."""
    rng = np.random.default_rng((seq, epoch, len(key)))
    ids = rng.choice(1 << 40, rows, replace=False).astype(np.int64)
    if seq % 3 == 0:
        return Record(seq=seq, epoch=epoch, key=key, change=Delete(item_ids=ids))
    vectors = rng.random((rows, dim), dtype=np.float32)
    attributes = b"" if seq % 2 else rng.bytes(5)
    change = Upsert(item_ids=ids, vectors=vectors, attributes=attributes)
    return Record(seq=seq, epoch=epoch, key=key, change=change)


def records(first: int, last: int, *, epoch: int = 1) -> list[Record]:
    return [a_record(seq, epoch=epoch) for seq in range(first, last + 1)]


def as_bytes(found: Sequence[Record]) -> list[bytes]:
    return [encode_record(record) for record in found]


def seqs(found: Sequence[Record]) -> list[int]:
    return [record.seq for record in found]
