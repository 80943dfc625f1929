"""Bytes of one shard of an index that is not built yet: its files, and its process in memory.

What the process takes besides its index is what ``cluster.preflight.free_memory`` reckons with, so
a plan and `serve` agree.
"""

import re
from dataclasses import dataclass
from functools import cache

from shardline.cluster.preflight.build_space import FLOAT_BYTES, ID_BYTES
from shardline.cluster.preflight.free_memory import FILTER_BYTES, SHARD_BYTES
from shardline.shards.core.schema import Metric
from shardline.shards.index.spec import IndexKind, ResolvedIndex
from shardline.shards.index.template import bytes_to_come

# Huge pages round a process up by 14 to 25 MiB (docs/OPERATIONS.md).
HUGE_PAGES_BYTES = 20 << 20
FASTSCAN_BLOCK = 32  # rows; the last block of each list is filled up, half of one on average
ROW_NUMBER_BYTES = 8  # of an ivf kind in ``bytes_to_come``; beside them what finds a row's list
LIST_OF_ROW_BYTES = 8
MOST_TABLE_BYTES = 2 << 30  # larger tables are not made (faiss, IndexIVFPQ.h)
CODES = re.compile(r"\bPQ(\d+)x(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSize:
    """Bytes. row_bytes: codes, row number, links and copies of one row. table_bytes: what faiss
    computes at loading for codes of residuals under L2. filter_bytes: at most, where searches have
    filters."""

    rows: int
    row_bytes: float
    ids_bytes: int
    centroid_bytes: int
    padding_bytes: int
    direct_map_bytes: int
    codebook_bytes: int
    table_bytes: int
    filter_bytes: int = FILTER_BYTES
    process_bytes: int = SHARD_BYTES + HUGE_PAGES_BYTES

    @property
    def file_bytes(self) -> int:
        """Of index and ids on the disk."""
        return (
            round(self.rows * self.row_bytes)
            + self.ids_bytes
            + self.centroid_bytes
            + self.codebook_bytes
            + self.padding_bytes
        )

    @property
    def loaded_bytes(self) -> int:
        """Of the index in memory."""
        return self.file_bytes + self.direct_map_bytes + self.table_bytes

    @property
    def resident_bytes(self) -> int:
        """Of the process, without filters."""
        return self.loaded_bytes + self.process_bytes

    @property
    def most_bytes(self) -> int:
        """Of the process, with filters."""
        return self.resident_bytes + self.filter_bytes


def shard_size(index: ResolvedIndex, *, rows: int, dim: int, metric: Metric) -> ShardSize:
    """Of the largest shard, which has so many rows."""
    nlist = index.nlist or 0
    has_copies = "Refine" in index.factory or "RFlat" in index.factory
    row_bytes = _row_bytes(index, dim, metric)
    codes = CODES.search(index.factory)
    m, nbits = (int(codes[1]), int(codes[2])) if codes else (0, 0)
    tables = nlist * m * 2**nbits * FLOAT_BYTES if metric is Metric.L2 else 0
    return ShardSize(
        rows=rows,
        row_bytes=row_bytes,
        ids_bytes=rows * ID_BYTES,
        centroid_bytes=nlist * dim * FLOAT_BYTES,
        padding_bytes=round(nlist * code_bytes(index, dim=dim, metric=metric) * FASTSCAN_BLOCK / 2)
        if index.kind is IndexKind.IVFPQ_FS
        else 0,
        direct_map_bytes=rows * LIST_OF_ROW_BYTES if nlist and not has_copies else 0,
        codebook_bytes=dim * 2**nbits * FLOAT_BYTES if codes else 0,
        table_bytes=tables if tables <= MOST_TABLE_BYTES else 0,
    )


def code_bytes(index: ResolvedIndex, *, dim: int, metric: Metric) -> float:
    """Of one row's code in a list, which is what a search reads of a row: without row number and
    copies."""
    parts = [part for part in index.factory.split(",") if not part.startswith(("Refine", "RFlat"))]
    plain = index.model_copy(update={"factory": ",".join(parts)})
    numbers = ROW_NUMBER_BYTES if index.nlist else 0
    return _row_bytes(plain, dim, metric) - numbers


@cache
def _row_bytes(index: ResolvedIndex, dim: int, metric: Metric) -> float:
    """A plan asks for the same ones many times, and each makes an index."""
    return bytes_to_come(index, dim=dim, metric=metric)
