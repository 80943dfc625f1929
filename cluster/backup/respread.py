"""The live rows of a generation on another number of shards, with the template that they have.

Codes of the new shards mean what they meant in the old ones: nothing is trained, and the search
parameters stay. Where all shards have taken over the index of another generation it is that one's
template; where only some have, the generation's own. Vectors of index kinds that keep exact copies
are the same bit for bit.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copyfile

import numpy as np

from shardline.cluster.build_shard import write_shard
from shardline.cluster.corpus_from_live import common_schema, in_schema
from shardline.cluster.spread import Progress
from shardline.cluster.store import Store
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.files import describe_file
from shardline.shards.core.partition import Partition, Partitioning, partition
from shardline.shards.live.live_rows import LiveRows, open_live_rows
from shardline.shards.storage.generation import (
    TEMPLATE_NAME,
    GenerationManifest,
    describe_shard,
    read_generation,
)
from shardline.shards.storage.spill import SPILL_FOLDER, read_spill, spill_file, spill_writer

ROWS_STAGE, SHARDS_STAGE = "rows", "shards"


def respread(
    source: Store, number: int, target: Path, num_shards: int, threads: int, progress: Progress
) -> GenerationManifest:
    """Writes all files of a generation but its manifest, which is returned, into a new folder.

    Nobody writes to the source meanwhile: its shards are read twice, one at a time in memory.
    Progress stages: ROWS_STAGE, SHARDS_STAGE.

    Raises:
        InvalidInput: more shards than live items. CorruptFile, NotFound: of the source's files.
    """
    folder = source.generation(number)
    manifest = read_generation(folder)
    item_ids, owns, template = [], [], folder / TEMPLATE_NAME
    for shard_rows in _all_rows(folder, manifest):
        item_ids.append(shard_rows.item_ids)
        owns.append(shard_rows.own)
        template = shard_rows.template or template
    ids = np.concatenate(item_ids)
    if not len(ids):
        raise InvalidInput("every item is deleted: nothing to index")
    cut = partition(ids, num_shards, Partitioning(manifest.partitioning))
    target.mkdir()
    for entry in manifest.common_files:
        (target / entry.name).parent.mkdir(parents=True, exist_ok=True)
        copyfile(folder / entry.name, target / entry.name)
    if owns[0] is not None and owns.count(owns[0]) == len(owns):
        copyfile(template, target / TEMPLATE_NAME)
        listed = describe_file(target, TEMPLATE_NAME)
        manifest = replace(manifest, index=owns[0].index, template=listed)
    counts = _spread(folder, manifest, cut, target, progress)
    shards = []
    for shard, rows in enumerate(counts):
        own = read_spill(target, shard, rows=rows, dim=manifest.dim)
        write_shard(target, shard, own, threads=threads)
        spill_file(target, shard).unlink()
        shards.append(describe_shard(target, shard, own.item_ids))
        progress(SHARDS_STAGE, len(shards), num_shards)
    (target / SPILL_FOLDER).rmdir()
    boundaries = tuple(int(key) for key in cut.upper_keys)
    return replace(manifest, boundaries=boundaries, shards=tuple(shards))


def _all_rows(folder: Path, manifest: GenerationManifest) -> Iterator[LiveRows]:
    return (open_live_rows(folder, manifest, entry.shard) for entry in manifest.shards)


def _spread(
    folder: Path, manifest: GenerationManifest, cut: Partition, target: Path, progress: Progress
) -> list[int]:
    """Each row to the file of its new shard; rows per shard."""
    schema = common_schema(folder, manifest)
    with spill_writer(target, cut) as spill:
        for rows in _all_rows(folder, manifest):
            for block in rows.blocks():
                spill.append(replace(block, attributes=in_schema(block.attributes, schema)))
                progress(ROWS_STAGE, sum(spill.rows), manifest.rows)
    return spill.rows
