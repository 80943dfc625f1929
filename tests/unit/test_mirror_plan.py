"""Records joined to batches and split for another generation, against a dict."""

import random
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from shardline.cluster.rollover import mirror_plan
from shardline.cluster.rollover.mirror_plan import joined, parts_of
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import UpsertRequest
from shardline.shards.core.partition import Partitioning
from shardline.shards.live.records import Delete, Record, Upsert
from tests.fake_shard import make_table

DIM, IDS = 3, 12


def a_record(seq: int, rng: random.Random) -> Record:
    ids = np.array(rng.sample(range(IDS), rng.randint(1, 5)), np.int64)
    change: Upsert | Delete = Delete(item_ids=ids)
    if rng.random() < 0.7:
        names = rng.sample(["a", "b"], rng.randint(0, 2))
        columns = {name: [f"{name}{seq}-{item}" for item in ids.tolist()] for name in names}
        features = [{"x": seq, "of": item} for item in ids.tolist()]
        change = Upsert(
            item_ids=ids,
            vectors=np.full((len(ids), DIM), seq, np.float32) + ids[:, None].astype(np.float32),
            attributes=msgpack.packb(columns) if columns else b"",
            features=msgpack.packb(features) if rng.random() < 0.5 else b"",
        )
    return Record(seq=seq, epoch=1, key="", change=change)


def last_of_each(records: list[Record]) -> dict[int, tuple | None]:
    """Of each item (vector, attributes that are not null, features), None where it is deleted."""
    found: dict[int, tuple | None] = {}
    for record in records:
        change = record.change
        for row, item in enumerate(change.item_ids.tolist()):
            found[item] = None
            if isinstance(change, Upsert):
                columns = msgpack.unpackb(change.attributes) if change.attributes else {}
                features = msgpack.unpackb(change.features) if change.features else None
                given = {name: values[row] for name, values in columns.items()}
                vector = tuple(change.vectors[row].tolist())
                found[item] = vector, given, features and features[row]
    return found


def sent(parts, homes) -> dict[int, tuple | None]:
    """As ``last_of_each``; every item comes once, in the part of its shard."""
    found: dict[int, tuple | None] = {}
    for part in parts:
        message = part.message
        ids = message.item_ids.tolist()
        assert set(homes(message.item_ids).tolist()) == {part.shard}
        assert not found.keys() & set(ids)
        if not isinstance(message, UpsertRequest):
            found |= dict.fromkeys(ids)
            continue
        columns = msgpack.unpackb(message.attributes) if message.attributes else {}
        features = msgpack.unpackb(message.features) if message.features else [None] * len(ids)
        for row, item in enumerate(ids):
            given = {name: of[row] for name, of in columns.items() if of[row] is not None}
            found[item] = tuple(message.vectors[row].tolist()), given, features[row]
    return found


def table_of(shards: int):
    return replace(
        make_table([], DIM),
        partitioning=Partitioning.RANGE,
        boundaries=tuple(range(IDS // shards, IDS, IDS // shards))[: shards - 1],
    )


@pytest.mark.parametrize("part_bytes", [1 << 20, 64])
@pytest.mark.parametrize("seed", range(20))
def test_the_last_of_every_item_is_sent_once_to_its_shard(
    monkeypatch: pytest.MonkeyPatch, seed: int, part_bytes: int
) -> None:
    monkeypatch.setattr(mirror_plan, "PART_BYTES", part_bytes)
    rng = random.Random(seed)
    records = [a_record(seq, rng) for seq in range(1, rng.randint(2, 12))]
    table = table_of(rng.choice((1, 2, 3)))
    parts = parts_of(joined(records), table, ("a", "b"), "key")
    assert sent(parts, table.partition.shard_of) == last_of_each(records)
    keys = [part.message.key for part in parts]
    assert len(set(keys)) == len(keys) and all(len(key) <= 128 for key in keys)
    again = parts_of(joined(records), table, ("a", "b"), "key")
    assert [part.message.key for part in again] == keys
    sizes = [
        max(len(part.message.attributes), len(part.message.features))
        for part in parts
        if isinstance(part.message, UpsertRequest) and part.items > 1
    ]
    assert all(size <= part_bytes for size in sizes)


def test_a_record_that_no_router_makes_is_refused() -> None:
    bad = Upsert(
        item_ids=np.array([1], np.int64),
        vectors=np.ones((1, DIM), np.float32),
        attributes=b"\xc1",
    )
    for change in (bad, replace(bad, attributes=b"", features=b"\x80")):
        with pytest.raises(InvalidInput):
            joined([Record(seq=1, epoch=1, key="", change=change)])
