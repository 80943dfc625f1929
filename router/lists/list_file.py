"""One version of a list as a file: a small header, the list's name, and its ids.

Little-endian: magic, format version, flags, number of ids, number of the version, bytes of the
name, CRC-32 of all the rest; the name in ASCII; the ids, int64, rising, each once. The name and the
version are inside too, so that a file that was renamed or put into another folder is found out.
"""

import struct
import zlib
from dataclasses import dataclass, field

import numpy as np

from shardline.router.list_names import LARGEST_LIST, MAX_NAME
from shardline.shards.core.errors import CorruptFile, NewerFormat
from shardline.shards.core.schema import IdArray

MAGIC = b"SHRDLIST"
FORMAT = 1
HEADER = struct.Struct("<8sHHIQHHI")
GONE = 1  # flag: the list was deleted
ID_BYTES = 8
MAX_FILE_BYTES = HEADER.size + MAX_NAME + LARGEST_LIST * ID_BYTES
HINT = "put the file back from a copy, or replace the list: PUT /v1/lists/{name}"

NO_IDS: IdArray = np.empty(0, np.int64)
NO_IDS.setflags(write=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredList:
    """A version of a list: its ids (n,) int64, rising, each once.

    version 0: there is none, or none any more. is_gone: this version says that the list was
    deleted. is_damaged: what its ids were is not known.
    """

    version: int = 0
    ids: IdArray = field(default_factory=lambda: NO_IDS)
    is_gone: bool = False
    is_damaged: bool = False

    @property
    def exists(self) -> bool:
        return self.version > 0 and not self.is_gone


ABSENT = StoredList()


def encode_list(name: str, stored: StoredList) -> bytes:
    text, ids = name.encode("ascii"), stored.ids.astype("<i8", copy=False).tobytes()
    flags = GONE if stored.is_gone else 0
    count = len(stored.ids)

    def header(checksum: int) -> bytes:
        fields = (FORMAT, flags, count, stored.version, len(text), 0, checksum)
        return HEADER.pack(MAGIC, *fields)

    checksum = zlib.crc32(ids, zlib.crc32(text, zlib.crc32(header(0))))
    return header(checksum) + text + ids


def decode_list(content: bytes, name: str, version: int, where: object) -> StoredList:
    """What ``encode_list`` made of version ``version`` of this list. ``where`` names the file.

    Raises:
        CorruptFile: it is another file, cut short, or altered. NewerFormat: of a later program.
    """
    if len(content) < HEADER.size or content[: len(MAGIC)] != MAGIC:
        raise CorruptFile(f"{where}: not a list", got=f"{len(content)} bytes", hint=HINT)
    _, form, flags, count, number, name_bytes, _, checksum = HEADER.unpack_from(content)
    if form > FORMAT:
        raise NewerFormat(
            f"{where}: format is newer than this program",
            expected=f"format version <= {FORMAT}",
            got=str(form),
            hint="upgrade shardline on every host",
        )
    ids_from = HEADER.size + name_bytes
    blank = content[: HEADER.size - 4] + bytes(4)  # the checksum is the last field
    if (
        len(content) != ids_from + count * ID_BYTES
        or zlib.crc32(content[HEADER.size :], zlib.crc32(blank)) != checksum
    ):
        raise CorruptFile(f"{where}: wrong length or checksum", hint=HINT)
    if content[HEADER.size : ids_from] != name.encode("ascii") or number != version:
        raise CorruptFile(f"{where}: a version of another list, or another version", hint=HINT)
    ids = np.frombuffer(content, "<i8", count, ids_from).astype(np.int64)  # aligned, unlike there
    ids.setflags(write=False)
    return StoredList(version=version, ids=ids, is_gone=bool(flags & GONE))
