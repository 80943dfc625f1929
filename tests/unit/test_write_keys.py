"""Keys of writes: a repeated request is found, another one under the same key is refused."""

from pathlib import Path

import msgpack
import numpy as np
import pytest

from shardline.shards.core.errors import CorruptFile, InvalidInput
from shardline.shards.live.records import Delete, Record, Upsert
from shardline.shards.live.write_keys import WINDOW, WriteKeys
from tests.live_writes import a_record

CHANGE = Upsert(
    item_ids=np.array([4, 7], dtype=np.int64),
    vectors=np.array([[1, 2], [3, 4]], dtype=np.float32),
    attributes=b"\x81\xa1a\x92\x01\x02",
)


def a_write(seq: int, key: str, change: Upsert | Delete = CHANGE) -> Record:
    return Record(seq=seq, epoch=3, key=key, change=change)


def test_a_repeated_request_finds_what_it_did() -> None:
    keys = WriteKeys()
    assert keys.find("a", CHANGE) is None
    keys.add(a_write(5, "a"), rows=2, existed=1)
    found = keys.find("a", CHANGE)
    assert found is not None
    assert (found.seq, found.rows, found.existed) == (5, 2, 1)
    assert keys.find("b", CHANGE) is None


def test_writes_without_a_key_are_not_kept() -> None:
    keys = WriteKeys()
    keys.add(a_write(1, ""), rows=2, existed=0)
    assert len(keys) == 0
    assert keys.find("", CHANGE) is None


@pytest.mark.parametrize(
    "other",
    [
        Delete(item_ids=CHANGE.item_ids),
        Upsert(item_ids=CHANGE.item_ids, vectors=CHANGE.vectors, attributes=b""),
        Upsert(item_ids=CHANGE.item_ids + 1, vectors=CHANGE.vectors, attributes=CHANGE.attributes),
        Upsert(item_ids=CHANGE.item_ids, vectors=-CHANGE.vectors, attributes=CHANGE.attributes),
    ],
)
def test_a_key_of_another_write_is_refused(other: Upsert | Delete) -> None:
    keys = WriteKeys()
    keys.add(a_write(5, "a"), rows=2, existed=1)
    with pytest.raises(InvalidInput, match="used for another write"):
        keys.find("a", other)


def test_the_window_forgets_the_oldest() -> None:
    keys = WriteKeys(window=3)
    for seq, key in enumerate("abcde", 1):
        keys.add(a_write(seq, key), rows=2, existed=0)
    assert [keys.find(key, CHANGE) is not None for key in "abcde"] == [False] * 2 + [True] * 3
    assert len(keys) == 3
    assert WINDOW == 65_536


def test_keys_are_read_as_they_were_saved() -> None:
    keys = WriteKeys()
    for seq in range(1, 50):
        keys.add(a_record(seq, key=f"schlüssel-{seq}"), rows=seq, existed=seq // 2)
    read = WriteKeys.unpack(keys.pack(), Path("keys.msgpack"))
    assert read.pack() == keys.pack()
    for seq in range(1, 50):
        record = a_record(seq, key=f"schlüssel-{seq}")
        assert read.find(record.key, record.change) == keys.find(record.key, record.change)
    shorter = WriteKeys.unpack(keys.pack(), Path("keys.msgpack"), window=10)
    assert len(shorter) == 10
    assert shorter.find("schlüssel-49", a_record(49, key="schlüssel-49").change) is not None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        msgpack.packb(7),
        msgpack.packb([7]),
        msgpack.packb([["a", 1, 2]]),
        msgpack.packb([["a", 1, 2, 3, "x"]]),
        msgpack.packb([[1, 1, 2, 3, 4]]),
        msgpack.packb([["a", 1, 2, 3, 4, 5]]),
        msgpack.packb([["a", 1, 2, 3, 4]])[:-1],
    ],
)
def test_what_is_no_list_of_keys_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptFile, match=r"keys\.msgpack: no list of write keys"):
        WriteKeys.unpack(content, Path("keys.msgpack"))
