"""The file calls of a shard's log, one method each: what tests replace by a disk that fails.

Nothing here retries, and nothing knows what the files mean.
"""

import ctypes
import errno
import os
from pathlib import Path

from shardline.shards.core.errors import CorruptFile
from shardline.shards.core.files import fsync_folder
from shardline.shards.core.small_files import open_regular

# A segment is closed at 64 MiB; it may begin with a copy of the largest group and end with another.
MAX_READ_BYTES = 512 << 20
_NEW = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of <linux/falloc.h>; os.posix_fallocate has no flags
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_LOOK = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class LogFiles:
    """Files by the operating system. Every method may raise OSError."""

    def make_folder(self, folder: Path) -> None:
        """With its parents; durable. Does nothing where it exists."""
        if not folder.is_dir():
            self.make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            fsync_folder(folder.parent)

    def names(self, folder: Path) -> list[str]:
        return os.listdir(folder)  # noqa: PTH208, half the time of Path.iterdir

    def create(self, path: Path) -> int:
        """A descriptor of a new, empty file that is written at its end.

        Raises:
            FileExistsError: it exists.
        """
        return os.open(
            path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644
        )

    def reserve(self, descriptor: int, offset: int, size: int) -> None:
        """Room on the disk for what will be appended; the file's length does not change.

        Then an fsync need not wait until the file system has found room: 0.3 against 1.1 ms for
        52 KB on ext4. Not every file system can.
        """
        if _fallocate(descriptor, _KEEP_SIZE, offset, size) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        """How many bytes were written, possibly fewer than asked for."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Returns when the file's bytes and its length are durable."""
        os.fdatasync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Replaces ``target``, atomically."""
        source.rename(target)

    def sync_folder(self, folder: Path) -> None:
        """Returns when what was created, renamed and removed in the folder is durable."""
        fsync_folder(folder)

    def remove(self, path: Path) -> None:
        """Does nothing where it is gone."""
        path.unlink(missing_ok=True)

    def size(self, path: Path) -> int:
        """In bytes. The file is opened for it, as by ``read``."""
        descriptor = os.open(path, _LOOK)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def read(self, path: Path, offset: int = 0, size: int = -1) -> bytes:
        """At most ``size`` bytes from ``offset`` on, -1 for all; fewer where the file ends.

        The file is opened anew each time: on NFS that is when other hosts' changes are seen.

        Raises:
            CorruptFile: not a regular file, or far larger than any of a log.
        """
        with open_regular(path) as file:
            length = os.fstat(file.fileno()).st_size
            if length > MAX_READ_BYTES:
                raise CorruptFile(
                    f"{path}: too large",
                    expected=f"at most {MAX_READ_BYTES:,} bytes",
                    got=f"{length:,} bytes",
                )
            if offset >= length:
                return b""
            file.seek(offset)
            return file.read(size)


FILES = LogFiles()


def write_all(files: LogFiles, descriptor: int, data: bytes) -> None:
    """Raises OSError: the disk took fewer bytes, or none."""
    rest = memoryview(data)
    while rest:
        written = files.write(descriptor, rest)
        if written <= 0:
            raise OSError(errno.EIO, "the disk took no bytes")
        rest = rest[written:]


def write_new(files: LogFiles, path: Path, data: bytes, temporary_name: str) -> int:
    """Makes ``path``, complete or absent, and durable; returns a descriptor to append by.

    Nobody else may use ``temporary_name`` at the same time.

    Raises:
        OSError: something failed; ``path`` may be there, whole, or not.
    """
    temporary = path.with_name(temporary_name)
    files.remove(temporary)
    descriptor = files.create(temporary)
    try:
        write_all(files, descriptor, data)
        files.sync(descriptor)
        files.rename(temporary, path)
        files.sync_folder(path.parent)
    except BaseException:
        files.close(descriptor)
        raise
    return descriptor
