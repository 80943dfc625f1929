"""A writer that is stopped before any of its file calls while successors take over, and followers.

Whatever the order of calls: what a writer has acknowledged is in its place in the final log, and
what a follower was given is the beginning of that log.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardline.shards.core.errors import NotFound, NotPrimary, ReadOnly
from shardline.shards.live.epoch_file import raise_epoch, read_epoch
from shardline.shards.live.log import Log
from shardline.shards.live.log_tail import LogTail
from tests.fake_disk import FakeDisk, ProcessFiles
from tests.interleaving import Paused, paused
from tests.live_writes import as_bytes, records

FOLDER = Path("live")
SEGMENT_BYTES = 400  # a few groups


class Writer:
    """One primary; acknowledged: its records by seq, as bytes. found: what it read at its start."""

    def __init__(self, epoch: int, counts: Sequence[int]) -> None:
        self.epoch = epoch
        self.counts = counts
        self.found: list[bytes] = []
        self.acknowledged: dict[int, bytes] = {}

    def start(self, files: ProcessFiles) -> Log:
        log, found = Log.open(
            FOLDER, self.epoch, after_seq=0, files=files, segment_bytes=SEGMENT_BYTES
        )
        self.found = as_bytes(found)
        self.acknowledged = dict(enumerate(self.found, 1))
        return log

    def go_on(self, log: Log) -> None:
        for count in self.counts:
            group = records(log.seq + 1, log.seq + count, epoch=self.epoch)
            log.append(group)
            self.acknowledged |= {record.seq: as_bytes([record])[0] for record in group}

    def __call__(self, files: ProcessFiles) -> None:
        self.go_on(self.start(files))


class Follower:
    """Polls so many times; ``given``: all that it was given, after ``start``."""

    def __init__(self, polls: int, start: int = 0) -> None:
        self.polls = polls
        self.start = start
        self.given: list[bytes] = []

    def __call__(self, files: ProcessFiles) -> None:
        tail = LogTail(FOLDER, self.start, files)
        for _ in range(self.polls):
            self.given += as_bytes(tail.read_new())


def final_log(disk: FakeDisk, epoch: int) -> list[bytes]:
    _, found = Log.open(FOLDER, epoch, after_seq=0, files=ProcessFiles(disk))
    return as_bytes(found)


def check(disk: FakeDisk, writers: Sequence[Writer], followers: Sequence[Follower]) -> None:
    """After all have ended: the final log, read by one more primary, holds what was promised."""
    log = final_log(disk, 1000)
    for writer in writers:
        for seq, record in writer.acknowledged.items():
            assert log[seq - 1] == record
    for follower in followers:
        assert follower.given == log[: len(follower.given)]
    last = Follower(1)
    last(ProcessFiles(disk))
    assert last.given == log


def began(
    counts: Sequence[int], *, is_network: bool = False, kind: type[Writer] = Writer
) -> tuple[FakeDisk, Writer, Callable[[ProcessFiles], None]]:
    """A writer that leads already; what it does from here on is to be paused."""
    disk, writer = FakeDisk(is_network=is_network), kind(1, counts)
    files = ProcessFiles(disk)
    log = writer.start(files)

    def work(pausing: ProcessFiles) -> None:
        log._files = pausing
        writer.go_on(log)

    return disk, writer, work


def calls_of(work: Callable[[ProcessFiles], None], disk: FakeDisk) -> int:
    files = ProcessFiles(disk)
    work(files)
    return files.calls


@pytest.mark.parametrize("is_network", [False, True])
def test_paused_before_every_call_while_a_successor_takes_over(is_network: bool) -> None:
    """For every pair of calls: the writer stops, the successor comes so far, the writer goes on."""
    disk, _, work = began((1, 2, 1, 1))
    writer_calls = calls_of(work, disk)
    successor_calls = calls_of(Writer(2, (1, 2)), disk)
    assert writer_calls > 15 and successor_calls > 20
    fenced = 0
    for paused_at in range(writer_calls + 1):
        for interrupted_at in range(successor_calls + 1):
            disk, old, work = began((1, 2, 1, 1), is_network=is_network)
            new = Writer(2, (1, 2))
            with paused(disk, work, new) as (first, second):
                first.advance(paused_at)
                second.advance(interrupted_at)
                first.finish()
                second.finish()
            assert second.error is None
            assert first.error is None or isinstance(first.error, NotPrimary)
            fenced += first.error is not None
            check(disk, [old, new], [])
    assert fenced > 100


class Healing(Writer):
    """Its second append fails at the fsync; what ``reopen`` finds counts as acknowledged."""

    def go_on(self, log: Log) -> None:
        super().go_on(log)
        files = log._files
        assert isinstance(files, ProcessFiles)
        files.fail_at_sync = files.syncs + 1
        group = records(log.seq + 1, log.seq + 2, epoch=self.epoch)
        with pytest.raises(ReadOnly):
            log.append(group)
        self.acknowledged |= {record.seq: as_bytes([record])[0] for record in log.reopen(log.seq)}
        super().go_on(log)


@pytest.mark.parametrize("is_network", [False, True])
def test_paused_before_every_call_of_a_reopen_while_a_successor_takes_over(
    is_network: bool,
) -> None:
    def began_healing() -> tuple[FakeDisk, Writer, Callable[[ProcessFiles], None]]:
        return began((1,), is_network=is_network, kind=Healing)

    disk, _, work = began_healing()
    writer_calls = calls_of(work, disk)
    successor_calls = calls_of(Writer(2, (1,)), disk)
    adopted = 0
    for paused_at in range(4, writer_calls + 1):
        for interrupted_at in range(successor_calls + 1):
            disk, old, work = began_healing()
            new = Writer(2, (1,))
            with paused(disk, work, new) as (first, second):
                first.advance(paused_at)
                second.advance(interrupted_at)
                first.finish()
                second.finish()
            assert second.error is None
            assert first.error is None or isinstance(first.error, NotPrimary)
            adopted += len(old.acknowledged) >= 3
            check(disk, [old, new], [])
    assert adopted > 50


@pytest.mark.parametrize("is_network", [False, True])
def test_followers_poll_after_every_call_of_a_takeover(is_network: bool) -> None:
    disk, _, work = began((1, 2, 1))
    writer_calls = calls_of(work, disk)
    for paused_at in range(writer_calls + 1):
        disk, old, work = began((1, 2, 1), is_network=is_network)
        new = Writer(2, (1, 1))
        given: list[bytes] = []
        tail = LogTail(FOLDER, 0, ProcessFiles(disk))
        with paused(disk, work, new) as (first, second):
            first.advance(paused_at)
            turns: list[Paused] = [second, first]
            while not (first.is_done and second.is_done):
                for process in turns:
                    process.advance(1)
                    given += as_bytes(tail.read_new())
        follower = Follower(0)
        follower.given = given
        check(disk, [old, new], [follower])
        assert given == final_log(disk, 1001)


def test_a_follower_paused_before_every_call_while_the_primary_changes() -> None:
    """A successor has read the log, the old primary writes then, and the follower reads that."""
    successor_calls = calls_of(Writer(2, (2,)), began((1,))[0])
    for written in range(6):
        for read in range(8):
            for taken_over in range(successor_calls + 1):
                disk, old, work = began((1, 2))
                new, follower = Writer(2, (2,)), Follower(2)
                with paused(disk, work, new, follower) as (first, second, third):
                    first.advance(written)
                    third.advance(read)
                    second.advance(taken_over)
                    first.finish()
                    third.finish()
                    second.finish()
                assert third.error is None
                check(disk, [old, new], [follower])


def trimming(log: Log, seq: int) -> Callable[[ProcessFiles], None]:
    def work(pausing: ProcessFiles) -> None:
        log._files = pausing
        log.trim(seq)

    return work


@pytest.mark.parametrize("start", [0, 3, 6])
def test_a_follower_paused_before_every_call_of_a_trim(start: int) -> None:
    """It goes on if it has read what is trimmed; otherwise it is told, or reads it in time."""
    for read in range(12):
        for trimmed in range(12):
            disk = FakeDisk()
            files = ProcessFiles(disk)
            log, _ = Log.open(FOLDER, 1, after_seq=0, files=files, segment_bytes=1)
            for seq in range(1, 9):
                log.append(records(seq, seq))
            follower = Follower(2, start)
            with paused(disk, trimming(log, 6), follower) as (first, second):
                second.advance(read)
                first.advance(trimmed)
                second.finish()
                first.finish()
            assert first.error is None
            if isinstance(second.error, NotFound):
                assert start < 6 and follower.given == []
            else:
                assert second.error is None
                assert follower.given == as_bytes(records(start + 1, 8))


@pytest.mark.parametrize("epochs", [(2, 3), (3, 2)])
def test_two_successors_at_pairs_of_calls(epochs: tuple[int, int]) -> None:
    """Whichever is the higher: never do both acknowledge, and one of them can."""
    disk, old, work = began((1, 2))
    work(ProcessFiles(disk))
    calls = calls_of(Writer(epochs[0], (1, 1)), disk) + 3
    acknowledged = 0
    for paused_at in range(calls):
        for interrupted_at in range(paused_at % 2, calls, 2):
            disk, old, work = began((1, 2))
            work(ProcessFiles(disk))
            writers = [Writer(epoch, (1, 1)) for epoch in epochs]
            with paused(disk, *writers) as (first, second):
                first.advance(paused_at)
                second.advance(interrupted_at)
                first.finish()
                second.finish()
            for process in (first, second):
                assert process.error is None or isinstance(process.error, NotPrimary | ReadOnly)
            acknowledged += any(len(writer.acknowledged) > 3 for writer in writers)
            check(disk, [old, *writers], [])
    assert acknowledged > calls * calls / 4


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=25),
    st.lists(st.integers(2, 9), min_size=3, max_size=3, unique=True),
    st.booleans(),
)
def test_any_order_of_calls(
    schedule: list[tuple[int, int]], epochs: list[int], is_network: bool
) -> None:
    disk, old, work = began((1, 3, 1, 2, 1), is_network=is_network)
    writers = [Writer(epoch, (2, 1, 1)) for epoch in epochs]
    followers = [Follower(12), Follower(12)]
    with paused(disk, work, *writers, *followers) as processes:
        for index, calls in schedule:
            processes[index].advance(calls)
        for process in processes:
            process.finish()
    for process in processes[:4]:
        assert process.error is None or isinstance(process.error, NotPrimary | ReadOnly)
    for process in processes[4:]:
        assert process.error is None
    check(disk, [old, *writers], followers)


@pytest.mark.parametrize("epochs", [(2, 3), (3, 2)])
def test_the_epoch_never_returns_to_one_that_was_passed(epochs: tuple[int, int]) -> None:
    """Raised by two at once, at every pair of calls: see the argument in ``epoch_file``."""

    def raises(epoch: int) -> Callable[[ProcessFiles], int]:
        def work(files: ProcessFiles) -> int:
            raise_epoch(FOLDER, epoch, files)
            return epoch

        return work

    for paused_at in range(20):
        for interrupted_at in range(20):
            disk = FakeDisk()
            files = ProcessFiles(disk)
            files.make_folder(FOLDER)
            raise_epoch(FOLDER, 1, files)
            with paused(disk, *map(raises, epochs)) as (first, second):
                first.advance(paused_at)
                second.advance(interrupted_at)
                seen = [read_epoch(FOLDER, files)]
                while first.advance(1):
                    seen.append(read_epoch(FOLDER, files))
                while second.advance(1):
                    seen.append(read_epoch(FOLDER, files))
            won = [process.result for process in (first, second) if process.error is None]
            for winner in won:
                passed = seen[seen.index(winner) :] if winner in seen else []
                assert [epoch for epoch in passed if epoch < winner and epoch in won] == []
            assert max(epochs) in won
