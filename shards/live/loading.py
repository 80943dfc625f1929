"""Reads a shard's state from the files of its generation."""

from pathlib import Path

from shardline.shards.core.errors import CorruptFile
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.spec import Device
from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.live.state import ShardState
from shardline.shards.storage.generation import (
    INDEX_NAME,
    ITEM_IDS_NAME,
    GenerationManifest,
    read_attributes,
    read_item_ids,
    shard_folder,
    verify_shard,
)


def load_state(
    folder: Path, manifest: GenerationManifest, shard: int, *, device: Device | None = None
) -> ShardState:
    """Verifies and reads one shard as it was built, before any write; ``device`` None means the
    manifest's.

    Raises:
        NotFound: no such shard.
        CorruptFile: a file is missing, altered, or contradicts the manifest; named.
    """
    entry = verify_shard(folder, manifest, shard)
    main = _load_main(folder, manifest, shard, device or manifest.index.device)
    item_ids = read_item_ids(folder / shard_folder(shard) / ITEM_IDS_NAME, rows=entry.rows)
    attributes = ItemAttributes(read_attributes(folder, manifest, shard, verify=False))
    return ShardState.of(main, item_ids, attributes)


def _load_main(folder: Path, manifest: GenerationManifest, shard: int, device: Device) -> MainIndex:
    path = folder / shard_folder(shard) / INDEX_NAME
    main = MainIndex.load(
        path, metric=manifest.metric, defaults=manifest.index.search_params, device=device
    )
    rows = manifest.shard_entry(shard).rows
    if main.rows != rows:
        raise CorruptFile(f"{path}: wrong row count", expected=str(rows), got=str(main.rows))
    if main.dim != manifest.dim:
        raise CorruptFile(f"{path}: wrong dimension", expected=str(manifest.dim), got=str(main.dim))
    return main
