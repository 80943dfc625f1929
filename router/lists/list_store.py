"""The lists of a store: read, and changed by any number of routers at once, without a lock.

<store>/lists/<two hex digits>/<name>/<version, 12 digits>.ids    by a hash of the name
<store>/lists/tmp/                                                files and folders that are made

A list is a folder, and each of its versions a whole file that is never changed; the newest counts.
A writer makes a complete file, fsyncs it, and gives it the name of the version after the newest
that it has seen, by a hard link: which fails if another writer was first, and then it looks again
and makes its change anew. So no change is lost, and nobody sees half of one. A change is
acknowledged after the folder has been fsynced. The version before stays for those who read it now,
older ones are removed, oldest first. So a name may be free because it was taken long ago: a writer
who has made a link looks whether the version that it saw is still there. If it is, the name was
never taken. If not, its link came too late, among the older versions, where nobody reads it; or in
time, and others have gone on from there: to make the change once more does no harm in either case.

Deleting a list writes a version that says so: a change that is made at the same time is based on
it, or it on the change. Some day `shardline gc` removes the folder (``list_removal``). So that a
writer who has looked before cannot link into a folder made anew, it links by the descriptor of the
folder that it looked at; and a new folder appears with its first version in it, by a rename that
succeeds only where there is none, or an empty one.

A newest version that is damaged is not passed over for the one before it, which may lack an id that
was acknowledged: reading the list fails until it is replaced.
"""

import errno
import logging
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from shardline.router.lists.list_disk import DISK, FOLDER, ListDisk
from shardline.router.lists.list_file import (
    ABSENT,
    MAX_FILE_BYTES,
    StoredList,
    decode_list,
    encode_list,
)
from shardline.shards.core.errors import CorruptFile, ListsUnavailable, Unavailable
from shardline.shards.core.small_files import read_small

logger = logging.getLogger(__name__)

LISTS_FOLDER = "lists"  # of a store
GENERATIONS_FOLDER = "generations"  # every store that is served has it
TEMPORARY_FOLDER = "tmp"
BUCKETS = tuple(f"{number:02x}" for number in range(256))
VERSION = re.compile(r"(\d{12})\.ids")
LOOKS = 100  # each misses only if the list was changed twice while it was read
TAKEN = {errno.ENOTEMPTY, errno.EEXIST}
NO_FOLDER = {errno.ENOENT, errno.ESTALE}  # ESTALE is how NFS says it

# From the newest version to what shall follow it, whose version number does not count; None: as it
# is. It may be called several times, once per look.
Change = Callable[[StoredList], StoredList | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What came of a change: the list before it and now.

    linked_after, linked_before: two moments, of time.monotonic, between which it took effect.
    """

    before: StoredList
    now: StoredList
    linked_after: float
    linked_before: float


def lists_folder(generation_dir: str) -> Path:
    """Of the store that has the generation in this folder.

    Raises:
        ListsUnavailable: the folder is not one of a store.
    """
    generation = Path(generation_dir)
    if generation.parent.name != GENERATIONS_FOLDER:
        raise ListsUnavailable("it is not known where the store is")
    return generation.parent.parent / LISTS_FOLDER


def bucket_of(name: str) -> str:
    return BUCKETS[zlib.crc32(name.encode("ascii")) & 0xFF]


def folder_name(name: str) -> str:
    """No name begins with a dot then, as those of hidden files do; % is in no list's name."""
    return f"%2E{name[1:]}" if name.startswith(".") else name


def list_name(folder: str) -> str:
    """The reverse of ``folder_name``."""
    return f".{folder[3:]}" if folder.startswith("%2E") else folder


def file_name(version: int) -> str:
    return f"{version:012d}.ids"


def _is_there(descriptor: int, name: str) -> bool:
    """Whether the folder has this file. It is opened: NFS may answer ``stat`` from memory."""
    try:
        os.close(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=descriptor))
    except FileNotFoundError:
        return False
    return True


def versions_in(names: Iterable[str]) -> list[int]:
    """The versions among the names in a list's folder, oldest first."""
    return sorted(int(match[1]) for name in names if (match := VERSION.fullmatch(name)))


class ListStore:
    """The lists below ``root``. Its methods block, and may be called from any thread."""

    def __init__(
        self, root: Path, disk: ListDisk = DISK, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.root = root
        self._disk = disk
        self._now = now
        self._durable: set[Path] = set()  # folders that this process has seen to

    def folder(self, name: str) -> Path:
        return self.root / bucket_of(name) / folder_name(name)

    def newest(self, name: str, known: int = -1) -> StoredList | None:
        """The list; None: its newest version is still ``known``.

        Raises:
            OSError: it cannot be read; of a list that is not there, that the store is not.
            CorruptFile, NewerFormat: as ``decode_list``. Unavailable: it changes too fast.
        """
        folder = self.folder(name)
        for _ in range(LOOKS):
            try:
                found = os.listdir(folder)  # noqa: PTH208, half the time of Path.iterdir
            except FileNotFoundError:
                self.refuse_missing_store(folder.parent)
                found = []
            version = max(versions_in(found), default=0)
            if version == known:
                return None
            if version == 0:
                return ABSENT
            with suppress(FileNotFoundError):  # two newer ones have come since
                return self._read(folder, name, version)
        raise Unavailable(f"{folder}: changes faster than it can be read")

    def write(
        self, name: str, change: Change, until: float, make_room: Callable[[str], None]
    ) -> Written:
        """Changes a list; durable on return. make_room is called with the bucket of a list that is
        to be created, and may refuse it. until: when to give up, of ``now``.

        Raises:
            OSError: of the disk. Where nothing was linked yet nothing has changed; else the change
                can be seen, and may be gone after a power cut.
            Unavailable: other writers were first until it was too late; nothing has changed.
            NewerFormat, and what ``change`` and ``make_room`` raise.
        """
        floor = 0
        while True:
            done = self._attempt(name, change, floor, make_room)
            if isinstance(done, Written):
                return done
            floor = done
            if self._now() >= until:
                raise Unavailable(f"the list {name} is being changed by others all the time")

    def _attempt(
        self, name: str, change: Change, floor: int, make_room: Callable[[str], None]
    ) -> Written | int:
        """Another writer was first: the version that there is by now, 0 where that is not known."""
        folder = self.folder(name)
        with _opened(folder) as descriptor:
            before = self._newest_before(folder, descriptor, name, floor)
            if before is None:
                return 0
            after = change(before)
            if after is None:
                now = self._now()
                if descriptor is not None:  # who made this version may not have done so
                    self._sync(descriptor, folder.parent)
                return Written(before=before, now=before, linked_after=now, linked_before=now)
            after = replace(after, version=before.version + 1)
            self._prepare(folder.parent)
            if before.version == 0:
                make_room(folder.parent.name)
                return self._created(folder, name, after)
            assert descriptor is not None
            return self._followed(folder, descriptor, name, before, after)

    def _created(self, folder: Path, name: str, after: StoredList) -> Written | int:
        """A list's first version, in a folder that appears with it."""
        with self._temporary() as staging:
            staging.mkdir()
            self._disk.write_new(staging / file_name(after.version), encode_list(name, after))
            self._disk.sync_path(staging)
            linked_after = self._now()
            try:
                self._disk.rename_folder(staging, folder)
            except OSError as error:
                if error.errno in TAKEN:
                    return 0
                raise
        linked_before = self._now()
        self._disk.sync_path(folder.parent)
        return Written(
            before=ABSENT, now=after, linked_after=linked_after, linked_before=linked_before
        )

    def _followed(
        self, folder: Path, descriptor: int, name: str, before: StoredList, after: StoredList
    ) -> Written | int:
        """The version after ``before``, in the folder of the descriptor."""
        with self._temporary() as temporary:
            self._disk.write_new(temporary, encode_list(name, after))
            linked_after = self._now()
            try:
                self._disk.link(temporary, descriptor, file_name(after.version))
            except FileExistsError:
                return after.version
            except OSError as error:
                if error.errno in NO_FOLDER:
                    return 0
                raise
        linked_before = self._now()
        if not _is_there(descriptor, file_name(before.version)):
            with suppress(OSError):
                self._disk.remove(descriptor, file_name(after.version))
            return 0
        self._sync(descriptor, folder.parent)
        self._remove_older(descriptor, before.version)
        return Written(
            before=before, now=after, linked_after=linked_after, linked_before=linked_before
        )

    def _newest_before(
        self, folder: Path, descriptor: int | None, name: str, floor: int
    ) -> StoredList | None:
        """What a change is based on; None: others have changed it meanwhile. floor: a version that
        there has been, which NFS may not list yet."""
        if descriptor is None:
            self.refuse_missing_store(folder.parent)
            return ABSENT
        listed = os.listdir(descriptor)  # noqa: PTH208, takes a descriptor
        version = max([floor, *versions_in(listed)])
        if version == 0:
            return ABSENT
        try:
            return self._read(folder, name, version)
        except FileNotFoundError:
            return None
        except CorruptFile as error:
            logger.error("%s", error)
            return StoredList(version=version, is_damaged=True)

    def _read(self, folder: Path, name: str, version: int) -> StoredList:
        path = folder / file_name(version)
        return decode_list(read_small(path, MAX_FILE_BYTES), name, version, path)

    def _sync(self, descriptor: int, bucket: Path) -> None:
        """The folder's own name too: who made it may have ended before that was durable."""
        self._disk.sync_folder(descriptor)
        self._disk.sync_path(bucket)

    def _remove_older(self, descriptor: int, than: int) -> None:
        """The change is durable: what cannot be removed is left to ``shardline gc``."""
        for version in versions_in(os.listdir(descriptor)):
            if version < than:
                with suppress(OSError):
                    self._disk.remove(descriptor, file_name(version))

    def _prepare(self, bucket: Path) -> None:
        """Makes the folders that all lists share. Not the store's: it may not be mounted."""
        for folder in (self.root, self.root / TEMPORARY_FOLDER, bucket):
            if folder not in self._durable or not folder.is_dir():
                self._disk.make_folder(folder)
                self._durable.add(folder)

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A path for a new file or folder, of which nothing is left at the end of the block."""
        path = self.root / TEMPORARY_FOLDER / secrets.token_hex(8)
        try:
            yield path
        finally:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def refuse_missing_store(self, folder: Path) -> None:
        """A store that is not mounted has no lists either, and that must not pass for none."""
        if not folder.is_dir() and not (self.root.parent / GENERATIONS_FOLDER).is_dir():
            raise FileNotFoundError(errno.ENOENT, "the store is not there", str(self.root.parent))


@contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    """A descriptor; None: there is no such folder."""
    try:
        descriptor = os.open(folder, FOLDER)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
