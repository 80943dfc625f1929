"""Records of a shard's log: one write request each, numbered from 1 per shard."""

from dataclasses import dataclass

from shardline.shards.core.schema import FloatArray, IdArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Upsert:
    """item_ids (n,) int64, each once; vectors (n, dim) float32; attributes: as those of
    ``UpsertRequest``."""

    item_ids: IdArray
    vectors: FloatArray
    attributes: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """item_ids (n,) int64, each once, existing or not."""

    item_ids: IdArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One write of one shard: seq counts them, epoch is that of its writer, key the request's."""

    seq: int
    epoch: int
    key: str
    change: Upsert | Delete
