"""Samples, tables and short rungs for tests of `shardline tune`."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardline.bench.vectors import manifold
from shardline.cluster.tuner.corpus_sample import CorpusSample
from shardline.shards.core.schema import Metric

ROWS, DIM = 9000, 16
LEAST_RUNG_ROWS = 2000  # in place of more, so that samples are small


def sample_of(rows: int = ROWS, *, shards: int = 1, **changes: object) -> CorpusSample:
    vectors = manifold(rows, DIM, 6, seed=1)
    fields = {
        "vectors": vectors,
        "ids": np.arange(rows) * 3,
        "rows": rows,
        "shards": shards,
        "metric": Metric.COSINE,
        "queries": manifold(40, DIM, 6, seed=1, stream=1),
        "query_source": "sample queries",
    }
    return CorpusSample(**fields | changes)


def table(path: Path, **columns: object) -> list[Path]:
    pq.write_table(pa.table(columns), path, write_page_checksum=True)
    return [path]
