"""The exact answer over what a main index stores: every row scored, whatever the index would visit.

Rows are read in blocks, from the best vectors that there are: the copies that re-rank, else the
vectors of the base (exact for flat, ivf and hnsw), else what its codes stand for. faiss releases
the GIL while a block is read and scored, and a block bounds the memory. Other threads may search
the index meanwhile: nothing here writes to it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import (
    EMPTY_ID,
    EMPTY_SCORE,
    FloatArray,
    IdArray,
    Metric,
    Ranked,
    in_order,
)
from shardline.shards.index.layers import Layers, codes_of, faiss_metric
from shardline.shards.index.selection import Selection

DENSE = 4  # of so many rows one is wanted: then decoding all of them takes as long as picking some
BLOCK_BYTES = 8 << 20  # of the vectors of a block: some milliseconds of one core
# A number in half precision as one in single precision: the fraction has so many bits more, and the
# exponent counts from so much lower.
FRACTION_BITS = 13
SIGN_AND_NUMBER = np.uint32(0x8FFFE000).astype(np.int32)  # without copies of the sign between them
EXPONENT_OF_ONE = np.float32(2.0**112)


class StoredVectors:
    """The best vectors that an index stores of its rows, in the space that they are compared in."""

    def __init__(self, layers: Layers) -> None:
        self._index = layers.whole  # keeps the memory of its layers alive
        self._transform = None if layers.refine is not None else layers.transform
        outer = layers.base if layers.refine is None else layers.refine.refine_index
        if layers.refine is None and layers.is_hnsw:
            outer = layers.base.storage
        self._outer = faiss.downcast_index(outer)
        # these decode a range at once, in a fraction of the time of one row after the other
        self._has_ranges = isinstance(self._outer, faiss.IndexFlatCodes)
        is_packed = isinstance(self._outer, faiss.IndexPQFastScan)
        self._codes = codes_of(self._outer) if self._has_ranges and not is_packed else None
        self._are_halves = (
            isinstance(self._outer, faiss.IndexScalarQuantizer)
            and self._outer.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        )
        self.rows = int(self._index.ntotal)
        self.dim = int(self._outer.d)

    @property
    def row_bytes(self) -> int:
        """Of a row of ``copied``, and its number."""
        size = self._outer.code_size if self._is_copied_as_stored else 4 * self.dim
        return 8 + int(size)

    @property
    def _is_copied_as_stored(self) -> bool:
        return self._codes is not None and isinstance(
            self._outer, faiss.IndexFlat | faiss.IndexScalarQuantizer
        )

    def queries(self, queries: FloatArray) -> FloatArray:
        """queries (n, d of the index) float32 in that space, (n, dim) float32."""
        if self._transform is None:
            return queries
        chain = self._transform.chain
        for place in range(chain.size()):
            queries = chain.at(place).apply(queries)
        return queries

    def of(self, rows: IdArray) -> FloatArray:
        """(m, dim) float32 of existing local rows (m,) int64, ascending."""
        if not self._has_ranges or not rows.size:
            return np.asarray(self._outer.reconstruct_batch(rows), dtype=np.float32)
        first, last = int(rows[0]), int(rows[-1])
        if self._codes is not None and self._are_halves:
            is_range = last - first + 1 == len(rows)
            return of_halves(
                self._codes[first : last + 1] if is_range else np.take(self._codes, rows, axis=0)
            )
        if self._codes is not None and DENSE * len(rows) < last - first:
            codes = np.take(self._codes, rows, axis=0)
            return np.asarray(self._outer.sa_decode(codes), dtype=np.float32)
        vectors = np.asarray(self._outer.reconstruct_n(first, last - first + 1), dtype=np.float32)
        return vectors if len(vectors) == len(rows) else np.take(vectors, rows - first, axis=0)

    def scores(self, query: FloatArray, rows: IdArray, metric: Metric) -> FloatArray:
        """(m,): of rows (m,) int64, ascending, for a query (dim,). Each row by itself: equal
        vectors have equal scores, wherever they stand."""
        vectors = self.of(rows)
        if metric is not Metric.L2:
            products: FloatArray = np.vecdot(vectors, query)
            return products
        vectors -= query
        squares: FloatArray = np.vecdot(vectors, vectors)
        return -squares

    def copied(self, rows: IdArray) -> Any:
        """An index of faiss with the vectors of rows (m,) int64, ascending, and no others: in the
        form they are stored in, if that is full or half precision."""
        outer = self._outer
        made: Any = faiss.IndexFlat(self.dim, outer.metric_type)
        if self._codes is None or not self._is_copied_as_stored:
            made.add(self.of(rows))
            return made
        if isinstance(outer, faiss.IndexScalarQuantizer):
            made = faiss.IndexScalarQuantizer(self.dim, outer.sq.qtype, outer.metric_type)
            made.sq, made.is_trained = outer.sq, True
        made.add_sa_codes(np.take(self._codes, rows, axis=0))
        return made


def of_halves(codes: NDArray[np.uint8]) -> FloatArray:
    """(m, d) float32 of finite numbers in half precision, codes (m, 2 d): what faiss decodes one
    by one, in a quarter of the time. Both formats have sign, exponent and fraction in this order;
    single precision has three more bits of exponent, and another bias."""
    bits = codes.view(np.int16).astype(np.int32)
    bits <<= FRACTION_BITS
    bits &= SIGN_AND_NUMBER
    numbers: FloatArray = bits.view(np.float32)
    numbers *= EXPONENT_OF_ONE
    return numbers


def scan(
    stored: StoredVectors,
    queries: FloatArray,
    k: int,
    metric: Metric,
    selection: Selection | None,
    look: Callable[[], None],
) -> Ranked:
    """The k best local rows, as ids (n, k), of queries (n, d) float32, of all rows that may come
    back; slots beyond their number are empty. As many threads as ``set_search_threads`` was told in
    this thread.

    look: called before each block; what it raises ends the scan.
    """
    queries = stored.queries(queries)
    shape = len(queries), k
    best = Ranked(np.full(shape, EMPTY_ID, np.int64), np.full(shape, EMPTY_SCORE, np.float32))
    for rows in _blocks(stored, selection):
        look()
        if rows.size:
            found = _best_of(queries, rows, stored.of(rows), k, metric)
            ids = np.concatenate((best.ids, found.ids), axis=1)
            scores = np.concatenate((best.scores, found.scores), axis=1)
            ids, scores = in_order(ids, scores)
            best = Ranked(ids[:, :k], scores[:, :k])
    return Ranked(np.ascontiguousarray(best.ids), np.ascontiguousarray(best.scores))


def _blocks(stored: StoredVectors, selection: Selection | None) -> Iterator[IdArray]:
    """The rows that may come back, some at a time."""
    step = max(1, BLOCK_BYTES // (4 * stored.dim))
    for start in range(0, stored.rows, step):
        rows = np.arange(start, min(start + step, stored.rows), dtype=np.int64)
        yield rows if selection is None else rows[selection.are_live(rows)]


def _best_of(
    queries: FloatArray, rows: IdArray, vectors: FloatArray, k: int, metric: Metric
) -> Ranked:
    """(n, min(k, m)): the best of rows (m,), whose vectors are (m, dim); of equal scores the lowest
    rows, which faiss does not promise."""
    width = min(k, len(rows))
    asked = min(k + 1, len(rows))
    ids, scores = _knn(queries, vectors, asked, metric)
    if asked > width:
        cut = np.flatnonzero(scores[:, width] == scores[:, width - 1])
        if cut.size:  # the tie goes on beyond the answer: all of the block, in order
            every = in_order(*_knn(queries[cut], vectors, len(rows), metric))
            ids[cut], scores[cut] = every.ids[:, :asked], every.scores[:, :asked]
    ids, scores = ids[:, :width], scores[:, :width]
    found = rows[ids]
    if ids.size and ids.min() < 0:  # scores that have overflowed are no results
        found[ids < 0], scores[ids < 0] = EMPTY_ID, EMPTY_SCORE
    return Ranked(found, scores)


def _knn(
    queries: FloatArray, vectors: FloatArray, width: int, metric: Metric
) -> tuple[IdArray, FloatArray]:
    """Positions and scores, both (n, width), higher first; width <= m."""
    distances, positions = faiss.knn(queries, vectors, width, metric=faiss_metric(metric))
    return positions, (-distances if metric is Metric.L2 else distances)
