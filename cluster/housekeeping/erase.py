"""Erasure: what was deleted or replaced leaves the files of a shard, not searches alone.

A compaction writes a main index without it; the generation lists that one's files; then the older
main indexes, the files that were built, and the log that the main index contains are removed. Where
a cluster has the shard loaded, its primary trims the log, as it does after every compaction.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shardline.cluster.housekeeping.rebase import rebase
from shardline.cluster.store import Store
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.files import MANIFEST_NAME
from shardline.shards.live.compaction import compact
from shardline.shards.live.epoch_file import read_epoch
from shardline.shards.live.kept_segments import drop_kept
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.live_rows import newest_write
from shardline.shards.live.log import Log
from shardline.shards.live.log_files import FILES
from shardline.shards.live.log_segments import SegmentName, segment_names
from shardline.shards.live.log_tail import LogTail
from shardline.shards.live.mains import compacted_seqs, main_folder, read_main, remove_older

ROUNDS = 3  # of compactions: a segment that was written on meanwhile goes with the next one
CHANGEOVER_S = 60.0  # a primary loads a main index within this, or has trouble
POLL_S = 0.5
# Replicas that follow load the new main index, too, within seconds; on a network mount the files of
# the old one must not go before.
GRACE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """Of one shard. seq: every write up to this one has left the log, and what it replaced or
    deleted all files; left: why not, else None."""

    generation: int
    shard: int
    seq: int
    left: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How time passes while a cluster changes over; now: seconds since 1970, as files have it."""

    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.time


def compact_away(
    store: Store, number: int, shard: int, *, is_loaded: bool, waiting: Waiting | None = None
) -> Erasure:
    """What was deleted until now is in no file any more that a start of the shard needs; then
    ``drop_superseded``. is_loaded: a cluster has the generation loaded; if not, nobody may load it
    meanwhile.

    Raises:
        CorruptFile, NotFound: of the shard's files. Unavailable: of its log, which a primary that
        has not begun leads, or which cannot be written. OSError: of the disk.
    """
    waiting = waiting or Waiting()
    folder = store.generation(number)
    live = live_folder(folder, shard)
    if not is_loaded:
        _settle(store, live)
    seq = newest_write(folder, shard, sleep=waiting.sleep)
    if not seq:
        return Erasure(generation=number, shard=shard, seq=0)
    try:
        left = None
        if not is_loaded:
            made = compact(folder, shard, until=seq)
            # the log is the only other copy
            read_main(live, made.seq, generation=number, shard=shard)
            _trim(store, live, made.seq)
        elif not _trimmed_by_primary(folder, shard, seq, waiting):
            left = "its primary has not changed over to a new main index; try again"
    except InvalidInput as error:
        left = str(error)
    if left is None:
        rebase(folder, shard)
    return Erasure(generation=number, shard=shard, seq=seq, left=left)


def drop_superseded(
    store: Store, done: Erasure, *, is_loaded: bool, waiting: Waiting | None = None
) -> None:
    """Removes what ``compact_away`` has made unnecessary of a shard's log and compactions; what was
    built is in ``removals`` then. Raises OSError: something of it may still be there."""
    if done.left is None and done.seq:
        live = live_folder(store.generation(done.generation), done.shard)
        if is_loaded:
            _let_replicas_change(live, waiting or Waiting())
        drop_kept(live, 0, FILES)
        remove_older(live, kept=1)


def _settle(store: Store, live: Path) -> None:
    """Of a shard that nobody has loaded, and whose newest primary has ended before it began: what
    the next one would do, so that the last writes are certain."""
    seq = (compacted_seqs(live) or [0])[-1]
    tail = LogTail(live, after_seq=seq)
    tail.read_proven()
    if tail.left_out:
        _lead(store, live, seq).close()


def _lead(store: Store, live: Path, seq: int) -> Log:
    """Of a shard that nobody has loaded; its files hold write ``seq``."""
    epoch = max(store.counter(), read_epoch(live)) + 1
    store.raise_counter(epoch)
    return Log.open(live, epoch, after_seq=seq)[0]


def _trim(store: Store, live: Path, seq: int) -> None:
    """Of a shard that nobody has loaded: what its primary would do."""
    log = _lead(store, live, seq)
    try:
        log.roll()
        log.trim(seq)
    finally:
        log.close()


def _trimmed_by_primary(folder: Path, shard: int, seq: int, waiting: Waiting) -> bool:
    """Compacts until the log holds none of the first ``seq`` writes; False: it still does."""
    live = live_folder(folder, shard)
    for _ in range(ROUNDS):
        newest = newest_write(folder, shard, sleep=waiting.sleep)
        made = compact(folder, shard, until=newest)
        until = waiting.now() + CHANGEOVER_S
        while waiting.now() < until:
            segments = _segments(live)
            if all(name.first_seq > seq for name in segments):
                return True
            if segments[-1].first_seq > made.seq:
                break  # changed over; writes after the compaction share a segment with earlier ones
            waiting.sleep(POLL_S)
    return False


def _let_replicas_change(live: Path, waiting: Waiting) -> None:
    newest = main_folder(live, compacted_seqs(live)[-1]) / MANIFEST_NAME
    with suppress(FileNotFoundError):  # a still newer one has come
        since = waiting.now() - newest.stat().st_mtime
        if since < GRACE_S:
            waiting.sleep(GRACE_S - since)


def _segments(live: Path) -> list[SegmentName]:
    return segment_names(os.listdir(live))  # noqa: PTH208, as LogFiles.names
