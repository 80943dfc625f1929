"""What of lists may go from a store: lists that were deleted a day ago, and what writers who were
killed have left: older versions, and files that they had begun. `shardline gc` asks for it.

A deleted list goes so that a writer at the same moment loses nothing. Its files are removed by the
descriptor of the folder that was looked at, the version that says that it is deleted last of all;
then the folder, if it is empty. A writer who has seen that version either links the next one before
the folder goes, and the folder stays, or finds it gone and looks again. Who finds an empty folder
puts a new one in its place, in one step (``list_store``).
"""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from shardline.router.list_names import is_list_name
from shardline.router.lists.list_disk import DISK, FOLDER, ListDisk
from shardline.router.lists.list_file import HEADER, MAX_FILE_BYTES, decode_list
from shardline.router.lists.list_paths import (
    BUCKETS,
    LISTS_FOLDER,
    TEMPORARY_FOLDER,
    file_name,
    list_name,
    names_in,
    versions_in,
)
from shardline.router.lists.list_store import NO_FOLDER, TAKEN
from shardline.shards.core.errors import CorruptFile, NewerFormat
from shardline.shards.core.small_files import read_small

# A router goes by a version number for an hour at most (``list_service.FORGET_S``), and nobody
# writes for so long
KEEP_S = 86_400.0


def deleted_lists(store: Path, now: float) -> Iterator[Path]:
    """Folders of lists that were deleted KEEP_S ago or longer. now: of time.time."""
    for folder in _list_folders(store):
        if _gone_since(folder, versions_in(names_in(folder)), now):
            yield folder


def left_by_writers(store: Path, now: float) -> Iterator[Path]:
    """Files and folders that writers who were killed have left, KEEP_S ago or longer: versions
    before the last but one, which nobody reads any more, and temporary ones."""
    temporary = store / LISTS_FOLDER / TEMPORARY_FOLDER
    yield from (
        temporary / name for name in sorted(names_in(temporary)) if _is_old(temporary / name, now)
    )
    for folder in _list_folders(store):
        older = (folder / file_name(version) for version in versions_in(names_in(folder))[:-2])
        # no name may become free while an older one is taken (``list_store``)
        yield from takewhile(lambda path: _is_old(path, now), older)


def remove_deleted(folder: Path, now: float, disk: ListDisk = DISK) -> bool:
    """Removes a list that ``deleted_lists`` has found; False: it is in use again.

    Raises:
        OSError: of the disk; what is left goes the next time.
    """
    try:
        descriptor = os.open(folder, FOLDER)
    except FileNotFoundError:
        return True
    try:
        versions = versions_in(os.listdir(descriptor))  # noqa: PTH208, takes a descriptor
        if not _gone_since(folder, versions, now):
            return False
        for version in versions[:-1]:
            disk.remove(descriptor, file_name(version))
        disk.sync_folder(descriptor)  # or a power cut could bring back one of them alone
        disk.remove(descriptor, file_name(versions[-1]))
    finally:
        os.close(descriptor)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in {*NO_FOLDER, *TAKEN}:
            raise
        return False
    disk.sync_path(folder.parent)
    return True


def _gone_since(folder: Path, versions: list[int], now: float) -> bool:
    """Whether the newest of these versions says that the list was deleted, long enough ago."""
    name = list_name(folder.name)
    if not versions:
        return False
    path = folder / file_name(versions[-1])
    with suppress(FileNotFoundError, CorruptFile, NewerFormat):
        # of a deleted list there is no id in it: others need not be read
        is_short = path.stat().st_size == HEADER.size + len(name)
        if is_short and _is_old(path, now):
            return decode_list(read_small(path, MAX_FILE_BYTES), name, versions[-1], path).is_gone
    return False


def _is_old(path: Path, now: float) -> bool:
    with suppress(FileNotFoundError):
        found = path.lstat()
        is_plain = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
        return is_plain and found.st_mtime <= now - KEEP_S
    return False


def _list_folders(store: Path) -> Iterator[Path]:
    for bucket in BUCKETS:
        path = store / LISTS_FOLDER / bucket
        folders = (path / name for name in sorted(names_in(path)) if is_list_name(list_name(name)))
        yield from (folder for folder in folders if folder.is_dir())
