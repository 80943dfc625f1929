"""Segments of a log that are in the newest main index, kept for who replays the shard's writes, and
for a start of the shard where that main index is damaged.

They lie in the folder ``kept`` beside the log, so that nobody who reads the log itself has to list
them. A generation that is to follow this one is brought the writes that it lacks from there.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shardline.shards.core.errors import CorruptFile
from shardline.shards.live.log_files import LogFiles
from shardline.shards.live.log_reader import history_of
from shardline.shards.live.log_segments import SegmentName, segment_names

logger = logging.getLogger(__name__)

KEPT_FOLDER = "kept"


def continued_by(
    folder: Path, segment: SegmentName, older: Sequence[SegmentName], files: LogFiles
) -> list[SegmentName]:
    """Those of the ``older`` ones that are the segment's history: what a primary of the past has
    written in vain is not. None if one of them is damaged: what they hold is in a main index."""
    try:
        history = history_of(folder, [*older, segment], 0, {}, files)
    except CorruptFile as error:
        logger.warning("not kept for a later publish: %s", error)
        return []
    return [header.name for header in history[:-1]]


def put_aside(folder: Path, segments: Sequence[SegmentName], files: LogFiles) -> None:
    """Moves segments of the log in ``folder`` to its kept ones; durable. Raises OSError."""
    if not segments:
        return
    kept = folder / KEPT_FOLDER
    files.make_folder(kept)
    for name in segments:
        with suppress(FileNotFoundError):  # a primary of the past has trimmed the log as well
            files.rename(folder / str(name), kept / str(name))
    files.sync_folder(kept)
    files.sync_folder(folder)


def surplus(folder: Path, most_bytes: int, files: LogFiles) -> list[Path]:
    """The oldest kept segments of the log in ``folder``, in their order, without which the others
    have ``most_bytes`` at most. Raises OSError."""
    kept = folder / KEPT_FOLDER
    try:
        names = segment_names(files.names(kept))
    except FileNotFoundError:
        return []
    left = most_bytes
    for place, name in reversed(list(enumerate(names))):
        with suppress(FileNotFoundError):  # another process has removed it
            left -= files.size(kept / str(name))
        if left < 0:
            return [kept / str(each) for each in names[: place + 1]]
    return []


def drop_kept(folder: Path, most_bytes: int, files: LogFiles) -> None:
    """Removes the ``surplus``, the oldest first: whatever ends it, none is left behind a gap.
    Raises OSError."""
    dropped = surplus(folder, most_bytes, files)
    for path in dropped:
        files.remove(path)
    if dropped:
        files.sync_folder(folder / KEPT_FOLDER)


class WithKept(LogFiles):
    """The files of a log as ``files`` has them, its kept segments among them; to read only."""

    def __init__(self, files: LogFiles) -> None:
        self._files = files
        # by folder, its names, and with those of the kept ones: listed again when it has changed,
        # for a follower looks often, and there may be thousands
        self._listed: dict[Path, tuple[list[str], list[str]]] = {}

    def names(self, folder: Path) -> list[str]:
        # in this order: what is put aside between the two is listed twice rather than never
        names = self._files.names(folder)
        if self._listed.get(folder, ([], []))[0] != names:
            kept: list[str] = []
            with suppress(FileNotFoundError):
                kept = self._files.names(folder / KEPT_FOLDER)
            self._listed[folder] = names, list(dict.fromkeys((*names, *kept)))
        return list(self._listed[folder][1])

    def size(self, path: Path) -> int:
        try:
            return self._files.size(path)
        except FileNotFoundError:
            return self._files.size(self._kept(path))

    def read(self, path: Path, offset: int = 0, size: int = -1) -> bytes:
        try:
            return self._files.read(path, offset, size)
        except FileNotFoundError:
            try:
                return self._files.read(self._kept(path), offset, size)
            except FileNotFoundError:
                self._listed.clear()  # it has been removed meanwhile
                raise

    def _kept(self, path: Path) -> Path:
        return path.parent / KEPT_FOLDER / path.name
