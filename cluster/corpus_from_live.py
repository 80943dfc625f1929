"""Today's live rows of a generation as an embedding set: what ``build --from-live`` builds from.

Written beside the generations and removed after the build. One shard is in memory at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile

import pyarrow as pa

from shardline.cluster.spread import Progress
from shardline.cluster.store import Store
from shardline.shards.core import files
from shardline.shards.live.attributes import decoded_schema
from shardline.shards.live.live_rows import open_live_rows
from shardline.shards.storage.cut import cut_of
from shardline.shards.storage.embedding_set import EmbeddingWriter, embedding_writer
from shardline.shards.storage.generation import (
    ATTRIBUTES_NAME,
    GenerationManifest,
    read_attributes,
    read_generation,
)

FOLDER = "live-rows"  # among the generations, while a build reads it
ID_BYTES, FLOAT_BYTES = 8, 4
STAGE = "live rows"


@contextmanager
def live_corpus(store: Store, number: int, progress: Progress) -> Iterator[Path]:
    """The folder of an embedding set with the live rows of generation ``number``, its model
    version, encoders and sample queries, and the cut that says which writes are in it.

    Writes may go on. Progress stage: STAGE, in rows.

    Raises:
        NotFound, CorruptFile, NewerFormat: of the generation, a shard's files or its log.
        InvalidInput: no live row is left. OSError: of the disk.
    """
    folder = store.generation(number)
    manifest = read_generation(folder)
    with files.scratch_folder(store.generations / FOLDER) as scratch:
        target = scratch / "set"
        with embedding_writer(
            target,
            model_version=manifest.model_version,
            dim=manifest.dim,
            metric=manifest.metric,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ) as writer:
            seqs = _append_rows(folder, manifest, writer, progress)
            writer.cut = cut_of(number, seqs, manifest.cut)
            _copy_beside(folder, manifest, writer.folder)
        yield target


def live_corpus_bytes(folder: Path, manifest: GenerationManifest) -> int:
    """About as much as ``live_corpus`` writes, by what the generation had when it was built."""
    rows = manifest.rows * (FLOAT_BYTES * manifest.dim + ID_BYTES)
    kept = {f"{entry.folder}/{ATTRIBUTES_NAME}" for entry in manifest.shards}
    beside = [file for entry in manifest.shards for file in entry.files if file.name in kept]
    return rows + sum(file.bytes for file in (*beside, *manifest.query_files))


def _append_rows(
    folder: Path, manifest: GenerationManifest, writer: EmbeddingWriter, progress: Progress
) -> tuple[int, ...]:
    """Of all shards, one after the other; how many writes of each are in its rows."""
    schema = common_schema(folder, manifest)
    seqs, rows = [], 0
    for entry in manifest.shards:
        shard = open_live_rows(folder, manifest, entry.shard)
        for block in shard.blocks():
            writer.append(block.item_ids, block.vectors, in_schema(block.attributes, schema))
            rows += len(block.item_ids)
            progress(STAGE, rows, max(rows, manifest.rows))
        seqs.append(shard.seq)
    progress(STAGE, rows, rows)
    return tuple(seqs)


def common_schema(folder: Path, manifest: GenerationManifest) -> pa.Schema:
    """Of the attributes of all shards: one with much text may have 64-bit offsets alone."""
    wide = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    found: pa.Schema | None = None
    for entry in manifest.shards:
        table = read_attributes(folder, manifest, entry.shard, verify=False)
        schema = pa.schema([]) if table is None else table.schema.remove_metadata()
        schema = decoded_schema(schema)  # as live rows have it
        if found is not None and found != schema:
            schema = pa.schema(
                field.with_type(wide.get(field.type, field.type))
                if field.type != schema.field(field.name).type
                else field
                for field in found
            )
        found = schema
    assert found is not None
    return found


def in_schema(attributes: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of one shard as ``common_schema`` has those of all."""
    return attributes if attributes.schema == schema else attributes.cast(schema)


def _copy_beside(folder: Path, manifest: GenerationManifest, target: Path) -> None:
    """The encoders and the sample queries, as they were written."""
    for entry in manifest.query_files:
        source = files.verify_file(folder, entry)
        (target / entry.name).parent.mkdir(parents=True, exist_ok=True)
        copyfile(source, target / entry.name)
