"""The files of a shard's log: names and headers of segments, and groups of records in them.

A segment is ``log-<epoch>-<part>-<first seq>.seg``. Parts number the segments of one epoch from 1,
so segments are ordered by epoch and part. A header, then groups: what one fsync made durable, with
one record or many. All numbers are little-endian.

Every group holds the checksum of the group before it, and its own covers that: a group that is
missing, or from another history, is noticed at the next. A header names the segment that its own
continues; so the history of the newest segment is known whatever else lies in the folder. What the
earlier segment holds from the first seq of the later one on is void.
"""

import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardline.shards.core.errors import CorruptFile, NewerFormat

_NAME = re.compile(r"log-(\d{20})-(\d{6})-(\d{20})\.seg")
FORMAT_VERSION = 2  # 1: without upserts by features; read as it is
_MAGIC = b"SHLDLOG\n"
# checksum of what follows, format version, epoch, part, first seq, the same three of the segment
# that it continues (zeros: none), checksum of the group before, bytes of the prefix
_HEADER = struct.Struct("<IIQQQQQQIQ")
HEADER_BYTES = len(_MAGIC) + _HEADER.size
_GROUP_MAGIC = b"\xf5GRP"
# magic, checksum of what follows and of the payload, that of the group before, records, first
# seq, bytes of the payload
_GROUP = struct.Struct("<4sIIIQQ")
_CHECKED_FROM = 8  # bytes of the group's head that stand before what its checksum covers
_LENGTH = struct.Struct("<I")  # before each record
FIRST_CHAIN = 0  # in the place of the checksum of a group before the first


@dataclass(frozen=True, slots=True, order=True)
class SegmentName:
    """Ordered as the segments are; ``first_seq`` is that of the first record it may hold."""

    epoch: int
    part: int
    first_seq: int

    def __str__(self) -> str:
        return f"log-{self.epoch:020d}-{self.part:06d}-{self.first_seq:020d}.seg"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    """``chain`` is the checksum of the group before the segment's first.

    prefix_bytes: of the groups that were in the file when it appeared; they were durable then.
    """

    name: SegmentName
    continues: SegmentName | None
    chain: int
    prefix_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Where in a segment's bytes a group with a right checksum is."""

    first_seq: int
    count: int
    before: int
    checksum: int
    start: int
    end: int

    @property
    def last_seq(self) -> int:
        return self.first_seq + self.count - 1


def segment_names(names: Sequence[str]) -> list[SegmentName]:
    """Those among the names of a folder, in their order."""
    matches = map(_NAME.fullmatch, names)
    return sorted(SegmentName(*map(int, match.groups())) for match in matches if match is not None)


def encode_header(header: SegmentHeader) -> bytes:
    name, continues = header.name, header.continues or SegmentName(0, 0, 0)
    values = (
        *(FORMAT_VERSION, name.epoch, name.part, name.first_seq),
        *(continues.epoch, continues.part, continues.first_seq),
        *(header.chain, header.prefix_bytes),
    )
    checked = _HEADER.pack(0, *values)[4:]
    return _MAGIC + struct.pack("<I", zlib.crc32(checked)) + checked


def decode_header(data: bytes, name: SegmentName, path: Path) -> SegmentHeader:
    """The header of the segment of that name; ``data`` begins with it.

    Raises:
        CorruptFile: damaged, or that of another segment. NewerFormat: of a later format.
    """
    whole = len(data) >= HEADER_BYTES and data.startswith(_MAGIC)
    if not whole or zlib.crc32(data[12:HEADER_BYTES]) != int.from_bytes(data[8:12], "little"):
        raise damaged(path, 0, name.first_seq, "damaged header")
    _, version, epoch, part, first_seq, *others, chain, prefix = _HEADER.unpack_from(data, 8)
    if version > FORMAT_VERSION:
        raise NewerFormat(
            f"{path}: format is newer than this program",
            expected=f"format version <= {FORMAT_VERSION}",
            got=str(version),
            hint="upgrade shardline",
        )
    if SegmentName(epoch, part, first_seq) != name:
        raise damaged(path, 0, name.first_seq, "another segment under this name")
    continues = SegmentName(*others) if any(others) else None
    return SegmentHeader(name=name, continues=continues, chain=chain, prefix_bytes=prefix)


def encode_group(records: Sequence[bytes], *, first_seq: int, chain: int) -> tuple[bytes, int]:
    """The group's bytes, and its checksum; ``chain`` is the checksum of the group before."""
    payload = b"".join(part for data in records for part in (_LENGTH.pack(len(data)), data))
    head = _GROUP.pack(_GROUP_MAGIC, 0, chain, len(records), first_seq, len(payload))
    checksum = zlib.crc32(payload, zlib.crc32(head[_CHECKED_FROM:]))
    return b"".join((head[:4], _LENGTH.pack(checksum), head[8:], payload)), checksum


def group_at(data: bytes, offset: int) -> Group | None:
    """The group that begins at this offset; None if none does, or not a whole and sound one."""
    if len(data) - offset < _GROUP.size:
        return None
    magic, checksum, before, count, first_seq, size = _GROUP.unpack_from(data, offset)
    end = offset + _GROUP.size + size
    if magic != _GROUP_MAGIC or not count or end > len(data):
        return None
    if zlib.crc32(memoryview(data)[offset + _CHECKED_FROM : end]) != checksum:
        return None
    return Group(
        first_seq=first_seq, count=count, before=before, checksum=checksum, start=offset, end=end
    )


def later_group(data: bytes, offset: int, seq: int) -> Group | None:
    """A sound group behind ``offset`` with later records than ``seq``; None if there is none."""
    start = offset
    while (start := data.find(_GROUP_MAGIC, start + 1)) >= 0:
        group = group_at(data, start)
        if group is not None and group.first_seq > seq:
            return group
    return None


def records_of(data: bytes, group: Group) -> list[memoryview]:
    """The bytes of a group's records, in order of seq; views.

    Raises:
        CorruptFile: their lengths do not add up, though the checksum is right.
    """
    view = memoryview(data)[group.start + _GROUP.size : group.end]
    found = []
    while len(view) >= _LENGTH.size:
        end = _LENGTH.size + _LENGTH.unpack_from(view)[0]
        found.append(view[_LENGTH.size : end])
        view = view[end:]
    if len(found) != group.count or len(view):
        raise CorruptFile("not a group of records", expected=f"{group.count}", got=f"{len(found)}")
    return found


def damaged(path: Path, offset: int, seq: int, what: str) -> CorruptFile:
    """``seq`` is that of the first write that cannot be read."""
    return CorruptFile(
        f"{path}: {what} at byte {offset}",
        hint=(
            "restore the file from a copy; or, to give up the writes of this shard from number "
            f"{seq} on, stop the cluster and move this segment and all later ones away; then make "
            "anew what was made of this generation since, snapshots and other generations: they "
            "count on these writes"
        ),
    )
