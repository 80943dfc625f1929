"""Segments that a trim puts aside: read from any earlier write on, bounded, without a gap."""

import contextlib
import random
from pathlib import Path

import pytest

from shardline.shards.core.errors import NotFound
from shardline.shards.live.kept_segments import KEPT_FOLDER, WithKept, drop_kept
from shardline.shards.live.log import Log
from shardline.shards.live.log_files import FILES, LogFiles
from shardline.shards.live.log_segments import segment_names
from shardline.shards.live.log_tail import LogTail
from tests.fake_disk import FakeDisk, ProcessFiles
from tests.interleaving import paused
from tests.live_writes import as_bytes, records, seqs

FOLDER = Path("live")
ALL = 1 << 30  # bytes, more than there are


def written(folder: Path, last: int, files=FILES, *, epoch: int = 1, segment_bytes: int = 1) -> Log:
    """A log of one record per segment."""
    log, _ = Log.open(folder, epoch, after_seq=0, files=files, segment_bytes=segment_bytes)
    for seq in range(1, last + 1):
        log.append(records(seq, seq, epoch=epoch))
    return log


def kept(folder: Path) -> list[int]:
    """The first seq of each kept segment."""
    names = segment_names(FILES.names(folder / KEPT_FOLDER))
    return [name.first_seq for name in names]


@pytest.mark.parametrize("at_once", [None, 1, 300])
def test_a_trimmed_log_is_read_from_any_write_on(tmp_path: Path, at_once: int | None) -> None:
    log = written(tmp_path, 9)
    log.trim(4, ALL)
    log.trim(7, ALL)
    assert len(segment_names(FILES.names(tmp_path))) == 2
    with pytest.raises(NotFound):
        LogTail(tmp_path, 3).read_new()
    for after in range(10):
        tail = LogTail(tmp_path, after, WithKept(FILES), at_once=at_once)
        found = []
        while tail.seq < 9:
            new = tail.read_new()
            assert new and tail.end_seq >= tail.seq
            assert tail.has_all == (tail.seq == 9)
            assert at_once != 1 or len(new) == 1, "a segment at a time"
            found += new
        assert as_bytes(found) == as_bytes(records(after + 1, 9))
        assert tail.read_new() == [] and tail.end_seq == 9


def test_a_tail_of_kept_segments_goes_on_with_what_is_appended(tmp_path: Path) -> None:
    log = written(tmp_path, 4)
    tail = LogTail(tmp_path, 0, WithKept(FILES), at_once=1)
    found = tail.read_new()
    for seq in range(5, 12):
        log.append(records(seq, seq))
        log.trim(seq - 1, ALL)
        found += tail.read_new()
    while new := tail.read_new():
        found += new
    assert seqs(found) == list(range(1, 12))


def test_the_oldest_go_first_and_without_a_gap(tmp_path: Path) -> None:
    log = written(tmp_path, 9)
    log.trim(6, ALL)
    assert kept(tmp_path)[-3:] == [4, 5, 6]
    sizes = {
        name.first_seq: FILES.size(tmp_path / KEPT_FOLDER / str(name))
        for name in segment_names(FILES.names(tmp_path / KEPT_FOLDER))
    }
    log.trim(6, sizes[6] + sizes[5] + sizes[4] - 1)
    assert kept(tmp_path) == [5, 6]
    with pytest.raises(NotFound, match="writes 4 to 4 are not in the log"):
        LogTail(tmp_path, 3, WithKept(FILES)).read_new()
    assert seqs(LogTail(tmp_path, 4, WithKept(FILES)).read_new()) == [5, 6, 7, 8, 9]
    log.trim(6)
    assert kept(tmp_path) == []
    log.trim(8)
    assert kept(tmp_path) == [], "nothing is kept without room"


class Ends(LogFiles):
    """The process ends after it has removed two files; another removes the newest meanwhile."""

    def __init__(self) -> None:
        self.removed = 0

    def size(self, path: Path) -> int:
        if self.removed == 0 and path.name.endswith(f"{6:020d}.seg"):
            path.unlink()
        return super().size(path)

    def remove(self, path: Path) -> None:
        if self.removed == 2:
            raise KeyboardInterrupt
        self.removed += 1
        super().remove(path)


def test_a_process_that_ends_while_the_oldest_go_leaves_no_gap(tmp_path: Path) -> None:
    log = written(tmp_path, 9)
    log.trim(6, ALL)
    first, *_, last = kept(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        drop_kept(tmp_path, 0, Ends())
    assert kept(tmp_path) == list(range(first + 2, last))


def test_what_a_primary_of_the_past_wrote_in_vain_is_not_kept(tmp_path: Path) -> None:
    written(tmp_path, 2, segment_bytes=1 << 20)
    new, found = Log.open(tmp_path, 2, after_seq=0, segment_bytes=1)
    assert len(found) == 2
    for seq in range(3, 7):
        new.append(records(seq, seq, epoch=2))
    in_vain = tmp_path / "log-00000000000000000001-000009-00000000000000000003.seg"
    first = segment_names(FILES.names(tmp_path))[0]
    in_vain.write_bytes((tmp_path / str(first)).read_bytes())
    new.trim(5, ALL)
    assert not in_vain.exists() and not (tmp_path / KEPT_FOLDER / in_vain.name).exists()
    assert seqs(LogTail(tmp_path, 0, WithKept(FILES)).read_new()) == [1, 2, 3, 4, 5, 6]


def test_a_damaged_segment_is_not_kept_and_hinders_no_trim(tmp_path: Path, caplog) -> None:
    log = written(tmp_path, 6)
    second = segment_names(FILES.names(tmp_path))[2]
    (tmp_path / str(second)).write_bytes(b"x" * 200)
    log.trim(4, ALL)
    assert "not kept" in caplog.text
    assert seqs(LogTail(tmp_path, 4).read_new()) == [5, 6]
    assert not (tmp_path / str(second)).exists()


def test_a_reader_paused_before_every_call_of_a_trim_misses_nothing() -> None:
    for read in range(16):
        for trimmed in range(14):
            disk = FakeDisk()
            log = written(FOLDER, 5, ProcessFiles(disk))

            def trim(files: ProcessFiles, log: Log = log) -> None:
                log._files = files
                log.trim(3, ALL)

            def follow(files: ProcessFiles) -> list[bytes]:
                tail = LogTail(FOLDER, 0, WithKept(files), at_once=1)
                found: list[bytes] = []
                for _ in range(12):
                    found += as_bytes(tail.read_new())
                return found

            with paused(disk, trim, follow) as (first, second):
                second.advance(read)
                first.advance(trimmed)
                second.finish()
                first.finish()
            assert first.error is None and second.error is None
            assert second.result == as_bytes(records(1, 5))


def test_a_power_cut_in_a_trim_loses_kept_segments_at_worst() -> None:
    for call in range(1, 30):
        for seed in range(4):
            disk = FakeDisk()
            log = written(FOLDER, 5, ProcessFiles(disk))

            def stop(made: int, name: str, call: int = call) -> None:
                if made == call:
                    raise KeyboardInterrupt

            log._files = ProcessFiles(disk, stop)
            with contextlib.suppress(KeyboardInterrupt):
                log.trim(3, ALL)
            restarted = ProcessFiles(disk.power_cut(random.Random(seed)))
            _, found = Log.open(FOLDER, 2, after_seq=3, files=restarted)
            assert as_bytes(found) == as_bytes(records(4, 5))
