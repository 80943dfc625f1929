"""Takes a snapshot of a generation from its files, while it is served and written, or while not."""

import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from shardline.cluster.backup.backup_folder import BackupFolder, Copied
from shardline.cluster.backup.snapshot_manifest import GENERATION, LIVE, Snapshot, write_snapshot
from shardline.cluster.spread import Progress
from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, InvalidInput, NotFound
from shardline.shards.core.files import MANIFEST_NAME, FileEntry
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.live_rows import make_durable
from shardline.shards.live.log import GROUP_BYTES, Log
from shardline.shards.live.log_tail import read_settled
from shardline.shards.live.mains import KEYS_NAME, compacted_seqs, main_folder, read_main
from shardline.shards.live.records import Record, Upsert
from shardline.shards.storage.generation import (
    ITEM_IDS_NAME,
    GenerationManifest,
    ShardEntry,
    read_generation,
    read_item_ids,
    shard_folder,
)

UNFINISHED = "_unfinished"  # in a folder that is not whole yet, so that another try may replace it
MARK_BYTES = 4096  # more than a mark has
STAGE = "snapshot, MiB"
EPOCH = 1  # of the writes in a snapshot: any store has given out higher ones, or gives them next


def take_snapshot(
    store: Store,
    number: int,
    url: str,
    progress: Progress = lambda stage, done, total: None,
    *,
    is_loaded: Callable[[], bool] = lambda: True,
    sleep: Callable[[float], None] = time.sleep,
) -> Snapshot:
    """Copies generation ``number``, and of each shard all writes until now, to a folder or URL.

    Whatever ends it early leaves a folder that ``restore_snapshot`` refuses, and that another call
    replaces. Progress stage: STAGE; the total is an estimate until the end. is_loaded: whether a
    cluster may write the generation, asked where a shard's new primary does not begin.

    Raises:
        InvalidInput: something else is in the folder, or a whole snapshot; or another snapshot is
        being written there.
        NotFound, CorruptFile: of the generation's files; named. OSError, DataError: of either disk.
        Unavailable: of a shard nobody can tell whether its last writes hold: ``read_settled``.
    """
    source, folder = store.generation(number), _Target(url)
    manifest = read_generation(source)
    folder.begin()
    copied = _counted(progress, sum(entry.bytes for entry in manifest.files))
    for entry in manifest.common_files:
        _put_as(folder, source, entry, f"{GENERATION}/{entry.name}", copied)
    read = partial(read_settled, is_written=is_loaded, sleep=sleep)
    shards = [
        _copy_shard(source, manifest, shard, folder, copied, read) for shard in manifest.shards
    ]
    snapshot = Snapshot(
        generation=replace(manifest, shards=tuple(shard.entry for shard in shards)),
        seqs=tuple(shard.seq for shard in shards),
        writes=tuple(entry for shard in shards for entry in shard.writes),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    folder.sync()
    folder.check_alone()
    write_snapshot(folder, snapshot)
    folder.remove(UNFINISHED)
    folder.sync()
    total = snapshot.bytes >> 20
    progress(STAGE, total, total)
    return snapshot


class _Target(BackupFolder):
    """The folder, for one snapshot: once another one begins in it, nothing more is put into it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._mark = (
            "A snapshot is being written here, or its writer has ended early.\n"
            f"{secrets.token_hex(8)}\n"
        ).encode()

    def begin(self) -> None:
        """Empties what an earlier try has left, and puts a mark in."""
        if self.has(MANIFEST_NAME):
            raise InvalidInput(
                f"{self.url}: a snapshot is there already", hint="name another folder, or remove it"
            )
        names = self.names()
        if names and UNFINISHED not in names:
            raise InvalidInput(
                f"{self.url}: not empty", got=names[0], hint="name a new or an empty folder"
            )
        self.write(UNFINISHED, [self._mark])
        for name in (GENERATION, LIVE):
            self.check_alone()
            self.remove(name)

    def check_alone(self) -> None:
        """Raises InvalidInput: another writer has begun here since."""
        if not self.has(UNFINISHED) or self.read(UNFINISHED, MARK_BYTES) != self._mark:
            raise InvalidInput(
                f"{self.url}: another snapshot is being written here, or was",
                hint="name a folder of its own for each",
            )

    def put(self, source: Path, name: str, copied: Copied = lambda size: None) -> FileEntry:
        self.check_alone()
        return super().put(source, name, copied)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """What was copied of a shard: its main index, and ``writes`` up to ``seq``."""

    entry: ShardEntry
    seq: int
    writes: list[FileEntry]


def _copy_shard(
    source: Path,
    manifest: GenerationManifest,
    shard: ShardEntry,
    folder: BackupFolder,
    copied: Copied,
    read: Callable[[Path, int], list[Record]],
) -> _Shard:
    """read: the records of a log after a write, as ``read_settled``."""
    live = live_folder(source, shard.shard)
    while True:
        main = (compacted_seqs(live) or [0])[-1]
        try:
            records = read(live, main)
            make_durable(live)
            if main:
                entry = _copy_main(live, main, manifest, shard.shard, folder, copied)
            else:
                for file in shard.files:
                    _put_as(folder, source, file, f"{GENERATION}/{file.name}", copied)
                entry = shard
        except (CorruptFile, NotFound, FileNotFoundError):
            if compacted_seqs(live)[-1:] in ([], [main]):
                raise
            # a newer main index has come since, and its primary has removed what was being read
            folder.remove(f"{GENERATION}/{shard_folder(shard.shard)}")
            continue
        writes = _copy_writes(records, main, shard.shard, folder, copied)
        return _Shard(entry=entry, seq=main + len(records), writes=writes)


def _copy_main(
    live: Path,
    seq: int,
    manifest: GenerationManifest,
    shard: int,
    folder: BackupFolder,
    copied: Copied,
) -> ShardEntry:
    """The files of a compaction, under the names that a generation gives to those of a shard."""
    main, made = main_folder(live, seq), []
    found = read_main(live, seq, generation=manifest.generation, shard=shard, verify=False)
    for file in found.files:
        if file.name != KEYS_NAME:
            name = f"{shard_folder(shard)}/{file.name}"
            _put_as(folder, main, file, f"{GENERATION}/{name}", copied)
            made.append(replace(file, name=name, rows=found.rows))
    item_ids = read_item_ids(main / ITEM_IDS_NAME, rows=found.rows)
    return ShardEntry(
        shard=shard,
        id_min=int(item_ids[0]),
        id_max=int(item_ids[-1]),
        rows=found.rows,
        files=tuple(made),
        own=found.own,
    )


def _copy_writes(
    records: Sequence[Record], main: int, shard: int, folder: BackupFolder, copied: Copied
) -> list[FileEntry]:
    """Records after write ``main`` as a log of their own, which begins with 1."""
    if not records:
        return []
    with tempfile.TemporaryDirectory(prefix="shardline-snapshot-") as name:
        log, _ = Log.open(Path(name), EPOCH, after_seq=0)
        try:
            for part in _parts(records):
                log.append([replace(each, seq=each.seq - main, epoch=EPOCH) for each in part])
        finally:
            log.close()
        target = f"{LIVE}/{shard_folder(shard)}"
        return [
            folder.put(path, f"{target}/{path.name}", copied)
            for path in sorted(Path(name).iterdir())
        ]


def _parts(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Some records at a time: encoded ones are in memory besides."""
    part: list[Record] = []
    size = 0
    for record in records:
        part.append(record)
        size += record.change.vectors.nbytes if isinstance(record.change, Upsert) else 0
        if size > GROUP_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _put_as(
    folder: BackupFolder, source: Path, entry: FileEntry, name: str, copied: Copied
) -> None:
    """Copies a file that a manifest lists.

    Raises:
        CorruptFile: it is not as listed, so the copy is not either.
    """
    done = folder.put(source / entry.name, name, copied)
    if (done.bytes, done.sha256) != (entry.bytes, entry.sha256):
        raise CorruptFile(
            f"{source / entry.name}: altered since it was written",
            expected=f"{entry.bytes} bytes, sha256 {entry.sha256[:12]}…",
            got=f"{done.bytes} bytes, sha256 {done.sha256[:12]}…",
            hint="`shardline doctor` lists what else is damaged",
        )


def _counted(progress: Progress, total: int) -> Copied:
    done = 0

    def copied(size: int) -> None:
        nonlocal done
        done += size
        progress(STAGE, done >> 20, max(total, done) >> 20)

    return copied
