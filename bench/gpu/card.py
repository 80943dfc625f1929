"""The card as the check sees it: torch's device, faiss's resources, free bytes, a clock.

With ``fake`` the device is the CPU and faiss's GPU classes are a double's, so that everything runs
except what it is about. Only a part's own process opens a card: CUDA does not survive a fork.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from shardline.bench.gpu.floors import TEMP_BYTES
from shardline.bench.gpu.part_outcome import Timing
from shardline.shards.core.errors import ConfigError
from shardline.shards.index import cards

FloatArray = NDArray[np.float32]
IdArray = NDArray[np.int64]
Ask = Callable[[FloatArray], tuple[FloatArray, IdArray]]  # (n, dim) -> (n, k), best first

FAKE_CARD_BYTES = 8 << 30
DOUBLE = "tests.fake_gpu_faiss"
WARM_UP = 2
SAMPLES_FOR_P99 = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One device, number 0 of those that are visible."""

    faiss: Any
    device: torch.device
    fake: bool
    name: str
    total_bytes: int
    memory: Callable[[], int]  # bytes that are free now

    def free_bytes(self) -> int:
        """Free bytes, with those that torch keeps for later given back."""
        if not self.fake:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return self.memory()

    def synchronize(self) -> None:
        if not self.fake:
            torch.cuda.synchronize()

    def resources(self) -> Any:
        """Resources of one index; no two searches may use one object at the same time."""
        resources = self.faiss.StandardGpuResources()
        resources.setTempMemory(TEMP_BYTES)
        return resources

    def put(self, index: Any, resources: Any, **options: Any) -> Any:
        """A copy of a CPU index on the card; ``options`` are those of faiss's GpuClonerOptions."""
        chosen = self.faiss.GpuClonerOptions()
        for name, value in options.items():
            setattr(chosen, name, value)
        return self.faiss.index_cpu_to_gpu(resources, 0, index, chosen)

    def add(self, index: Any, rows: torch.Tensor) -> None:
        """Adds (n, dim) float32 rows that are on the card already."""
        if self.fake:
            index.add(rows.numpy())
            return
        torch.cuda.synchronize()  # faiss works in a stream of its own
        add_by_pointer(self.faiss, index, rows)
        torch.cuda.synchronize()

    def search(
        self, index: Any, queries: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, k) scores and ids on the card, of queries (n, dim) on the card."""
        if self.fake:
            scores, ids = index.search(queries.numpy(), k)
            return torch.from_numpy(scores), torch.from_numpy(ids)
        torch.cuda.synchronize()
        found = search_by_pointer(self.faiss, index, queries, k)
        torch.cuda.synchronize()
        return found


def add_by_pointer(faiss: Any, index: Any, rows: torch.Tensor) -> None:
    """Adds (n, dim) float32 rows from wherever they lie: faiss.contrib.torch_utils would do it,
    too, but replaces ``search`` of all indexes by one that takes no parameters."""
    rows = rows.contiguous()
    index.add_ex(len(rows), faiss.cast_integer_to_float_ptr(rows.data_ptr()), faiss.Float32)


def search_by_pointer(
    faiss: Any, index: Any, queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, k) scores and ids beside the queries (n, dim) float32, on their device."""
    queries = queries.contiguous()
    scores = torch.empty((len(queries), k), dtype=torch.float32, device=queries.device)
    ids = torch.empty((len(queries), k), dtype=torch.int64, device=queries.device)
    index.search_ex(
        len(queries),
        faiss.cast_integer_to_float_ptr(queries.data_ptr()),
        faiss.Float32,
        k,
        faiss.cast_integer_to_float_ptr(scores.data_ptr()),
        faiss.cast_integer_to_idx_t_ptr(ids.data_ptr()),
    )
    return scores, ids


@contextmanager
def open_card(*, fake: bool) -> Iterator[Card]:
    """The first visible card, or the double's.

    Raises:
        ConfigError: no card, a driver that is too old, a faiss without GPU support.
    """
    faiss = import_module("faiss")
    if fake:
        double = import_module(DOUBLE)
        with (
            double.installed(double.Card(total_bytes=FAKE_CARD_BYTES)) as there,
            patch.object(
                cards,
                "memory_of",
                lambda card: cards.Memory(there[card].free_bytes, FAKE_CARD_BYTES),
            ),
        ):
            yield Card(
                faiss=faiss,
                device=torch.device("cpu"),
                fake=True,
                name="no card: a double of the GPU build on this CPU",
                total_bytes=there[0].total_bytes,
                memory=lambda: int(there[0].free_bytes),
            )
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            "torch sees no card",
            expected="a CUDA device, and a driver for CUDA " + str(torch.version.cuda),
            got=f"torch {torch.__version__}",
            hint="nvidia-smi shows card and driver; --fake runs without a card",
        )
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise ConfigError(
            "faiss sees no card",
            expected="the faiss-gpu or the faiss-gpu-cuvs wheel, alone in its environment",
            got=f"faiss {faiss.__version__}, {faiss.get_num_gpus()} GPUs",
            hint="install faiss-gpu by constraints-gpu.txt, without faiss-cpu beside it",
        )
    yield Card(
        faiss=faiss,
        device=torch.device("cuda:0"),
        fake=False,
        name=torch.cuda.get_device_name(0),
        total_bytes=torch.cuda.mem_get_info(0)[1],
        memory=lambda: int(torch.cuda.mem_get_info(0)[0]),
    )


class Corpus:
    """Unit vectors around random centres, made on the card block by block from a seed.

    The shape of ``bench/vectors.py``: noise of norm .6 around unit centres, 250 rows per centre up
    to ``MOST_CENTRES`` centres. Row i is the same whenever it is made.
    """

    ROWS_PER_CENTRE = 250
    MOST_CENTRES = 1 << 20
    SPREAD = 0.6

    def __init__(self, card: Card, rows: int, dim: int, block_rows: int, seed: int = 7) -> None:
        self.rows, self.dim, self.block_rows = rows, dim, block_rows
        self._device, self._seed = card.device, seed
        centres = min(max(1, rows // self.ROWS_PER_CENTRE), self.MOST_CENTRES)
        self._centres = _unit(self._normal(0, centres))

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, (m, dim) float32 on the card) for all rows in order."""
        for number, first in enumerate(range(0, self.rows, self.block_rows)):
            yield first, self._made(1 + number, min(self.block_rows, self.rows - first))

    def queries(self, count: int) -> torch.Tensor:
        """(count, dim) further vectors of the same centres, none of them among the rows."""
        return self._made(1 << 40, count)

    def sample(self, count: int) -> torch.Tensor:
        """(count, dim) further vectors, to train on."""
        return self._made(1 << 41, count)

    def _made(self, stream: int, count: int) -> torch.Tensor:
        generator = self._generator(stream)
        chosen = torch.randint(
            len(self._centres), (count,), generator=generator, device=self._device
        )
        rows = self._normal(stream, count, generator)
        rows *= self.SPREAD / self.dim**0.5
        rows += self._centres[chosen]
        return _unit(rows)

    def _normal(
        self, stream: int, count: int, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        generator = generator or self._generator(stream)
        return torch.randn((count, self.dim), generator=generator, device=self._device)

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator(device=self._device).manual_seed(self._seed * (1 << 42) + stream)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return functional.normalize(rows, dim=1)


class Truth:
    """Exact float32 top-k of some queries, kept while the rows pass by."""

    def __init__(self, queries: torch.Tensor, k: int) -> None:
        self._queries, self._k = queries, k
        shape = (len(queries), k)
        self._scores = torch.full(shape, -float("inf"), device=queries.device)
        self._ids = torch.full(shape, -1, dtype=torch.int64, device=queries.device)

    def see(self, first: int, block: torch.Tensor) -> None:
        scores, places = (self._queries @ block.T).topk(min(self._k, len(block)), dim=1)
        scores = torch.cat([self._scores, scores], dim=1)
        ids = torch.cat([self._ids, places + first], dim=1)
        self._scores, best = scores.topk(self._k, dim=1)
        self._ids = ids.gather(1, best)

    @property
    def ids(self) -> IdArray:
        """(num_queries, k), best first."""
        found: IdArray = self._ids.cpu().numpy()
        return found


def recall(found: IdArray, truth: IdArray) -> float:
    """Mean share of the exact top k that was found; both (n, k). Random vectors have no ties."""
    shares = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, truth, strict=True)]
    return float(np.mean(shares))


def centroids(sample: torch.Tensor, count: int, iterations: int = 10) -> torch.Tensor:
    """(count, dim) unit centroids of spherical k-means over a (n, dim) sample, on its device.

    An empty cluster keeps its centroid. Products in float32: Dhillon and Modha, Machine Learning
    2001.
    """
    chosen = sample[: count if len(sample) >= count else len(sample)].clone()
    step = max(1, (1 << 28) // max(count, 1))  # at most 1 GiB of scores at once
    for _ in range(iterations):
        sums = torch.zeros_like(chosen)
        for part in torch.split(sample, step):
            sums.index_add_(0, (part @ chosen.T).argmax(dim=1), part)
        lengths = sums.norm(dim=1, keepdim=True)
        chosen = torch.where(lengths > 0, sums / lengths.clamp_min(1e-12), chosen)
    return chosen


def reranked(card: Card, index: Any, copies: torch.Tensor, k: int, factor: int) -> Ask:
    """A search for ``factor`` x k candidates, scored again with ``copies`` (rows, dim) float16 that
    are on the card."""

    def ask(queries: FloatArray) -> tuple[FloatArray, IdArray]:
        asked = torch.from_numpy(queries).to(card.device)
        _, ids = card.search(index, asked, factor * k)
        vectors = copies[ids.clamp_min(0)].float()
        scores = torch.einsum("qcd,qd->qc", vectors, asked).masked_fill(ids < 0, -float("inf"))
        best, places = scores.topk(k, dim=1)
        return best.cpu().numpy(), ids.gather(1, places).cpu().numpy()

    return ask


def plain(index: Any, k: int) -> Ask:
    """The index's own search, with queries and answers in the host's memory."""

    def ask(queries: FloatArray) -> tuple[FloatArray, IdArray]:
        scores, ids = index.search(queries, k)
        return scores, ids

    return ask


def time_calls(call: Callable[[int], object], *, seconds: float, fewest: int) -> list[float]:
    """Milliseconds of each call, after two that do not count: at least ``fewest``, then until
    ``seconds`` are over. ``call`` is given its number and returns when its work is done."""
    for number in range(WARM_UP):
        call(number)
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < fewest or time.perf_counter() < until:
        started = time.perf_counter()
        call(len(taken))
        taken.append(1000 * (time.perf_counter() - started))
    return taken


def timing(
    taken: Sequence[float],
    *,
    what: str,
    rows: int,
    batch: int,
    k: int,
    recall: float | None,
    floor_ms: float,
    bound_by: str,
) -> Timing:
    """The figures of some calls, ``taken`` ms each."""
    p50 = float(np.percentile(taken, 50))
    return Timing(
        what=what,
        rows=rows,
        batch=batch,
        k=k,
        p50_ms=p50,
        best_ms=min(taken),
        p99_ms=float(np.percentile(taken, 99)) if len(taken) >= SAMPLES_FOR_P99 else None,
        samples=len(taken),
        qps=1000 * batch / p50,
        recall=recall,
        floor_ms=floor_ms,
        bound_by=bound_by,
    )
