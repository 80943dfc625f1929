"""Following the log of a shard: what a replica reads that does not write it.

A record is handed out only if no later primary can have missed it: its segment is the newest, and
EPOCH holds that segment's number after the record was read. Then a successor raises EPOCH later,
and reads the log after that. While EPOCH names a primary that has not begun a segment yet, nothing
is handed out, because what its predecessor appends now may be void.

A replica that starts has no state to go on with meanwhile, and that primary may be dead: it takes
all but the last group of the newest segment (``read_proven``). Each of these is proven: its writer
has appended another one, so it was durable while its writer led, and every successor reads it.

There is no notification: the store may be a network mount, which has none. ``read_new`` is called
again and again, and is cheap when nothing has changed.
"""

from contextlib import suppress
from pathlib import Path

from shardline.shards.live.epoch_file import read_epoch
from shardline.shards.live.log_files import FILES, LogFiles
from shardline.shards.live.log_reader import Found, Headers, Position, read_log
from shardline.shards.live.log_segments import segment_names
from shardline.shards.live.records import Record

TRIES = 20  # of a read from which files vanish; each time a primary has trimmed the log meanwhile


class LogTail:
    """The records of a log after ``after_seq``, as they come; for one thread."""

    def __init__(
        self,
        folder: Path,
        after_seq: int,
        files: LogFiles = FILES,
        *,
        at_once: int | None = None,
    ) -> None:
        """at_once: bytes of segments that a call of ``read_new`` reads, or one segment."""
        self._folder = folder
        self._files = files
        self._at_once = at_once
        self._end_seq = after_seq
        self._has_all = False
        self._position = Position(next_seq=after_seq + 1)
        self._headers: Headers = {}
        # the folder's names when all was read last; the newest segment then, and its size
        self._names: list[str] = []
        self._newest = folder
        self._size = 0

    @property
    def seq(self) -> int:
        """That of the last record handed out."""
        return self._position.next_seq - 1

    @property
    def end_seq(self) -> int:
        """That of the last record that the log is known to hold, handed out or not."""
        return self._end_seq

    @property
    def has_all(self) -> bool:
        """Whether the log held no later record when it was read last."""
        return self._has_all

    def read_new(self) -> list[Record]:
        """Whole groups that have come since, in order of seq; nothing where there is no log yet.

        Raises:
            CorruptFile: damaged before the last group; or the log is not the one that was read
            before, so that this replica must load the shard anew. NotFound: records have been
            trimmed before they were read here: load the compacted files. OSError: not readable.
        """
        try:
            names = self._files.names(self._folder)
        except FileNotFoundError:  # no folder yet
            self._has_all = True
            return []
        try:
            if names == self._names and self._files.size(self._newest) == self._size:
                return []
            return self._read(names)
        except FileNotFoundError:  # a segment was trimmed: the next call knows
            return []

    def read_proven(self) -> list[Record]:
        """For a replica that starts: all that comes after, one complete read of the log. Empty
        only if there is nothing; every acknowledged write is among it, except that the last group
        is missing while EPOCH names a primary that has not begun a segment.

        Raises:
            CorruptFile, NotFound, OSError: as ``read_new``; FileNotFoundError too: files have
            vanished from every one of TRIES reads.
        """
        for _ in range(TRIES - 1):
            with suppress(FileNotFoundError):
                return self._read_proven()
        return self._read_proven()

    def _read_proven(self) -> list[Record]:
        try:
            names = self._files.names(self._folder)
        except FileNotFoundError:
            return []  # no folder yet
        if not segment_names(names):
            return []
        found = read_log(self._folder, self._position, self._headers, self._files)
        if found.newest is None or read_epoch(self._folder, self._files) != found.newest.epoch:
            found = read_log(
                self._folder, self._position, self._headers, self._files, proven_only=True
            )
            names = []  # its last group is still to be read
        return self._moved(found, names)

    def _read(self, names: list[str]) -> list[Record]:
        segments = segment_names(names)
        if not segments:
            self._has_all = True
            return []
        if read_epoch(self._folder, self._files) != segments[-1].epoch:
            return []
        found = read_log(
            self._folder, self._position, self._headers, self._files, at_once=self._at_once
        )
        if found.newest is None or read_epoch(self._folder, self._files) != found.newest.epoch:
            return []
        return self._moved(found, names)

    def _moved(self, found: Found, names: list[str]) -> list[Record]:
        """Behind what was found in the folder with these names."""
        self._position = found.position
        # with bytes behind the last group nothing is kept: on NFS they may change, not their number
        self._has_all = found.has_all
        self._names = names if found.has_all and not found.tail else []
        newest = found.history[-1].name.first_seq if found.history else found.position.next_seq
        self._end_seq = max(self.seq, newest - 1)
        self._newest, self._size = self._folder / str(found.newest), found.size
        return found.records
