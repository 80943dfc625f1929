"""What a snapshot holds, and the manifest that declares it whole.

    _manifest.json                        written last, with a checksum of itself and of every file
    generation/                           a generation: each shard as its newest main index has it
    live/shard-00000/log-...seg, EPOCH    what was written to the shard since; absent without writes

Of each shard it is a prefix of its log: the first ``seqs[shard]`` writes, no other. Across shards
there is no order of writes, in a snapshot as anywhere else. The writes in ``live/`` are numbered
from 1 on. Idempotency keys of earlier ones are not kept.
"""

from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from shardline.cluster.backup.backup_folder import BackupFolder
from shardline.shards.core.errors import CorruptFile, NotFound
from shardline.shards.core.files import (
    MANIFEST_NAME,
    FileEntry,
    decode_manifest,
    encode_manifest,
)
from shardline.shards.core.small_files import MAX_MANIFEST_BYTES
from shardline.shards.storage.generation import (
    GenerationManifest,
    manifest_from_json,
    manifest_to_json,
)

KIND = "snapshot"
FORMAT_VERSION = 2
OF_ONE_INDEX_VERSION = 1  # of a generation whose shards all have its template
GENERATION, LIVE = "generation", "live"  # folders in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """generation: what lies in ``generation/``, with the number and the time of creation of the
    one that it was taken of. writes: the files in ``live/``, of all shards.

    seqs: of each shard how many writes it holds. created_at: of the snapshot, ISO 8601.
    """

    generation: GenerationManifest
    seqs: tuple[int, ...]
    writes: tuple[FileEntry, ...]
    created_at: str

    @property
    def bytes(self) -> int:
        """Of all its files but the manifest."""
        return sum(entry.bytes for entry in (*self.generation.files, *self.writes))


def write_snapshot(folder: BackupFolder, snapshot: Snapshot) -> None:
    """Declares the folder whole. Call it last."""
    body = {
        "generation": manifest_to_json(snapshot.generation),
        "seqs": list(snapshot.seqs),
        "writes": [asdict(entry) for entry in snapshot.writes],
        "created_at": snapshot.created_at,
    }
    has_own = any(entry.own is not None for entry in snapshot.generation.shards)
    version = FORMAT_VERSION if has_own else OF_ONE_INDEX_VERSION
    folder.write(MANIFEST_NAME, [encode_manifest(kind=KIND, version=version, body=body)])


def read_snapshot(folder: BackupFolder) -> Snapshot:
    """The manifest of a whole snapshot; its files are verified when they are copied.

    Raises:
        NotFound: no snapshot, or one that was never finished.
        CorruptFile: the manifest was altered. NewerFormat: of a later version.
    """
    try:
        data = folder.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except NotFound as error:
        raise NotFound(
            f"{folder.url}: no complete snapshot here",
            hint=f"{MANIFEST_NAME}, which is written last, is missing",
        ) from error
    path = folder.path_of(MANIFEST_NAME)
    body = decode_manifest(data, path, kind=KIND, version=FORMAT_VERSION)
    try:
        return _from_json(body)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path}: a field is missing or wrong", got=repr(error)) from error


def _from_json(body: dict[str, Any]) -> Snapshot:
    snapshot = Snapshot(
        generation=manifest_from_json(body["generation"]),
        seqs=tuple(int(seq) for seq in body["seqs"]),
        writes=tuple(FileEntry(**entry) for entry in body["writes"]),
        created_at=str(body["created_at"]),
    )
    if len(snapshot.seqs) != len(snapshot.generation.shards):
        raise ValueError(f"{len(snapshot.seqs)} seqs")
    for entry in (*snapshot.generation.files, *snapshot.writes):
        path = PurePosixPath(entry.name)
        if path.is_absolute() or ".." in path.parts:  # it would be written outside of the store
            raise ValueError(f"name {entry.name}")
    return snapshot
