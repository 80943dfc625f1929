"""Keys of recent writes: what makes a repeated request one effect.

The window is bounded: a key is forgotten after 65,536 later ones. It is rebuilt from the log, and
saved with every compaction, so that it outlives the segments that are trimmed.
"""

import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgpack
import numpy as np

from shardline.shards.core.errors import CorruptFile, InvalidInput
from shardline.shards.live.records import Change, Record, Upsert, encode_record

WINDOW = 65_536  # keys; about 20 MB of memory
MIRRORS = "mirror-"  # what the keys of writes that come from another generation begin with


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What the write under a key did, as in ``WriteReply``; digest: of the change itself."""

    seq: int
    rows: int
    existed: int
    digest: int


class WriteKeys:
    """For one thread. Writes without a key, "", are not kept."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._written: OrderedDict[str, Written] = OrderedDict()

    def __len__(self) -> int:
        return len(self._written)

    @property
    def written(self) -> Mapping[str, Written]:
        """By key, the oldest first."""
        return self._written

    def of_callers(self) -> "WriteKeys":
        """Those of them that are no mirror's."""
        found = WriteKeys(self._window)
        found._written.update(
            (key, each) for key, each in self._written.items() if not key.startswith(MIRRORS)
        )
        return found

    def find(self, key: str, change: Change) -> Written | None:
        """What was written under this key; None: nothing yet, or it is forgotten.

        Raises:
            InvalidInput: the key was used for another change.
        """
        written = self._written.get(key)
        if written is not None:
            refuse_another(change, written.digest)
        return written

    def add(self, record: Record, *, rows: int, existed: int) -> None:
        """A record that has been applied; records come in order of seq."""
        if record.key:
            self._written[record.key] = Written(
                seq=record.seq, rows=rows, existed=existed, digest=digest_of(record.change)
            )
            self._written.move_to_end(record.key)
            if len(self._written) > self._window:
                self._written.popitem(last=False)

    def pack(self) -> bytes:
        """What ``unpack`` reads."""
        rows = [(key, w.seq, w.rows, w.existed, w.digest) for key, w in self._written.items()]
        packed: bytes = msgpack.packb(rows)
        return packed

    @classmethod
    def unpack(cls, data: bytes, path: Path, window: int = WINDOW) -> "WriteKeys":
        """``path`` names where the bytes are from.

        Raises:
            CorruptFile: not what ``pack`` makes.
        """
        keys = cls(window)
        try:
            for key, *numbers in msgpack.unpackb(data):
                if type(key) is not str or any(type(number) is not int for number in numbers):
                    raise ValueError(f"{key!r}: {numbers}")
                seq, rows, existed, digest = numbers
                keys._written[key] = Written(seq=seq, rows=rows, existed=existed, digest=digest)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise CorruptFile(f"{path}: no list of write keys", got=str(error)[:100]) from error
        while len(keys) > window:
            keys._written.popitem(last=False)
        return keys


def refuse_another(change: Change, digest: int) -> None:
    """Raises InvalidInput unless the change has this digest, that of another with the same key."""
    if digest_of(change) != digest:
        raise InvalidInput(
            "the key has been used for another write",
            field="idempotency_key",
            hint="repeat a request with its own key, and take a new key for a new request",
        )


def digest_of(change: Change) -> int:
    """A checksum of a change, whatever its number and key. The vectors of items that were given by
    features do not count: another host may have made them of the same with other last bits."""
    if isinstance(change, Upsert) and change.features:
        nothing = np.empty((len(change.item_ids), 0), np.float32)
        change = replace(change, vectors=nothing)
    return zlib.crc32(encode_record(Record(seq=0, epoch=0, key="", change=change)))
