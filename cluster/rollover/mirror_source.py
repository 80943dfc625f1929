"""The writes of a generation, read from the logs of its shards in the store: all of them, in order.

Changes nothing, and needs nothing of the processes that write. What it hands out is durable: else a
power cut could give its number to another write, which would be passed over as known. What
compactions have made unnecessary is read too, as far as the logs keep it.
"""

from collections.abc import Sequence
from pathlib import Path

from shardline.shards.core.errors import NotFound, ShardlineError, WritesLost
from shardline.shards.live.kept_segments import WithKept
from shardline.shards.live.live_rows import make_durable
from shardline.shards.live.log_files import FILES, LogFiles
from shardline.shards.live.log_tail import LogTail
from shardline.shards.live.records import Record, Upsert

SEGMENT_AT_A_TIME = 1  # byte, after which a tail has read enough: it ends with a whole segment
READ_AT_ONCE = 4  # shards whose segments, 64 MiB each, are in memory at the same time
UNREAD_WRITES = 10_000  # counted for a segment that has not been read: it is not taken for empty
RECORD_BYTES = 256  # of a record and of each of its rows, beside what it brings


class SourceShard:
    """The records of one shard after ``seq``, handed out in order; for one thread at a time."""

    def __init__(self, live: Path, shard: int, seq: int, files: LogFiles = FILES) -> None:
        """live: the folder of the shard's log, which need not be there yet."""
        self.shard = shard
        self.seq = seq  # of the record handed out last
        # one for all reads: it knows by the checksums of what it read whether the log is still that
        self._tail = LogTail(live, seq, WithKept(files), at_once=SEGMENT_AT_A_TIME)
        self._waiting: list[Record] = []  # read, and not yet handed out
        self._taken = 0  # of those
        self._live = live
        self._is_durable = True  # all of those

    @property
    def end_seq(self) -> int:
        """Of the last record of the log; an estimate while its newest segment has not been read."""
        return self._tail.end_seq + (0 if self._tail.has_all else UNREAD_WRITES)

    @property
    def is_waiting(self) -> bool:
        """Whether records have been read that were not handed out."""
        return self._taken < len(self._waiting)

    def take(self, most_bytes: int, until: int | None = None) -> list[Record]:
        """The next records, at least one if there is one. With ``until`` exactly those up to that
        write, or none while the log does not show all of them.

        Raises:
            WritesLost: they are not in the log any more.
            CorruptFile, OSError: of the log; a later call tries again.
        """
        self._read(until)
        if not self._is_durable:
            make_durable(self._live)
            self._is_durable = True
        first = end = self._taken
        size = 0
        if until is not None:
            if self._tail.seq < until:
                return []
            end += until - self.seq
        else:
            while end < len(self._waiting) and (end == first or size < most_bytes):
                size += bytes_of(self._waiting[end])
                end += 1
        found = self._waiting[first:end]
        self._taken = end
        if end == len(self._waiting):
            self._waiting, self._taken = [], 0
        if found:
            self.seq = found[-1].seq
        return found

    def _read(self, until: int | None) -> None:
        if self.is_waiting and until is None:
            return
        try:
            while new := self._tail.read_new():
                self._waiting += new
                self._is_durable = False
                if until is None or self._tail.seq >= until:
                    return
        except NotFound as error:
            raise WritesLost(
                f"shard {self.shard}: writes from {self.seq + 1} on are needed, and not in its "
                f"log any more ({error.message})",
                hint="build a generation from today's rows with `shardline build --from-live`, or "
                "publish with --without-writes; `live.keep_log_mib` is what the log keeps",
            ) from error


def gathered(
    sources: Sequence[SourceShard], most_bytes: int, first: int = 0
) -> tuple[list[tuple[SourceShard, list[Record]]], ShardlineError | OSError | None]:
    """The next records of shards that have any, ``most_bytes`` of each; from the shard of position
    ``first`` on, because not more than READ_AT_ONCE may hold what is left of a segment. With them
    the last error of ``take``, of a shard whose turn comes again."""
    found, failure = [], None
    for source in (*sources[first:], *sources[:first]):
        busy = sum(each.is_waiting for each in sources)
        if source.is_waiting or busy < READ_AT_ONCE:
            try:
                records = source.take(most_bytes)
            except (ShardlineError, OSError) as error:
                failure = error
                continue
            if records:
                found.append((source, records))
    return found, failure


def bytes_of(record: Record) -> int:
    """Of memory, about."""
    change = record.change
    size = RECORD_BYTES * (1 + len(change.item_ids))
    if isinstance(change, Upsert):
        size += change.vectors.nbytes + len(change.attributes) + len(change.features)
    return size
