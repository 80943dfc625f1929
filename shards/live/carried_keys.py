"""Idempotency keys of the generation that was live before: a request that is repeated after the
switch, with the same items in one part, is one effect.

When a shard is sealed, so that another generation goes live, it leaves its keys beside its log. A
shard of that other one reads those of all shards, because an item may be in any, once its
generation's note says whose they are (``went_live``). The window is that of ``WriteKeys``, an equal
share of it for each shard: what is repeated is repeated soon.
"""

import logging
import re
from pathlib import Path

from shardline.shards.core.errors import CorruptFile
from shardline.shards.live.log_files import LogFiles, write_new
from shardline.shards.live.went_live import NAME, parse_went_live
from shardline.shards.live.write_keys import WINDOW, WriteKeys, Written

logger = logging.getLogger(__name__)

_SEALED = re.compile(r"sealed-keys-(\d{20})\.msgpack")


def leave_keys(live: Path, epoch: int, keys: WriteKeys, files: LogFiles) -> None:
    """Those of a shard that is sealed with an epoch, durably; live: the folder of its log.

    A file for each seal, of which the newest counts: a replica that pauses here may go on when
    another one has sealed the shard again. Raises OSError.
    """
    name = f"sealed-keys-{epoch:020d}.msgpack"
    packed = keys.of_callers().pack()
    files.close(write_new(files, live / name, packed, f".{name}.tmp"))
    for lower in _sealed_names(live, files):
        if lower < name:
            files.remove(live / lower)


def _sealed_names(live: Path, files: LogFiles) -> list[str]:
    """The newest last."""
    return sorted(name for name in files.names(live) if _SEALED.fullmatch(name))


class CarriedKeys:
    """For one thread. live: the folder of the log of a shard that takes writes."""

    def __init__(self, live: Path) -> None:
        self._live = live
        self._note: bytes | None = None  # as it was read last
        self._written: dict[str, Written] = {}
        self._told = ""

    def look(self, files: LogFiles) -> None:
        """Reads the keys if another generation's count now; what cannot be read is logged, and
        tried again by the next call."""
        path = self._live.parent / NAME
        try:
            note = files.read(path)
        except FileNotFoundError:
            return
        except (OSError, CorruptFile) as error:
            self._complain(error)
            return
        if note == self._note:
            return
        try:
            keys_of = parse_went_live(note, path).keys_of
            self._written = {} if keys_of is None else self._read(keys_of, files)
        except (OSError, CorruptFile, ValueError) as error:
            self._complain(error)
        else:
            self._note, self._told = note, ""

    def find(self, key: str) -> Written | None:
        """What was written under a key; its ``seq`` is one of the generation before."""
        return self._written.get(key)

    def _read(self, keys_of: str, files: LogFiles) -> dict[str, Written]:
        """Nothing where gc has removed the folder."""
        folder = self._live.parent.parent / keys_of
        try:
            names = sorted(name for name in files.names(folder) if name.startswith("shard-"))
        except FileNotFoundError:
            return {}
        found: dict[str, Written] = {}
        for name in names:
            for sealed in _sealed_names(folder / name, files)[-1:]:
                path = folder / name / sealed
                found |= WriteKeys.unpack(files.read(path), path, WINDOW // len(names)).written
        return found

    def _complain(self, error: Exception) -> None:
        if str(error) != self._told:
            logger.error("keys of the generation before are not known: %s", error)
        self._told = str(error)
