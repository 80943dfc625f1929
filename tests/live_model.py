"""Writes to a shard, and the slow, obvious state that they lead to: a dict."""

import numpy as np

from shardline.shards.core.schema import Metric, Ranked
from shardline.shards.live.records import Delete, Record, Upsert
from shardline.shards.live.state import Applied
from tests.reference import brute_force


def upsert(seq: int, ids, vectors, attributes: bytes = b"") -> Record:
    change = Upsert(
        item_ids=np.array(ids, np.int64),
        vectors=np.array(vectors, np.float32).reshape(len(ids), -1),
        attributes=attributes,
    )
    return Record(seq=seq, epoch=1, key="", change=change)


def delete(seq: int, ids) -> Record:
    return Record(seq=seq, epoch=1, key="", change=Delete(item_ids=np.array(ids, np.int64)))


class Model:
    """items: the vector of each item id."""

    def __init__(self, ids, vectors) -> None:
        self.items = dict(zip(map(int, ids), vectors, strict=True))

    def apply(self, record: Record) -> Applied:
        ids = record.change.item_ids.tolist()
        existed = sum(item in self.items for item in ids)
        for place, item in enumerate(ids):
            self.items.pop(item, None)
            if isinstance(record.change, Upsert):
                self.items[item] = record.change.vectors[place]
        return Applied(len(ids), existed)

    def answer(self, queries, k: int, metric: Metric) -> Ranked:
        ids = np.array(list(self.items), np.int64)
        vectors = np.array(list(self.items.values()), np.float32).reshape(
            len(ids), queries.shape[1]
        )
        return brute_force(queries, vectors, ids, k, metric)
