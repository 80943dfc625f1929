"""Some shards of a generation in this process, searched for blocks of queries on given threads.

The indexes and ids alone: attributes are read from their files (``result_columns``).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardline.cluster.batch.batch_job import Wanted
from shardline.cluster.batch.top_k import merge_stacked
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.schema import FloatArray, IdArray, Metric, Ranked, normalise
from shardline.shards.index.main_index import search_threads
from shardline.shards.server.shard import Shard
from shardline.shards.storage.generation import ATTRIBUTES_NAME, GenerationManifest

# Of what is free, the share that indexes may take: blocks in flight, the merge and the libraries
# need the rest.
USABLE_SHARE = 0.8
READ_AHEAD = 2
# Queries per thread in one call of faiss: of one nearest list after the other, and these visit few
# lists, which are chosen in a tenth of the time. With 2,048 each takes a quarter longer.
GROUPED_ROWS = 512
# The same without lists. 8,192 take 8 % longer each: their lookup tables and candidates exceed the
# cache of a core, and above 32 MB the C library maps fresh pages for every call.
SEARCHED_ROWS = 2048
COPIES = 3  # of a block's queries and results: while it is checked, merged and written


@dataclass(frozen=True, slots=True, eq=False)
class LoadedShards:
    """Shards of one generation. On a CPU several threads may search them, each its own block.

    share_lists: all indexes have inverted lists, with the same centroids.
    """

    shards: tuple[Shard, ...]
    share_lists: bool

    @classmethod
    def load(cls, folder: Path, numbers: Sequence[int]) -> "LoadedShards":
        """Verifies and reads them. ``set_search_threads`` is for each thread that searches.

        Raises:
            NotFound, CorruptFile, NewerFormat: as ``Shard.load``.
        """
        shards = tuple(Shard.load(folder, number) for number in numbers)
        mains = [shard.state.main for shard in shards]
        return cls(shards, all(main.has_lists_of(mains[0]) for main in mains))

    @property
    def dim(self) -> int:
        return self.shards[0].dim

    def search(self, vectors: FloatArray, wanted: Wanted) -> Ranked:
        """(n, searched_k), the best of these shards, for vectors (n, dim) float32.

        Raises:
            InvalidInput: a search parameter out of range, or a filter that is none for the items.
        """
        packed = wanted.packed_filter
        count = len(vectors)
        grouped = self.shards[0].state.main.by_list(vectors, wanted.searched_k, wanted.params)
        order = np.arange(count) if grouped is None else grouped.order
        are_told = grouped is not None and grouped.most > 0 and self.share_lists and not packed
        step = (GROUPED_ROWS if are_told else SEARCHED_ROWS) * search_threads()
        shape = (count, wanted.searched_k)
        found = Ranked(np.empty(shape, np.int64), np.empty(shape, np.float32))
        for start in range(0, count, step):
            rows = order[start : start + step]
            lists = grouped.of(rows) if grouped is not None and are_told else None
            found.ids[rows], found.scores[rows] = self._search(vectors[rows], wanted, packed, lists)
        return found

    def _search(
        self, vectors: FloatArray, wanted: Wanted, packed: bytes, lists: IdArray | None
    ) -> Ranked:
        """``search`` of so few that what it allocates stays in the caches; lists: of ``ByList``."""
        shape = (len(self.shards), len(vectors), wanted.searched_k)
        ids, scores = np.empty(shape, np.int64), np.empty(shape, np.float32)
        k, params = wanted.searched_k, wanted.params
        for place, shard in enumerate(self.shards):
            state = shard.state
            if packed:
                matching = state.matching(packed)
                ids[place], scores[place] = state.search(vectors, k, params, matching)
                continue
            rows, scores[place] = state.search_main(vectors, k, params, lists)
            # row -1 of an empty result is the last slot, which holds the empty id
            np.take(state.ids_by_row, rows, out=ids[place], mode="wrap")
        return merge_stacked(ids, scores)

    def item_vectors(self, shard: int, start: int, stop: int, metric: Metric) -> FloatArray:
        """The stored vectors of rows of one of these shards, as queries."""
        state = next(each for each in self.shards if each.shard == shard).state
        vectors = state.main.reconstruct(np.arange(start, stop, dtype=np.int64))
        # an index without exact copies gives approximations, whose length is not quite one
        return normalise(vectors) if metric is Metric.COSINE else vectors


def cores() -> int:
    """Cores this process may use, fewer than the machine has under taskset or in a container."""
    return len(os.sched_getaffinity(0))


def loaded_bytes(manifest: GenerationManifest) -> list[int]:
    """Bytes that each shard takes when loaded: its files, without attributes."""
    return [
        sum(file.bytes for file in entry.files if not file.name.endswith(ATTRIBUTES_NAME))
        for entry in manifest.shards
    ]


def blocks_in_flight(workers: int) -> int:
    """Blocks that are searched, one that waits so that no worker does, and blocks that are
    written."""
    return 2 * workers + 1


def block_bytes(block_rows: int, dim: int, k: int, shards: int, workers: int) -> int:
    """Bytes of the blocks that a job holds at once; a merge holds a part per shard."""
    one = COPIES * block_rows * (dim * 4 + k * 12)
    merged = min(block_rows, SEARCHED_ROWS) * k * 12 * shards
    return (blocks_in_flight(workers) + READ_AHEAD) * one + workers * merged


def groups_of(sizes: Sequence[int], available: int, needed: int) -> list[list[int]]:
    """The shards that are in memory at once, as few groups as possible in their order.

    sizes: bytes of each; available: bytes that are free; needed: of those, for blocks of queries.

    Raises:
        Unavailable: the largest shard does not fit by itself; with the arithmetic.
    """
    room = int(available * USABLE_SHARE) - needed
    largest = max(sizes)
    if largest > room:
        raise Unavailable(
            "not enough memory for one shard",
            expected=f"{_mib(largest)} of its files and {_mib(needed)} of queries and results",
            got=f"{USABLE_SHARE:.0%} of {_mib(available)} that are free",
            hint="free memory, build more and smaller shards, or take smaller blocks "
            "(--block-rows)",
        )
    groups: list[list[int]] = [[]]
    taken = 0
    for shard, size in enumerate(sizes):
        if groups[-1] and taken + size > room:
            groups.append([])
            taken = 0
        groups[-1].append(shard)
        taken += size
    return groups


def _mib(number: int) -> str:
    return f"{number / 2**20:,.0f} MiB"
