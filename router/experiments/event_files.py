"""Events on disk: Arrow files, a folder per day, each complete or absent.

``<store>/events/2026-03-01/<router>-000007-1a2b3c4d.arrow``: the seventh file of one run of a
router, written on that day (UTC), and the CRC-32 of its bytes. A file appears under its name when
all of it is on the disk; who reads it checks the CRC. Names of files under way begin with a dot.

Small files of one run are merged: ``<router>-000007_000066-<crc>.arrow`` has the events of files
7 to 66, which go after it has come. Where a kill leaves both, the small ones do not count. Spans of
one run are within each other, or apart.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from shardline.router.experiments.stored_event import Event
from shardline.shards.core.errors import CorruptFile
from shardline.shards.core.files import fsync_folder, write_bytes
from shardline.shards.core.small_files import read_small

SCHEMA = pa.schema(
    [
        pa.field("event", pa.string(), nullable=False),
        pa.field("at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("key", pa.string()),
        pa.field("request_id", pa.string()),
        pa.field("event_id", pa.string()),
        pa.field("item_id", pa.int64()),
        pa.field("value", pa.float64()),
        pa.field("arms", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("took_ms", pa.float64()),
        pa.field("k", pa.int32()),
        pa.field("queries", pa.int32()),
        pa.field("results", pa.int64()),
    ]
)
MAX_FILE_BYTES = 1 << 30
DAY = re.compile(r"\d{4}-\d\d-\d\d")
FILE = re.compile(
    r"(?P<router>[0-9a-z-]+)-(?P<first>\d+)(?:_(?P<last>\d+))?-(?P<crc>[0-9a-f]{8})\.arrow"
)
MICROSECONDS = 1_000_000
# An event may be dated after its arrival by so much; so those since a moment lie in the folders
# from the day before it on.
MAX_AHEAD = timedelta(days=1)


def write_events(
    folder: Path, router: str, number: int, events: Sequence[Event], at: float
) -> Path:
    """A new file of one or more events, durable when this returns; at: now, in seconds since 1970.

    Raises:
        OSError: nothing was written, or nobody knows what.
    """
    content = encode_table(table_of(events))
    day = folder / datetime.fromtimestamp(at, UTC).date().isoformat()
    path = day / f"{router}-{number:06d}-{zlib.crc32(content):08x}.arrow"
    write_bytes(path, content)
    for parent in (folder, folder.parent):  # a new day's name, and that of the folder of all days
        fsync_folder(parent)
    return path


def merge_files(parts: Sequence[Path]) -> Path:
    """One file instead of several, which a router has written one after the other on one day.

    Raises:
        CorruptFile, OSError: all parts are there, or the new file is, and some of them.
    """
    names = [FILE.fullmatch(path.name) for path in parts]
    first, last = names[0], names[-1]
    assert first is not None
    assert last is not None
    content = encode_table(pa.concat_tables([read_events(path) for path in parts]))
    span = f"{first['first']}_{last['last'] or last['first']}"
    path = parts[0].with_name(f"{first['router']}-{span}-{zlib.crc32(content):08x}.arrow")
    write_bytes(path, content)
    for part in parts:
        part.unlink(missing_ok=True)
    return path


def encode_table(table: pa.Table) -> bytes:
    """An Arrow IPC file."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(sink, SCHEMA, options=options) as writer:
        writer.write_table(table.combine_chunks())
    content: bytes = sink.getvalue().to_pybytes()
    return content


def table_of(events: Sequence[Event]) -> pa.Table:
    columns = {
        name: [getattr(event, name) for event in events]
        for name in SCHEMA.names
        if name not in ("at", "arms")
    }
    columns["at"] = [round(event.at * MICROSECONDS) for event in events]
    columns["arms"] = [list(event.arms.items()) for event in events]
    return pa.table([pa.array(columns[name], _storage(name)) for name in SCHEMA.names], SCHEMA)


def read_events(path: Path) -> pa.Table:
    """The events of one file.

    Raises:
        OSError: it is not there. CorruptFile: it was altered, or is none of ours.
    """
    found = FILE.fullmatch(path.name)
    if found is None:
        raise CorruptFile(f"{path}: not a file of events", expected=FILE.pattern)
    content = read_small(path, MAX_FILE_BYTES)
    crc = f"{zlib.crc32(content):08x}"
    if crc != found["crc"]:
        raise CorruptFile(f"{path}: wrong checksum", expected=f"crc {found['crc']}", got=crc)
    try:
        table = pa.ipc.open_file(content).read_all()
    except pa.ArrowException as error:
        raise CorruptFile(f"{path}: not an Arrow file", got=str(error)) from error
    if table.schema != SCHEMA:
        raise CorruptFile(f"{path}: other columns", expected=str(SCHEMA.names))
    return table


def event_files(folder: Path, since: datetime | None = None) -> Iterator[Path]:
    """The complete files of a store, oldest day first; those that may hold events since then."""
    first = date.min if since is None else (since.astimezone(UTC) - MAX_AHEAD).date()
    for day in days_of(folder):
        if date.fromisoformat(day.name) >= first:
            yield from _without_merged(sorted(day.iterdir()))


def days_of(folder: Path) -> list[Path]:
    """The folders of days, oldest first; [] where there is none."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _is_day(path.name))


def _without_merged(paths: Sequence[Path]) -> Iterator[Path]:
    """The files of events among the sorted paths of a day, without those that others hold, too."""
    found = [(path, match) for path in paths if (match := FILE.fullmatch(path.name))]
    # of each router the widest of those that begin first comes first
    found.sort(key=lambda each: (each[1]["router"], int(each[1]["first"]), -_last(each[1])))
    router, covered = "", -1
    for path, match in found:
        if match["router"] != router:
            router, covered = match["router"], -1
        if _last(match) > covered:
            covered = _last(match)
            yield path


def _last(match: re.Match[str]) -> int:
    """The number of the last file whose events a file holds."""
    return int(match["last"] or match["first"])


def _is_day(name: str) -> bool:
    try:
        return bool(DAY.fullmatch(name)) and bool(date.fromisoformat(name))
    except ValueError:
        return False


def _storage(name: str) -> Any:
    return SCHEMA.field(name).type
