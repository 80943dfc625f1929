"""The log of a shard's writes: its one writer, the primary.

A write is acknowledged when its group is durable and EPOCH still holds the writer's number. A
writer begins a segment of its own with a copy of the last group that it has read, because nothing
proves that this one is durable; every earlier group is, or none would have been written after it.
What a writer appends that was paused while its successor read is void: the successor's segment does
not continue it.

When anything fails, nothing can be said of the bytes in the file's last group: the log refuses
further writes until ``reopen`` has read what is there and begun another segment.
"""

import copy
import errno
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shardline.shards.core.errors import CorruptFile, NotPrimary, ReadOnly, StoreFull
from shardline.shards.live.epoch_file import raise_epoch, read_epoch
from shardline.shards.live.kept_segments import continued_by, drop_kept, put_aside
from shardline.shards.live.log_files import FILES, LogFiles, write_all, write_new
from shardline.shards.live.log_reader import Found, Position, history_of, read_log
from shardline.shards.live.log_segments import (
    HEADER_BYTES,
    SegmentHeader,
    SegmentName,
    encode_group,
    encode_header,
    segment_names,
)
from shardline.shards.live.records import Record, encode_record

logger = logging.getLogger(__name__)

TORN = ".torn"  # after a segment's name: a copy of the bytes behind its last whole group
SEGMENT_BYTES = 64 << 20  # a segment is closed above this
RESERVED_BYTES = 4 << 20  # of the disk, ahead of what is written
GROUP_BYTES = 32 << 20  # records of one append beyond this are made durable in several steps
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Log:
    """Appends records to the log of one shard; for one thread, ``trim`` and ``seq`` for any."""

    def __init__(self, folder: Path, epoch: int, files: LogFiles, segment_bytes: int) -> None:
        self.folder = folder
        self.epoch = epoch
        self._files = files
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self._refusal: NotPrimary | ReadOnly | None = ReadOnly(f"{folder}: not open yet")
        self._descriptor: int | None = None
        self._name: SegmentName | None = None
        self._bytes = 0  # of the segment
        self._reserved = 0  # bytes of the disk for it
        self._seq = 0
        self._chain = 0  # checksum of the group that ends with _seq

    @classmethod
    def open(
        cls,
        folder: Path,
        epoch: int,
        *,
        after_seq: int,
        files: LogFiles = FILES,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> tuple["Log", list[Record]]:
        """The log for a new primary, and the records after ``after_seq``, durable, in order.

        ``epoch`` must be above that of every earlier primary.

        Raises:
            NotPrimary: the epoch is not the newest. CorruptFile: damaged, with what to do.
            NotFound: records after ``after_seq`` have been trimmed. ReadOnly, StoreFull: the disk
            does not take writes, or cannot be read.
        """
        log = cls(folder, epoch, files, segment_bytes)
        try:
            with log._failures():
                files.make_folder(folder)
                raise_epoch(folder, epoch, files)
                records = log._take_over(after_seq)
                log._remove_unfinished()
        except BaseException:
            log._close_segment()
            raise
        return log, records

    @property
    def seq(self) -> int:
        """That of the last record that is durable and this log's own, or was when it was opened."""
        return self._seq

    def append(self, records: Sequence[Record]) -> None:
        """Makes records durable, with one fsync; they follow ``seq`` without gaps.

        Raises:
            NotPrimary: another replica leads, for good. ReadOnly, StoreFull: the disk failed, or
            had failed before. In both cases the records may be in the log or not: a later
            ``reopen``, or another primary, says so.
        """
        with self._lock:
            self._refuse()
            expected = range(self._seq + 1, self._seq + 1 + len(records))
            assert [record.seq for record in records] == list(expected)
            assert all(record.epoch == self.epoch for record in records)
            groups = list(_groups_of([encode_record(record) for record in records]))
            with self._failures():
                for group in groups:
                    self._append_group(group)

    def reopen(self, after_seq: int) -> list[Record]:
        """Accepts writes again after a failure. Returns the records after ``after_seq``, the last
        that the caller has applied: those of failed appends that are in the log nevertheless,
        durable now. Does nothing if there was no failure.

        ``seq`` may be later than ``after_seq``: an append that failed in its second group has
        moved it behind the first.

        Raises:
            NotPrimary, CorruptFile, NotFound, ReadOnly, StoreFull: as ``open``.
        """
        with self._lock:
            if self._refusal is None:
                return []
            if isinstance(self._refusal, NotPrimary):
                self._refuse()
            with self._failures():
                self._check_epoch()
                return self._take_over(after_seq)

    def check(self) -> None:
        """For a primary that has nothing to write: whether it still leads.

        Raises: as ``append``.
        """
        with self._lock:
            self._refuse()
            with self._failures():
                self._check_epoch()

    def roll(self) -> None:
        """Begins another segment, so that all records until now can be trimmed.

        Raises: as ``append``.
        """
        with self._lock:
            self._refuse()
            with self._failures():
                self._begin_segment(self._seq + 1, self._chain, b"", self._name)
                self._check_epoch()

    def trim(self, seq: int, keep_bytes: int = 0) -> None:
        """Removes the segments that hold no record after ``seq``, never the newest, and torn ends
        that were kept aside of segments that are gone. ``keep_bytes`` of the newest that it removes
        and has removed are put aside instead (``kept_segments``).

        Raises:
            NotPrimary, ReadOnly: as ``append``. OSError: the next ``trim`` goes on.
        """
        with self._lock:
            self._refuse()
            self._check_epoch()
            listed = self._files.names(self.folder)
            names = segment_names(listed)
            oldest = history_of(self.folder, names, seq + 1, {}, self._files)[0].name
            void = [name for name in names if name < oldest] if oldest.first_seq <= seq + 1 else []
            kept = {f"{name}{TORN}" for name in names if name not in void}
            torn = [name for name in listed if name.endswith(TORN) and name not in kept]
            if keep_bytes and void:
                older = continued_by(self.folder, oldest, void, self._files)
                put_aside(self.folder, older, self._files)
                void = [name for name in void if name not in older]
            for each in (*map(str, void), *torn):
                self._files.remove(self.folder / each)
            if void or torn:
                self._files.sync_folder(self.folder)
            drop_kept(self.folder, keep_bytes, self._files)

    def close(self) -> None:
        """No records can be appended any more. Does nothing if it is closed."""
        with self._lock:
            self._refusal = NotPrimary(f"{self.folder}: closed")
            self._close_segment()

    def _append_group(self, records: Sequence[bytes]) -> None:
        if self._bytes >= max(self._segment_bytes, HEADER_BYTES + 1):
            self._begin_segment(self._seq + 1, self._chain, b"", self._name)
        assert self._descriptor is not None
        data, checksum = encode_group(records, first_seq=self._seq + 1, chain=self._chain)
        self._reserve(len(data))
        write_all(self._files, self._descriptor, data)
        self._files.sync(self._descriptor)
        self._check_epoch()
        self._seq += len(records)
        self._chain = checksum
        self._bytes += len(data)

    def _reserve(self, size: int) -> None:
        assert self._descriptor is not None
        if self._bytes + size > self._reserved:
            self._reserved = self._bytes + size + RESERVED_BYTES
            with suppress(
                OSError
            ):  # only appends take longer then; if the disk is full, they say so
                self._files.reserve(self._descriptor, self._bytes, self._reserved - self._bytes)

    def _take_over(self, after_seq: int) -> list[Record]:
        """Reads what is there and begins a segment that continues it."""
        found = read_log(self.folder, Position(next_seq=after_seq + 1), {}, self._files)
        if found.newest is not None and found.newest.epoch > self.epoch:
            raise NotPrimary(f"{self.folder}: epoch {found.newest.epoch} has written already")
        if found.end_seq <= after_seq:
            raise CorruptFile(
                f"{self.folder}: the log ends too early",
                expected=f"write {after_seq}, which the shard's files hold",
                got=f"write {found.end_seq - 1} as the last",
                hint="restore the log from a copy; or, to go on with what the shard's files hold, "
                "stop the cluster and move the segments away",
            )
        first_seq, chain, prefix = found.last_group or (found.end_seq, found.end_chain, b"")
        self._begin_segment(first_seq, chain, prefix, found.newest)
        self._keep_aside(found)  # after the segment, which needs the room on a full disk
        self._check_epoch()
        self._seq, self._chain = found.end_seq - 1, found.end_chain
        self._refusal = None
        return found.records

    def _begin_segment(
        self, first_seq: int, chain: int, prefix: bytes, continues: SegmentName | None
    ) -> None:
        names = segment_names(self._files.names(self.folder))
        part = 1 + max((name.part for name in names if name.epoch == self.epoch), default=0)
        name = SegmentName(self.epoch, part, first_seq)
        header = SegmentHeader(
            name=name, continues=continues, chain=chain, prefix_bytes=len(prefix)
        )
        content = encode_header(header) + prefix
        path = self.folder / str(name)
        descriptor = write_new(self._files, path, content, f".{name}.tmp")
        self._close_segment()
        self._descriptor, self._name = descriptor, name
        self._bytes, self._reserved = len(content), 0

    def _close_segment(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):  # what counts in it is durable, or will be read again
                self._files.close(self._descriptor)
            self._descriptor = None

    def _keep_aside(self, found: Found) -> None:
        """A copy of the bytes behind the last whole group, for people; readers pass over them."""
        if not found.tail:
            return
        path = self.folder / f"{found.newest}{TORN}"
        logger.warning(
            "%s: its last %d bytes are no whole write; it was not acknowledged; they are kept in "
            "%s", found.newest, len(found.tail), path.name,
        )  # fmt: skip
        try:
            descriptor = self._files.create(path)
            try:
                write_all(self._files, descriptor, found.tail)
            finally:
                self._files.close(descriptor)
        except FileExistsError:
            return
        except OSError as error:
            logger.warning("%s cannot be written: %s", path, error)
            with suppress(OSError):  # a part of it would pass for the whole, and takes room
                self._files.remove(path)

    def _remove_unfinished(self) -> None:
        """What earlier primaries have left of segments that they did not finish."""
        for name in self._files.names(self.folder):
            if name.startswith(".") and name.endswith(".tmp"):
                unfinished = segment_names([name[1 : -len(".tmp")]])
                if unfinished and unfinished[0].epoch < self.epoch:
                    with suppress(OSError):  # the next primary tries again
                        self._files.remove(self.folder / name)

    def _check_epoch(self) -> None:
        try:
            newest = read_epoch(self.folder, self._files)
        except CorruptFile as error:
            raise ReadOnly(str(error)) from error
        if newest != self.epoch:
            raise NotPrimary(
                f"{self.folder}: another primary has come",
                expected=f"epoch {self.epoch}",
                got=str(newest),
            )

    def _refuse(self) -> None:
        if self._refusal is not None:
            raise copy.copy(self._refusal)  # an exception collects the trace of every raise

    def _refusal_after(self, error: OSError) -> NotPrimary | ReadOnly:
        has_led = self._descriptor is not None
        if has_led:  # a successor may have removed the file that is missed
            with suppress(OSError, ReadOnly):
                try:
                    self._check_epoch()
                except NotPrimary as lost:
                    return lost
        kind = StoreFull if error.errno in _FULL else ReadOnly
        return kind(f"{self.folder}: {error.strerror or error}")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Whatever fails inside: from then on the log refuses writes, and errors are ours.

        Copies are kept: the trace of what is raised keeps alive what was to be written.
        """
        try:
            yield
        except (NotPrimary, ReadOnly) as error:
            self._refusal = copy.copy(error)
            raise
        except OSError as error:
            refusal = self._refusal_after(error)
            self._refusal = copy.copy(refusal)
            raise refusal from error
        except BaseException as error:
            self._refusal = ReadOnly(f"{self.folder}: {error}")
            raise


def _groups_of(records: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Groups of at most GROUP_BYTES, or of one record."""
    group: list[bytes] = []
    size = 0
    for record in records:
        if group and size + len(record) > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(record)
        size += len(record)
    if group:
        yield group
