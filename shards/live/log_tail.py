"""Following the log of a shard: what a replica reads that does not write it.

A record is handed out only if no later primary can have missed it: its segment is the newest, and
EPOCH holds that segment's number after the record was read. Then a successor raises EPOCH later,
and reads the log after that. While EPOCH names a primary that has not begun a segment yet, nothing
is handed out, because what its predecessor appends now may be void.

A replica that starts has no state to go on with meanwhile, and that primary may be dead: it takes
all but the last group of the newest segment (``read_proven``). Each of these is proven: its writer
has appended another one, so it was durable while its writer led, and every successor reads it.
Who must have every acknowledged write waits for that primary (``read_settled``).

There is no notification: the store may be a network mount, which has none. ``read_new`` is called
again and again, and is cheap when nothing has changed.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shardline.shards.core.errors import Unavailable
from shardline.shards.live.epoch_file import read_epoch
from shardline.shards.live.log_files import FILES, LogFiles
from shardline.shards.live.log_reader import Found, Headers, Position, read_log
from shardline.shards.live.log_segments import segment_names
from shardline.shards.live.records import Record

TRIES = 20  # of a read from which files vanish; each time a primary has trimmed the log meanwhile
LOOKS = 10  # for a new primary to begin: with BETWEEN_S 5 s, in which another one is elected
BETWEEN_S = 0.5


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
        self.left_out = 0  # writes in the last group, if ``read_proven`` has left it out
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
        is missing, and counted in ``left_out``, while EPOCH names a primary that has not begun a
        segment.

        Raises:
            CorruptFile, NotFound, OSError: as ``read_new``; FileNotFoundError too: files have
            vanished from every one of TRIES reads.
        """
        return self._complete(is_written=True)

    def read_all(self) -> list[Record]:
        """As ``read_proven``, and the last group in any case: for who knows that nobody writes.
        The next primary will read it too. Raises: as ``read_proven``."""
        return self._complete(is_written=False)

    def _complete(self, *, is_written: bool) -> list[Record]:
        for _ in range(TRIES - 1):
            with suppress(FileNotFoundError):
                return self._read_once(is_written=is_written)
        return self._read_once(is_written=is_written)

    def _read_once(self, *, is_written: bool) -> list[Record]:
        try:
            names = self._files.names(self._folder)
        except FileNotFoundError:
            return []  # no folder yet
        if not segment_names(names):
            return []
        found = read_log(self._folder, self._position, self._headers, self._files)
        self.left_out = 0
        if is_written and (
            found.newest is None or read_epoch(self._folder, self._files) != found.newest.epoch
        ):
            found = read_log(
                self._folder, self._position, self._headers, self._files, proven_only=True
            )
            self.left_out = max(0, found.end_seq - found.position.next_seq)
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


def read_settled(
    folder: Path,
    after_seq: int,
    *,
    is_written: Callable[[], bool] = lambda: True,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Record]:
    """All records after ``after_seq``, with every write that was acknowledged before the call.

    Waits some seconds for a primary that has not begun. If none comes, ``is_written`` is asked
    whether anybody may write the log; if not, all that is in it holds.

    Raises:
        Unavailable: somebody may, and nobody can tell whether the last group holds. CorruptFile,
        NotFound, OSError: as ``LogTail.read_proven``.
    """
    for _ in range(LOOKS):
        tail = LogTail(folder, after_seq)
        records = tail.read_proven()
        if not tail.left_out:
            return records
        sleep(BETWEEN_S)
    if not is_written():
        return LogTail(folder, after_seq).read_all()
    raise Unavailable(
        f"{folder}: the shard's new primary has not begun, so nobody can tell whether its last "
        f"{tail.left_out} writes hold",
        hint="make room on the store, or wait until the cluster has elected a primary; then repeat",
    )
