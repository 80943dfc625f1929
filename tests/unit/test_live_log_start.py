"""What a replica that starts reads of the log: all that was acknowledged, or all but one group."""

import errno
from pathlib import Path

import pytest

from shardline.shards.core.errors import NotFound
from shardline.shards.live.epoch_file import raise_epoch, read_epoch
from shardline.shards.live.log import Log
from shardline.shards.live.log_segments import segment_names
from shardline.shards.live.log_tail import TRIES, LogTail
from tests.fake_disk import FakeDisk, ProcessFiles
from tests.interleaving import Paused, paused
from tests.live_writes import as_bytes, records, seqs
from tests.unit.test_live_log_fencing import Writer, began, final_log

FOLDER = Path("live")


def a_log(segment_bytes: int = 1 << 20) -> tuple[ProcessFiles, Log]:
    """Six writes in groups of two."""
    files = ProcessFiles(FakeDisk())
    log, _ = Log.open(FOLDER, 1, after_seq=0, files=files, segment_bytes=segment_bytes)
    for first in (1, 3, 5):
        log.append(records(first, first + 1))
    return files, log


def test_nothing_is_there_yet() -> None:
    files = ProcessFiles(FakeDisk())
    tail = LogTail(FOLDER, 0, files)
    assert tail.read_proven() == []
    files.make_folder(FOLDER)
    raise_epoch(FOLDER, 1, files)
    assert tail.read_proven() == []
    Log.open(FOLDER, 2, after_seq=0, files=files)[0].append(records(1, 2, epoch=2))
    assert seqs(tail.read_new()) == [1, 2]


@pytest.mark.parametrize("segment_bytes", [1, 1 << 20])
def test_a_successor_that_has_begun_nothing_hides_the_last_group_alone(segment_bytes: int) -> None:
    files, _ = a_log(segment_bytes)
    raise_epoch(FOLDER, 2, files)
    tail, behind, ahead = (LogTail(FOLDER, seq, files) for seq in (0, 3, 6))
    assert as_bytes(tail.read_proven()) == as_bytes(records(1, 4))
    assert seqs(behind.read_proven()) == [4]
    assert seqs(ahead.read_proven()) == []
    for each in (tail, behind, ahead):
        assert each.read_proven() == each.read_new() == []
    log, _ = Log.open(FOLDER, 3, after_seq=0, files=files)
    log.append(records(7, 7, epoch=3))
    assert seqs(tail.read_new()) == seqs(behind.read_proven()) == [5, 6, 7]
    assert seqs(ahead.read_new()) == [7]


def test_a_segment_without_groups_proves_the_one_before() -> None:
    files, log = a_log()
    log.roll()
    raise_epoch(FOLDER, 2, files)
    assert seqs(LogTail(FOLDER, 0, files).read_proven()) == [1, 2, 3, 4, 5, 6]


def test_a_trim_before_every_call_of_a_read() -> None:
    """All, or the word that some are in a main index by now; never a part without a word."""
    told = 0
    for call in range(1, 12):
        files, log = a_log(segment_bytes=1)
        reading = ProcessFiles(files.disk)

        def trim(made: int, name: str, log: Log = log, call: int = call) -> None:
            if made == call:
                log.trim(4)

        reading.before = trim
        try:
            assert seqs(LogTail(FOLDER, 0, reading).read_proven()) == [1, 2, 3, 4, 5, 6]
        except NotFound:
            told += 1
    assert told > 3


def test_a_file_that_always_vanishes_ends_the_read() -> None:
    files, _ = a_log()
    lost = []

    class Losing(ProcessFiles):
        def read(self, path: Path, offset: int = 0, size: int = -1) -> bytes:
            if segment_names([path.name]):
                lost.append(path)
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            return super().read(path, offset, size)

    with pytest.raises(FileNotFoundError):
        LogTail(FOLDER, 0, Losing(files.disk)).read_proven()
    assert len(lost) == TRIES


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("is_network", [False, True])
def test_replicas_start_after_every_call_of_a_takeover(is_network: bool, dies: bool) -> None:
    """What they are given holds for good, whether the successor, which has stopped after any of
    its calls, goes on later or is never heard of again."""
    successor_calls = 40
    starts = without = 0
    for paused_at in (0, 3, 7, 100):
        for stops_at in range(successor_calls):
            disk, old, work = began((1, 2, 1, 2), is_network=is_network)
            new, given = Writer(2, (1, 1)), []
            with paused(disk, work, new) as (first, second):
                first.advance(paused_at)
                for turn in range(stops_at + 30):
                    running: Paused = second if turn < stops_at else first
                    running.advance(1)
                    files = ProcessFiles(disk)
                    found = as_bytes(LogTail(FOLDER, 0, files).read_proven())
                    given.append(found)
                    acknowledged = max(old.acknowledged | new.acknowledged, default=0)
                    names = segment_names(files.names(FOLDER))
                    leads = read_epoch(FOLDER, files) == names[-1].epoch
                    assert len(found) >= acknowledged - (0 if leads else 2)
                    starts, without = starts + 1, without + (not leads)
                if not dies:
                    second.finish()
                log = final_log(disk, 1000)
            assert all(found == log[: len(found)] for found in given)
    assert starts > without > 100
