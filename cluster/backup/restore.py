"""Makes a generation of a snapshot: with as many shards, file by file; with another number, anew
from the rows.

Everything is copied, verified and written beside the generations first. What was written since a
shard's main index goes to ``<store>/live`` an instant before the generation appears; if the process
is killed between the two, ``shardline gc`` removes it, and nobody ever uses its number.
"""

import errno
import logging
import os
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from shardline.cluster.backup.backup_folder import BackupFolder
from shardline.cluster.backup.respread import respread
from shardline.cluster.backup.snapshot_manifest import GENERATION, LIVE, Snapshot, read_snapshot
from shardline.cluster.backup.take_snapshot import EPOCH
from shardline.cluster.rollover.replayed_note import Replayed, new_run, write_note
from shardline.cluster.spread import Progress
from shardline.cluster.store import Store
from shardline.shards.core import files
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.files import FileEntry
from shardline.shards.live.live_rows import newest_write
from shardline.shards.storage.cut import Cut, cut_of
from shardline.shards.storage.generation import (
    GenerationManifest,
    read_generation,
    write_generation,
)

logger = logging.getLogger(__name__)

FOLDER = "restored"  # among the generations, until it is one
STAGE = "restore, MiB"
COPY = 1  # the snapshot's generation, in a store of its own


def restore_snapshot(
    store: Store,
    url: str,
    *,
    num_shards: int | None = None,
    threads: int = 1,
    progress: Progress = lambda stage, done, total: None,
) -> GenerationManifest:
    """Writes the next generation; it is not made the live one. num_shards: None as it was.

    Whatever ends it early leaves nothing that a store's readers see. Progress stages: STAGE, and
    those of ``respread``.

    Raises:
        NotFound: no whole snapshot there. InvalidInput: more shards than items.
        CorruptFile: a file of it is missing or altered; named. NewerFormat: of a later version.
        OSError, DataError: of either disk.
    """
    folder = BackupFolder(url)
    snapshot = read_snapshot(folder)
    with files.scratch_folder(store.generations / FOLDER) as scratch:
        copy = Store(scratch / "copy")
        _copy_files(folder, snapshot, copy, progress)
        ready, writes, manifest = copy.generation(COPY), copy.writes(COPY), snapshot.generation
        if num_shards not in (None, len(manifest.shards)):
            write_generation(ready, replace(manifest, generation=COPY))
            ready, writes = scratch / "respread", scratch / "no-writes"
            manifest = respread(copy, COPY, ready, num_shards, threads, progress)
        number = store.claim_generation()
        manifest = replace(
            manifest,
            generation=number,
            cut=_cut(store, snapshot),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_generation(ready, manifest)
        store.raise_counter(EPOCH)
        _note_writes(manifest, ready, writes)
        _put_in_place(store, number, ready, writes)
    return manifest


def _copy_files(folder: BackupFolder, snapshot: Snapshot, copy: Store, progress: Progress) -> None:
    """All files of a snapshot, as a generation COPY and its writes in a store of their own."""
    total, done = snapshot.bytes, 0

    def copied(size: int) -> None:
        nonlocal done
        done += size
        progress(STAGE, done >> 20, total >> 20)

    for entry in snapshot.generation.files:
        stored = replace(entry, name=f"{GENERATION}/{entry.name}")
        folder.get(stored, copy.generation(COPY) / entry.name, copied)
    for entry in snapshot.writes:
        folder.get(entry, copy.writes(COPY) / _below(entry, LIVE), copied)
    progress(STAGE, total >> 20, total >> 20)


def _below(entry: FileEntry, name: str) -> Path:
    return Path(entry.name).relative_to(name)


def _cut(store: Store, snapshot: Snapshot) -> Cut | None:
    """Which writes of this store's own generation the snapshot holds, if it was taken of one of
    these: in another store a generation of the same number is another one. None too where that
    one's log is shorter, having been cut or put back from a copy: its next writes are others than
    those that the snapshot holds under their numbers."""
    number = snapshot.generation.generation
    try:
        own = read_generation(store.generation(number))
    except (ShardlineError, OSError):  # not here any more, or damaged: nothing replays its writes
        return None
    taken = snapshot.generation
    is_same = (own.template, own.created_at) == (taken.template, taken.created_at)
    if not is_same or not _holds(store.generation(number), snapshot.seqs):
        return None
    return cut_of(number, snapshot.seqs, own.cut)


def _holds(generation: Path, seqs: tuple[int, ...]) -> bool:
    """Whether the logs of a generation go on to these writes."""
    try:
        return all(
            # its last writes count in any case: they were certain when the snapshot was taken
            newest_write(generation, shard, is_written=_nobody, sleep=_at_once) >= seq
            for shard, seq in enumerate(seqs)
        )
    except (ShardlineError, OSError) as error:
        logger.error("%s; `shardline publish` will replay all writes", error)
        return False


def _nobody() -> bool:
    return False


def _at_once(seconds: float) -> None:
    """Does not wait."""


def _note_writes(manifest: GenerationManifest, ready: Path, writes: Path) -> None:
    """Has a mirror know that the log in ``writes``, that of the generation ``ready``, holds nothing
    that the generation of its cut lacks. Raises OSError."""
    cut = manifest.cut
    if cut is not None and writes.is_dir():
        back = tuple(newest_write(ready, entry.shard) for entry in manifest.shards)
        seqs, run = cut.seqs, new_run()
        note = Replayed(generation=cut.generation, seqs=seqs, sending=seqs, run=run, back=back)
        write_note(writes, note)


def _put_in_place(store: Store, number: int, ready: Path, writes: Path) -> None:
    """Raises FileExistsError: a generation of this number is there; OSError: of the disk. Nothing
    of what was to be put in place is there then."""
    target, live = store.generation(number), store.writes(number)
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    ready.chmod(0o755)
    files.fsync_tree(ready)
    has_writes = writes.is_dir()
    if has_writes:
        files.fsync_tree(writes)
        live.parent.mkdir(exist_ok=True)
        writes.rename(live)
        files.fsync_folder(live.parent)
    try:
        ready.rename(target)
    except BaseException:
        if has_writes and ready.is_dir():  # not renamed, or it would be the generation's log by now
            shutil.rmtree(live, ignore_errors=True)
        raise
    files.fsync_folder(target.parent)
