"""Main indexes that compactions have made: folders ``main-<seq>`` beside a shard's log.

    main-<seq>/index.faiss       the live rows after seq writes, dense local rows 0..n-1
    main-<seq>/item_ids.npy      (n,) int64, ascending: local row -> item id
    main-<seq>/attributes.arrow  attribute columns in local row order; absent where there are none
    main-<seq>/keys.msgpack      the newest idempotency keys among these writes
    main-<seq>/template.faiss    where the index is of another template than the generation's
    main-<seq>/_manifest.json    written last; the folder is complete when it exists

A complete folder never changes, and any of them is a beginning for the log after its seq. A shard
is loaded from the one of the highest seq, without any from its generation's own files. So there is
no pointer that a primary of the past could turn back. One that turns out to be damaged is passed
over (``loading``), and put aside by the next compaction, as ``.main-<seq>.damaged``.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from shardline.shards.core.errors import CorruptFile
from shardline.shards.core.files import (
    MANIFEST_NAME,
    FileEntry,
    describe_tree,
    read_manifest,
    remove_tree,
    verify_files,
    write_manifest,
)
from shardline.shards.storage.generation import OwnIndex, own_index_from_json

KIND = "compacted shard"
FORMAT_VERSION = 2
OF_GENERATION_VERSION = 1  # of one with the generation's template
KEYS_NAME = "keys.msgpack"
# Replicas may still be loading the one before the newest; and where the newest is damaged, the
# shard is loaded from that one and the log.
KEPT = 2
_NAME = re.compile(r"main-(\d{20})")
_STAGED = re.compile(r"\.main-(\d{20})\.")
_DAMAGED = ".damaged"  # the end of a name


@dataclass(frozen=True, slots=True, kw_only=True)
class MainManifest:
    """What a compaction has written: of which shard, after how many writes. own: as of
    ``ShardEntry``."""

    generation: int
    shard: int
    seq: int
    rows: int
    files: tuple[FileEntry, ...]
    own: OwnIndex | None = None


def main_folder(live: Path, seq: int) -> Path:
    return live / f"main-{seq:020d}"


def compacted_seqs(live: Path) -> list[int]:
    """Of all complete ``main-<seq>`` in ``live``, ascending."""
    return [seq for seq in _seqs(live) if (main_folder(live, seq) / MANIFEST_NAME).is_file()]


def write_main(
    folder: Path, *, generation: int, shard: int, seq: int, rows: int, own: OwnIndex | None = None
) -> None:
    """Declares a staged folder complete. Call it last."""
    files = tuple(describe_tree(folder))
    manifest = MainManifest(generation=generation, shard=shard, seq=seq, rows=rows, files=files)
    body = asdict(manifest)
    del body["own"]
    version = OF_GENERATION_VERSION
    if own is not None:
        version, body["own"] = FORMAT_VERSION, own.to_json()
    write_manifest(folder, kind=KIND, version=version, body=body)


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
        own = own_index_from_json(body.get("own"))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(
            f"{folder / MANIFEST_NAME}: a field is missing or wrong", got=repr(error)
        ) from error
    manifest = MainManifest(**numbers, files=files, own=own)
    wanted = {"generation": generation, "shard": shard, "seq": seq}
    if any(numbers[name] != number for name, number in wanted.items()):
        raise CorruptFile(
            f"{folder}: another shard's folder", expected=str(wanted), got=str(numbers)
        )
    if verify:
        verify_files(folder, files)
    return manifest


def superseded(live: Path, kept: int = KEPT) -> list[Path]:
    """What no start of the shard needs: all but the newest ``kept`` of the complete folders, what a
    removal that was killed has left of older ones, and what was put aside, unless it is newer."""
    complete = compacted_seqs(live)
    if not complete:
        return []
    found = [main_folder(live, seq) for seq in _seqs(live) if seq < complete[-kept:][0]]
    aside = _hidden(live, complete[-kept] + 1) if len(complete) >= kept else []
    return found + [path for path in aside if path.suffix == _DAMAGED]


def remove_older(live: Path, kept: int = KEPT) -> None:
    """Removes what is ``superseded``, and what compactions of older writes that were killed have
    left, on any host.

    Raises:
        OSError: something stays, which the next call removes.
    """
    complete = compacted_seqs(live)
    staged = _hidden(live, complete[-kept]) if len(complete) >= kept else []
    failed: OSError | None = None
    for folder in (*superseded(live, kept), *staged):
        try:
            (folder / MANIFEST_NAME).unlink(missing_ok=True)  # first: half of it is not complete
            remove_tree(folder)
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


def put_aside(live: Path, seq: int) -> Path:
    """Moves a damaged ``main-<seq>`` where nobody loads it, for people; where it is now. It goes
    with the older ones. Raises OSError."""
    folder = main_folder(live, seq)
    aside = live / f".{folder.name}{_DAMAGED}"
    remove_tree(aside)  # of the same write, put aside before
    folder.rename(aside)
    return aside


def _seqs(live: Path) -> list[int]:
    """Of all ``main-<seq>``, complete or not, ascending."""
    try:
        names = [path.name for path in live.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match is not None)


def _hidden(live: Path, before_seq: int) -> list[Path]:
    """Staged folders, and those put aside, of an earlier write than this."""
    found = ((path, _STAGED.match(path.name)) for path in live.glob(".main-*"))
    return sorted(path for path, match in found if match and int(match[1]) < before_seq)
