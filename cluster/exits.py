"""What a command ends with: one exit code and one line for each kind of error.

``EXITS`` is the one table of codes: `shardline --help` prints it, and the README repeats it. Errors
of the operating system about a path become errors of ours here, for every command.
"""

import errno
import itertools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from shardline.shards.core.errors import (
    ConfigError,
    CorruptFile,
    DataError,
    InvalidInput,
    NewerFormat,
    NotFound,
    ShardlineError,
    Unavailable,
    VersionMismatch,
)


@dataclass(frozen=True, slots=True)
class Exit:
    """A process exit code, what it means, and the errors that lead to it."""

    code: int
    meaning: str
    kinds: tuple[type[ShardlineError], ...] = ()


EXITS = (
    Exit(0, "done"),
    Exit(1, "a defect of Shardline's: please report it"),
    Exit(2, "the command, the configuration or a query is wrong", (InvalidInput, ConfigError)),
    Exit(
        3,
        "data or files: missing, damaged, not readable or writable; an unknown item or user",
        (DataError, CorruptFile, NewerFormat, NotFound, VersionMismatch),
    ),
    Exit(4, "something is not running, is busy, or did not answer in time", (Unavailable,)),
    Exit(130, "interrupted"),
)
DEFECT = 1
INTERRUPTED = 130

MAKE_ROOM = "make room, or choose a path on another disk; `shardline doctor` shows what is free"
NO_ROOM = "no space left on the disk"
# errno -> what is wrong, and the way out
REASONS: dict[int, tuple[str, str | None]] = {
    errno.ENOENT: ("no such file or folder", None),
    errno.EACCES: ("permission denied", "choose another path, or change who may use this one"),
    errno.EPERM: ("not permitted", "choose another path, or change who may use this one"),
    errno.ENOTDIR: ("not a folder, or below something that is none", "choose another path"),
    errno.EISDIR: ("a folder, where a file is needed", None),
    errno.EEXIST: ("exists already", "another command has just written it; run again"),
    errno.ENAMETOOLONG: ("a name too long for this file system", None),
    errno.EROFS: ("a read-only file system", "choose a path on another"),
    errno.ENOSPC: (NO_ROOM, MAKE_ROOM),
    errno.EDQUOT: ("the user's share of the disk is used up", MAKE_ROOM),
    errno.EFBIG: ("larger than a file may be here", "see `ulimit -f`"),
    errno.EIO: ("the disk does not read or write it", "look for its errors in `dmesg`"),
}
NO_FOLDER = ("a file, where a folder is needed", "remove it, or choose another path")
# what the disk says of itself; anything else without a path did not come from a path of the user's
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
# libraries written in C++ and Rust say so in words, and lose the number
NO_ROOM_TEXT = re.compile(r"No space left on device|\d+ requested and \d+ written")
SAYERS = (("pyarrow", "ArrowException"), ("safetensors", "SafetensorError"))
TEMPORARY = re.compile(r"\..+\.tmp")  # as `shards.core.files` names what is not complete yet


def exit_code(error: ShardlineError) -> int:
    """The process exit code of an error."""
    for row in EXITS:
        if isinstance(error, row.kinds):
            return row.code
    return DEFECT


def as_known(error: BaseException) -> ShardlineError | None:
    """The error in our terms: itself, or what it says about a path; None for a defect."""
    if isinstance(error, ShardlineError):
        return error
    if isinstance(error, OSError):
        # our FileExistsError carries the path alone
        number = errno.EEXIST if isinstance(error, FileExistsError) else error.errno
        path = _path_of(error)
        if number in REASONS and (path is not None or number in OF_THE_DISK):
            is_file = number == errno.EEXIST and path is not None and path.is_file()
            reason, hint = NO_FOLDER if is_file else REASONS[number]
            kind = NotFound if number == errno.ENOENT else DataError
            return kind(reason if path is None else f"{path}: {reason}", hint=hint)
    if isinstance(error, _sayers()) and NO_ROOM_TEXT.search(str(error)):
        return DataError(NO_ROOM, hint=MAKE_ROOM)
    return None


def _sayers() -> tuple[type[BaseException], ...]:
    """The errors that may tell of a full disk in words; a library not imported raised none."""
    foreign = (getattr(sys.modules.get(module), name, OSError) for module, name in SAYERS)
    return (OSError, RuntimeError, *foreign)


def _path_of(error: OSError) -> Path | None:
    """The path that an error is about, up to a temporary name, which nobody has typed."""
    named = error.filename
    if named is None and error.strerror is not None:  # Arrow puts it into the text
        found = re.search(r"'([^']+)'", error.strerror)
        named = found[1] if found else None
    elif named is None and isinstance(error, FileExistsError) and error.args:
        named = error.args[0]
    if not isinstance(named, str | bytes | os.PathLike):
        return None
    parts = Path(os.fsdecode(named)).parts
    return Path(*itertools.takewhile(lambda part: not TEMPORARY.fullmatch(part), parts))
