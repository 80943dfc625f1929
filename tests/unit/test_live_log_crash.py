"""The log of a shard after kills, power cuts and failures of the disk, at every file call."""

import copy
import errno
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from shardline.shards.core.errors import NotPrimary, ReadOnly, StoreFull
from shardline.shards.live.epoch_file import read_epoch
from shardline.shards.live.log import Log
from shardline.shards.live.log_segments import SegmentName
from shardline.shards.live.log_tail import LogTail
from tests.fake_disk import FailingCalls, FakeDisk, ProcessFiles, Stopped
from tests.live_writes import as_bytes, records, seqs

FOLDER = Path("live")
SEGMENT_BYTES = 400  # a few groups
RESTARTS = 4  # random states after a power cut, besides the killed and the strict one


class Life:
    """A primary that writes, has a successor, trims; what it has acknowledged, and last tried."""

    def __init__(self) -> None:
        self.acknowledged: list[bytes] = []
        self.attempted: list[bytes] = []
        self.trimmed = 0

    def lead(self, files: ProcessFiles, epoch: int) -> None:
        """Adopts what is there and writes groups of one to three records."""
        log = self.begin(files, epoch)
        for count in (1, 3, 1, 2):
            self.append(log, count)
        self.trim(log, log.seq - 2)
        self.append(log, 1)

    def begin(self, files: ProcessFiles, epoch: int) -> Log:
        log, found = Log.open(
            FOLDER, epoch, after_seq=self.trimmed, files=files, segment_bytes=SEGMENT_BYTES
        )
        self.adopt(as_bytes(found))
        return log

    def append(self, log: Log, count: int) -> None:
        group = records(log.seq + 1, log.seq + count, epoch=log.epoch)
        self.attempted = as_bytes(group)
        log.append(group)
        self.acknowledged += self.attempted
        self.attempted = []

    def trim(self, log: Log, seq: int) -> None:
        """As after a compaction: from here on recovery starts at ``seq``."""
        self.trimmed = seq
        log.trim(seq)

    def adopt(self, found: list[bytes]) -> None:
        """What a primary finds: all that was acknowledged, and the last attempt whole or not."""
        expected = self.acknowledged[self.trimmed :]
        assert found in (expected, [*expected, *self.attempted])
        self.acknowledged[self.trimmed :] = found
        self.attempted = []


def restarts(disk: FakeDisk, seed: int) -> list[FakeDisk]:
    """The disk as the next process may find it; a killed process leaves all that it has written."""
    strict = disk.power_cut(None)
    return [disk, strict, *(disk.power_cut(random.Random(seed + n)) for n in range(RESTARTS))]


def stop_at(call: int, write_part: int | None = None) -> Callable[[int, str], int | None]:
    """Killed at this call; with ``write_part`` after so many bytes if it is a write."""

    def before(number: int, name: str) -> int | None:
        if number > call or (number == call and (write_part is None or name != "write")):
            raise Stopped
        return write_part if number == call else None

    return before


def a_life(disk: FakeDisk, before: Callable[[int, str], int | None] | None) -> tuple[Life, int]:
    """Two primaries, the second after the first has ended; and how many calls they made."""
    life = Life()
    files = ProcessFiles(disk, before)
    try:
        life.lead(files, 1)
        life.lead(files, 2)
    except Stopped:
        pass
    return life, files.calls


CALLS = a_life(FakeDisk(), None)[1]


def test_a_life_has_many_calls() -> None:
    assert CALLS > 60


@pytest.mark.parametrize("part", [None, 1, 40])
def test_killed_or_without_power_at_every_call(part: int | None) -> None:
    for call in range(1, CALLS + 1):
        disk = FakeDisk()
        life, _ = a_life(disk, stop_at(call, part))
        for restarted in restarts(disk, seed=call * 100):
            after = copy.deepcopy(life)
            after.begin(ProcessFiles(restarted), 3)  # what it has found is durable from here on
            restarted = restarted.power_cut(None)
            after.append(after.begin(ProcessFiles(restarted), 4), 1)
            after.lead(ProcessFiles(restarted.power_cut(None)), 5)


def test_killed_or_without_power_twice() -> None:
    """During the recovery from a power cut too."""
    for call, (seed, stop) in itertools.product(
        range(1, CALLS + 1, 3), enumerate((2, 5, 9, 13, 17, 19, 20, 21, 23, 26))
    ):
        disk = FakeDisk()
        life, _ = a_life(disk, stop_at(call, 30))
        disk = disk.power_cut(random.Random(call * 100 + seed))
        with pytest.raises(Stopped):
            life.lead(ProcessFiles(disk, stop_at(stop, 50)), 3)
        disk = disk.power_cut(random.Random(call * 100 + seed + 50))
        life.lead(ProcessFiles(disk), 4)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("part", [None, 25])
def test_the_disk_fails_at_every_call_and_heals(number: int, part: int | None) -> None:
    kind = ReadOnly if number == errno.EIO else StoreFull
    refused = 0
    for call in range(1, CALLS):
        disk, life = FakeDisk(), Life()
        failing = FailingCalls(call, number, part)
        files = ProcessFiles(disk, failing)
        log = opened(life, files, failing, kind)
        follower, followed = LogTail(FOLDER, 0, ProcessFiles(disk)), []
        for count in (1, 3, 1, 2, 1, 2, 1, 1):
            try:
                life.append(log, count)
            except kind:
                refused += 1
                with pytest.raises(kind):
                    log.append(records(log.seq + 1, log.seq + 1, epoch=log.epoch))
                assert len(life.acknowledged) == log.seq
                with pytest.raises(kind):
                    log.reopen(log.seq)
                failing.heal()
                found = as_bytes(log.reopen(log.seq))
                assert found in ([], life.attempted)
                life.acknowledged += found
                life.attempted = []
                assert log.reopen(log.seq) == []
            followed += follower.read_new()
        assert as_bytes(followed) == life.acknowledged
        life.lead(ProcessFiles(disk.power_cut(random.Random(call))), 9)
    assert refused > 20


def opened(life: Life, files: ProcessFiles, failing: FailingCalls, kind: type[ReadOnly]) -> Log:
    """With the next epoch if the disk fails during the first."""
    try:
        return life.begin(files, 1)
    except kind:
        failing.heal()
    return life.begin(files, 2)


@pytest.mark.parametrize("part", [1, 7, 31, 32, 33])
def test_short_writes_without_an_error_change_nothing(part: int) -> None:
    disk = FakeDisk()
    life, calls = a_life(disk, lambda call, name: part)
    assert calls > CALLS
    assert len(life.acknowledged) == 16
    life.lead(ProcessFiles(disk), 3)


def test_a_disk_that_takes_no_bytes_has_failed() -> None:
    log, _ = Log.open(FOLDER, 1, after_seq=0, files=(files := ProcessFiles(FakeDisk())))
    files.before = lambda call, name: 0
    with pytest.raises(ReadOnly):
        log.append(records(1, 1))


def test_an_unreadable_epoch_is_no_permission() -> None:
    """Nothing is acknowledged while the file cannot be read, and all goes on afterwards."""
    disk = FakeDisk()
    files = ProcessFiles(disk)
    log, _ = Log.open(FOLDER, 1, after_seq=0, files=files)
    content = disk.file(FOLDER / "EPOCH").content
    kept, content[:] = bytes(content), b"damaged"
    with pytest.raises(ReadOnly, match="EPOCH: damaged"):
        log.append(records(1, 2))
    assert log.seq == 0
    with pytest.raises(ReadOnly):
        log.reopen(log.seq)
    content[:] = kept
    assert seqs(log.reopen(log.seq)) == [1, 2]
    log.append(records(3, 3))
    assert seqs(LogTail(FOLDER, 0, files).read_new()) == [1, 2, 3]


def test_whatever_fails_while_a_log_is_opened_no_file_stays_open() -> None:
    opening = ProcessFiles(FakeDisk())
    Log.open(FOLDER, 1, after_seq=0, files=opening)
    for call in range(1, opening.calls + 1):
        disk = FakeDisk()
        Log.open(FOLDER, 1, after_seq=0, files=ProcessFiles(disk))[0].close()
        assert disk.open_descriptors == set()
        try:
            log, _ = Log.open(
                FOLDER, 2, after_seq=0, files=ProcessFiles(disk, FailingCalls(call, errno.EIO))
            )
            log.close()
        except ReadOnly:
            pass
        assert disk.open_descriptors == set()


def test_unfinished_segments_of_earlier_primaries_are_removed() -> None:
    """Those alone: a later one may be about to give its own a name."""
    disk = FakeDisk()
    files = ProcessFiles(disk)
    files.make_folder(FOLDER)
    unfinished = {epoch: f".{SegmentName(epoch, 1, 1)}.tmp" for epoch in (1, 2, 3, 4)}
    for name in unfinished.values():
        files.close(files.create(FOLDER / name))
    Log.open(FOLDER, 3, after_seq=0, files=files)
    assert {name for name in files.names(FOLDER) if name.endswith(".tmp")} == {unfinished[4]}


def test_an_interrupted_append_is_not_continued() -> None:
    disk = FakeDisk()
    files = ProcessFiles(disk)
    log, _ = Log.open(FOLDER, 1, after_seq=0, files=files)

    log.append(records(1, 1))
    writes = iter([10])

    def interrupt(call: int, name: str) -> int | None:
        if (allowed := next(writes, None)) is None:
            raise KeyboardInterrupt
        return allowed

    files.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        log.append(records(2, 2))
    files.before = None
    with pytest.raises(ReadOnly):
        log.append(records(2, 2))
    assert log.reopen(log.seq) == []
    log.append(records(2, 2))
    log.close()
    with pytest.raises(NotPrimary, match="closed"):
        log.append(records(3, 3))
    assert seqs(Log.open(FOLDER, 2, after_seq=0, files=files)[1]) == [1, 2]
    assert read_epoch(FOLDER, files) == 2


def test_a_group_of_a_failed_append_that_is_durable_is_found_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An append of two groups whose second fails: the caller has applied neither."""
    monkeypatch.setattr("shardline.shards.live.log.GROUP_BYTES", 1)
    files = ProcessFiles(FakeDisk())
    log, _ = Log.open(FOLDER, 1, after_seq=0, files=files)
    log.append(records(1, 1))
    files.fail_at_sync = files.syncs + 2
    with pytest.raises(ReadOnly):
        log.append(records(2, 4))
    found = log.reopen(1)
    assert as_bytes(found) == as_bytes(records(2, log.seq))
    assert log.seq in (2, 3)
    log.append(records(log.seq + 1, log.seq + 2))


def test_a_torn_end_is_copied_when_the_next_segment_has_its_room() -> None:
    created: list[str] = []

    class Recording(ProcessFiles):
        def create(self, path: Path) -> int:
            created.append(path.name)
            return super().create(path)

    files = Recording(FakeDisk())
    log, _ = Log.open(FOLDER, 1, after_seq=0, files=files)
    log.append(records(1, 1))
    files.before = failing = FailingCalls(files.calls + 1, errno.ENOSPC, 10)
    with pytest.raises(StoreFull):
        log.append(records(2, 2))
    created.clear()
    failing.heal()
    files.fail_at_sync = files.syncs + 1
    with pytest.raises(ReadOnly):
        log.reopen(1)
    assert [name for name in created if name.endswith(".torn")] == []
    assert log.reopen(1) == []
    first, second = SegmentName(1, 1, 1), SegmentName(1, 2, 1)
    assert created == [f".{second}.tmp", f".{second}.tmp", f"{first}.torn"]
    assert len(files.read(FOLDER / created[-1])) == 10
