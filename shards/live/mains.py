"""Main indexes that compactions have made: folders ``main-<seq>`` beside a shard's log.

    main-<seq>/index.faiss       the live rows after seq writes, dense local rows 0..n-1
    main-<seq>/item_ids.npy      (n,) int64, ascending: local row -> item id
    main-<seq>/attributes.arrow  attribute columns in local row order; absent where there are none
    main-<seq>/keys.msgpack      the newest idempotency keys among these writes
    main-<seq>/_manifest.json    written last; the folder is complete when it exists

A complete folder never changes, and any of them is a beginning for the log after its seq. A shard
is loaded from the one of the highest seq, without any from its generation's own files. So there is
no pointer that a primary of the past could turn back.
"""

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from shardline.shards.core.errors import CorruptFile
from shardline.shards.core.files import (
    MANIFEST_NAME,
    FileEntry,
    describe_tree,
    read_manifest,
    verify_files,
    write_manifest,
)

KIND = "compacted shard"
FORMAT_VERSION = 1
KEYS_NAME = "keys.msgpack"
# Replicas may still be loading the one before the newest.
KEPT = 2
_NAME = re.compile(r"main-(\d{20})")
_STAGED = re.compile(r"\.main-(\d{20})\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MainManifest:
    """What a compaction has written: of which shard, after how many writes."""

    generation: int
    shard: int
    seq: int
    rows: int
    files: tuple[FileEntry, ...]


def main_folder(live: Path, seq: int) -> Path:
    return live / f"main-{seq:020d}"


def compacted_seqs(live: Path) -> list[int]:
    """Of all complete ``main-<seq>`` in ``live``, ascending."""
    return [seq for seq in _seqs(live) if (main_folder(live, seq) / MANIFEST_NAME).is_file()]


def write_main(folder: Path, *, generation: int, shard: int, seq: int, rows: int) -> None:
    """Declares a staged folder complete. Call it last."""
    files = tuple(describe_tree(folder))
    manifest = MainManifest(generation=generation, shard=shard, seq=seq, rows=rows, files=files)
    write_manifest(folder, kind=KIND, version=FORMAT_VERSION, body=asdict(manifest))


def read_main(
    live: Path, seq: int, *, generation: int, shard: int, verify: bool = True
) -> MainManifest:
    """The manifest of ``main-<seq>``, its files verified; ``verify=False`` is for whoever compares
    the checksums while it copies them.

    Raises:
        NotFound: it is gone, or was never complete.
        CorruptFile: a file is missing or altered, or it is another shard's.
    """
    folder = main_folder(live, seq)
    body = read_manifest(folder, kind=KIND, version=FORMAT_VERSION)
    try:
        files = tuple(FileEntry(**entry) for entry in body["files"])
        numbers = {name: int(body[name]) for name in ("generation", "shard", "seq", "rows")}
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(
            f"{folder / MANIFEST_NAME}: a field is missing or wrong", got=repr(error)
        ) from error
    manifest = MainManifest(**numbers, files=files)
    wanted = {"generation": generation, "shard": shard, "seq": seq}
    if any(numbers[name] != number for name, number in wanted.items()):
        raise CorruptFile(
            f"{folder}: another shard's folder", expected=str(wanted), got=str(numbers)
        )
    if verify:
        verify_files(folder, files)
    return manifest


def superseded(live: Path, kept: int = KEPT) -> list[Path]:
    """All but the newest ``kept`` of the complete folders, and what a removal that was killed has
    left of older ones."""
    complete = compacted_seqs(live)
    if len(complete) < kept:
        return []
    return [main_folder(live, seq) for seq in _seqs(live) if seq < complete[-kept]]


def remove_older(live: Path, kept: int = KEPT) -> None:
    """Removes all but the newest ``kept`` of the complete folders, and what a process that was
    killed has left of older ones."""
    for folder in superseded(live, kept):
        (folder / MANIFEST_NAME).unlink(missing_ok=True)  # first: half of it is not complete
        shutil.rmtree(folder, ignore_errors=True)
    complete = compacted_seqs(live)
    if len(complete) < kept:
        return
    for staged in live.glob(".main-*"):  # of processes on any host
        match = _STAGED.match(staged.name)
        if match is not None and int(match[1]) < complete[-kept]:
            shutil.rmtree(staged, ignore_errors=True)


def _seqs(live: Path) -> list[int]:
    """Of all ``main-<seq>``, complete or not, ascending."""
    try:
        names = [path.name for path in live.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match is not None)
