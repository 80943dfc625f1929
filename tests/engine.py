"""Small indexes, generations and shards for tests of the engine."""

from pathlib import Path

import numpy as np

from shardline.shards.core.files import FileEntry, describe_file, write_bytes
from shardline.shards.core.schema import Metric
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexSpec
from shardline.shards.index.template import build_shard_index, train_template, write_index
from shardline.shards.server.shard import Shard
from shardline.shards.storage.generation import (
    INDEX_NAME,
    ITEM_IDS_NAME,
    TEMPLATE_NAME,
    GenerationManifest,
    describe_shard,
    shard_folder,
    write_generation,
    write_item_ids,
)


def build_main(vectors: np.ndarray, *, metric: Metric = Metric.COSINE, **fields) -> MainIndex:
    """A main index in memory over all vectors, built with one thread."""
    rows, dim = vectors.shape
    resolved = resolve(IndexSpec(**fields), rows=rows, dim=dim, metric=metric)
    index = train_template(resolved, vectors, metric=metric, seed=0, threads=1)
    index.add(vectors)
    return MainIndex(index, metric=metric, defaults=resolved.search_params)


def build_generation(
    folder: Path,
    vectors: np.ndarray,
    ids: np.ndarray,
    num_shards: int,
    *,
    metric: Metric = Metric.COSINE,
    query_encoder: dict[str, bytes] | None = None,
    **fields,
) -> GenerationManifest:
    """A complete generation; ids ascending, cut into num_shards ranges of nearly equal size."""
    rows, dim = vectors.shape
    spec = IndexSpec(**fields)
    resolved = resolve(spec, rows=rows, dim=dim, metric=metric)
    template = train_template(resolved, vectors, metric=metric, seed=0, threads=1)
    write_index(template, folder / TEMPLATE_NAME)
    entries = []
    for shard, mine in enumerate(np.array_split(np.arange(rows), num_shards)):
        place = folder / shard_folder(shard)
        build_shard_index(
            folder / TEMPLATE_NAME, vectors[mine], place / INDEX_NAME, metric=metric, threads=1
        )
        write_item_ids(place / ITEM_IDS_NAME, ids[mine])
        entries.append(describe_shard(folder, shard, ids[mine]))
    encoder: list[FileEntry] = []
    for name, content in (query_encoder or {}).items():
        write_bytes(folder / "query_encoder" / name, content)
        encoder.append(describe_file(folder, f"query_encoder/{name}"))
    manifest = GenerationManifest(
        generation=7,
        model_version="m1",
        metric=metric,
        dim=dim,
        spec=spec,
        index=resolved,
        partitioning="range",
        boundaries=tuple(entry.id_min for entry in entries[1:]),
        shards=tuple(entries),
        template=describe_file(folder, TEMPLATE_NAME),
        query_encoder=tuple(encoder),
        created_at="2026-11-22T00:00:00+00:00",
        quality={"recall@100": 1.0},
    )
    write_generation(folder, manifest)
    return manifest


def flat_shard(vectors: np.ndarray, ids: np.ndarray, *, metric: Metric = Metric.DOT) -> Shard:
    """A shard in memory over a flat index."""
    main = build_main(vectors, metric=metric, kind="flat")
    return Shard(shard=0, generation=7, main=main, item_ids=ids)
