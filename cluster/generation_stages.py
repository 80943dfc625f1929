"""All shards of a generation in this process, searched with and without approximations.

For measurements, not for serving: one thread, no deadline, and always on the CPU. Answers are
merged as the router merges them.
"""

from pathlib import Path

import numpy as np

from shardline.router.merge import merge_top_k
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray, Ranked
from shardline.shards.index.main_index import set_search_threads
from shardline.shards.index.stages import Stage, stages_of
from shardline.shards.index.template import read_index
from shardline.shards.storage.generation import (
    INDEX_NAME,
    ITEM_IDS_NAME,
    GenerationManifest,
    read_generation,
    read_item_ids,
    verify_shard,
)


class _LocalShard:
    """One shard's index, which owns the memory, and the ways to search it."""

    def __init__(self, folder: Path, manifest: GenerationManifest, shard: int) -> None:
        entry = verify_shard(folder, manifest, shard)
        place = folder / entry.folder
        self._index = read_index(place / INDEX_NAME)
        self._item_ids = np.append(read_item_ids(place / ITEM_IDS_NAME, rows=entry.rows), EMPTY_ID)
        params = manifest.index_of(shard).search_params
        self.stages = stages_of(self._index, manifest.metric, params)

    def search(self, stage: Stage, queries: FloatArray, k: int) -> Ranked:
        rows, scores = self.stages[stage].search(queries, k, SearchParams())
        return Ranked(self._item_ids[rows], scores)


class LocalGeneration:
    """A generation's shards, verified and loaded; each search uses ``threads`` threads.

    Raises:
        NotFound, CorruptFile, NewerFormat: as ``shards.storage.generation`` reads and verifies.
    """

    def __init__(self, folder: Path, *, threads: int) -> None:
        self.manifest = read_generation(folder)
        set_search_threads(threads)
        shards = range(len(self.manifest.shards))
        self._shards = [_LocalShard(folder, self.manifest, shard) for shard in shards]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that the index of every shard has, from exhaustive to as configured."""
        common = set.intersection(*(set(shard.stages) for shard in self._shards))
        return tuple(stage for stage in self._shards[0].stages if stage in common)

    def search(self, stage: Stage, queries: FloatArray, k: int) -> IdArray:
        """(n, k) int64 item ids of the merged answer, best first, -1 in empty slots.

        queries (n, dim) float32, checked and normalised already.
        """
        return merge_top_k([shard.search(stage, queries, k) for shard in self._shards], k).ids

    def describe(self, stage: Stage) -> str:
        """What is searched at this stage, in a few words."""
        index = self.manifest.index_of(0)
        if stage is Stage.CODES:
            return "every code scored"
        if stage is Stage.RERANKED:
            return f"every code scored, {index.rerank_factor} k re-ranked"
        knobs = (
            f"nprobe {index.nprobe} of {index.nlist}" if index.nprobe else "",
            f"ef_search {index.ef_search}" if index.ef_search else "",
            f"{index.rerank_factor} k re-ranked" if index.rerank_factor else "",
        )
        return ", ".join(knob for knob in knobs if knob) or "no knobs"
