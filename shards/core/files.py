"""Files that are complete or absent: atomic writes, checksums, versioned manifests.

A folder of ours (embedding set, generation) is complete when its ``_manifest.json`` exists: the
manifest is written last, lists every other file with its size and SHA-256, and carries a checksum
of itself. This module does not know what the files mean.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardline.shards.core.errors import CorruptFile, NewerFormat, NotFound
from shardline.shards.core.small_files import (
    MAX_MANIFEST_BYTES,
    open_regular,
    parse_json,
    read_small,
)

MANIFEST_NAME = "_manifest.json"
HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # in the names of staged folders
LIVE_FOLDER = "live"  # of a store: what was written to its generations while they were served
MAX_DIGITS = 18  # of a number in a name: it fits int64
PROBE_BYTES = 1 << 20
# what a disk says of itself: full, the user's share of it used up, a file too long, unreadable
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a manifest; ``name`` is relative to the manifest's folder, ``rows`` optional."""

    name: str
    bytes: int
    sha256: str
    rows: int | None = None


def number_of(text: str) -> int | None:
    """The number that a text, a folder's name say, is in ASCII digits; None for any other text.

    ``str.isdigit`` alone takes the digits of every alphabet.
    """
    is_number = text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS
    return int(text) if is_number else None


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a regular file, read in chunks."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Fsyncs the folder, so that renames inside it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that becomes it when the block ends without an error.

    The file is fsynced, renamed over the target, and the folder fsynced. On an error the
    temporary file is removed and the target left as it was.

    Raises:
        OSError: the block failed and the disk is why, whatever the block said.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        with disk_errors(target.parent):
            yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
        fsync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, data: bytes) -> None:
    """Replaces ``target`` atomically and durably."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


def write_json(target: Path, value: Any) -> None:
    """Replaces ``target`` with indented JSON, atomically and durably."""
    write_bytes(target, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())


def describe_file(folder: Path, name: str, rows: int | None = None) -> FileEntry:
    """The manifest entry of an existing file, checksum computed from what is on disk."""
    path = folder / name
    return FileEntry(name=name, bytes=path.stat().st_size, sha256=sha256_of(path), rows=rows)


def describe_tree(folder: Path) -> list[FileEntry]:
    """Entries of every file below ``folder``, manifest excepted, sorted by name."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME
    )
    return [describe_file(folder, name) for name in names]


def verify_file(folder: Path, entry: FileEntry) -> Path:
    """The path of a file whose size and checksum are as its manifest says.

    Raises:
        CorruptFile: the file is missing, cut short, grown, or altered.
    """
    path = folder / entry.name
    if not path.is_file():
        raise CorruptFile(
            f"{path}: missing", hint="restore it from a copy, or write the folder again"
        )
    size = path.stat().st_size
    if size != entry.bytes:
        raise CorruptFile(
            f"{path}: wrong size", expected=f"{entry.bytes} bytes", got=f"{size} bytes"
        )
    digest = sha256_of(path)
    if digest != entry.sha256:
        raise CorruptFile(
            f"{path}: wrong checksum",
            expected=f"sha256 {entry.sha256[:12]}…",
            got=f"{digest[:12]}…",
            hint="the file was altered after it was written; restore it or build again",
        )
    return path


def verify_files(folder: Path, entries: Iterable[FileEntry]) -> None:
    """Checks every entry; raises CorruptFile naming the first that does not match."""
    for entry in entries:
        verify_file(folder, entry)


def write_manifest(folder: Path, *, kind: str, version: int, body: dict[str, Any]) -> None:
    """Writes the manifest that declares the folder complete. Call it last."""
    write_bytes(folder / MANIFEST_NAME, encode_manifest(kind=kind, version=version, body=body))


def encode_manifest(*, kind: str, version: int, body: dict[str, Any]) -> bytes:
    """What ``decode_manifest`` reads: indented JSON."""
    content = {"kind": kind, "format_version": version, **body}
    content["checksum"] = _self_checksum(content)
    return (json.dumps(content, indent=2, sort_keys=False) + "\n").encode()


def read_manifest(
    folder: Path, *, kind: str, version: int, limit: int = MAX_MANIFEST_BYTES
) -> dict[str, Any]:
    """The manifest's body, checked for size, kind, version and its own checksum.

    Raises:
        NotFound: no manifest, so the folder is absent or was never completed.
        CorruptFile: above ``limit`` bytes, not JSON, another kind, or altered.
        NewerFormat: written by a version newer than this code.
    """
    path = folder / MANIFEST_NAME
    try:
        data = read_small(path, limit)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(
            f"{folder}: no complete {kind} here", hint=f"{MANIFEST_NAME} is missing"
        ) from error
    return decode_manifest(data, path, kind=kind, version=version)


def decode_manifest(data: bytes, path: Path | str, *, kind: str, version: int) -> dict[str, Any]:
    """The body in the bytes of a manifest; ``path`` names where they are from, or a URL does.

    Raises:
        CorruptFile, NewerFormat: as ``read_manifest``.
    """
    content = parse_json(data, path)
    if not isinstance(content, dict) or content.get("kind") != kind:
        got = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise CorruptFile(f"{path}: not a manifest of this kind", expected=kind, got=str(got))
    found = content.get("format_version")
    if type(found) is not int:
        raise CorruptFile(f"{path}: no format_version", expected="an integer", got=repr(found))
    if found > version:
        raise NewerFormat(
            f"{path}: format is newer than this program",
            expected=f"format_version <= {version}",
            got=str(found),
            hint="upgrade shardline, or build again with this version",
        )
    checksum = content.pop("checksum", None)
    if checksum != _self_checksum(content):
        raise CorruptFile(f"{path}: wrong checksum", hint="the manifest was altered")
    return content


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside ``target`` that is renamed to it when the block ends without an error.

    What a process that was killed has left of the same target is removed first.

    Raises:
        FileExistsError: the target already exists when the block ends.
        OSError: the block failed and the disk is why, whatever the block said.
    """
    with scratch_folder(target) as staging:
        yield staging
        if target.exists():
            raise FileExistsError(target)
        staging.chmod(0o755)
        fsync_tree(staging)
        staging.rename(target)
        fsync_folder(target.parent)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside ``target`` that is removed when the block ends.

    What a process that was killed has left of the same target is removed first.

    Raises:
        OSError: the block failed and the disk is why, whatever the block said.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, glob.escape(target.name))
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.{HOST}-"))
    with _locked(made):
        staging = made.rename(f"{made}.tmp")  # locked by now, so that nobody takes it for abandoned
        try:
            with disk_errors(target.parent):
                yield staging
        finally:
            with suppress(FileNotFoundError):
                shutil.rmtree(staging)


def abandoned_folders(parent: Path, target: str = "*") -> list[Path]:
    """Folders that ``staged_folder`` made in ``parent`` for targets of this pattern, on this host,
    and whose process was killed. Those of other hosts are none: a network mount may lock for one
    host alone. On a disk without locks none are found."""
    found = sorted(parent.glob(f".{target}.{HOST}-????????.tmp"))
    return [path for path in found if path.is_dir() and _is_abandoned(path)]


def remove_abandoned(parent: Path, target: str = "*") -> None:
    """Removes what ``abandoned_folders`` finds."""
    for path in abandoned_folders(parent, target):
        shutil.rmtree(path, ignore_errors=True)


def remove_tree(folder: Path) -> None:
    """Removes a folder with all that is in it; what is gone meanwhile, or before, is no error.

    Raises:
        OSError: something cannot be removed; the rest may be there or not.
    """

    def failed(function: object, path: str, info: tuple[Any, BaseException, Any]) -> None:
        if not isinstance(info[1], FileNotFoundError):
            raise info[1]

    shutil.rmtree(folder, onerror=failed)


def _is_abandoned(staging: Path) -> bool:
    with suppress(OSError), _locked(staging) as is_free:  # gone by now, or another user's
        return is_free
    return False


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether the block holds the folder's lock, which ends with the block or with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        is_held = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(handle)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Around what is written below ``folder``: a full disk is an OSError with number and path.

    Libraries in C++ and Rust say it in words of their own and lose the number. So the system is
    asked, by a small write to the same disk. Many, and Python's own writes, lose the path: it is
    ``folder`` then.
    """
    try:
        yield
    except Exception as error:
        told = error if isinstance(error, OSError) and error.errno is not None else None
        if told is None:
            try:
                _probe(folder)
            except OSError as answer:
                told = answer
        if told is None or told.errno not in DISK_ERRORS or told.filename is not None:
            raise
        raise OSError(told.errno, os.strerror(told.errno), str(folder)) from error


def _probe(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())


def fsync_tree(folder: Path) -> None:
    """Fsyncs a folder and all files and folders below it."""
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def _self_checksum(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
