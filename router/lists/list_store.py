"""The lists of a store: read, and changed by any number of routers at once, without a lock.

<store>/lists/<two hex digits>/<name>/<version, 12 digits>.ids    by a hash of the name
<store>/lists/tmp/                                                files and folders that are made

A list is a folder, and each of its versions a whole file that is never changed; the newest counts.
A writer makes a complete file, fsyncs it, and gives it the name of the version after the newest
that it has seen, by a hard link: which fails if another writer was first, and then it looks again
and makes its change anew. So no change is lost, and nobody sees half of one. A change is
acknowledged after the folder has been fsynced. The version before stays for those who read it now,
older ones are removed, oldest first. So a name may be free because it was taken long ago: a writer
who has made a link looks whether the version that it saw is still there, the very same file. If it
is, the name was never taken. If not, its link came too late, among the older versions, where nobody
reads it; or in time, and others have gone on from there: to make the change once more does no harm
in either case.

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
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from io import BufferedReader
from os.path import sameopenfile
from pathlib import Path

from shardline.router.lists.list_disk import DISK, FOLDER, ListDisk
from shardline.router.lists.list_file import (
    ABSENT,
    MAX_FILE_BYTES,
    StoredList,
    decode_list,
    encode_list,
)
from shardline.router.lists.list_paths import (
    GENERATIONS_FOLDER,
    TEMPORARY_FOLDER,
    bucket_of,
    file_name,
    folder_name,
    names_in,
    versions_in,
)
from shardline.shards.core.errors import CorruptFile, ListsUnavailable, Unavailable
from shardline.shards.core.small_files import open_regular, read_open, read_small

logger = logging.getLogger(__name__)

LOOKS = 100  # each misses only if the list was changed twice while it was read
TAKEN = {errno.ENOTEMPTY, errno.EEXIST}
NO_FOLDER = {errno.ENOENT, errno.ESTALE}  # ESTALE is how NFS says it

# From the newest version to what shall follow it, whose version number does not count; None: as it
# is. It may be called several times, once per look.
Change = Callable[[StoredList], StoredList | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What came of a change: the list before it and now.

    linked_after, linked_before: two moments, of time.monotonic, between which it took effect; both
    are when it was looked at, where there was nothing to change.
    """

    before: StoredList
    now: StoredList
    linked_after: float
    linked_before: float


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
            CorruptFile, NewerFormat: as ``decode_list``. ListsUnavailable: it changes too fast.
        """
        folder = self.folder(name)
        for _ in range(LOOKS):
            found = names_in(folder)
            if not found:
                self.refuse_missing_store(folder.parent)
            version = max(versions_in(found), default=0)
            if version == known:
                return None
            if version == 0:
                return ABSENT
            with suppress(FileNotFoundError):  # two newer ones have come since
                return self._read(folder, name, version)
        raise ListsUnavailable(f"the list {name} changes faster than it can be read")

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
        folder, began = self.folder(name), self._now()
        with ExitStack() as opened:
            descriptor = opened.enter_context(_opened(folder))
            base = self._newest_before(folder, descriptor, name, floor, opened)
            if base is None:
                return 0
            before = base.stored
            after = change(before)
            if after is None:
                if descriptor is not None:  # who made this version may not have done so
                    self._sync(descriptor, folder.parent)
                return Written(before=before, now=before, linked_after=began, linked_before=began)
            after = replace(after, version=before.version + 1)
            self._prepare(folder.parent)
            if before.version == 0:
                make_room(folder.parent.name)
                return self._created(folder, name, after)
            assert descriptor is not None
            return self._followed(folder, descriptor, name, base, after)

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
        self, folder: Path, descriptor: int, name: str, base: "_Base", after: StoredList
    ) -> Written | int:
        """The version after ``base``, in the folder of the descriptor."""
        before = base.stored
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
        if not base.is_there(descriptor):
            with suppress(OSError):
                self._disk.remove(descriptor, file_name(after.version))
            return 0
        self._sync(descriptor, folder.parent)
        self._remove_older(descriptor, before.version)
        return Written(
            before=before, now=after, linked_after=linked_after, linked_before=linked_before
        )

    def _newest_before(
        self, folder: Path, descriptor: int | None, name: str, floor: int, opened: ExitStack
    ) -> "_Base | None":
        """What a change is based on; None: others have changed it meanwhile. floor: a version that
        there has been, which NFS may not list yet."""
        if descriptor is None:
            self.refuse_missing_store(folder.parent)
            return _Base(ABSENT)
        listed = os.listdir(descriptor)  # noqa: PTH208, takes a descriptor
        version = max([floor, *versions_in(listed)])
        if version == 0:
            if listed:  # nobody else puts anything there, and no folder can take its place
                raise OSError(errno.ENOTEMPTY, "files in it are none of a list's", str(folder))
            return _Base(ABSENT)
        path, file = folder / file_name(version), None
        try:
            file = opened.enter_context(open_regular(path))
            content = read_open(file, path, MAX_FILE_BYTES)
            return _Base(decode_list(content, name, version, path), file)
        except FileNotFoundError:
            return None
        except CorruptFile as error:
            logger.error("%s", error)
            return _Base(StoredList(version=version, is_damaged=True), file)

    def _read(self, folder: Path, name: str, version: int) -> StoredList:
        path = folder / file_name(version)
        return decode_list(read_small(path, MAX_FILE_BYTES), name, version, path)

    def _sync(self, descriptor: int, bucket: Path) -> None:
        """The folder's own name too: who made it may have ended before that was durable."""
        self._disk.sync_folder(descriptor)
        self._disk.sync_path(bucket)

    def _remove_older(self, descriptor: int, than: int) -> None:
        """The change is durable: what cannot be removed is left to ``shardline gc``, and all that
        is newer: no name may become free while an older one is taken."""
        with suppress(OSError):
            for version in versions_in(os.listdir(descriptor)):
                if version < than:
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


@dataclass(frozen=True, slots=True)
class _Base:
    """A version that a change is based on. file: where it was read, which stays open meanwhile, so
    that no other file gets its number; None: there is none, or it is no regular file."""

    stored: StoredList
    file: BufferedReader | None = None

    def is_there(self, descriptor: int) -> bool:
        """Whether the folder still has it, and not what a writer who was too late has put in its
        place for a moment. It is opened: NFS may answer ``stat`` from memory."""
        name, flags = file_name(self.stored.version), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            found = os.open(name, flags, dir_fd=descriptor)
        except FileNotFoundError:
            return False
        try:
            return self.file is None or sameopenfile(found, self.file.fileno())
        finally:
            os.close(found)


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
