"""A disk in memory for tests of the log: it forgets what was not fsynced, and fails on demand.

A ``FakeDisk`` is what all processes of the machine see. ``ProcessFiles`` is the way of one process
to it: its calls can be counted, stopped before any of them, and made to fail. After ``power_cut``
a disk holds what was durable, and any part of the rest: appended bytes may be there, missing, cut
or zeros, and each change of a folder may have happened or not.
"""

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shardline.shards.live.log_files import LogFiles


@dataclass(slots=True)
class FakeFile:
    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


@dataclass(slots=True)
class FakeFolder:
    files: dict[str, FakeFile] = field(default_factory=dict)
    durable: dict[str, FakeFile] = field(default_factory=dict)
    # changes since: name removed or None, name that appeared or None, its file
    changes: list[tuple[str | None, str | None, FakeFile | None]] = field(default_factory=list)

    def change(self, gone: str | None, come: str | None, file: FakeFile | None) -> None:
        self.changes.append((gone, come, file))
        _change(self.files, gone, come, file)


def _change(
    files: dict[str, FakeFile], gone: str | None, come: str | None, file: FakeFile | None
) -> None:
    if gone is not None:
        files.pop(gone, None)
    if come is not None and file is not None:
        files[come] = file


class FakeDisk:
    """Files by folder and name; descriptors are never used again.

    is_network: what a process writes reaches the others with its fsync, as from another host.
    """

    def __init__(self, *, is_network: bool = False) -> None:
        self.is_network = is_network
        self.folders: dict[Path, FakeFolder] = {}
        self.open_files: dict[int, FakeFile] = {}  # closed ones too
        self.open_descriptors: set[int] = set()

    def power_cut(self, rng: random.Random | None) -> "FakeDisk":
        """What is there after the restart; without a generator exactly what was durable."""
        disk = FakeDisk()
        for path, folder in self.folders.items():
            files = dict(folder.durable)
            for change in folder.changes:
                if rng is not None and rng.random() < 0.5:
                    _change(files, *change)
            restarted = {name: _restarted(file, rng) for name, file in files.items()}
            disk.folders[path] = FakeFolder(files=restarted, durable=dict(restarted))
        return disk

    def file(self, path: Path) -> FakeFile:
        folder = self.folders.get(path.parent)
        if folder is None or path.name not in folder.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return folder.files[path.name]


def _restarted(file: FakeFile, rng: random.Random | None) -> FakeFile:
    content = bytes(file.durable)
    rest = bytes(file.content[len(content) :])
    if rng is not None:
        cut = rng.choice([0, rng.randint(0, len(rest)), len(rest)])
        zeros = rng.choice([0, 0, rng.randint(0, cut)])  # their pages were written, or only sizes
        content += bytes(zeros) + rest[zeros:cut]
    return FakeFile(content=bytearray(content), durable=content)


class Stopped(BaseException):
    """The process was killed."""


class FailingCalls:
    """From the call with this number on every call that changes something fails, until healed.

    The call itself, if it is a write and ``part`` is given, takes so many bytes.
    """

    def __init__(self, call: int, number: int, part: int | None = None) -> None:
        self.call, self.number, self.part = call, number, part

    def __call__(self, call: int, name: str) -> int | None:
        if name in ("close", "names", "size", "read", "remove") or call < self.call:
            return None
        if call == self.call and name == "write" and self.part is not None:
            return self.part
        raise OSError(self.number, "injected")

    def heal(self) -> None:
        self.call = 1 << 30


class ProcessFiles(LogFiles):
    """``before`` is called with the number of each call, from 1, and its name; it may raise.

    What it returns bounds the bytes of a write: None for all of them.
    """

    def __init__(
        self, disk: FakeDisk, before: Callable[[int, str], int | None] | None = None
    ) -> None:
        self.disk = disk
        self.before = before
        self.calls = 0
        self.syncs = 0
        self.fail_at_sync = 0  # this one of the files' fsyncs fails, and changes nothing; 0: none
        self._stopped = False
        self._unsent: dict[int, bytearray] = {}  # by the file's identity, on a network disk

    def _call(self, name: str) -> int | None:
        self.calls += 1
        if self._stopped:
            raise Stopped  # clean-up of a process that is dead does nothing
        try:
            return None if self.before is None else self.before(self.calls, name)
        except Stopped:
            self._stopped = True
            raise

    def make_folder(self, folder: Path) -> None:
        self._call("make_folder")
        self.disk.folders.setdefault(folder, FakeFolder())

    def names(self, folder: Path) -> list[str]:
        self._call("names")
        if folder not in self.disk.folders:
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(folder))
        return list(self.disk.folders[folder].files)

    def create(self, path: Path) -> int:
        self._call("create")
        folder = self.disk.folders[path.parent]
        if path.name in folder.files:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        file = FakeFile()
        folder.change(None, path.name, file)
        descriptor = len(self.disk.open_files)
        self.disk.open_files[descriptor] = file
        self.disk.open_descriptors.add(descriptor)
        return descriptor

    def reserve(self, descriptor: int, offset: int, size: int) -> None:
        self._call("reserve")
        assert offset >= len(self.disk.open_files[descriptor].content)

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        part = bytes(data)[: self._call("write")]
        file = self.disk.open_files[descriptor]
        if self.disk.is_network:
            self._unsent.setdefault(id(file), bytearray()).extend(part)
        else:
            file.content += part
        return len(part)

    def sync(self, descriptor: int) -> None:
        self._call("sync")
        self.syncs += 1
        if self.syncs == self.fail_at_sync:
            raise OSError(errno.EIO, "injected")
        file = self.disk.open_files[descriptor]
        file.content += self._unsent.pop(id(file), b"")
        file.durable = bytes(file.content)

    def close(self, descriptor: int) -> None:
        self._call("close")
        self.disk.open_descriptors.remove(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename")
        file = self.disk.file(source)
        if source.parent == target.parent:
            self.disk.folders[target.parent].change(source.name, target.name, file)
        else:  # after a power cut it may be in both, or in neither
            self.disk.folders[target.parent].change(None, target.name, file)
            self.disk.folders[source.parent].change(source.name, None, None)

    def sync_folder(self, folder: Path) -> None:
        self._call("sync_folder")
        found = self.disk.folders[folder]
        found.durable = dict(found.files)
        found.changes.clear()

    def remove(self, path: Path) -> None:
        self._call("remove")
        folder = self.disk.folders[path.parent]
        if path.name in folder.files:
            folder.change(path.name, None, None)

    def size(self, path: Path) -> int:
        self._call("size")
        return len(self._seen(path))

    def read(self, path: Path, offset: int = 0, size: int = -1) -> bytes:
        self._call("read")
        content = self._seen(path)
        return content[offset:] if size < 0 else content[offset : offset + size]

    def _seen(self, path: Path) -> bytes:
        file = self.disk.file(path)
        return bytes(file.content + self._unsent.get(id(file), b""))
