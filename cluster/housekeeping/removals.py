"""What may go from a store, and how it goes: each thing so that an end at any moment leaves no half
of it that anybody takes for a whole, and that the next time removes the rest.
"""

import os
import stat
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from shardline.cluster.backup.restore import FOLDER as RESTORED
from shardline.cluster.store import Store
from shardline.router.experiments.event_files import days_of
from shardline.router.lists.list_removal import deleted_lists, left_by_writers, remove_deleted
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.files import (
    LIVE_FOLDER,
    MANIFEST_NAME,
    abandoned_folders,
    number_of,
    remove_tree,
)
from shardline.shards.live.kept_segments import surplus
from shardline.shards.live.log_files import FILES
from shardline.shards.live.mains import superseded
from shardline.shards.storage.generation import read_generation

_STAGED = f".{RESTORED}.*"


class Kind(StrEnum):
    """generation: with what was written to it. writes: of a generation that is gone. unfinished:
    what a command that was killed has left. compaction: an older one of a shard, or half of one.
    log: kept segments beyond the bound. embeddings: an embedding set. list: a deleted one.
    events: those of a day."""

    GENERATION = "generation"
    WRITES = "writes"
    UNFINISHED = "unfinished"
    COMPACTION = "compaction"
    LOG = "log"
    EMBEDDINGS = "embeddings"
    LIST = "list"
    EVENTS = "events"


@dataclass(frozen=True, slots=True)
class Removal:
    """One file or folder that may go, and the bytes in it, by its kind."""

    kind: Kind
    path: Path
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """live: what CURRENT names. held: generations that nobody may touch. keep: older ones to leave.
    keep_log_bytes: of each shard. keep_embeddings: embedding sets to leave, the newest; None: all.
    keep_event_bytes: of events, the newest days; None: all. now: of time.time; lists that were
    deleted lately are left.
    """

    live: int | None
    held: Collection[int]
    keep: int
    keep_log_bytes: int
    keep_embeddings: int | None = None
    now: float = field(default_factory=time.time)
    keep_event_bytes: int | None = None


def removals(store: Store, policy: Policy) -> list[Removal]:
    """All that may go, in the order in which it may; nothing is changed."""
    gone = old_generations(store.generation_numbers(), policy)
    found = [
        Removal(
            Kind.GENERATION,
            store.generation(number),
            bytes_of(store.generation(number)) + bytes_of(store.writes(number)),
        )
        for number in gone
    ]
    found += _described(Kind.UNFINISHED, _unfinished(store, policy.held))
    found += _described(Kind.UNFINISHED, left_by_writers(store.root, policy.now))
    found += _described(Kind.LIST, deleted_lists(store.root, policy.now))
    found += _described(Kind.WRITES, _orphaned_writes(store))
    for number in store.generation_numbers():
        if number not in gone:
            found += _described(Kind.UNFINISHED, _unlisted_shards(store.generation(number)))
            for live in _shard_folders(store.writes(number)):
                found += _described(Kind.COMPACTION, superseded(live))
                found += _described(Kind.LOG, surplus(live, policy.keep_log_bytes, FILES))
    if policy.keep_embeddings is not None:
        found += _described(Kind.EMBEDDINGS, _old_embeddings(store, policy.keep_embeddings))
    if policy.keep_event_bytes is not None:
        found += _old_events(store, policy.keep_event_bytes)
    return found


def old_generations(complete: list[int], policy: Policy) -> list[int]:
    """Those of ``complete``, ascending, that may go. None where none is live: nobody can tell then
    what is old."""
    live = policy.live or 0
    older = [number for number in complete if number < live and number not in policy.held]
    return older[: max(0, len(older) - policy.keep)]


def remove(store: Store, removal: Removal, in_use: Callable[[], Collection[int]]) -> bool:
    """False: it is left, because its generation is among those ``in_use`` by now, or somebody
    writes to the list again. Raises OSError, and what ``in_use`` raises."""
    if removal.kind is Kind.GENERATION:
        number = number_of(removal.path.name)
        assert number is not None
        return remove_generation(store, number, in_use)
    if removal.kind is Kind.LIST:
        return remove_deleted(removal.path, time.time())
    if removal.path.is_dir():
        (removal.path / MANIFEST_NAME).unlink(missing_ok=True)  # first: half of it is not complete
        remove_tree(removal.path)
    else:
        removal.path.unlink(missing_ok=True)
    return True


def remove_generation(store: Store, number: int, in_use: Callable[[], Collection[int]]) -> bool:
    """With what was written to it; False: it is left, being among those ``in_use``, which is asked
    at the last moment: since the last look it may have been published. Raises: as ``remove``."""
    store.remember_generation(number)  # one from before `build` did so
    if not store.retire(number, in_use):
        return False
    remove_tree(store.generation(number))
    remove_tree(store.writes(number))
    return True


def bytes_of(path: Path) -> int:
    """Of a file, or of all below a folder; 0 where there is nothing. What goes meanwhile, beside a
    cluster say, counts or not."""
    size = _file_bytes(path)
    for folder, _, names in os.walk(path):  # passes over folders that are gone
        size += sum(_file_bytes(Path(folder) / name) for name in names)
    return size


def _file_bytes(path: Path) -> int:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _described(kind: Kind, paths: Iterator[Path] | list[Path]) -> list[Removal]:
    return [Removal(kind, path, bytes_of(path)) for path in paths]


def _unfinished(store: Store, held: Collection[int]) -> Iterator[Path]:
    """Of commands and processes on this host that were killed, and of removals that were."""
    yield from abandoned_folders(store.generations)
    yield from abandoned_folders(store.embeddings)
    for folder in sorted(store.generations.glob("[0-9]*")):
        number = number_of(folder.name)
        if number is None:
            continue
        if not (folder / MANIFEST_NAME).is_file() and number not in held:
            yield folder
        yield from abandoned_folders(folder)
        for live in _shard_folders(store.writes(number)):
            yield from abandoned_folders(live)


def _orphaned_writes(store: Store) -> Iterator[Path]:
    """What was written to generations that are not there. While a restore is at work it may have
    put its writes in place and not yet its generation."""
    folders = sorted((store.root / LIVE_FOLDER).glob("[0-9]*"))
    abandoned = abandoned_folders(store.generations)
    if any(path not in abandoned for path in store.generations.glob(_STAGED)):
        return
    for folder in folders:
        number = number_of(folder.name)
        if number is not None and not store.generation(number).exists():
            yield folder


def _unlisted_shards(generation: Path) -> Iterator[Path]:
    """Folders of shards that the manifest does not list: a later main index has replaced them."""
    try:
        listed = {entry.folder for entry in read_generation(generation).shards}
    except ShardlineError:  # a damaged manifest: nobody can tell
        return
    for folder in sorted(generation.glob("shard-*")):
        if folder.name not in listed:
            yield folder


def _shard_folders(writes: Path) -> list[Path]:
    return sorted(path for path in writes.glob("shard-*") if path.is_dir())


def _old_events(store: Store, keep_bytes: int) -> list[Removal]:
    """The oldest days, until the others have at most so many bytes; never the newest, which routers
    write to."""
    days = _described(Kind.EVENTS, days_of(store.events))
    surplus_bytes = sum(day.bytes for day in days) - keep_bytes
    old = []
    for day in days[:-1]:
        if surplus_bytes <= 0:
            break
        old.append(day)
        surplus_bytes -= day.bytes
    return old


def _old_embeddings(store: Store, keep: int) -> list[Path]:
    manifests = sorted(
        store.embeddings.glob(f"*/{MANIFEST_NAME}"), key=lambda path: path.stat().st_mtime_ns
    )
    return [path.parent for path in manifests[: max(0, len(manifests) - keep)]]
