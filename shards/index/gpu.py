"""The base of an index on a CUDA device, and its re-rank in the host's memory.

Not yet run on a card: proved on a double of faiss's GPU builds (tests/fake_gpu_faiss.py).

flat, ivf and ivfpq. Both wheels are used with faiss's classic kernels, which ignore an IDSelector
without an error: MainIndex fetches more and filters. One lock per index: two threads that share a
resources object break its stack of temporary memory. A CUDA error within faiss ends the process,
and is known afterwards only from ``CardWatch``; what it raises instead is ``CardFailed``.
"""

import contextlib
import threading
from contextlib import AbstractContextManager
from typing import Any, Protocol

import faiss
import numpy as np

from shardline.shards.core.errors import CardFailed, ConfigError, last_line
from shardline.shards.core.schema import FloatArray, IdArray, Metric
from shardline.shards.index import cards
from shardline.shards.index.card_memory import (
    TEMP_MEMORY_BYTES,
    card_memory,
    is_half,
    refuse_without_room,
)
from shardline.shards.index.layers import Layers, codes_of, faiss_metric, layers_of

GPU_MAX_K = 2048  # faiss's limit for k and for nprobe (faiss/gpu/utils/DeviceDefs.cuh)
FP16_LOOKUP_M = 56  # from this m on, float32 lookup tables exceed the GPU's shared memory
SELF_TEST_ROWS, SELF_TEST_K = 8, 8
# Of the largest score, or of the largest squared length: a card finds L2 distances as the
# difference of products that are as large (faiss/gpu/impl/Distance.cu).
SELF_TEST_TOLERANCE = 1e-3
SELF_TEST_TOLERANCE_HALF = 1e-2
RERANK_VALUES = 4 << 20  # gathered at a time: 16 MiB of float32


class CardWatch(Protocol):
    """Is told when the card is in use, so that what ends the process there is known after it."""

    def using(self) -> AbstractContextManager[None]: ...


class _Unwatched:
    def using(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


_watch: CardWatch = _Unwatched()


def watch(watching: CardWatch) -> None:
    """Of all indexes of this process, from now on."""
    global _watch
    _watch = watching


def check_room(factory: str, *, rows: int, dim: int, metric: Metric, card: int) -> None:
    """Returns if a card can take an index that has not been read yet.

    Raises:
        ConfigError: there is no such card, or too little memory is free; with the arithmetic.
    """
    trouble = cards.why_no_card(card)
    if trouble is not None:
        raise trouble
    layers = layers_of(faiss.index_factory(dim, factory, faiss_metric(metric)))
    refuse_without_room(card_memory(layers, rows), cards.memory_of(card).free, card)


class CardIndex:
    """Searches the layers of an index: the base on the card, the others on the CPU."""

    def __init__(self, layers: Layers, *, metric: Metric, card: int) -> None:
        """Copies the base to the card and compares some answers.

        Raises:
            ConfigError: no such card, too little memory, or its answers differ from the CPU's.
        """
        trouble = cards.why_no_card(card)
        if trouble is not None:
            raise trouble
        refuse_without_room(
            card_memory(layers, int(layers.whole.ntotal)), cards.memory_of(card).free, card
        )
        self._layers, self._metric = layers, metric
        self._lock = threading.Lock()
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(TEMP_MEMORY_BYTES)
        # 256 MiB of the host's, which only batches of 256 MiB would use (faiss/gpu/GpuIndex.cu)
        self._resources.setPinnedMemory(0)
        self._is_half = is_half(layers.base)
        self._vectors = None if layers.refine is None else _copies(layers.refine)
        with _watch.using():
            self._on_card = self._copied(card)
        self._self_test()

    def _copied(self, card: int) -> Any:
        base, options = self._layers.base, self._options()
        try:
            return faiss.index_cpu_to_gpu(self._resources, card, base, options)
        except RuntimeError as error:
            raise ConfigError(
                f"the shard cannot be put on card {card}",
                field="index.device",
                got=last_line(error),
                hint="serve it with index.device cpu",
            ) from error

    def _options(self) -> Any:
        options = faiss.GpuClonerOptions()
        # the kernels of both wheels are the same; cuVS has none for half precision
        options.use_cuvs = False
        if hasattr(self._layers.base, "pq"):  # the type of the lookup tables, not of the codes
            options.useFloat16 = self._layers.base.pq.M >= FP16_LOOKUP_M
            self._is_half = bool(options.useFloat16)
        return options

    def search(
        self, queries: FloatArray, fetch: int, *, candidates: int, nprobe: int | None
    ) -> tuple[FloatArray, IdArray]:
        """faiss's distances and rows, (n, fetch), of queries (n, dim); best first, -1 at the end.

        fetch: at most GPU_MAX_K. candidates: of the re-rank, at most as many; nprobe: of lists.

        Raises:
            CardFailed: faiss has raised an error.
        """
        inner = queries if self._layers.transform is None else self._moved(queries)
        found = self._search(inner, min(max(fetch, candidates), GPU_MAX_K), nprobe)
        if self._vectors is None:
            return found
        return _reranked(queries, found[1], self._vectors, fetch, self._metric)

    def _search(
        self, queries: FloatArray, k: int, nprobe: int | None
    ) -> tuple[FloatArray, IdArray]:
        params = None if nprobe is None else faiss.SearchParametersIVF(nprobe=nprobe)
        try:
            with self._lock, _watch.using():
                distances, rows = self._on_card.search(queries, k, params=params)
        except RuntimeError as error:
            raise CardFailed("the card has failed in a search", got=last_line(error)) from error
        return distances, rows

    def _moved(self, queries: FloatArray) -> FloatArray:
        assert self._layers.transform is not None
        chain = self._layers.transform.chain
        for place in range(chain.size()):
            queries = chain.at(place).apply(queries)
        return queries

    def _self_test(self) -> None:
        """Compares the best scores of a few stored rows, used as queries, on both devices."""
        rows = min(SELF_TEST_ROWS, int(self._layers.whole.ntotal))
        if rows == 0:
            return
        if self._layers.is_ivf and self._layers.refine is None:
            self._layers.base.make_direct_map()
        queries = np.asarray(self._layers.whole.reconstruct_n(0, rows), dtype=np.float32)
        if self._layers.transform is not None:
            queries = self._moved(queries)
        k = min(SELF_TEST_K, rows)
        expected, there = self._layers.base.search(queries, k)
        nprobe = int(self._layers.base.nprobe) if self._layers.is_ivf else None
        got, found = self._search(queries, k, nprobe)
        has = there >= 0
        scale = max(1.0, np.abs(expected[has]).max(), float(np.square(queries).sum(axis=1).max()))
        tolerance = SELF_TEST_TOLERANCE_HALF if self._is_half else SELF_TEST_TOLERANCE
        is_alike = np.array_equal(has, found >= 0) and np.allclose(
            got[has], expected[has], rtol=0, atol=tolerance * scale
        )
        if not is_alike:
            raise ConfigError(
                "the GPU's answers differ from the CPU's",
                field="index.device",
                expected=_shown(expected),
                got=_shown(got),
                hint="serve with index.device cpu, and check the driver and the faiss wheel",
            )


def _shown(scores: FloatArray) -> str:
    """Of the first query, in one line."""
    return ", ".join(f"{score:.6g}" for score in scores[0].tolist())


def _copies(refine: Any) -> FloatArray:
    """(rows, dim) float32 or float16, a view of the copies that re-rank."""
    index = faiss.downcast_index(refine.refine_index)
    value = np.float16 if is_half(index) else np.float32
    copies: FloatArray = codes_of(index).view(value)
    return copies


def _reranked(
    queries: FloatArray, rows: IdArray, vectors: FloatArray, fetch: int, metric: Metric
) -> tuple[FloatArray, IdArray]:
    """(n, fetch): the best of candidates (n, c), -1 for none, by exact distances."""
    is_l2 = metric is Metric.L2
    worst = np.float32(np.inf if is_l2 else -np.inf)
    exact = np.empty(rows.shape, np.float32)
    step = max(1, RERANK_VALUES // (rows.shape[1] * vectors.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        taken = vectors[np.maximum(rows[part], 0)].astype(np.float32, copy=False)
        if is_l2:
            taken = taken - queries[part, None, :]
            exact[part] = np.einsum("ncd,ncd->nc", taken, taken)
        else:
            exact[part] = np.matmul(taken, queries[part, :, None])[:, :, 0]
    exact[rows < 0] = worst
    order = np.argsort(exact if is_l2 else -exact, axis=1, kind="stable")[:, :fetch]
    return np.take_along_axis(exact, order, axis=1), np.take_along_axis(rows, order, axis=1)
