"""Reading a shard's log: the records that follow a position, along the history of the newest
segment, and what is wrong with it.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardline.shards.core.errors import CorruptFile, NotFound
from shardline.shards.live.log_files import LogFiles
from shardline.shards.live.log_segments import (
    FIRST_CHAIN,
    HEADER_BYTES,
    Group,
    SegmentHeader,
    SegmentName,
    damaged,
    decode_header,
    group_at,
    later_group,
    records_of,
    segment_names,
)
from shardline.shards.live.records import Record, decode_record

Headers = MutableMapping[SegmentName, SegmentHeader]


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a reader has come: ``next_seq`` is the first that it has not read.

    chain: checksum of the group that it read last, None: it has read none. Where ``segment`` is
    not None, ``offset`` is the byte in it that follows that group.
    """

    next_seq: int
    chain: int | None = None
    segment: SegmentName | None = None
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """records follow each other without gaps; position is behind them.

    history: the headers of the newest segment, last, and of those that it continues, as far as was
    needed. end_seq: first seq that the log does not hold; end_chain: checksum of the group
    before it. last_group: bytes of the newest segment's last group, with its first seq and the
    checksum before it; None: it holds none, or it was not read this time. tail: bytes behind it.
    size: bytes of the newest segment. has_all: reading did not stop before that one; else the
    last four say nothing.
    """

    records: list[Record]
    position: Position
    history: tuple[SegmentHeader, ...] = ()
    end_seq: int
    end_chain: int = FIRST_CHAIN
    last_group: tuple[int, int, bytes] | None = None
    tail: bytes = b""
    size: int = 0
    has_all: bool = True

    @property
    def newest(self) -> SegmentName | None:
        return self.history[-1].name if self.history else None


def read_log(
    folder: Path,
    position: Position,
    headers: Headers,
    files: LogFiles,
    *,
    proven_only: bool = False,
    at_once: int | None = None,
) -> Found:
    """``headers`` are those read before, and takes those read now.

    proven_only: the last group of the newest segment is checked, and is not among the records.
    at_once: bytes of segments after which reading stops at the end of one; None: all are read.

    Raises:
        CorruptFile: damaged before the last group, or another history than the position's.
        NotFound: records after the position have been trimmed. OSError: something cannot be read.
    """
    names = segment_names(files.names(folder))
    for gone in headers.keys() - set(names):
        del headers[gone]
    if not names:
        return Found(records=[], position=position, end_seq=position.next_seq)
    history = history_of(folder, names, position.next_seq, headers, files)
    if history[0].name.first_seq > position.next_seq:
        raise NotFound(
            f"{folder}: writes {position.next_seq} to {history[0].name.first_seq - 1} are not in "
            "the log any more",
            hint="load the shard's compacted files, which hold them",
        )
    reading = _Reading(folder, position, proven_only)
    for header, following in zip(history, (*history[1:], None), strict=True):
        reading.segment(header, None if following is None else following.name.first_seq, files)
        if following is not None and at_once is not None and reading.bytes_read >= at_once:
            return reading.found(history, has_all=False)
    return reading.found(history)


def history_of(
    folder: Path, names: Sequence[SegmentName], seq: int, headers: Headers, files: LogFiles
) -> tuple[SegmentHeader, ...]:
    """The newest segment, last, and those that it continues, back to the one that holds ``seq``."""
    present = set(names)
    found = []
    name: SegmentName | None = names[-1]
    while name is not None and name in present:
        if name not in headers:
            path = folder / str(name)
            headers[name] = decode_header(files.read(path, 0, HEADER_BYTES), name, path)
        found.append(headers[name])
        name = None if name.first_seq <= seq else headers[name].continues
    return tuple(reversed(found))


class _Reading:
    """One call of ``read_log``: goes through segments from old to new, and keeps what it finds."""

    def __init__(self, folder: Path, position: Position, proven_only: bool) -> None:
        self._folder = folder
        self._proven_only = proven_only
        self._position = position
        self._records: list[Record] = []
        self._end_seq = position.next_seq
        self._end_chain = FIRST_CHAIN
        self._last: tuple[int, int, bytes] | None = None
        self._tail = b""
        self._size = 0
        self.bytes_read = 0

    def found(self, history: tuple[SegmentHeader, ...], *, has_all: bool = True) -> Found:
        return Found(
            records=self._records,
            position=self._position,
            history=history,
            end_seq=self._end_seq,
            end_chain=self._end_chain,
            last_group=self._last,
            tail=self._tail,
            size=self._size,
            has_all=has_all,
        )

    def segment(self, header: SegmentHeader, end: int | None, files: LogFiles) -> None:
        """``end``: the first seq that is void in it; None for the newest segment."""
        path = self._folder / str(header.name)
        start, seq, chain = HEADER_BYTES, header.name.first_seq, header.chain
        position = self._position
        if position.segment == header.name and position.chain is not None:
            start, seq, chain = position.offset, position.next_seq, position.chain
        elif seq == position.next_seq:
            self._meet(path, start, chain)
        data = files.read(path, start)
        offset = 0
        self._last = None
        before: Group | None = None  # the group before, not taken yet
        for group in _groups(data, end):
            if group.first_seq != seq or group.before != chain:
                raise damaged(path, start + group.start, seq, "another write than expected")
            if end is not None and group.last_seq >= end:
                raise damaged(path, start + group.start, seq, "more writes than expected")
            if before is not None:
                self._take(header.name, path, start, data, before)
            before = group
            self._last = group.first_seq, group.before, data[group.start : group.end]
            seq, chain, offset = group.last_seq + 1, group.checksum, group.end
        if before is not None and not (end is None and self._proven_only):
            self._take(header.name, path, start, data, before)
        self._end_seq, self._end_chain, self._tail = seq, chain, data[offset:]
        self._size = start + len(data)
        self.bytes_read += len(data)
        if end is not None:
            is_damaged = seq < end
        else:
            was_durable = start + offset < HEADER_BYTES + header.prefix_bytes
            is_damaged = was_durable or later_group(data, offset, seq) is not None
        if is_damaged:
            raise damaged(path, start + offset, seq, "damaged group of writes")

    def _take(self, name: SegmentName, path: Path, start: int, data: bytes, group: Group) -> None:
        """Keeps the group's records that come after the position, and moves it behind them."""
        position = self._position
        following = group.last_seq + 1
        if following < position.next_seq:
            return
        if following == position.next_seq:
            self._meet(path, start + group.start, group.checksum)
        elif group.first_seq < position.next_seq and position.chain is not None:
            raise self._other_history(path, start + group.start)
        else:
            self._records += _decoded(path, start, data, group)[position.next_seq - following :]
        self._position = Position(
            next_seq=following, chain=group.checksum, segment=name, offset=start + group.end
        )

    def _meet(self, path: Path, offset: int, chain: int) -> None:
        """The group before the position's next seq has this checksum here: the same as then?"""
        if self._position.chain not in (None, chain):
            raise self._other_history(path, offset)

    def _other_history(self, path: Path, offset: int) -> CorruptFile:
        return CorruptFile(
            f"{path}: not the log that was read before, at byte {offset}",
            expected=f"the same write {self._position.next_seq - 1}",
            hint="restart this replica, so that it loads the shard anew",
        )


def _groups(data: bytes, end: int | None) -> Iterator[Group]:
    offset = 0
    while (group := group_at(data, offset)) is not None:
        if end is not None and group.first_seq >= end:
            return
        yield group
        offset = group.end


def _decoded(path: Path, start: int, data: bytes, group: Group) -> list[Record]:
    try:
        records = [decode_record(each) for each in records_of(data, group)]
        expected = range(group.first_seq, group.first_seq + group.count)
        if [record.seq for record in records] != list(expected):
            raise CorruptFile("writes out of order")
    except CorruptFile as error:
        raise damaged(path, start + group.start, group.first_seq, str(error)) from error
    return records
