"""Files that are read whole, or opened to be read through: regular ones only, of a bounded size.

Whoever can write a store can put anything where a file of ours is expected. A pipe without a writer
or a device must not make its reader wait, and a sparse file of 20 GiB must not fill its memory: so
kind and size are known before the first byte is read.
"""

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from shardline.shards.core.errors import CorruptFile

# Largest sizes in bytes, each far above what a healthy file has.
MAX_STATE_BYTES = 64 << 10  # counters, notes, CURRENT: a few hundred bytes at most
MAX_TEXT_BYTES = 1 << 20  # configurations and key files, written by people
MAX_MANIFEST_BYTES = 64 << 20  # a shard's entry takes 1 KB
MAX_VOCABULARY_BYTES = 1 << 30  # encoders and runs list every value of a feature: 20 bytes each

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path) -> BufferedReader:
    """The file, open for reading; its kind is looked at before it is opened and again after.

    Before, because opening a device may do something; after, because it may have been exchanged.

    Raises:
        OSError: it is not there, or cannot be opened. CorruptFile: it is no regular file.
    """
    _refuse_other_kinds(path, path.stat().st_mode)
    # a pipe is opened without waiting for its writer; regular files know no such waiting
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_other_kinds(path, os.fstat(handle).st_mode)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_small(path: Path, limit: int) -> bytes:
    """All bytes of a file that has at most ``limit`` of them.

    Raises:
        OSError: it is not there, or cannot be read.
        CorruptFile: it is no regular file, or larger than that.
    """
    with open_regular(path) as file:
        return read_open(file, path, limit)


def read_open(file: BufferedReader, path: Path, limit: int) -> bytes:
    """As ``read_small``, of a file that ``open_regular`` has opened."""
    size = os.fstat(file.fileno()).st_size
    content = file.read(limit + 1) if size <= limit else b""
    size = max(size, len(content))
    if size > limit:
        raise CorruptFile(
            f"{path}: too large", expected=f"at most {limit:,} bytes", got=f"{size:,} bytes"
        )
    return content


def read_json(path: Path, limit: int) -> Any:
    """What the JSON of a file of at most ``limit`` bytes says.

    Raises:
        OSError, CorruptFile: as ``read_small``. CorruptFile: it is not JSON.
    """
    return parse_json(read_small(path, limit), path)


def parse_json(content: bytes, path: Path | str) -> Any:
    """``path`` names where the content is from. Raises CorruptFile: it is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: not JSON", got=str(error)) from error


def _refuse_other_kinds(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_of, name in KINDS if is_of(mode)), "something else")
        raise CorruptFile(f"{path}: not a regular file", got=kind)
