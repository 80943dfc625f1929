"""Which primary of a shard is the newest: the file EPOCH, and claims that keep it from falling.

A primary may acknowledge a write only if EPOCH holds its own number after the write is durable. So
a successor that raises EPOCH before it reads the log sees every acknowledged write.

Raising must hold against successors that come at the same time, in any order, without locks,
which network mounts may lack. Each first claims its number by a file ``EPOCH-<number>``, gives up
if there is a higher one, replaces EPOCH, and gives up if there is a higher one now. If n passes the
second look, a higher m claims later and replaces EPOCH later, with m; whoever replaces it again
and is lower than m finds m's claim and gives up, and is not n. So from m's replacement on
EPOCH is never n again: n acknowledges nothing that m does not see.
"""

import re
import zlib
from pathlib import Path

from shardline.shards.core.errors import CorruptFile, NotPrimary
from shardline.shards.live.log_files import FILES, LogFiles, write_new

EPOCH_NAME = "EPOCH"
_CLAIM = re.compile(r"EPOCH-(\d{20})")
_CONTENT = re.compile(rb"(\d{20}) ([0-9a-f]{8})\n")
_MAX_BYTES = 64


def read_epoch(folder: Path, files: LogFiles = FILES) -> int:
    """The number of the newest primary; 0 if there has been none.

    Raises:
        CorruptFile: EPOCH is damaged. OSError: it cannot be read.
    """
    path = folder / EPOCH_NAME
    try:
        content = files.read(path, 0, _MAX_BYTES)
    except FileNotFoundError:
        return 0
    match = _CONTENT.fullmatch(content)
    if match is None or int(match[2], 16) != zlib.crc32(match[1]):
        raise CorruptFile(
            f"{path}: damaged",
            expected="a number and its checksum",
            got=repr(content[:40]),
            hint="the next primary writes it anew",
        )
    return int(match[1])


def raise_epoch(folder: Path, epoch: int, files: LogFiles = FILES) -> None:
    """Makes ``epoch``, above all earlier ones, the newest; durable on return.

    Raises:
        NotPrimary: this number or a higher one was here before, or came meanwhile.
        OSError: the folder cannot be written.
    """
    highest = max(_claims(folder, files), default=0)
    if highest >= epoch:
        raise _not_primary(folder, highest, epoch)
    try:
        files.close(files.create(folder / f"{EPOCH_NAME}-{epoch:020d}"))
    except FileExistsError as error:
        raise _not_primary(folder, epoch, epoch) from error
    _refuse_higher(folder, epoch, files)
    digits = b"%020d" % epoch
    content = b"%s %08x\n" % (digits, zlib.crc32(digits))
    files.close(write_new(files, folder / EPOCH_NAME, content, f".{EPOCH_NAME}-{epoch:020d}.tmp"))
    _refuse_higher(folder, epoch, files)
    for lower in _claims(folder, files):
        if lower < epoch:
            files.remove(folder / f"{EPOCH_NAME}-{lower:020d}")
            files.remove(folder / f".{EPOCH_NAME}-{lower:020d}.tmp")


def _claims(folder: Path, files: LogFiles) -> list[int]:
    matches = map(_CLAIM.fullmatch, files.names(folder))
    return [int(match[1]) for match in matches if match is not None]


def _refuse_higher(folder: Path, epoch: int, files: LogFiles) -> None:
    highest = max(_claims(folder, files), default=0)
    if highest > epoch:
        raise _not_primary(folder, highest, epoch)


def _not_primary(folder: Path, highest: int, epoch: int) -> NotPrimary:
    return NotPrimary(
        f"{folder}: another primary has come",
        expected=f"an epoch above {highest}",
        got=str(epoch),
    )
