"""A generation: the immutable, numbered folder that shards load, and its manifest.

    _manifest.json               written last; the folder is complete when it exists
    template.faiss               trained once; every shard's index is a copy of it plus rows
    query_encoder/...            what turns a user's features into a query
    item_encoder/...             what turns a new item's features into its vector; absent before
                                 exports had it, and where vectors are foreign
    queries.arrow                sample queries; absent where the embedding set has none
    shard-00000/index.faiss      dense local rows 0..n-1
    shard-00000/item_ids.npy     (n,) int64, ascending: local row -> item id
    shard-00000/attributes.arrow attribute columns in local row order; absent where there are none

Format 1 had neither attributes nor queries, and is still read. In format 3 a shard's files may lie
in another folder, which the manifest names: those of a compaction, in place of the ones that were
built (``cluster.housekeeping.rebase``). Nothing here needs faiss.
Every checksum is verified before a file is used.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.shards.core.encoder_files import ITEM_ENCODER_FOLDER, QUERY_ENCODER_FOLDER
from shardline.shards.core.errors import CorruptFile, NotFound
from shardline.shards.core.files import (
    MANIFEST_NAME,
    FileEntry,
    atomic_path,
    describe_file,
    number_of,
    read_manifest,
    verify_file,
    verify_files,
    write_manifest,
)
from shardline.shards.core.schema import IdArray, Metric
from shardline.shards.index.spec import IndexSpec, ResolvedIndex
from shardline.shards.storage.cut import Cut, cut_from_json
from shardline.shards.storage.vector_files import open_ipc, write_table

KIND = "generation"
FORMAT_VERSION = 4
OF_ONE_INDEX_VERSION = 3  # of one whose shards all have the template of the generation
UNMOVED_VERSION = 2  # of one, besides, whose shards all lie where its build has put them
TEMPLATE_NAME = "template.faiss"
INDEX_NAME = "index.faiss"
ITEM_IDS_NAME = "item_ids.npy"
ATTRIBUTES_NAME = "attributes.arrow"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnIndex:
    """Of a shard that has taken its index over from another generation (``shards.live.takeover``):
    which one, by which publish, and how it is searched. The template lies among the shard's files.

    token: the publish, unlike any other of any store; numbers of generations repeat.
    """

    generation: int
    token: str
    index: ResolvedIndex

    def to_json(self) -> dict[str, Any]:
        """As manifests keep it."""
        return {
            "generation": self.generation,
            "token": self.token,
            "index": self.index.model_dump(mode="json"),
        }


def own_index_from_json(value: Any) -> OwnIndex | None:
    """What ``OwnIndex.to_json`` made; None for None, as most shards have it.

    Raises:
        KeyError, TypeError, ValueError: anything else.
    """
    if value is None:
        return None
    index = ResolvedIndex.model_validate(value["index"])
    return OwnIndex(generation=int(value["generation"]), token=str(value["token"]), index=index)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One shard: its smallest and largest item id, its rows, and its files. own: its index, where
    that is not of the generation's template."""

    shard: int
    id_min: int
    id_max: int
    rows: int
    files: tuple[FileEntry, ...]
    own: OwnIndex | None = None

    @property
    def folder(self) -> str:
        """Where the files lie in the generation's folder; all in one."""
        if not self.files:
            return shard_folder(self.shard)
        return PurePosixPath(self.files[0].name).parent.as_posix()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationManifest:
    """All that is known of a generation.

    spec is what was asked for, index what it resolved to. boundaries are the upper keys between
    neighbouring shards, in the terms of ``partitioning``. quality is the report of the build. cut:
    what its rows contain of an earlier generation's writes; None where nobody has said it.
    """

    generation: int
    model_version: str
    metric: Metric
    dim: int
    spec: IndexSpec
    index: ResolvedIndex
    partitioning: str
    boundaries: tuple[int, ...]
    shards: tuple[ShardEntry, ...]
    template: FileEntry
    query_encoder: tuple[FileEntry, ...]
    queries: FileEntry | None
    created_at: str
    quality: dict[str, Any]
    item_encoder: tuple[FileEntry, ...] = ()
    cut: Cut | None = None

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.shards)

    @property
    def query_files(self) -> tuple[FileEntry, ...]:
        """What its embedding set brought besides rows: encoders and sample queries."""
        queries = () if self.queries is None else (self.queries,)
        return (*self.query_encoder, *self.item_encoder, *queries)

    @property
    def common_files(self) -> tuple[FileEntry, ...]:
        """Those that belong to no shard."""
        return (self.template, *self.query_files)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All, the manifest excepted."""
        return (*self.common_files, *(file for entry in self.shards for file in entry.files))

    def index_of(self, shard: int) -> ResolvedIndex:
        """What a shard's files hold. Raises NotFound: no such shard."""
        own = self.shard_entry(shard).own
        return self.index if own is None else own.index

    def shard_entry(self, shard: int) -> ShardEntry:
        """Raises NotFound when the generation has no such shard."""
        if not 0 <= shard < len(self.shards):
            raise NotFound(
                f"generation {self.generation} has no shard {shard}",
                expected=f"0 to {len(self.shards) - 1}",
            )
        return self.shards[shard]


def shard_template(folder: Path, entry: ShardEntry) -> Path:
    """The template of a shard of the generation in ``folder``."""
    return (folder if entry.own is None else folder / entry.folder) / TEMPLATE_NAME


def shard_folder(shard: int) -> str:
    """The name of a shard's folder inside its generation, as a build gives it."""
    return f"shard-{shard:05d}"


def describe_shard(folder: Path, shard: int, item_ids: IdArray) -> ShardEntry:
    """The manifest entry of a shard whose files have been written; item_ids (n,), ascending."""
    names = [f"{shard_folder(shard)}/{name}" for name in (INDEX_NAME, ITEM_IDS_NAME)]
    if (folder / shard_folder(shard) / ATTRIBUTES_NAME).is_file():
        names.append(f"{shard_folder(shard)}/{ATTRIBUTES_NAME}")
    return ShardEntry(
        shard=shard,
        id_min=int(item_ids[0]),
        id_max=int(item_ids[-1]),
        rows=item_ids.size,
        files=tuple(describe_file(folder, name, rows=item_ids.size) for name in names),
    )


def write_generation(folder: Path, manifest: GenerationManifest) -> None:
    """Declares the folder complete. Call it last."""
    is_moved = any(entry.folder != shard_folder(entry.shard) for entry in manifest.shards)
    version = OF_ONE_INDEX_VERSION if is_moved else UNMOVED_VERSION
    if any(entry.own is not None for entry in manifest.shards):
        version = FORMAT_VERSION
    write_manifest(folder, kind=KIND, version=version, body=manifest_to_json(manifest))


def manifest_to_json(manifest: GenerationManifest) -> dict[str, Any]:
    """What ``manifest_from_json`` reads."""
    return asdict(manifest) | {
        "spec": manifest.spec.model_dump(mode="json"),
        "index": manifest.index.model_dump(mode="json"),
        "cut": None if manifest.cut is None else manifest.cut.to_json(),
        "shards": [_shard_to_json(entry) for entry in manifest.shards],
    }


def _shard_to_json(entry: ShardEntry) -> dict[str, Any]:
    """Without ``own`` where there is none: older versions know no such field."""
    made = asdict(replace(entry, own=None))
    del made["own"]
    return made if entry.own is None else made | {"own": entry.own.to_json()}


def read_generation(folder: Path) -> GenerationManifest:
    """The manifest of a complete generation; its files are not looked at yet.

    A folder whose name is a number must hold the generation of that number: one that was exchanged
    with another, or copied over it, is whole by all its checksums.

    Raises:
        NotFound: the folder is absent or was never completed.
        CorruptFile: the manifest was altered, contradicts itself, or is another generation's.
        NewerFormat: written by a version newer than this code.
    """
    body = read_manifest(folder, kind=KIND, version=FORMAT_VERSION)
    try:
        manifest = manifest_from_json(body)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(
            f"{folder / MANIFEST_NAME}: a field is missing or wrong", got=repr(error)
        ) from error
    numbers = [entry.shard for entry in manifest.shards]
    if not numbers or numbers != list(range(len(numbers))):
        raise CorruptFile(
            f"{folder / MANIFEST_NAME}: shards are not numbered from 0", got=str(numbers)
        )
    number = number_of(folder.name)
    if number is not None and number != manifest.generation:
        raise CorruptFile(
            f"{folder}: another generation's folder",
            expected=f"the manifest of generation {number}",
            got=f"that of generation {manifest.generation}",
            hint="give the folder the number of its manifest as its name again",
        )
    return manifest


def verify_shard(folder: Path, manifest: GenerationManifest, shard: int) -> ShardEntry:
    """The shard's entry, once its files have the size and checksum that the manifest gives.

    Raises:
        NotFound: no such shard in the manifest.
        CorruptFile: a file is missing or altered; named in the message.
    """
    entry = manifest.shard_entry(shard)
    listed = {file.name for file in entry.files}
    for name in (INDEX_NAME, ITEM_IDS_NAME):
        if f"{entry.folder}/{name}" not in listed:
            raise CorruptFile(
                f"{folder / MANIFEST_NAME}: shard {shard} does not list {name}",
                got=", ".join(sorted(listed)),
            )
    verify_files(folder, entry.files)
    return entry


def verify_query_encoder(folder: Path, manifest: GenerationManifest) -> Path:
    """The query encoder's folder, its files verified.

    Raises:
        NotFound: the generation was built without one.
        CorruptFile: a file is missing or altered.
    """
    if not manifest.query_encoder:
        raise NotFound(
            f"generation {manifest.generation} has no query encoder",
            hint="it was built from foreign embeddings: query it with vectors or item ids",
        )
    verify_files(folder, manifest.query_encoder)
    return folder / QUERY_ENCODER_FOLDER


def verify_item_encoder(folder: Path, manifest: GenerationManifest) -> Path:
    """The item encoder's folder, its files verified.

    Raises:
        NotFound: the generation was built without one.
        CorruptFile: a file is missing or altered.
    """
    if not manifest.item_encoder:
        raise NotFound(
            f"generation {manifest.generation} has no item encoder",
            hint="export the model again and build; foreign embeddings have none",
        )
    verify_files(folder, manifest.item_encoder)
    return folder / ITEM_ENCODER_FOLDER


def verify_generation(folder: Path, manifest: GenerationManifest) -> None:
    """Checks every file of the generation; raises CorruptFile for the first that is wrong."""
    verify_file(folder, manifest.template)
    verify_files(folder, manifest.query_encoder)
    verify_files(folder, manifest.item_encoder)
    if manifest.queries is not None:
        verify_file(folder, manifest.queries)
    for entry in manifest.shards:
        verify_shard(folder, manifest, entry.shard)


def write_item_ids(path: Path, item_ids: IdArray) -> None:
    """Writes (n,) int64 ids, which must be ascending, complete or not at all."""
    assert item_ids.dtype == np.int64 and (item_ids[1:] > item_ids[:-1]).all()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, item_ids, allow_pickle=False)


def read_item_ids(path: Path, *, rows: int) -> IdArray:
    """(rows,) int64 ids, ascending and without repeats.

    Raises:
        CorruptFile: not such a file, or another number of rows.
    """
    try:
        item_ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorruptFile(f"{path}: not a numpy array", got=str(error)) from error
    if not isinstance(item_ids, np.ndarray) or item_ids.dtype != np.int64 or item_ids.ndim != 1:
        raise CorruptFile(f"{path}: wrong contents", expected="1-d int64 item ids")
    if item_ids.size != rows:
        raise CorruptFile(f"{path}: wrong row count", expected=str(rows), got=str(item_ids.size))
    if item_ids.size and (item_ids[0] < 0 or (item_ids[1:] <= item_ids[:-1]).any()):
        raise CorruptFile(f"{path}: item ids are not ascending", expected=">= 0, each id once")
    return item_ids


def write_attributes(path: Path, attributes: pa.Table) -> None:
    """Writes the attribute columns of a shard, rows in the order of its item ids; none, no file."""
    if attributes.num_columns:
        write_table(path, attributes)


def read_attributes(
    folder: Path, manifest: GenerationManifest, shard: int, *, verify: bool = True
) -> pa.Table | None:
    """The attribute columns of a shard, mapped, row i that of its i-th item id.

    None where the corpus has no attributes, or the generation was built before they were kept.
    ``verify=False`` is for whoever has verified the shard's files.

    Raises:
        NotFound: no such shard. CorruptFile: the file is altered, or has other rows.
    """
    entry = manifest.shard_entry(shard)
    name = f"{entry.folder}/{ATTRIBUTES_NAME}"
    listed = next((file for file in entry.files if file.name == name), None)
    if listed is None:
        return None
    path = verify_file(folder, listed) if verify else folder / listed.name
    return read_attribute_file(path, rows=entry.rows)


def read_attribute_file(path: Path, *, rows: int) -> pa.Table | None:
    """What ``write_attributes`` wrote, mapped; None where there is no file.

    Raises:
        CorruptFile: not such a file, or another number of rows.
    """
    if not path.is_file():
        return None
    table = open_ipc(path).read_all()
    if table.num_rows != rows:
        raise CorruptFile(f"{path}: wrong row count", expected=str(rows), got=str(table.num_rows))
    return table


def manifest_from_json(body: dict[str, Any]) -> GenerationManifest:
    """Raises KeyError, TypeError, ValueError: not the body of a generation's manifest."""
    return GenerationManifest(
        generation=int(body["generation"]),
        model_version=str(body["model_version"]),
        metric=Metric(body["metric"]),
        dim=int(body["dim"]),
        spec=IndexSpec.model_validate(body["spec"]),
        index=ResolvedIndex.model_validate(body["index"]),
        partitioning=str(body["partitioning"]),
        boundaries=tuple(int(key) for key in body["boundaries"]),
        shards=tuple(
            ShardEntry(
                **{
                    **entry,
                    "files": _file_entries(entry["files"]),
                    "own": own_index_from_json(entry.get("own")),
                }
            )
            for entry in body["shards"]
        ),
        template=FileEntry(**body["template"]),
        query_encoder=_file_entries(body["query_encoder"]),
        queries=FileEntry(**body["queries"]) if body.get("queries") else None,
        created_at=str(body["created_at"]),
        quality=dict(body["quality"]),
        item_encoder=_file_entries(body.get("item_encoder", [])),
        cut=cut_from_json(body.get("cut")),
    )


def _file_entries(values: list[dict[str, Any]]) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(**value) for value in values)
