"""Writes to one shard: as its primary, as a follower, and from one to the other."""

import errno
import gc
import os
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import msgpack
import numpy as np
import pytest

from shardline.shards.core.errors import (
    DeltaFull,
    InvalidInput,
    NotFound,
    NotPrimary,
    ReadOnly,
    ShardlineError,
    StoreFull,
)
from shardline.shards.core.messages import MAX_WRITTEN_ROWS, NO_PARAMS, WriteReply
from shardline.shards.live.changeover import Changeover
from shardline.shards.live.compaction import compact
from shardline.shards.live.epoch_file import raise_epoch
from shardline.shards.live.kept_segments import KEPT_FOLDER, WithKept
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.loading import last_write, load_caught_up
from shardline.shards.live.log import Log
from shardline.shards.live.log_files import FILES, LogFiles
from shardline.shards.live.log_tail import LogTail
from shardline.shards.live.mains import compacted_seqs
from shardline.shards.live.records import Record
from shardline.shards.live.writes import HEAL_S, ShardWrites
from shardline.shards.server.shard import Shard
from shardline.shards.server.write_thread import WriteThread
from shardline.shards.storage.generation import read_generation
from tests.live_shard import (
    DIM,
    NEW_ITEMS,
    ROWS,
    built,
    contents,
    delete_request,
    opened,
    unit_vectors,
    upsert_request,
    wrote,
)
from tests.manual_clock import ManualClock


@pytest.fixture
def generation(tmp_path: Path) -> Path:
    return built(tmp_path)


def leading(generation: Path, epoch: int = 1, **limits: int) -> tuple[Shard, ShardWrites]:
    shard, writes = opened(generation, **limits)
    writes.lead(epoch)
    return shard, writes


def test_what_is_acknowledged_is_found_and_survives(generation: Path) -> None:
    shard, writes = leading(generation)
    replies = wrote(
        writes,
        upsert_request([3, NEW_ITEMS], title=["new 3", None], price=[1.5, 2]),
        delete_request([4, 5, NEW_ITEMS + 1]),
    )
    assert [(r.rows, r.existed, r.seq) for r in replies] == [(2, 1, 1), (3, 2, 2)]
    query = unit_vectors(2, seed=1)[1:]
    ids, _ = shard.state.search(query, 3, NO_PARAMS)
    assert ids[0, 0] == NEW_ITEMS
    found = shard.state.attributes_of(np.array([3, NEW_ITEMS]), ["title", "price"], np.inf, 1 << 20)
    assert found is not None
    titles, prices = msgpack.Unpacker(BytesIO(found[1]))
    assert (titles, prices) == (["new 3", None], [1.5, 2.0])
    before = contents(shard)
    assert not before.keys() & {4, 5}
    again, _ = opened(generation)
    assert contents(again) == before
    assert again.state.seq == 2


def test_a_group_shares_an_fsync_and_each_gets_its_own_answer(generation: Path) -> None:
    _, writes = leading(generation)
    bad = replace(upsert_request([7]), vectors=np.zeros((1, DIM + 1), np.float32))
    answers = writes.write(
        [
            upsert_request([1], key="a"),
            bad,
            upsert_request([1], key="a"),
            upsert_request([2], price=["dear"]),
            delete_request([1]),
        ]
    )
    assert [getattr(each, "seq", None) for each in answers] == [1, None, 1, None, 2]
    wrong = [each for each in answers if isinstance(each, ShardlineError)]
    assert [(type(each), each.field) for each in wrong] == [
        (InvalidInput, "vectors"),
        (InvalidInput, "attributes.price"),
    ]


@pytest.mark.parametrize("restart", [False, True])
def test_a_repeated_key_is_one_effect(generation: Path, restart: bool) -> None:
    _, writes = leading(generation)
    (first,) = wrote(writes, upsert_request([1, NEW_ITEMS], key="k"))
    wrote(writes, delete_request([1]))
    if restart:
        _, writes = leading(generation, epoch=2)
    (again,) = wrote(writes, upsert_request([1, NEW_ITEMS], key="k"))
    assert again == first
    assert writes.seq == 2
    (refused,) = writes.write([upsert_request([1], key="k")])
    assert isinstance(refused, InvalidInput)


@pytest.mark.parametrize(
    "request_",
    [
        upsert_request([]),
        delete_request([]),
        delete_request([-1]),
        delete_request([1, 1]),
        delete_request(range(MAX_WRITTEN_ROWS + 1)),
        upsert_request([1], key="ä" * 65),
        upsert_request([1], colour=["red"]),
        replace(upsert_request([1]), vectors=np.full((1, DIM), np.nan, np.float32)),
        replace(upsert_request([1]), attributes=b"\xc1"),
    ],
)
def test_bad_input_changes_nothing(generation: Path, request_) -> None:
    shard, writes = leading(generation)
    state = shard.state
    (answer,) = writes.write([request_])
    assert isinstance(answer, InvalidInput)
    assert shard.state is state
    assert opened(generation)[0].state.seq == 0


def test_a_full_delta_refuses_upserts_and_takes_deletes(generation: Path) -> None:
    _, writes = leading(generation, max_delta_rows=3)
    first, refused, deleted = writes.write(
        [upsert_request([1, 2], key="k"), upsert_request([3, 4]), delete_request([1])]
    )
    assert isinstance(first, WriteReply)
    assert isinstance(refused, DeltaFull)
    assert isinstance(deleted, WriteReply)
    assert wrote(writes, upsert_request([1, 2], key="k")) == [first], "it was taken before"


def test_a_follower_sees_what_the_primary_writes(generation: Path) -> None:
    primary, writes = leading(generation)
    replica, follower = opened(generation)
    (answer,) = follower.write([delete_request([1])])
    assert isinstance(answer, NotPrimary)
    for round_ in range(3):
        wrote(writes, upsert_request([round_, NEW_ITEMS + round_], seed=round_ + 2))
        follower.catch_up()
        assert contents(replica) == contents(primary)
        assert follower.seq == writes.seq


def test_the_primary_of_the_past_acknowledges_nothing(generation: Path) -> None:
    old_shard, old = leading(generation, epoch=3)
    wrote(old, upsert_request([NEW_ITEMS]))
    new_shard, new = opened(generation)
    assert new.lead(4) == 1
    (answer,) = old.write([delete_request([NEW_ITEMS])])
    assert isinstance(answer, NotPrimary)
    assert not old.leads
    wrote(new, upsert_request([NEW_ITEMS + 1]))
    old.catch_up()
    assert contents(old_shard) == contents(new_shard)
    with pytest.raises(NotPrimary):
        old.lead(3)
    assert old.lead(5) == 2


class FailingDisk:
    """Makes the log's fsync fail while ``error`` is set."""

    error: OSError | None = None

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.fdatasync

        def fdatasync(descriptor: int) -> None:
            if self.error is not None:
                raise self.error
            real(descriptor)

        monkeypatch.setattr(os, "fdatasync", fdatasync)


def test_a_full_disk_refuses_writes_until_there_is_room(generation, monkeypatch) -> None:
    disk, now_s = FailingDisk(monkeypatch), [100.0]
    shard, _ = opened(generation)
    writes = ShardWrites(shard, live_folder(generation, 0), clock=lambda: now_s[0])
    writes.lead(1)
    wrote(writes, upsert_request([NEW_ITEMS]))
    state, disk.error = shard.state, OSError(28, "No space left on device")
    for _ in range(2):
        (answer,) = writes.write([upsert_request([NEW_ITEMS + 1], key="k")])
        assert isinstance(answer, StoreFull)
    assert shard.state is state, "searches go on with what was acknowledged"
    assert "No space left" in str(writes.describe()["trouble"])
    disk.error = OSError(5, "Input/output error")
    now_s[0] += HEAL_S
    (answer,) = writes.write([delete_request([1])])
    assert isinstance(answer, ReadOnly)
    disk.error = None
    (answer,) = writes.write([delete_request([1])])
    assert isinstance(answer, ReadOnly), "not tried again so soon"
    now_s[0] += HEAL_S
    (answer,) = wrote(writes, upsert_request([NEW_ITEMS + 1], key="k"))
    assert writes.describe()["trouble"] is None
    assert contents(opened(generation)[0]) == contents(shard)


def test_a_defect_of_ours_leaves_no_gap(generation: Path, monkeypatch) -> None:
    shard, writes = leading(generation)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("shardline.shards.live.writes.apply", broken)
        with pytest.raises(ZeroDivisionError):
            writes.write([delete_request([1])])
    assert not writes.leads
    writes.catch_up()
    assert writes.seq == 1
    assert 1 not in contents(shard)


def test_a_full_disk_in_the_second_group_of_an_append(generation: Path, monkeypatch) -> None:
    """The first group is durable: it becomes part of the state, and writes go on behind it."""
    monkeypatch.setattr("shardline.shards.live.log.GROUP_BYTES", 1)
    files, now_s = SecondSyncFails(), [100.0]
    shard, writes = opened(generation, files=files, clock=lambda: now_s[0])
    writes.lead(1)
    files.left = 2
    requests = [upsert_request([NEW_ITEMS + n], key=f"k{n}") for n in range(3)]
    answers = writes.write(requests)
    assert all(isinstance(answer, StoreFull) for answer in answers)
    assert writes.seq == 0
    now_s[0] += HEAL_S
    replies = wrote(writes, *requests)
    assert [reply.seq for reply in replies] == [1, 2, 3]
    assert contents(opened(generation)[0]) == contents(shard)
    assert writes.adopt(load_caught_up(generation, read_generation(generation), 0))


class SecondSyncFails(LogFiles):
    """The ``left``-th fsync from now finds no room."""

    left = 0

    def sync(self, descriptor: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().sync(descriptor)


@pytest.mark.parametrize("is_before", [True, False])
def test_who_cannot_say_what_is_in_its_log_leads_no_more(
    generation: Path, monkeypatch, is_before: bool
) -> None:
    shard, writes = leading(generation)
    inner = Log.append

    def broken(log: Log, records: Sequence[Record]) -> None:
        if not is_before:
            inner(log, records)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", broken)
        with pytest.raises(ZeroDivisionError):
            writes.write([delete_request([1])])
    assert not writes.leads
    writes.catch_up()
    assert writes.lead(2) == (0 if is_before else 1)
    wrote(writes, delete_request([2]))
    assert contents(opened(generation)[0]) == contents(shard)


def test_a_refusal_keeps_no_request_alive(generation: Path, monkeypatch) -> None:
    disk = FailingDisk(monkeypatch)
    _, writes = leading(generation)
    disk.error = OSError(28, "No space left on device")
    request = upsert_request([NEW_ITEMS])
    alive = weakref.ref(request.vectors)
    answers = [*writes.write([request]), *writes.write([request])]
    assert all(isinstance(answer, StoreFull) for answer in answers)
    assert answers[0] is not answers[1]
    del request, answers
    disk.error = None  # whose trace the test itself would keep
    gc.collect()
    assert alive() is None


def test_a_trouble_of_the_write_thread_keeps_no_trace(generation: Path) -> None:
    _, writes = opened(generation)
    thread = WriteThread(writes, lambda answered: None)
    for kind in (NotFound, OSError):
        try:
            raise kind("gone")
        except kind as error:
            thread._complain(error)
        assert isinstance(writes.trouble, kind)
        assert str(writes.trouble) == "gone"
        assert writes.trouble.__traceback__ is None


def test_a_replica_that_starts_while_nobody_leads_has_the_writes(generation: Path) -> None:
    """The successor has raised the epoch, and died before its first segment."""
    _, writes = leading(generation)
    for number in range(3):
        wrote(writes, upsert_request([NEW_ITEMS + number]))
    raise_epoch(live_folder(generation, 0), 2)
    started, starting = opened(generation)
    assert starting.seq == 2, "the last group is not proven"
    assert NEW_ITEMS + 1 in contents(started)
    assert last_write(generation, read_generation(generation), 0) == 2
    assert starting.lead(3) == 3


def test_a_replica_starts_while_writes_go_on(generation: Path, monkeypatch) -> None:
    """It does not wait for a moment without writes."""
    _, writes = leading(generation)
    wrote(writes, upsert_request([NEW_ITEMS]))
    reads = []

    class Chased(LogTail):
        def read_proven(self) -> list[Record]:
            return self._chased(super().read_proven())

        def read_new(self) -> list[Record]:
            return self._chased(super().read_new())

        def _chased(self, found: list[Record]) -> list[Record]:
            reads.append(len(found))
            if len(reads) < 20:
                wrote(writes, upsert_request([NEW_ITEMS + len(reads)]))
            return found

    with monkeypatch.context() as patch:
        patch.setattr("shardline.shards.live.loading.LogTail", Chased)
        loaded = load_caught_up(generation, read_generation(generation), 0)
    assert (loaded.state.seq, reads) == (1, [1])
    _, follower = opened(generation)
    reads.clear()
    with monkeypatch.context() as patch:
        patch.setattr("shardline.shards.live.writes.LogTail", Chased)
        assert follower.adopt(loaded)
    assert (follower.seq, reads) == (2, [1])
    follower.catch_up()
    assert follower.seq == 3, "it goes on behind what it has read"


def test_a_compaction_ends_with_the_last_write_that_was_acknowledged(generation: Path) -> None:
    _, writes = leading(generation)
    wrote(writes, upsert_request([NEW_ITEMS]))
    wrote(writes, delete_request([1]))
    assert compact(generation, 0, until=1).seq == 1
    assert opened(generation)[0].state.seq == 2


def test_a_group_does_not_take_one_key_for_two_writes(generation: Path) -> None:
    _, writes = leading(generation)
    first, second = writes.write([delete_request([1], key="k"), delete_request([2], key="k")])
    assert isinstance(first, WriteReply)
    assert isinstance(second, InvalidInput)
    assert writes.seq == 1


def test_a_replica_that_fell_behind_a_trim_goes_on_with_the_newest_main(generation: Path) -> None:
    shard, writes = leading(generation)
    replica, follower = opened(generation)
    for round_ in range(2):
        wrote(writes, upsert_request(range(NEW_ITEMS, NEW_ITEMS + 12), seed=round_))
        change = changing(generation, writes, leads=True, main_seq=round_)
        changed_over(change, writes, leads=True)
    with pytest.raises(NotFound):
        follower.catch_up()
    changed_over(changing(generation, follower, leads=False), follower, leads=False)
    follower.catch_up()
    assert contents(replica) == contents(shard)


def test_what_compactions_make_unnecessary_is_kept_for_a_replay(generation: Path) -> None:
    shard, writes = leading(generation)
    for round_ in range(3):
        request = upsert_request(range(NEW_ITEMS, NEW_ITEMS + 12), seed=round_)
        wrote(writes, replace(request, features=b"\x90"))
        change = changing(generation, writes, leads=True, main_seq=round_)
        changed_over(change, writes, leads=True)
    wrote(writes, delete_request([1]))
    live = live_folder(generation, 0)
    found = LogTail(live, 0, WithKept(FILES)).read_new()
    assert [record.seq for record in found] == [1, 2, 3, 4]
    assert [getattr(record.change, "features", None) for record in found] == [b"\x90"] * 3 + [None]
    shutil.rmtree(live / KEPT_FOLDER)
    assert contents(opened(generation)[0]) == contents(shard), "no start of the shard reads it"
    assert last_write(generation, read_generation(generation), 0) == 4


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "ivfpq-fs", "sq8"])
def test_a_compaction_changes_no_answer(tmp_path: Path, kind: str) -> None:
    options = {"nlist": 2} if kind.startswith("ivf") else {}
    generation = built(tmp_path, kind=kind, **options)
    shard, writes = leading(generation)
    wrote(
        writes,
        upsert_request(range(5, 15), seed=4, title=[f"t{n}" for n in range(10)]),
        upsert_request(range(NEW_ITEMS, NEW_ITEMS + 20), seed=5, key="k"),
        delete_request([0, 7, 59, NEW_ITEMS + 3]),
    )
    done = compact(generation, 0)
    assert (done.seq, done.rows) == (3, ROWS + 20 - 4)
    compacted, again = opened(generation)
    assert compacted.state.main.rows == done.rows
    assert not compacted.state.delta.rows
    ids = np.array(sorted(contents(shard)))
    assert sorted(contents(compacted)) == ids.tolist()
    for name in ("title", "price"):
        before, after = (
            each.state.attributes_of(ids, [name], np.inf, 1 << 20) for each in (shard, compacted)
        )
        assert before is not None
        assert after is not None
        assert before[1] == after[1]
    if kind in ("flat", "ivf", "hnsw"):
        assert contents(compacted) == contents(shard)
        query = unit_vectors(6, seed=9)
        everything = replace(NO_PARAMS, nprobe=2) if kind == "ivf" else NO_PARAMS
        before, after = (each.state.search(query, 10, everything) for each in (shard, compacted))
        np.testing.assert_array_equal(before.ids, after.ids)
    again.lead(2)
    (reply,) = wrote(again, upsert_request(range(NEW_ITEMS, NEW_ITEMS + 20), seed=5, key="k"))
    assert reply.seq == 2, "keys outlive the compaction"


def changing(
    generation: Path, writes: ShardWrites, *, leads: bool, main_seq: int = 0
) -> Changeover:
    """With a compaction that runs at once, here."""

    class Done:
        def poll(self) -> int:
            return 0

    def start(folder: Path, shard: int, until: int) -> Done:
        compact(folder, shard, until=until)
        return Done()

    config = LiveConfig(compact_share=1e-9, compact_min_rows=10)
    change = Changeover(
        generation, 0, main_seq=main_seq, config=config, start=start, clock=ManualClock().time
    )
    assert change.turn(writes.state, leads=leads) is None
    return change


def changed_over(change: Changeover, writes: ShardWrites, *, leads: bool) -> None:
    loaded = change.turn(writes.state, leads=leads)
    while loaded is None:
        assert change.is_busy
        loaded = change.turn(writes.state, leads=leads)
    assert writes.adopt(loaded)
    change.main_seq = loaded.main_seq


def test_primary_and_follower_change_over_while_writes_go_on(generation: Path) -> None:
    shard, writes = leading(generation)
    replica, follower = opened(generation)
    wrote(writes, upsert_request(range(NEW_ITEMS, NEW_ITEMS + 12)))
    follower.catch_up()
    before = shard.state
    change = changing(generation, writes, leads=True)
    wrote(writes, delete_request([NEW_ITEMS, 3]), upsert_request([4], seed=8))
    expected = contents(shard)
    changed_over(change, writes, leads=True)
    assert shard.state.main is not before.main
    assert (shard.state.delta.rows, shard.state.seq) == (1, 3)
    assert contents(shard) == expected
    wrote(writes, upsert_request([NEW_ITEMS + 50], seed=9))
    other = changing(generation, follower, leads=False)
    changed_over(other, follower, leads=False)
    follower.catch_up()
    assert contents(replica) == contents(shard) == contents(opened(generation)[0])


@pytest.mark.parametrize(
    ("counts", "due"),
    [
        ({"written": 2900, "hidden": 99, "rows": 100}, False),  # fewer than compact_min_rows
        ({"written": 2900, "hidden": 100, "rows": 100}, True),
        ({"written": 3999, "hidden": 0, "rows": 200_000}, False),
        ({"written": 0, "hidden": 4000, "rows": 200_000}, True),
        ({"written": 32_767, "hidden": 0, "rows": 10**8}, False),
        ({"written": 32_768, "hidden": 0, "rows": 10**8}, True),  # or upserts were refused for good
        ({"written": 0, "hidden": 0, "rows": 10**6, "writes": 99_999}, False),
        ({"written": 0, "hidden": 0, "rows": 10**6, "writes": 100_000}, True),  # of absent items
    ],
)
def test_when_a_compaction_is_due(counts: dict[str, int], due: bool) -> None:
    assert LiveConfig().is_due(**{"writes": 0, **counts}) is due


def test_shards_that_are_written_alike_do_not_all_begin_at_once() -> None:
    config = LiveConfig(compact_share=0.1, compact_min_rows=1)
    begins = [
        next(
            count
            for count in range(10**5)
            if config.is_due(written=count, hidden=0, rows=10**4, writes=0, shard=shard)
        )
        for shard in range(8)
    ]
    assert max(begins) == begins[0] == 1000
    assert min(begins) >= 700
    assert np.diff(np.sort(begins)).min() >= 15


def test_upserts_are_never_refused_before_a_compaction_is_due() -> None:
    config = LiveConfig(compact_min_rows=10**6, max_delta_rows=1)
    assert config.is_due(written=1, hidden=0, rows=10**9, writes=1)


def test_no_second_compaction_begins_before_the_first_is_swapped_in(generation: Path) -> None:
    _, writes = leading(generation)
    started: list[int] = []

    class Ended:
        def poll(self) -> int:
            return 0

    def start(folder: Path, shard: int, until: int) -> Ended:
        started.append(until)
        compact(folder, shard, until=until)
        return Ended()

    config = LiveConfig(compact_share=1e-9, compact_min_rows=10)
    now = ManualClock().time
    change = Changeover(generation, 0, main_seq=0, config=config, start=start, clock=now)
    wrote(writes, upsert_request(range(NEW_ITEMS, NEW_ITEMS + 12)))
    assert change.turn(writes.state, leads=True) is None
    wrote(writes, upsert_request(range(NEW_ITEMS, NEW_ITEMS + 12), seed=3))
    changed_over(change, writes, leads=True)
    assert started == [1]
    change.turn(writes.state, leads=True)
    assert started == [1, 2], "what came since is due again"


def test_what_cannot_be_swapped_in_is_put_off(generation: Path) -> None:
    now_s = [0.0]
    _, writes = leading(generation)
    change = Changeover(generation, 0, main_seq=0, clock=lambda: now_s[0])
    wrote(writes, delete_request([1]))
    compact(generation, 0)
    change.put_off(OSError("no such luck"))
    assert "no such luck" in change.describe()["compaction_trouble"]
    change.turn(writes.state, leads=True)
    assert not change.is_busy
    now_s[0] += 61.0
    changed_over(change, writes, leads=True)
    told = {"main_seq": 1, "index_of": None, "compacting": False, "compaction_trouble": None}
    assert change.describe() == told


def test_what_a_compaction_holds_leaves_the_log(generation: Path) -> None:
    shard, writes = leading(generation)
    folder = live_folder(generation, 0)
    for round_ in range(3):
        wrote(writes, upsert_request(range(NEW_ITEMS, NEW_ITEMS + 12), seed=round_))
        change = changing(generation, writes, leads=True, main_seq=round_)
        changed_over(change, writes, leads=True)
    assert compacted_seqs(folder) == [2, 3], "the one before may still be read"
    size = sum(path.stat().st_size for path in folder.glob("log-*"))
    assert size < 12 * DIM * 4, "no vector is left in the log"
    assert contents(opened(generation)[0]) == contents(shard)


def test_a_shard_whose_items_are_all_deleted_goes_on(generation: Path) -> None:
    shard, writes = leading(generation)
    wrote(writes, delete_request(range(ROWS)))
    with pytest.raises(InvalidInput, match="every item"):
        compact(generation, 0)
    ids, _ = shard.state.search(unit_vectors(1), 3, NO_PARAMS)
    assert ids.tolist() == [[-1, -1, -1]]
    wrote(writes, upsert_request([NEW_ITEMS]))
    assert compact(generation, 0).rows == 1
    assert list(contents(opened(generation)[0])) == [NEW_ITEMS]
