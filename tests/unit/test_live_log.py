"""The log of a shard: what is appended is read again, by successors and by followers."""

import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shardline.shards.core.errors import CorruptFile, NotFound, NotPrimary, ReadOnly
from shardline.shards.live.epoch_file import raise_epoch, read_epoch
from shardline.shards.live.log import Log
from shardline.shards.live.log_files import FILES, LogFiles, write_new
from shardline.shards.live.log_segments import segment_names
from shardline.shards.live.log_tail import LogTail
from shardline.shards.live.records import Delete, Record, Upsert, decode_record, encode_record
from tests.fake_disk import FakeDisk, ProcessFiles
from tests.live_writes import a_record, as_bytes, records, seqs


@pytest.fixture(params=["disk", "memory"])
def files(request: pytest.FixtureRequest) -> LogFiles:
    """The real calls, and those that the tests of faults use: one suite for both."""
    return FILES if request.param == "disk" else ProcessFiles(FakeDisk())


@pytest.mark.parametrize(
    "change",
    [
        Upsert(
            item_ids=np.array([7, 2**62], dtype=np.int64),
            vectors=np.array([[1, -2.5, 3], [0, np.inf, -0.0]], dtype=np.float32),
            attributes=b"\x81\xa1a\x92\x01\x02",
        ),
        Upsert(
            item_ids=np.empty(0, dtype=np.int64),
            vectors=np.empty((0, 3), dtype=np.float32),
            attributes=b"",
        ),
        Upsert(
            item_ids=np.array([7], dtype=np.int64),
            vectors=np.array([[1, 2]], dtype=np.float32),
            attributes=b"\x81\xa1a\x91\x01",
            features=b"\x91\x81\xa1a\x01",
        ),
        Delete(item_ids=np.array([0, 5, 9], dtype=np.int64)),
        Delete(item_ids=np.empty(0, dtype=np.int64)),
    ],
)
def test_a_record_is_read_as_it_was_written(change: Upsert | Delete) -> None:
    record = Record(seq=2**40, epoch=2**50, key="schlüssel", change=change)
    found = decode_record(encode_record(record))
    assert (found.seq, found.epoch, found.key) == (2**40, 2**50, "schlüssel")
    assert type(found.change) is type(change)
    assert found.change.item_ids.dtype == np.int64
    np.testing.assert_array_equal(found.change.item_ids, change.item_ids)
    if isinstance(change, Upsert):
        assert isinstance(found.change, Upsert)
        assert found.change.vectors.dtype == np.float32
        assert found.change.vectors.shape == change.vectors.shape
        np.testing.assert_array_equal(found.change.vectors, change.vectors)
        assert found.change.attributes == change.attributes
        assert found.change.features == change.features


def test_a_log_of_the_first_format_is_read_and_continued(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shardline.shards.live.log_segments.FORMAT_VERSION", 1)
        old, _ = Log.open(tmp_path, 1, after_seq=0)
        old.append(records(1, 2))
        old.close()
    new, found = Log.open(tmp_path, 2, after_seq=0)
    assert as_bytes(found) == as_bytes(records(1, 2))
    featured = replace(records(1, 1)[0].change, features=b"\x90")
    new.append([Record(seq=3, epoch=2, key="", change=featured)])
    (again,) = LogTail(tmp_path, 2).read_new()
    assert encode_record(again) == encode_record(replace(again, change=featured))


def test_what_is_no_record_is_refused() -> None:
    whole = encode_record(a_record(1))
    featured = encode_record(
        replace(a_record(1), change=replace(a_record(1).change, features=b"f"))
    )
    for record in (whole, featured):
        for size in range(len(record)):
            with pytest.raises(CorruptFile):
                decode_record(record[:size])
    for wrong in (whole + b"x", b"\x09" + whole[1:], encode_record(a_record(3))[:-1] + b"\xff\xff"):
        with pytest.raises(CorruptFile):
            decode_record(wrong)


def test_what_is_appended_is_there_for_the_next_primary(files: LogFiles, tmp_path: Path) -> None:
    folder = tmp_path / "live" / "000001" / "shard-00000"
    log, found = Log.open(folder, 1, after_seq=0, files=files)
    assert (found, log.seq) == ([], 0)
    written = records(1, 6)
    log.append(written[:1])
    log.append(written[1:4])
    log.append([])
    log.append(written[4:])
    assert log.seq == 6
    log.close()
    for epoch, after_seq in ((2, 0), (3, 2), (4, 6)):
        log, found = Log.open(folder, epoch, after_seq=after_seq, files=files)
        assert as_bytes(found) == as_bytes(written[after_seq:])
        assert (log.seq, read_epoch(folder, files)) == (6, epoch)
        log.close()


def test_a_primary_that_has_a_successor_is_refused(files: LogFiles, tmp_path: Path) -> None:
    old, _ = Log.open(tmp_path, 1, after_seq=0, files=files)
    old.append(records(1, 2))
    new, found = Log.open(tmp_path, 2, after_seq=0, files=files)
    assert seqs(found) == [1, 2]
    for _ in range(2):
        with pytest.raises(NotPrimary):
            old.append(records(3, 3))
    with pytest.raises(NotPrimary):
        old.check()
    with pytest.raises(NotPrimary):
        old.reopen(old.seq)
    with pytest.raises(NotPrimary):
        old.trim(1)
    new.append(records(3, 4, epoch=2))
    old.close()
    new.close()
    newest, found = Log.open(tmp_path, 3, after_seq=1, files=files)
    newest.close()
    assert as_bytes(found) == as_bytes([*records(2, 2), *records(3, 4, epoch=2)])


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_serves_once(files: LogFiles, tmp_path: Path, epoch: int) -> None:
    log, _ = Log.open(tmp_path, 2, after_seq=0, files=files)
    with pytest.raises(NotPrimary):
        Log.open(tmp_path, epoch, after_seq=0, files=files)
    log.append(records(1, 1, epoch=2))
    log.close()


def test_a_primary_without_writes_learns_that_it_has_a_successor(
    files: LogFiles, tmp_path: Path
) -> None:
    old, _ = Log.open(tmp_path, 1, after_seq=0, files=files)
    old.check()
    new, _ = Log.open(tmp_path, 2, after_seq=0, files=files)
    with pytest.raises(NotPrimary, match="another primary has come; expected epoch 1; got 2"):
        old.check()
    new.check()
    old.close()
    new.close()


def test_epochs(files: LogFiles, tmp_path: Path) -> None:
    files.make_folder(tmp_path)
    assert read_epoch(tmp_path, files) == 0
    raise_epoch(tmp_path, 3, files)
    raise_epoch(tmp_path, 10, files)
    assert read_epoch(tmp_path, files) == 10
    assert sorted(files.names(tmp_path)) == ["EPOCH", f"EPOCH-{10:020d}"]
    damaged = files.read(tmp_path / "EPOCH").replace(b"10", b"11")
    files.remove(tmp_path / "EPOCH")
    files.close(write_new(files, tmp_path / "EPOCH", damaged, "temporary"))
    with pytest.raises(CorruptFile, match="EPOCH: damaged"):
        read_epoch(tmp_path, files)
    raise_epoch(tmp_path, 12, files)
    assert read_epoch(tmp_path, files) == 12


def test_a_follower_reads_what_comes(files: LogFiles, tmp_path: Path) -> None:
    tail = LogTail(tmp_path / "later", 0, files)
    assert tail.read_new() == []
    log, _ = Log.open(tmp_path / "later", 1, after_seq=0, files=files)
    assert tail.read_new() == []
    log.append(records(1, 2))
    late = LogTail(tmp_path / "later", 1, files)
    assert as_bytes(tail.read_new()) == as_bytes(records(1, 2))
    assert tail.read_new() == []
    assert seqs(late.read_new()) == [2]
    successor, _ = Log.open(tmp_path / "later", 2, after_seq=0, files=files)
    assert tail.read_new() == []
    with pytest.raises(NotPrimary):
        log.append(records(3, 3))
    assert tail.read_new() == []
    successor.append(records(3, 4, epoch=2))
    for follower in (tail, late, LogTail(tmp_path / "later", 2, files)):
        assert as_bytes(follower.read_new()) == as_bytes(records(3, 4, epoch=2))
        assert follower.seq == 4
    log.close()
    successor.close()


def test_segments_are_closed_at_their_size_and_trimmed(files: LogFiles, tmp_path: Path) -> None:
    log, _ = Log.open(tmp_path, 1, after_seq=0, files=files, segment_bytes=1)
    tail, behind = LogTail(tmp_path, 0, files), LogTail(tmp_path, 1, files)
    for record in records(1, 6):
        log.append([record])
    assert len(segment_names(files.names(tmp_path))) == 6
    assert seqs(tail.read_new()) == [1, 2, 3, 4, 5, 6]
    log.trim(0)
    assert len(segment_names(files.names(tmp_path))) == 6
    log.trim(3)
    assert len(segment_names(files.names(tmp_path))) == 3
    with pytest.raises(NotFound, match="writes 2 to 3 are not in the log"):
        behind.read_new()
    log.trim(6)
    assert len(segment_names(files.names(tmp_path))) == 1
    log.append(records(7, 7))
    assert seqs(tail.read_new()) == [7]
    log.roll()
    log.trim(7)
    assert len(segment_names(files.names(tmp_path))) == 1
    log.close()
    log, found = Log.open(tmp_path, 2, after_seq=7, files=files)
    assert found == []
    log.append(records(8, 8, epoch=2))
    log.close()
    with pytest.raises(NotFound):
        Log.open(tmp_path, 3, after_seq=5, files=files)
    assert seqs(tail.read_new()) == []  # epoch 3 has begun nothing: what 2 has written may be void
    log, found = Log.open(tmp_path, 4, after_seq=7, files=files)
    log.close()
    assert seqs(found) == seqs(tail.read_new()) == [8]


def test_a_file_that_may_not_grow_refuses_writes_until_it_may(tmp_path: Path) -> None:
    """On the real disk: the write is cut short, then fails."""
    log, _ = Log.open(tmp_path, 1, after_seq=0)
    log.append(records(1, 2))
    name = segment_names(FILES.names(tmp_path))[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILES.size(tmp_path / str(name)) + 50, hard))
    try:
        with pytest.raises(ReadOnly, match="File too large"):
            log.append(records(3, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(ReadOnly):
        log.append(records(3, 4))
    assert log.reopen(log.seq) == []
    torn = tmp_path / f"{name}.torn"
    assert len(FILES.read(torn)) == 50
    log.append(records(3, 4))
    assert as_bytes(LogTail(tmp_path, 0).read_new()) == as_bytes(records(1, 4))
    log.trim(4)
    assert not torn.exists()
    log.close()
