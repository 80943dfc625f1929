"""Where files of the user's are: a path, or a URL that pyarrow or fsspec knows."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
from pyarrow import fs

from shardline.shards.core.errors import DataError, InvalidInput, ShardlineError, last_line
from shardline.shards.storage.column_types import LIBRARY_ERRORS, first_line, read_errors

Version = tuple[int, int | None] | None  # size, time of change in ns; None: there is no file


@dataclass(frozen=True, slots=True)
class Location:
    """A path in a file system; ``name`` is its last part, for messages."""

    system: fs.FileSystem
    path: str

    @classmethod
    def of(cls, source: object, option: str = "--source") -> "Location":
        """A local path, or a URL that pyarrow or fsspec knows (s3://, gs://, file://, ...).

        Raises:
            InvalidInput: a URL of no known kind, or a malformed one.
        """
        text = str(source)
        if text in ("", "file://"):
            raise InvalidInput("no place to read from", field=option, expected="a path or a URL")
        if "://" not in text:
            return cls(fs.LocalFileSystem(), text.rstrip("/") or "/")
        try:
            return cls(*_from_url(text))
        except Exception as error:  # libraries behind fsspec raise what they like
            raise InvalidInput(
                "not a place to read from",
                field=option,
                expected="a path, or a URL such as s3://bucket/folder or file:///folder",
                got=f"{text}: {first_line(error)}",
                hint="URLs other than s3://, gs://, hdfs:// and file:// need fsspec installed",
            ) from error

    def open(self) -> pa.NativeFile:
        """The file for random access; a local one is mapped, so that only what is used is read."""
        if isinstance(self.system, fs.LocalFileSystem):
            return pa.memory_map(self.path)
        return self.system.open_input_file(self.path)

    def stream(self, compression: str | None = None) -> pa.NativeFile:
        """The file from its start, decompressed if it is said to be compressed."""
        return self.system.open_input_stream(self.path, compression=compression)

    def sha256(self) -> str:
        """The checksum of the file's content.

        Raises:
            DataError: not readable.
        """
        with read_errors(self.path), self.stream() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def version(self) -> Version:
        """Size in bytes and time of the last change, which another content does not share."""
        info = self._info()
        return (info.size, info.mtime_ns) if info.type == fs.FileType.File else None

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def parent(self) -> "Location":
        return Location(self.system, str(PurePosixPath(self.path).parent))

    def child(self, name: str) -> "Location":
        return Location(self.system, str(PurePosixPath(self.path) / name))

    @property
    def is_file(self) -> bool:
        return bool(self._info().type == fs.FileType.File)

    @property
    def is_folder(self) -> bool:
        return bool(self._info().type == fs.FileType.Directory)

    def named(self, stem: str) -> "Location | None":
        """The only file or folder in this folder that is called ``stem``, or ``stem.something``.

        Raises:
            DataError: there are several.
        """
        if self.child(stem)._info().type != fs.FileType.NotFound:
            return self.child(stem)
        found = sorted(
            entry.base_name
            for entry in self._entries(recursive=False)
            if entry.base_name.startswith(f"{stem}.")
        )
        if len(found) > 1:
            raise DataError(
                f"{self.path}: several tables called {stem}",
                got=", ".join(found),
                hint="--users-file, --items-file and --interactions-file say which",
            )
        return self.child(found[0]) if found else None

    def files(self) -> list["Location"]:
        """Those below the folder, by path, without those that tools keep for themselves."""
        start = len(self.path.rstrip("/")) + 1
        with read_errors(self.path):  # names that are not UTF-8
            paths = sorted(
                entry.path
                for entry in self._entries(recursive=True)
                if entry.type == fs.FileType.File
                and not any(part[0] in "_." for part in PurePosixPath(entry.path[start:]).parts)
            )
        return [Location(self.system, path) for path in paths]

    def _info(self) -> fs.FileInfo:
        with _remote_errors(self.path):
            return self.system.get_file_info(self.path)

    def _entries(self, *, recursive: bool) -> list[fs.FileInfo]:
        with _remote_errors(self.path):
            selector = fs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
            return list(self.system.get_file_info(selector))


@contextmanager
def _remote_errors(path: str) -> Iterator[None]:
    """As ``read_errors``. Libraries behind fsspec raise what they like: botocore's and google's
    errors are plain Exceptions."""
    with read_errors(path):
        try:
            yield
        except (ShardlineError, *LIBRARY_ERRORS):
            raise
        except Exception as error:
            raise OSError(last_line(error)) from error


def _from_url(url: str) -> tuple[fs.FileSystem, str]:
    try:
        system, path = fs.FileSystem.from_uri(url)
    except pa.ArrowInvalid:
        import fsspec

        handler, path = fsspec.core.url_to_fs(url)
        system = fs.PyFileSystem(fs.FSSpecHandler(handler))
    return system, path.rstrip("/") or "/"
