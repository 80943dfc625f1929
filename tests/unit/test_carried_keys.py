"""A write that is repeated after another generation went live, and was applied before, is one
effect."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from shardline.cluster.rollover.replayed_note import key_prefix
from shardline.cluster.serving.going_live import make_live
from shardline.cluster.store import Store
from shardline.router.written import Part, by_shard
from shardline.shards.core.files import MANIFEST_NAME
from shardline.shards.core.messages import DeleteRequest, UpsertRequest, WriteReply
from shardline.shards.live import carried_keys
from shardline.shards.live.went_live import NAME, WentLive, read_went_live, write_went_live
from tests.two_generations import Written, build, unit_vectors

OLD, NEW = 1, 2


def upsert(item: int, seed: int, key: str) -> UpsertRequest:
    return UpsertRequest(
        item_ids=np.array([item]),
        vectors=unit_vectors([item], seed),
        attributes=b"",
        key=key,
        timeout_ms=1e3,
    )


def delete(item: int, key: str) -> DeleteRequest:
    return DeleteRequest(item_ids=np.array([item]), key=key, timeout_ms=1e3)


def deliver(written: Written, message: UpsertRequest | DeleteRequest) -> WriteReply:
    ((shard, _),) = by_shard(message.item_ids, np.arange(1), written.table, 10)
    return written.deliver(Part(shard=shard, message=message))


@pytest.fixture
def old(tmp_path: Path) -> Written:
    """Of two shards."""
    return Written(build(tmp_path, OLD, 2))


@pytest.fixture
def new(tmp_path: Path) -> Written:
    """Of three shards."""
    return Written(build(tmp_path, NEW, 3))


def go_live(store: Path, generation: int = NEW, keys_of: int | None = OLD) -> None:
    folder = None if keys_of is None else f"{keys_of:06d}"
    write_went_live(store / "live" / f"{generation:06d}", WentLive(has=(1, 1, 1), keys_of=folder))


def test_what_comes_again_is_answered_as_the_first_time_and_changes_nothing(
    tmp_path: Path, old: Written, new: Written
) -> None:
    requests = [upsert(100, 1, "a"), upsert(7, 2, "b"), delete(8, "c"), delete(999, "d")]
    first = [deliver(old, each) for each in requests]
    for each in requests:  # as a mirror brings them
        deliver(new, each.__class__(**{**fields(each), "key": key_prefix("r") + each.key}))
    old.seal(5)
    deliver(new, upsert(8, 3, ""))  # newer than the delete
    deliver(new, upsert(7, 4, ""))
    before, seqs = new.contents(), new.seqs
    go_live(tmp_path)
    for request, reply in zip(requests, first, strict=True):
        again = deliver(new, request)
        assert (again.rows, again.existed) == (reply.rows, reply.existed)
        assert again.generation == NEW
        assert again.seq in seqs
    assert (new.contents(), new.seqs) == (before, seqs)
    deliver(new, delete(8, "e"))
    assert 8 not in new.contents(), "another key is another write"
    restarted = Written(new.folder, epoch=2)
    assert deliver(restarted, requests[2]).existed == 1
    assert restarted.seqs == new.seqs


def fields(request: UpsertRequest | DeleteRequest) -> dict[str, object]:
    return {name: getattr(request, name) for name in request.__dataclass_fields__}


def test_keys_count_once_the_note_says_so_and_no_longer_than_that(
    tmp_path: Path, old: Written, new: Written
) -> None:
    deliver(old, delete(8, "a"))
    old.seal(5)
    assert deliver(new, delete(8, "a")).seq == 1, "it is not live yet"
    deliver(new, upsert(8, 1, ""))
    go_live(tmp_path)
    third = Written(build(tmp_path, 3, 1))
    go_live(tmp_path, 3, NEW)
    deliver(third, delete(8, "a"))
    assert 8 not in third.contents(), "generation 2 had left no keys"
    new.seal(6)
    go_live(tmp_path, 3, None)
    deliver(third, upsert(9, 1, "z"))
    go_live(tmp_path, 3, NEW)
    deliver(third, upsert(8, 1, ""))
    fresh = Written(third.folder, epoch=2)
    seqs = fresh.seqs
    assert deliver(fresh, delete(8, "a")).existed == 1
    assert fresh.seqs == seqs


def test_what_a_mirror_has_brought_is_no_callers_write(
    tmp_path: Path, old: Written, new: Written
) -> None:
    mirrored = key_prefix("r") + "1"
    deliver(old, delete(8, mirrored))
    old.seal(5)
    go_live(tmp_path)
    assert deliver(new, delete(8, mirrored)).seq == 1


def test_the_newest_seal_counts_and_the_newest_keys_of_each_shard(
    tmp_path: Path, old: Written, new: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carried_keys, "WINDOW", 6)
    first = [item for item in range(60) if old.table.partition.shard_of(np.array([item]))[0] == 0]
    for item in first[:3]:
        deliver(old, delete(item, f"k{item}"))
    old.seal(5)
    for writes in old.writes:
        writes.lead(6)
    for item in first[3:5]:
        deliver(old, delete(item, f"k{item}"))
    old.seal(7)
    live = tmp_path / "live" / f"{OLD:06d}" / "shard-00000"
    assert [path.name for path in live.glob("sealed-keys-*")] == [f"sealed-keys-{7:020d}.msgpack"]
    go_live(tmp_path)
    replies = [deliver(new, delete(item, f"k{item}")) for item in first[:5]]
    assert [reply.existed for reply in replies] == [1] * 5
    gone = [item for item in first[:5] if item not in new.contents()]
    assert gone == first[:2], "of each of two shards three keys are known"


def test_keys_that_cannot_be_read_are_told_of_and_writes_go_on(
    tmp_path: Path, old: Written, new: Written, caplog: pytest.LogCaptureFixture
) -> None:
    deliver(old, delete(8, "a"))
    deliver(old, delete(50, "b"))
    old.seal(5)
    (path,) = (tmp_path / "live" / f"{OLD:06d}" / "shard-00000").glob("sealed-keys-*")
    whole = path.read_bytes()
    path.write_bytes(b"\xc1")
    go_live(tmp_path)
    assert deliver(new, upsert(100, 1, "c")).existed == 0
    assert deliver(new, upsert(101, 1, "d")).existed == 0
    assert caplog.text.count("keys of the generation before are not known") == 1
    assert path.name in caplog.text
    path.write_bytes(whole)
    seqs = new.seqs
    assert deliver(new, delete(8, "a")).existed == 1
    assert new.seqs == seqs
    note = tmp_path / "live" / f"{NEW:06d}" / NAME
    note.write_text('{"format": 1, "has": [], "keys_of": "../000001"}')
    fresh = Written(new.folder, epoch=2)
    deliver(fresh, delete(8, "a"))
    assert 8 not in fresh.contents()
    assert "instead of a generation's folder" in caplog.text


def test_where_gc_has_removed_the_generation_before_there_are_no_keys_and_no_complaint(
    tmp_path: Path, old: Written, new: Written, caplog: pytest.LogCaptureFixture
) -> None:
    deliver(old, delete(8, "a"))
    old.seal(5)
    go_live(tmp_path)
    shutil.rmtree(tmp_path / "live" / f"{OLD:06d}")
    read = []
    with pytest.MonkeyPatch.context() as patch:
        parse = carried_keys.parse_went_live
        patch.setattr(carried_keys, "parse_went_live", lambda *a: read.append(1) or parse(*a))
        assert deliver(new, delete(8, "a")).existed == 1
        assert deliver(new, delete(8, "b")).existed == 0
    assert len(read) == 1, "not for every write"
    assert "not known" not in caplog.text


@pytest.mark.parametrize("live", [1, 2])
def test_what_a_switch_noted_is_void_where_a_generation_goes_live_without_one(
    tmp_path: Path, live: int
) -> None:
    store = Store(tmp_path)
    for number in (1, 2):
        store.generation(number).mkdir(parents=True)
        (store.generation(number) / MANIFEST_NAME).write_text("{}")
    noted = WentLive(has=(3,), keys_of="000001")
    write_went_live(store.writes(2), noted)
    store.set_current(live)
    make_live(store, 2)
    assert store.current() == 2
    assert read_went_live(store.writes(2)) == (noted if live == 2 else WentLive())
