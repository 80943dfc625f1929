"""Blocks between two passes over the shards: their queries and the best results so far, on disk."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from shardline.cluster.batch.queries import Queries
from shardline.cluster.batch.spans import Span
from shardline.shards.core.files import disk_errors
from shardline.shards.core.schema import Ranked

IDS = "query_id"


@dataclass(frozen=True, slots=True)
class ParkedBlocks:
    """Files in a folder that one process uses: not durable, removed when a block is taken."""

    folder: Path

    def park(self, span: Span, queries: Queries) -> None:
        """Keeps the queries of a block. Raises OSError: the disk is full."""
        assert queries.vectors is not None
        ids = pa.record_batch({IDS: queries.ids})
        with disk_errors(self.folder):
            with pa.ipc.new_file(str(self._path(span, "ids.arrow")), ids.schema) as writer:
                writer.write_batch(ids)
            np.save(self._path(span, "vectors.npy"), queries.vectors)
            if queries.own is not None:
                np.save(self._path(span, "own.npy"), queries.own)

    def queries(self, span: Span) -> Queries:
        """Those of a parked block."""
        with pa.OSFile(str(self._path(span, "ids.arrow"))) as file:
            ids = pa.ipc.open_file(file).get_batch(0).column(IDS)
        own = self._path(span, "own.npy")
        return Queries(
            ids=ids,
            vectors=np.load(self._path(span, "vectors.npy")),
            own=np.load(own) if own.exists() else None,
        )

    def keep(self, span: Span, ranked: Ranked) -> None:
        """Keeps the best results so far, instead of those kept before. Raises as ``park``."""
        with disk_errors(self.folder):
            np.save(self._path(span, "item-ids.npy"), ranked.ids)
            np.save(self._path(span, "scores.npy"), ranked.scores)

    def kept(self, span: Span) -> Ranked:
        """What ``keep`` was given last."""
        return Ranked(
            np.load(self._path(span, "item-ids.npy")), np.load(self._path(span, "scores.npy"))
        )

    def drop(self, span: Span) -> None:
        """Forgets a block."""
        for path in self.folder.glob(f"block-{span.number:06d}.*"):
            path.unlink()

    def _path(self, span: Span, name: str) -> Path:
        return self.folder / f"block-{span.number:06d}.{name}"


def parked_bytes(block_rows: int, dim: int, k: int) -> int:
    """Bytes of one parked block, ids of 32 bytes assumed."""
    return block_rows * (dim * 4 + k * 12 + 40)
