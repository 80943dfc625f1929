"""The file calls of lists that change something, one method each: what tests replace by a disk that
fails, or by a process that is killed.

Nothing here retries, and nothing knows what the files mean.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

from shardline.shards.core.files import fsync_folder

NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class ListDisk:
    """Files by the operating system. Every method may raise OSError."""

    def make_folder(self, folder: Path) -> None:
        """Without its parents; durable. Does not mind that it exists."""
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)

    def write_new(self, path: Path, data: bytes) -> None:
        """A new file, its bytes durable; its name is not."""
        descriptor = os.open(path, NEW_FILE, 0o644)
        try:
            rest = memoryview(data)
            while rest:
                written = os.write(descriptor, rest)
                if written <= 0:
                    raise OSError(errno.EIO, "the disk took no bytes", str(path))
                rest = rest[written:]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def link(self, source: Path, folder: int, name: str) -> None:
        """A second name for a file, in the folder of this descriptor, which may have lost its own
        name meanwhile: FileNotFoundError then. FileExistsError: the name is taken."""
        os.link(source, name, dst_dir_fd=folder)

    def rename_folder(self, source: Path, target: Path) -> None:
        """Atomic; ``target`` must be absent or an empty folder."""
        source.rename(target)

    def sync_folder(self, descriptor: int) -> None:
        """Returns when what was created, renamed and removed in the folder is durable."""
        os.fsync(descriptor)

    def sync_path(self, folder: Path) -> None:
        fsync_folder(folder)

    def remove(self, folder: int, name: str) -> None:
        """A file of the folder of this descriptor. Does nothing where it is gone."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


DISK = ListDisk()
