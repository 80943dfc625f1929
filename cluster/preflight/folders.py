"""Folders that a command writes to, before it needs them: the store, temporary files, /dev/shm.

``look_at`` writes a small file and removes it, because permissions, mount options, quotas and full
disks are told apart by nothing else.
"""

import errno
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from shardline.cluster.preflight.check import Check, failed, mib, passed, warned
from shardline.shards.core.errors import DataError, ShardlineError, Unavailable

SHARED_MEMORY = Path("/dev/shm")
# Ray takes 30 % of the memory by default; our object store only carries build jobs and their
# reports, never vectors.
OBJECT_STORE_BYTES = 128 << 20
# HAProxy takes socket paths of 97 bytes, of which Ray's node id and a one-letter name use 59.
MAX_SESSION_PATH = 38
# "/shardline-", a pid of up to 7 digits, "-" and 8 random letters take the rest
MAX_TEMPORARY_PATH = MAX_SESSION_PATH - 27
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")  # Ray writes it into that without quotes
PROBE_BYTES = 1 << 16
FEWEST_FREE_BYTES = 32 << 20  # Ray's logs and sockets, or a store's keys, counters and notes
LOW_DISK_BYTES = 2 << 30
OTHER_TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm", "/run")
ROOM = "make room, or choose a path on another disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What is known of a folder, or of the nearest one above it that exists.

    refusal: of a small file written there, None if it was written; can_execute: whether programs
    in it may be started, False where none could be written.
    """

    path: Path
    free_bytes: int
    can_execute: bool
    refusal: OSError | None


def look_at(path: Path) -> Folder:
    """Writes a small file into the folder, and removes it."""
    try:
        while not path.exists():
            path = path.parent
        free = shutil.disk_usage(path).free
        with tempfile.NamedTemporaryFile(dir=path, prefix=".shardline-probe-") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o700)
            can_execute = os.access(file.name, os.X_OK)  # as Ray asks, of HAProxy's launcher
    except OSError as error:
        return Folder(path=path, free_bytes=_free(path), can_execute=False, refusal=error)
    return Folder(path=path, free_bytes=free, can_execute=can_execute, refusal=None)


def _free(path: Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def check_writable(name: str, folder: Folder, *, needed_bytes: int = 0) -> Check:
    """Whether files of so many bytes can be written there, and some small ones; code 3 if not."""
    if folder.refusal is not None:
        return failed(name, DataError(**_refused(folder)))
    expected = needed_bytes + FEWEST_FREE_BYTES
    if folder.free_bytes < expected:
        error = DataError(
            f"{folder.path}: no space for what is to be written",
            expected=f"at least {mib(expected)} free",
            got=mib(folder.free_bytes),
            hint=ROOM,
        )
        return failed(name, error)
    if folder.free_bytes - needed_bytes < LOW_DISK_BYTES:
        left = mib(folder.free_bytes - needed_bytes)
        return warned(name, f"{folder.path}: only {left} free; {ROOM}")
    return passed(name, f"{mib(folder.free_bytes)} free at {folder.path}")


def check_temporary(folder: Folder, shared: Folder | None, *, executes: bool) -> Check:
    """Whether Ray can have its session folder there; ``executes``: a program in it is started.

    shared: /dev/shm, None where there is none. Where that is too small, the object store goes here.
    """
    name = "temporary folder"
    hint = f"set TMPDIR={_other_temporary(folder.path)}"
    error: ShardlineError | None = None
    needed = FEWEST_FREE_BYTES
    if shared is not None and shared.free_bytes < OBJECT_STORE_BYTES:
        needed += OBJECT_STORE_BYTES
    if len(str(folder.path)) > MAX_TEMPORARY_PATH:
        error = Unavailable(
            f"{folder.path}: path too long for Ray's sockets",
            expected=f"a temporary folder of at most {MAX_TEMPORARY_PATH} characters",
            hint=hint,
        )
    elif not PLAIN_PATH.fullmatch(str(folder.path)):
        error = Unavailable(
            f"{str(folder.path)!r}: not a path for HAProxy's configuration",
            expected="letters, digits and any of / . _ - in the path of the temporary folder",
            hint=hint,
        )
    elif folder.refusal is not None:
        error = Unavailable(**_refused(folder) | {"hint": hint})
    elif folder.free_bytes < needed:
        error = Unavailable(
            f"{folder.path}: no space for Ray's files",
            expected=f"at least {mib(needed)} free",
            got=mib(folder.free_bytes),
            hint=f"make room, or {hint}",
        )
    elif executes and not folder.can_execute:
        error = Unavailable(
            f"{folder.path}: mounted so that no program in it can be started (noexec)",
            expected="a temporary folder that HAProxy can be started from",
            hint=hint,
        )
    if error is not None:
        return failed(name, error)
    return passed(name, f"{folder.path}, {mib(folder.free_bytes)} free")


def check_shared_memory(folder: Folder | None) -> Check:
    """Whether Ray's object store fits into /dev/shm; None: there is no such folder."""
    name = "shared memory"
    if folder is None:
        text = f"{SHARED_MEMORY}: no such folder, and Ray does not start without it"
        return failed(name, Unavailable(text, hint=f"mount -t tmpfs tmpfs {SHARED_MEMORY}"))
    if folder.free_bytes < OBJECT_STORE_BYTES:
        return warned(
            name,
            f"{SHARED_MEMORY}: {mib(folder.free_bytes)} free, so Ray's object store of "
            f"{mib(OBJECT_STORE_BYTES)} goes to the temporary folder, which is slower; "
            "`docker run --shm-size=256m` gives it room",
        )
    if folder.refusal is not None:
        return failed(name, Unavailable(**_refused(folder)))
    return passed(name, f"{mib(folder.free_bytes)} free")


def temporary_root() -> Path:
    """Where Python puts temporary files, and so Ray's sessions go.

    Raises:
        Unavailable: into none of the folders that it tries can a file be written.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise Unavailable(
            "no folder for temporary files",
            expected="one that files can be written to: $TMPDIR, /tmp or /var/tmp",
            hint="make room in one of them, or set TMPDIR to another",
        ) from error


def shared_memory() -> Folder | None:
    return look_at(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None


def _refused(folder: Folder) -> dict[str, str]:
    """The words of an error about a folder that takes no file."""
    assert folder.refusal is not None
    reasons = {
        errno.EROFS: ("on a read-only file system", "mount it for writing, or choose another path"),
        errno.ENOSPC: ("no space left", ROOM),
        errno.EDQUOT: ("this user's share of the disk is used up", ROOM),
        errno.ENOTDIR: ("not a folder", "choose another path"),
    }
    unknown = (folder.refusal.strerror or "not writable", "choose another, or change who may write")
    reason, hint = reasons.get(folder.refusal.errno or 0, unknown)
    return {"message": f"{folder.path}: {reason}", "hint": hint}


def _other_temporary(path: Path) -> str:
    """A folder to name instead: the first of the usual ones that would do."""
    for other in OTHER_TEMPORARY:
        if Path(other) != path and Path(other).is_dir():
            found = look_at(Path(other))
            has_room = found.free_bytes >= FEWEST_FREE_BYTES + OBJECT_STORE_BYTES
            if found.refusal is None and found.can_execute and has_room:
                return other
    return "/tmp"
