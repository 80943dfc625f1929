"""Damaged logs: cut at every byte, every bit flipped, files exchanged, old or missing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shardline.shards.core.errors import CorruptFile, NewerFormat, NotPrimary
from shardline.shards.live.log import Log
from shardline.shards.live.log_segments import (
    FORMAT_VERSION,
    HEADER_BYTES,
    SegmentHeader,
    SegmentName,
    encode_group,
    encode_header,
    group_at,
    segment_names,
)
from shardline.shards.live.log_tail import LogTail
from tests.fake_disk import FakeDisk, FakeFile, FakeFolder, ProcessFiles
from tests.live_writes import as_bytes, records, seqs

FOLDER = Path("live")
WRITES = records(1, 6)


def a_log(*, primaries: int = 1) -> FakeDisk:
    """Six writes in groups of 1, 2, 1 and 2; by the first of so many primaries."""
    disk = FakeDisk()
    log, _ = Log.open(FOLDER, 1, after_seq=0, files=ProcessFiles(disk))
    for first, last in ((0, 1), (1, 3), (3, 4), (4, 6)):
        log.append(WRITES[first:last])
    for epoch in range(2, primaries + 1):
        Log.open(FOLDER, epoch, after_seq=0, files=ProcessFiles(disk))
    return disk


def segment(disk: FakeDisk, which: int = -1) -> bytearray:
    """The content of a segment; the newest is the last."""
    names = segment_names(list(disk.folders[FOLDER].files))
    return disk.file(FOLDER / str(names[which])).content


def groups(content: bytes) -> list[tuple[int, int]]:
    """First and last byte of each group."""
    found, offset = [], HEADER_BYTES
    while (group := group_at(bytes(content), offset)) is not None:
        found.append((group.start, group.end))
        offset = group.end
    return found


def opened(disk: FakeDisk, epoch: int = 50, after_seq: int = 0) -> list[int]:
    log, found = Log.open(FOLDER, epoch, after_seq=after_seq, files=ProcessFiles(disk))
    assert as_bytes(found) == as_bytes(WRITES[after_seq : log.seq])
    return seqs(found)


def followed(disk: FakeDisk) -> list[int]:
    return seqs(LogTail(FOLDER, 0, ProcessFiles(disk)).read_new())


def test_cut_at_every_byte_of_the_last_group() -> None:
    start, end = groups(segment(a_log()))[-1]
    for size in range(start, end):
        disk = a_log()
        content = segment(disk)
        torn = bytes(content[start:size])
        del content[size:]
        assert followed(disk) == [1, 2, 3, 4]
        name = f"{segment_names(list(disk.folders[FOLDER].files))[0]}.torn"
        assert opened(disk) == [1, 2, 3, 4]
        kept = disk.folders[FOLDER].files.get(name)
        assert (b"" if kept is None else bytes(kept.content)) == torn
        assert followed(disk) == [1, 2, 3, 4]
        assert opened(disk, 51) == [1, 2, 3, 4]


def test_cut_anywhere_before_is_noticed_or_leaves_a_shorter_log() -> None:
    """Whole groups that are missing at the end leave no trace, unless others know of them."""
    content = segment(a_log())
    left = dict(zip([start for start, _ in groups(content)], (0, 1, 3, 4), strict=True))
    for size in range(HEADER_BYTES):
        disk = a_log()
        del segment(disk)[size:]
        with pytest.raises(CorruptFile, match="damaged header at byte 0"):
            opened(disk)
    for size in range(HEADER_BYTES, len(content)):
        disk = a_log()
        del segment(disk)[size:]
        with pytest.raises(CorruptFile, match="the log ends too early"):
            opened(disk, after_seq=6)
        if size in left:
            assert opened(disk, 51) == list(range(1, 1 + left[size]))


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_bit_flipped_before_the_last_group_is_refused(bit: int) -> None:
    content = segment(a_log())
    places = groups(content)
    for byte in range(places[-1][0]):
        disk = a_log()
        segment(disk)[byte] ^= 1 << bit
        start = next((start for start, end in places if start <= byte < end), 0)
        for read in (followed, opened):
            with pytest.raises(CorruptFile, match=rf"at byte {start}\b.*move this segment"):
                read(disk)


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_bit_flipped_in_the_last_group_cuts_it_off(bit: int) -> None:
    start, end = groups(segment(a_log()))[-1]
    for byte in range(start, end):
        disk = a_log()
        segment(disk)[byte] ^= 1 << bit
        assert followed(disk) == [1, 2, 3, 4]
        assert opened(disk) == [1, 2, 3, 4]


def test_a_bit_flipped_in_the_copy_that_a_successor_made_is_refused() -> None:
    """It was durable when the segment appeared, so it is no unfinished write."""
    (start, end), = groups(segment(a_log(primaries=2)))  # fmt: skip
    for byte in range(start, end):
        disk = a_log(primaries=2)
        segment(disk)[byte] ^= 1
        with pytest.raises(CorruptFile, match=f"damaged group of writes at byte {start}"):
            opened(disk)


def test_a_bit_flipped_behind_the_end_of_an_earlier_segment_does_not_matter() -> None:
    """A successor's segment begins with the last group, so the earlier copy of it is void."""
    start, end = groups(segment(a_log()))[-1]
    for byte in range(start, end):
        disk = a_log(primaries=2)
        segment(disk, 0)[byte] ^= 1
        assert opened(disk) == [1, 2, 3, 4, 5, 6]


def test_zeros_behind_the_last_group_are_cut_off() -> None:
    disk = a_log()
    segment(disk).extend(bytes(1000))
    assert followed(disk) == opened(disk) == [1, 2, 3, 4, 5, 6]


def test_exchanged_groups_are_refused() -> None:
    disk = a_log()
    content = segment(disk)
    (a, b), (_, c), *_ = groups(content)
    content[a:c] = content[b:c] + content[a:b]
    with pytest.raises(CorruptFile, match="another write than expected"):
        opened(disk)


def test_a_missing_group_is_refused() -> None:
    disk = a_log()
    start, end = groups(segment(disk))[1]
    del segment(disk)[start:end]
    with pytest.raises(CorruptFile, match="another write than expected"):
        opened(disk)


def test_a_group_of_another_history_is_refused() -> None:
    disk, other = a_log(), FakeDisk()
    log, _ = Log.open(FOLDER, 2, after_seq=0, files=ProcessFiles(other))
    for first, last in ((1, 1), (2, 3), (4, 4), (5, 6)):
        log.append(records(first, last, epoch=2))
    content = segment(disk)
    (start, _), (_, end) = groups(content)[1:3]
    content[start:end] = segment(other)[start:end]
    with pytest.raises(CorruptFile, match="another write than expected"):
        opened(disk)


def renamed(disk: FakeDisk, change: Callable[[FakeFolder, list[str]], None]) -> FakeDisk:
    folder = disk.folders[FOLDER]
    change(folder, [str(name) for name in segment_names(list(folder.files))])
    return disk


def test_exchanged_segments_are_refused() -> None:
    def exchange(folder: FakeFolder, names: list[str]) -> None:
        folder.files[names[0]], folder.files[names[1]] = (
            folder.files[names[1]],
            folder.files[names[0]],
        )

    with pytest.raises(CorruptFile, match="another segment under this name"):
        opened(renamed(a_log(primaries=2), exchange))


def test_an_old_copy_of_a_segment_is_refused() -> None:
    """A backup put back, with the segment that continues it still there."""

    def put_back(folder: FakeFolder, names: list[str]) -> None:
        content = folder.files[names[0]].content
        del content[groups(content)[-2][0] :]

    with pytest.raises(CorruptFile, match="damaged group of writes"):
        opened(renamed(a_log(primaries=2), put_back))


def test_a_missing_first_segment_is_refused() -> None:
    def remove(folder: FakeFolder, names: list[str]) -> None:
        del folder.files[names[0]]

    with pytest.raises(Exception, match="writes 1 to 4 are not in the log any more"):
        opened(renamed(a_log(primaries=2), remove))


def test_moving_damaged_segments_away_gives_up_what_they_held() -> None:
    """What the error says to do."""

    def remove(folder: FakeFolder, names: list[str]) -> None:
        del folder.files[names[-1]]

    disk = a_log(primaries=3)
    segment(disk)[HEADER_BYTES + 9] ^= 1
    with pytest.raises(CorruptFile, match="from number 5 on, stop the cluster and move this"):
        opened(disk)
    assert opened(renamed(disk, remove), 60) == [1, 2, 3, 4, 5, 6]


def test_a_segment_that_the_newest_does_not_continue_does_not_matter() -> None:
    """A primary that was paused may finish one long after its successor has read the log."""
    late = FakeDisk()
    early, _ = Log.open(FOLDER, 1, after_seq=0, files=ProcessFiles(late))
    early.append(WRITES[:1])
    Log.open(FOLDER, 2, after_seq=0, files=ProcessFiles(late))
    disk = a_log()
    Log.open(FOLDER, 3, after_seq=0, files=ProcessFiles(disk))
    name = str(segment_names(list(late.folders[FOLDER].files))[-1])
    disk.folders[FOLDER].files[name] = late.file(FOLDER / name)
    assert followed(disk) == opened(disk) == [1, 2, 3, 4, 5, 6]


def test_other_files_in_the_folder_do_not_matter() -> None:
    disk = a_log()
    for name in ("LIVE", "log-1-2-3.seg", "log-x.seg.torn", ".log.tmp", "EPOCH-7", "main-1"):
        disk.folders[FOLDER].files[name] = FakeFile(content=bytearray(b"x"))
    assert opened(disk) == [1, 2, 3, 4, 5, 6]


def test_a_newer_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardline.shards.live.log_segments.FORMAT_VERSION", FORMAT_VERSION + 1)
    disk = a_log()
    monkeypatch.undo()
    for read in (followed, opened):
        with pytest.raises(NewerFormat, match="upgrade shardline"):
            read(disk)


def test_a_segment_of_a_later_primary_than_this_one_is_respected() -> None:
    """Though the claims of epochs are gone."""
    disk = a_log(primaries=9)
    folder = disk.folders[FOLDER]
    for name in [name for name in folder.files if name.startswith("EPOCH")]:
        del folder.files[name]
    with pytest.raises(NotPrimary, match="epoch 9 has written already"):
        opened(disk, 8)


def test_a_follower_notices_that_the_log_is_another_one() -> None:
    """It read a write that was not durable and was lost, or the files were exchanged."""
    disk = a_log()
    tail = LogTail(FOLDER, 0, ProcessFiles(disk))
    assert seqs(tail.read_new()) == [1, 2, 3, 4, 5, 6]
    del segment(disk)[groups(segment(disk))[-1][0] :]
    log, _ = Log.open(FOLDER, 50, after_seq=0, files=ProcessFiles(disk))
    assert tail.read_new() == []  # it has seen more than there is; nothing says it is wrong yet
    log.append(records(5, 5, epoch=50))
    if log.seq < tail.seq:
        assert tail.read_new() == []
    log.append(records(6, 7, epoch=50))
    with pytest.raises(CorruptFile, match=r"not the log that was read before.*restart"):
        tail.read_new()


def test_a_group_that_says_another_number_than_its_records_is_refused() -> None:
    disk = FakeDisk()
    files = ProcessFiles(disk)
    name = SegmentName(1, 1, 1)
    header = SegmentHeader(name=name, continues=None, chain=0, prefix_bytes=0)
    group, _ = encode_group(as_bytes(records(2, 2)), first_seq=1, chain=0)
    files.make_folder(FOLDER)
    for content in (group, encode_group([b"nonsense"], first_seq=1, chain=0)[0]):
        disk.folders[FOLDER].files = {
            str(name): FakeFile(content=bytearray(encode_header(header) + content))
        }
        with pytest.raises(CorruptFile, match=r"\.seg: .*at byte"):
            opened(disk)
