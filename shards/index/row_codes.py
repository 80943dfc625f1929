"""Short codes of all rows of an index, of which those of a filter's rows are scored together.

Tens of thousands of rows that match a filter are too many to score by their vectors for every
query: 25,000 rows in half precision are 6.4 MB, which each shard reads from memory that others read
too. Codes of four bits per two numbers are 0.8 MB, and FastScan compares 32 of them at once. What
they find is scored again by the stored vectors. The codes of an index's own lists are of no use
here: they say how a row differs from its list's centroid, and the lists would be visited one by
one, 2 us each.
"""

import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import FloatArray, IdArray, Metric
from shardline.shards.index.exact_scan import StoredVectors, scan
from shardline.shards.index.layers import faiss_metric
from shardline.shards.index.selection import Selection

NUMBERS_PER_CODE = 2  # fewer errors than with four, at twice the memory
BITS = 4  # FastScan's
TRAIN_ROWS, TRAIN_ROUNDS = 8192, 10
BLOCK_ROWS = 4096  # encoded in 16 ms
PAUSE = 3.0  # times as long as a block took: others want the core
RECALL_PAUSE_S = 0.02  # between blocks of some milliseconds


class RowCodes:
    """codes (rows, bytes per row) uint8, by row, all made with the same ``_trained`` quantiser, of
    vectors less their ``_mean``: what all have in common says nothing of which is better."""

    def __init__(self, trained: Any, mean: FloatArray, codes: NDArray[np.uint8]) -> None:
        self._trained, self._mean, self._codes = trained, mean, codes

    @staticmethod
    def row_bytes(dim: int) -> int:
        """Of a row's code; 0 where vectors of ``dim`` numbers have none."""
        return 0 if dim % NUMBERS_PER_CODE else (dim // NUMBERS_PER_CODE * BITS + 7) // 8

    @classmethod
    def of(
        cls, stored: StoredVectors, metric: Metric, is_wanted: Callable[[], bool]
    ) -> "RowCodes | None":
        """4 us of one core per row of 128 numbers, with pauses. None where it is no longer wanted;
        that is asked between blocks."""
        faiss.omp_set_num_threads(1)  # of this thread
        rng = np.random.default_rng(0)
        sample = np.sort(rng.permutation(stored.rows)[:TRAIN_ROWS])
        trained = faiss.IndexPQ(
            stored.dim, stored.dim // NUMBERS_PER_CODE, BITS, faiss_metric(metric)
        )
        trained.pq.cp.niter = TRAIN_ROUNDS
        vectors = stored.of(sample)
        mean = vectors.mean(axis=0)
        trained.train(vectors - mean)
        codes = np.empty((stored.rows, trained.code_size), np.uint8)
        for start in range(0, stored.rows, BLOCK_ROWS):
            if not is_wanted():
                return None
            began = time.perf_counter()
            rows = np.arange(start, min(start + BLOCK_ROWS, stored.rows))
            codes[rows[0] : rows[-1] + 1] = trained.sa_encode(stored.of(rows) - mean)
            time.sleep(PAUSE * (time.perf_counter() - began))
        return cls(trained, mean, codes)

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes

    def of_rows(self, rows: IdArray) -> "CodedRows":
        """Those of rows (m,) int64, ascending; 4 ms for 125,000."""
        plain = faiss.IndexPQ(self._trained.d, self._trained.pq.M, BITS, self._trained.metric_type)
        plain.pq, plain.is_trained = self._trained.pq, True
        plain.add_sa_codes(np.take(self._codes, rows, axis=0))
        return CodedRows(rows.astype(np.int32), faiss.IndexPQFastScan(plain), self._mean)

    def recall(
        self,
        stored: StoredVectors,
        metric: Metric,
        candidates: int,
        wanted: int,
        most_rows: int,
        queries: int,
    ) -> float:
        """Of the ``wanted`` best of the first ``most_rows`` rows, the share that is among so many
        candidates: half of the queries are rows, and half lie between two of them."""
        count = min(stored.rows, most_rows)
        rng = np.random.default_rng(1)
        asked = stored.of(np.sort(rng.choice(count, queries, replace=False)))
        asked[::2] += rng.permutation(asked)[::2]
        asked[::2] /= 2
        among = Selection.of(np.arange(stored.rows) < count)
        best = scan(stored, asked, wanted, metric, among, lambda: time.sleep(RECALL_PAUSE_S))
        coded = self.of_rows(np.arange(count))
        found = 0
        for query, least in zip(asked, best.scores[:, -1], strict=True):
            rows = np.sort(coded.nearest(query, candidates))
            reached = np.count_nonzero(stored.scores(query, rows, metric) >= least)
            found += min(wanted, int(reached))  # of equal ones there may be more
        return found / best.scores.size


class CodedRows:
    """rows (m,) int32, ascending, and an index of their codes alone."""

    def __init__(self, rows: NDArray[np.int32], packed: Any, mean: FloatArray) -> None:
        self.rows, self._packed, self._mean = rows, packed, mean

    @property
    def nbytes(self) -> int:
        return int(self.rows.nbytes + self._packed.codes.size())

    def nearest(self, query: FloatArray, count: int) -> IdArray:
        """(count or fewer,) int64: the rows whose codes score best for a query (d,), in order."""
        if self._packed.metric_type == faiss.METRIC_L2:
            query = query - self._mean
        _, places = self._packed.search(query[None], min(count, len(self.rows)))
        found: IdArray = self.rows[places[places >= 0]].astype(np.int64)
        return found
