"""The layers of a faiss index as built here, outermost first: re-rank, transform, base.

    IndexRefine                 exact (or fp16) copies of the vectors, re-ranks candidates
      IndexPreTransform         PCA or rotation in front
        base                    flat | ivf | hnsw | pq | sq8 ...: finds the candidates

Any layer but the base may be absent. faiss returns them as untyped pointers; only this module
casts them to their classes.
"""

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import Metric

# What the search, exclusion and reconstruction code of MainIndex has been tested with.
KNOWN_BASES = (
    faiss.IndexFlat,
    faiss.IndexScalarQuantizer,
    faiss.IndexPQ,
    faiss.IndexPQFastScan,
    faiss.IndexHNSW,
    faiss.IndexIVFFlat,
    faiss.IndexIVFPQ,
    faiss.IndexIVFPQFastScan,
    faiss.IndexIVFScalarQuantizer,
)
# The other bases refuse an IDSelector (IndexPQ) or any search parameters (IndexPQFastScan).
SELECTOR_BASES = (
    faiss.IndexFlat,
    faiss.IndexScalarQuantizer,
    faiss.IndexHNSW,
    faiss.IndexIVF,
)
FASTSCAN_BASES = (faiss.IndexPQFastScan, faiss.IndexIVFFastScan)


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of ``whole``, downcast to their own classes; they live as long as it does."""

    whole: Any
    refine: Any | None
    transform: Any | None
    base: Any

    @property
    def is_known(self) -> bool:
        return isinstance(self.base, KNOWN_BASES)

    @property
    def is_ivf(self) -> bool:
        return isinstance(self.base, faiss.IndexIVF)

    @property
    def is_hnsw(self) -> bool:
        return isinstance(self.base, faiss.IndexHNSW)

    @property
    def is_fastscan(self) -> bool:
        return isinstance(self.base, FASTSCAN_BASES)

    @property
    def takes_selector(self) -> bool:
        return isinstance(self.base, SELECTOR_BASES)

    def bytes_per_vector(self, rows: int) -> float:
        """Stored bytes per row: codes, row numbers, links and re-rank copies, without centroids.

        rows 0: what rows are going to take, also of an index that is not trained yet.
        """
        if self.is_hnsw:
            size = faiss.downcast_index(self.base.storage).code_size + self._link_bytes(rows)
        elif self.is_fastscan:
            size = self.base.M2 / 2  # 4 bits per sub-vector, padded to an even number of them
        else:
            size = self.base.code_size
        size += 8 if self.is_ivf else 0
        copies = faiss.downcast_index(self.refine.refine_index).code_size if self.refine else 0
        return float(size + copies)

    def _link_bytes(self, rows: int) -> float:
        graph = self.base.hnsw
        if rows:
            return float(graph.neighbors.size() * 4 / rows)
        lowest, above = graph.nb_neighbors(0), graph.nb_neighbors(1)
        return 4.0 * float(
            lowest + above / max(1, above - 1)
        )  # one node of M is in each higher level


def layers_of(index: Any) -> Layers:
    """Unwraps an index; a base that Shardline does not know is left for the caller to refuse."""
    whole = index  # owns the memory: a second proxy would not keep it alive
    refine = transform = None
    if isinstance(index, faiss.IndexRefine):
        refine, index = index, faiss.downcast_index(index.base_index)
    if isinstance(index, faiss.IndexPreTransform):
        transform, index = index, faiss.downcast_index(index.index)
    return Layers(whole=whole, refine=refine, transform=transform, base=index)


def faiss_metric(metric: Metric) -> int:
    """The faiss metric; cosine is inner product, because vectors are normalised on input."""
    return int(faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT)


def codes_of(index: Any) -> NDArray[np.uint8]:
    """(rows, code_size) of an index that stores its codes row by row: its own memory, which must
    not outlive it."""
    size = index.ntotal * index.code_size
    # an empty array may have no memory
    codes = faiss.rev_swig_ptr(index.codes.data(), size) if size else np.empty(0, np.uint8)
    return np.asarray(codes).reshape(-1, index.code_size)
