"""All items of a generation as queries: item-to-item, an item itself not among its results.

Their vectors are in the indexes. They are written to the job's work folder first, shard by shard,
so that reading a block never needs an index in memory.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.cluster.batch.loaded_shards import LoadedShards
from shardline.cluster.batch.queries import Queries, cut
from shardline.cluster.batch.spans import Span
from shardline.shards.core.files import atomic_path
from shardline.shards.storage.generation import (
    ITEM_IDS_NAME,
    GenerationManifest,
    read_item_ids,
)

ROWS_AT_ONCE = 16_384


class GenerationItems:
    """Shard by shard, in ascending order of ids within one."""

    drops_own = True

    def __init__(self, folder: Path, manifest: GenerationManifest, work: Path | None) -> None:
        """work: where their vectors are kept while the job runs; None: they are not needed, because
        a live cluster looks them up."""
        self._folder, self._manifest, self._work = folder, manifest, work
        self.rows = manifest.rows
        self.id_type: pa.DataType = pa.int64()

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "items"}

    def keep_vectors(self, loaded: LoadedShards) -> None:
        """Writes the vectors of these shards' items, those that are not there yet."""
        for shard in loaded.shards:
            path = self._path(shard.shard)
            if path.exists():
                continue
            rows, metric = self._manifest.shard_entry(shard.shard).rows, self._manifest.metric
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": (rows, loaded.dim)}
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, rows, ROWS_AT_ONCE):
                    stop = min(start + ROWS_AT_ONCE, rows)
                    file.write(loaded.item_vectors(shard.shard, start, stop, metric).tobytes())

    def read(self, spans: Iterable[Span]) -> Iterator[tuple[Span, Queries]]:
        yield from cut(spans, self._pieces)

    def _pieces(self, start: int) -> Iterator[Queries]:
        before = 0
        for entry in self._manifest.shards:
            first = max(0, start - before)
            before += entry.rows
            if first >= entry.rows:
                continue
            ids = read_item_ids(self._folder / entry.folder / ITEM_IDS_NAME, rows=entry.rows)
            vectors = (
                None if self._work is None else np.load(self._path(entry.shard), mmap_mode="r")
            )
            for row in range(first, entry.rows, ROWS_AT_ONCE):
                part = slice(row, row + ROWS_AT_ONCE)
                yield Queries(
                    ids=pa.array(ids[part]),
                    vectors=None if vectors is None else np.array(vectors[part]),
                    own=ids[part],
                )

    def _path(self, shard: int) -> Path:
        assert self._work is not None
        return self._work / f"items-{shard:05d}.npy"
