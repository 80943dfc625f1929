"""The folder of a snapshot, on a disk or behind a URL: files go in and come out with checksums."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pyarrow import fs

from shardline.shards.core.errors import (
    CorruptFile,
    DataError,
    NotFound,
    ShardlineError,
    last_line,
)
from shardline.shards.core.files import FileEntry, fsync_folder
from shardline.shards.core.small_files import open_regular
from shardline.shards.storage.locations import Location

BLOCK_BYTES = 4 << 20
FLAT = ("s3", "gcs", "abfs")  # have no folders
OPTION = "the snapshot's folder"  # in messages about a URL

Copied = Callable[[int], None]  # told of bytes as they are copied


class BackupFolder:
    """Files by their names relative to the folder, with slashes.

    What is written to a local disk is fsynced; elsewhere it is durable when the store of objects
    says so, at the end of each file. Every method may raise OSError, or DataError where a remote
    file system gives a reason of its own.
    """

    def __init__(self, url: str) -> None:
        """url: a path, or a URL as ``Location.of`` takes it.

        Raises:
            InvalidInput: not such a URL.
        """
        self.location = Location.of(url, OPTION)
        self.url = url.rstrip("/") or "/"
        self._is_local = isinstance(self.location.system, fs.LocalFileSystem)

    def names(self) -> list[str]:
        """Of all files in it, sorted; none where there is no such folder."""
        system, path = self.location.system, self.location.path
        with self._told(""):
            selector = fs.FileSelector(path, allow_not_found=True, recursive=True)
            found = [each for each in system.get_file_info(selector) if each.is_file]
        return sorted(PurePosixPath(each.path).relative_to(path).as_posix() for each in found)

    def has(self, name: str) -> bool:
        with self._told(name):
            return bool(self._type(name) == fs.FileType.File)

    def path_of(self, name: str) -> str:
        """For messages."""
        return f"{self.url.rstrip('/')}/{name}"

    def write(self, name: str, blocks: Iterable[bytes], copied: Copied = lambda size: None) -> None:
        """Makes or replaces a file. What cannot be finished leaves nothing under this name, but for
        remote file systems that show a file while it is written."""
        where = self.location.child(name)
        # as stores of objects have it: whole or absent
        path = f"{where.parent.path}/.{where.name}.tmp" if self._is_local else where.path
        with self._told(name):
            if where.system.type_name not in FLAT:
                where.system.create_dir(where.parent.path, recursive=True)
            with where.system.open_output_stream(path) as stream:
                for block in blocks:
                    stream.write(block)
                    copied(len(block))
            if self._is_local:
                _fsync(Path(path))
                Path(path).rename(where.path)

    def put(self, source: Path, name: str, copied: Copied = lambda size: None) -> FileEntry:
        """Copies a file into it; the entry has the checksum of what was copied."""
        digest, size = hashlib.sha256(), 0

        def blocks() -> Iterator[bytes]:
            nonlocal size
            with open_regular(source) as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
                    yield block

        self.write(name, blocks(), copied)
        return FileEntry(name=name, bytes=size, sha256=digest.hexdigest())

    def get(self, entry: FileEntry, target: Path, copied: Copied = lambda size: None) -> None:
        """Copies a file out of it. Not fsynced.

        Raises:
            CorruptFile: it is missing, or not as its entry says; named.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with target.open("wb") as file:
            for block in self._blocks(entry.name):
                digest.update(block)
                size += len(block)
                if size > entry.bytes:
                    break
                file.write(block)
                copied(len(block))
        path = self.path_of(entry.name)
        if size != entry.bytes:
            got = f"{size} bytes" if size < entry.bytes else "more"
            raise CorruptFile(f"{path}: wrong size", expected=f"{entry.bytes} bytes", got=got)
        if digest.hexdigest() != entry.sha256:
            raise CorruptFile(
                f"{path}: wrong checksum",
                expected=f"sha256 {entry.sha256[:12]}…",
                got=f"{digest.hexdigest()[:12]}…",
                hint="the snapshot was altered after it was taken: restore another one",
            )

    def read(self, name: str, limit: int) -> bytes:
        """A whole file of at most ``limit`` bytes.

        Raises:
            NotFound: there is none. CorruptFile: it is larger.
        """
        if not self.has(name):
            raise NotFound(f"{self.path_of(name)}: no such file")
        content = b""
        for block in self._blocks(name):
            content += block
            if len(content) > limit:
                raise CorruptFile(
                    f"{self.path_of(name)}: too large", expected=f"at most {limit:,} bytes"
                )
        return content

    def remove(self, name: str) -> None:
        """A file, or a folder with all that is in it; does nothing where there is none."""
        where = self.location.child(name)
        with self._told(name):
            kind = self._type(name)
            if kind == fs.FileType.Directory:
                where.system.delete_dir(where.path)
            elif kind == fs.FileType.File:
                where.system.delete_file(where.path)

    def sync(self) -> None:
        """Returns when all names in it are durable."""
        if self._is_local:
            root = Path(self.location.path)
            for folder in (*(path for path in root.rglob("*") if path.is_dir()), root, root.parent):
                fsync_folder(folder)

    def _blocks(self, name: str) -> Iterator[bytes]:
        where = self.location.child(name)
        if not self.has(name):
            raise CorruptFile(
                f"{self.path_of(name)}: missing", hint="the copy is not whole: restore another one"
            )
        with self._told(name), where.stream() as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block

    def _type(self, name: str) -> fs.FileType:
        where = self.location.child(name)
        return where.system.get_file_info(where.path).type

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Libraries of remote file systems raise what they like, without a path: botocore's and
        google's errors are plain Exceptions."""
        try:
            yield
        except ShardlineError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            path = self.path_of(name).rstrip("/")
            raise DataError(f"{path}: cannot be read or written", got=last_line(error)) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
