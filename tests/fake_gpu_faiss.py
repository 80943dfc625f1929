"""A double of faiss's GPU builds on top of the CPU wheel: same names, limits, silences and memory.

``installed(Card(), variant=Variant.GPU)`` puts what the GPU wheels add into the ``faiss`` module:
``StandardGpuResources``, ``GpuClonerOptions``, ``index_cpu_to_gpu``, the Gpu indexes. Answers are
those of the CPU index below, in the precision of the device. What ends the process in faiss (a
FAISS_ASSERT, and CUDA_VERIFY with it, prints and calls abort) raises ``ProcessAborted`` here, which
no ``except Exception`` catches.

Each behaviour names where it was read: files of github.com/facebookresearch/faiss of August 2026
(after 1.15.1), below faiss/ unless another folder is named. Not modelled: time, NaN, tiling by
temporary memory, the answers of an approximate CAGRA graph (it answers exactly here).
"""

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

import faiss
import numpy as np
from numpy.typing import NDArray

GIB, MIB = 1 << 30, 1 << 20

# gpu/utils/DeviceDefs.cuh (GPU_MAX_SELECTION_K), gpu/impl/IndexUtils.cu (getMaxKSelection)
MAX_K, MAX_K_CUVS = 2048, 16_384
# gpu/impl/IVFPQ.cu (isSupportedPQCodeLength)
PQ_LENGTHS = frozenset({1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96})
# gpu/impl/GpuScalarQuantizer.cuh (isSQSupported)
SQ_TYPES = frozenset(
    getattr(faiss.ScalarQuantizer, f"QT_{name}")
    for name in (
        *("8bit", "8bit_uniform", "8bit_direct"),
        *("4bit", "4bit_uniform", "6bit", "fp16"),
    )
)
# gpu/StandardGpuResources.cpp (getDefaultTempMemForGPU): most temporary memory by the card's size
TEMP_BY_CARD = ((4 * GIB, 512 * MIB), (8 * GIB, 1024 * MIB))
TEMP_MOST = 1536 * MIB
PINNED_BYTES = 256 * MIB  # gpu/StandardGpuResources.cpp (kDefaultPinnedMemoryAllocation)
ALLOCATION_BYTES = 256  # gpu/StandardGpuResources.cpp (allocMemory rounds up to it)
STACK_BYTES = 16  # gpu/utils/StackDeviceMemory.cpp (the first address is 16 bytes in)
# gpu/GpuIndicesOptions.h; by 64-bit a row's number takes 8 bytes on the device
INDICES_CPU, INDICES_IVF, INDICES_32_BIT, INDICES_64_BIT = range(4)
INDEX_BYTES = {INDICES_CPU: 0, INDICES_IVF: 0, INDICES_32_BIT: 4, INDICES_64_BIT: 8}
COPY_ROWS = 1 << 20  # gpu/GpuCloner.cpp (clone_Index): fp16 rows are added so many at a time
CANCELLATION = np.float32(2.0**-21)  # of a squared length: what an L2 distance is wrong by
SHARED_MEMORY_BYTES = 48 << 10  # cudaDeviceProp.sharedMemPerBlock of every card since 2010


class Variant(StrEnum):
    """Which wheel: ``faiss-gpu`` or ``faiss-gpu-cuvs``."""

    GPU = "gpu"
    CUVS = "cuvs"


class ProcessAborted(BaseException):
    """impl/FaissAssert.h: FAISS_ASSERT prints and calls abort(), so the process is gone;
    gpu/utils/DeviceUtils.h: CUDA_VERIFY, for every CUDA call but an allocation, is one too."""


@dataclass(eq=False)
class Card:
    """One device. total_bytes: its memory; taken: by others, before anything of faiss.

    fail_searches: how many searches more end the process by a CUDA error; on_search: called within
    each, while its resources are in use. wrong: whether it answers with scores that are not right.
    """

    total_bytes: int = 80 * GIB
    taken_bytes: int = 0
    shared_memory_bytes: int = SHARED_MEMORY_BYTES
    driver_too_old: bool = False
    fail_searches: int = 0
    raise_in_search: Exception | None = None
    wrong: bool = False
    on_search: Callable[[], None] = lambda: None
    used_bytes: int = 0
    peak_bytes: int = 0
    searches: int = 0

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.taken_bytes - self.used_bytes

    def allocate(self, size: int, kind: str) -> None:
        """gpu/StandardGpuResources.cpp (allocMemory): a failed cudaMalloc is thrown, not asserted.

        Raises:
            RuntimeError: the card is full.
        """
        if size > self.free_bytes:
            raise RuntimeError(
                f"Error in virtual void* faiss::gpu::StandardGpuResourcesImpl::allocMemory: "
                f"StandardGpuResources: alloc fail type {kind} dev 0 space Device size {size} bytes"
                " (cudaMalloc error out of memory [2])"
            )
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def release(self, size: int) -> None:
        self.used_bytes -= size


@dataclass
class _Machine:
    cards: tuple[Card, ...] = ()
    variant: Variant = Variant.GPU

    @property
    def visible(self) -> tuple[Card, ...]:
        # gpu/utils/DeviceUtils.cu (getNumDevices): a driver that is too old counts as no device
        return () if any(card.driver_too_old for card in self.cards) else self.cards


_machine = _Machine()


def num_devices() -> int:
    """faiss/python/swigfaiss.swig (get_num_gpus)."""
    return len(_machine.visible)


def _abort(text: str) -> ProcessAborted:
    return ProcessAborted(f"Faiss assertion {text}")


def _error(text: str) -> RuntimeError:
    """impl/FaissException.h, which SWIG hands to Python as a RuntimeError."""
    return RuntimeError(f"Error in faiss::gpu: Error: {text}")


def _rounded(size: int) -> int:
    return -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES


# ---------------------------------------------------------------------------------- resources


@dataclass(eq=False)
class _Resources:
    """gpu/StandardGpuResources.h (StandardGpuResourcesImpl): shared by an index and its maker."""

    temp_bytes: int = TEMP_MOST
    pinned_bytes: int = PINNED_BYTES
    stacks: dict[int, int] = field(default_factory=dict)  # temporary memory by device
    allocations: dict[int, Counter[str]] = field(default_factory=dict)
    counts: dict[int, Counter[str]] = field(default_factory=dict)
    cards: dict[int, Card] = field(default_factory=dict)
    user: int | None = None  # the thread inside

    def initialise(self, device: int) -> None:
        """gpu/StandardGpuResources.cpp (initializeForDevice): takes the temporary memory."""
        if device in self.stacks:
            return
        if not 0 <= device < num_devices():
            raise _abort("'device < getNumDevices()' failed in initializeForDevice")
        self.cards[device] = _machine.visible[device]
        self.allocations[device], self.counts[device] = Counter(), Counter()
        self.stacks[device] = 0
        self._take_stack(device)

    def _take_stack(self, device: int) -> None:
        size = self.temp_bytes
        for card_bytes, most in TEMP_BY_CARD:
            if self.cards[device].total_bytes <= card_bytes:
                size = min(size, most)
                break
        size = min(size, TEMP_MOST)
        self.stacks[device] = size
        if size:
            self.allocate(device, size, "TemporaryMemoryBuffer")

    def set_temp(self, size: int) -> None:
        """gpu/StandardGpuResources.cpp (setTempMemory): capped; frees and takes anew."""
        self.temp_bytes = min(size, TEMP_MOST)
        for device in self.stacks:
            self.free(
                device, self.allocations[device]["TemporaryMemoryBuffer"], "TemporaryMemoryBuffer"
            )
            self._take_stack(device)

    def allocate(self, device: int, size: int, kind: str) -> int:
        size = _rounded(size)
        if size:
            self.cards[device].allocate(size, kind)
            self.allocations[device][kind] += size
            self.counts[device][kind] += 1
        return size

    def free(self, device: int, size: int, kind: str) -> None:
        if size:
            self.cards[device].release(size)
            self.allocations[device][kind] -= size
            self.counts[device][kind] -= 1

    @contextmanager
    def used(self, device: int, temporary: list[int]) -> Iterator[None]:
        """gpu/utils/StackDeviceMemory.cpp: temporary memory is a stack that two threads break,
        which returnAlloc asserts; what does not fit is allocated for the call
        (gpu/StandardGpuResources.cpp, TemporaryMemoryOverflow)."""
        me = threading.get_ident()
        if self.user is not None and self.user != me:
            raise _abort("'p + size == head_' failed in StackDeviceMemory::Stack::returnAlloc")
        before, self.user = self.user, me
        left, overflow = self.stacks[device] - STACK_BYTES, 0
        try:
            for size in map(_rounded, temporary):
                if size <= left:
                    left -= size
                else:
                    overflow += self.allocate(device, size, "TemporaryMemoryOverflow")
            yield
            if self.user != me:
                raise _abort("'p + size == head_' failed in StackDeviceMemory::Stack::returnAlloc")
        finally:
            self.user = before
            self.free(device, overflow, "TemporaryMemoryOverflow")


def _release_all(resources: _Resources, device: int, taken: dict[str, int]) -> None:
    for kind, size in taken.items():
        resources.free(device, size, kind)


def _release_stacks(resources: _Resources) -> None:
    for device in resources.stacks:
        kind = "TemporaryMemoryBuffer"
        resources.free(device, resources.allocations[device][kind], kind)
        resources.stacks[device] = 0


class _Handle:
    """What an index and its ``StandardGpuResources`` share: the last of them frees the memory."""

    def __init__(self) -> None:
        self.impl = _Resources()
        weakref.finalize(self, _release_stacks, self.impl)


class StandardGpuResources:
    """gpu/StandardGpuResources.h."""

    def __init__(self) -> None:
        self._handle = _Handle()

    def setTempMemory(self, size: int) -> None:  # noqa: N802
        self._handle.impl.set_temp(size)

    def noTempMemory(self) -> None:  # noqa: N802
        self._handle.impl.set_temp(0)

    def setPinnedMemory(self, size: int) -> None:  # noqa: N802
        # gpu/StandardGpuResources.cpp (setPinnedMemory)
        if self._handle.impl.stacks:
            raise _abort("'defaultStreams_.size() == 0' failed in setPinnedMemory")
        self._handle.impl.pinned_bytes = size

    def getTempMemoryAvailable(self, device: int) -> int:  # noqa: N802
        if device not in self._handle.impl.stacks:
            raise _abort("'isInitialized(device)' failed in getTempMemoryAvailable")
        return self._handle.impl.stacks[device]

    def getMemoryInfo(self) -> dict[int, dict[str, tuple[int, int]]]:  # noqa: N802
        """{device: {type of allocation: (count, bytes)}}."""
        impl = self._handle.impl
        return {
            device: {kind: (impl.counts[device][kind], size) for kind, size in sizes.items()}
            for device, sizes in impl.allocations.items()
        }


class GpuClonerOptions:
    """gpu/GpuClonerOptions.h."""

    def __init__(self) -> None:
        self.indicesOptions = INDICES_64_BIT
        self.useFloat16CoarseQuantizer = False
        self.useFloat16 = False
        self.usePrecomputed = False
        self.reserveVecs = 0
        self.storeTransposed = False
        self.verbose = False
        self.use_cuvs = _machine.variant is Variant.CUVS
        self.allowCpuCoarseQuantizer = False


# ---------------------------------------------------------------------------------- indexes


class GpuIndex:
    """gpu/GpuIndex.cu. ``inner``: the CPU index that has the same rows in the device's precision.

    Unless a class says otherwise it has none of reconstruct, add_with_ids, remove_ids, range_search
    (Index.cpp: "... not implemented for this type of index").
    """

    handles_selector_with_cuvs: ClassVar[bool] = True

    def __init__(self, resources: StandardGpuResources, device: int, inner: Any, *, cuvs: bool):
        if cuvs and _machine.variant is not Variant.CUVS:
            raise _error(
                "cuVS has not been compiled into the current version so it cannot be used."
            )
        if device >= num_devices():
            raise _error(f"Invalid GPU device {device}")
        self._handle = resources._handle
        self._device, self._inner, self._cuvs = device, inner, cuvs
        self._handle.impl.initialise(device)
        self._taken: dict[str, int] = {}
        weakref.finalize(self, _release_all, self._handle.impl, device, self._taken)

    d = property(lambda self: int(self._inner.d))
    ntotal = property(lambda self: int(self._inner.ntotal))
    metric_type = property(lambda self: int(self._inner.metric_type))
    is_trained = property(lambda self: bool(self._inner.is_trained))

    @property
    def _card(self) -> Card:
        return self._handle.impl.cards[self._device]

    def getDevice(self) -> int:  # noqa: N802
        return self._device

    def _take(self, kind: str, size: int) -> None:
        taken = self._handle.impl.allocate(self._device, size, kind)
        self._taken[kind] = self._taken.get(kind, 0) + taken

    def _most_k(self) -> int:
        return MAX_K_CUVS if self._cuvs else MAX_K

    def _check_k(self, k: int) -> None:
        """gpu/impl/IndexUtils.cu (validateKSelect)."""
        if not 0 < k <= self._most_k():
            raise _error(
                f"GPU index only supports min/max-K selection up to {self._most_k()} "
                f"(requested {k})"
            )

    def search(
        self,
        x: NDArray[np.float32],
        k: int,
        *,
        params: Any = None,
        D: Any = None,  # noqa: N803
        I: Any = None,  # noqa: N803, E741
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        x = np.ascontiguousarray(x, dtype=np.float32)
        # faiss/python/class_wrappers.py (replacement_search) asserts both
        assert x.shape[1] == self.d
        assert k > 0
        if not self.is_trained:
            raise _error("Index not trained")
        self._check_k(k)
        inner_params, temporary = self._prepare(len(x), k, params)
        temporary = [len(x) * k * 4, len(x) * k * 8, x.nbytes, *temporary]
        card = self._card
        with self._handle.impl.used(self._device, temporary):
            card.searches += 1
            card.on_search()
            if card.fail_searches:
                card.fail_searches -= 1
                raise _abort(
                    "'err__ == cudaSuccess' failed; details: CUDA error 700 an illegal memory "
                    "access was encountered"
                )
            if card.raise_in_search is not None:
                raise card.raise_in_search
            distances, rows = self._inner.search(self._queries(x), k, params=inner_params)
        if card.wrong:
            distances = distances * np.float32(0.5)
        distances = self._with_errors(x, self._in_precision(distances))
        if D is not None:
            D[:], I[:] = distances, rows
        return distances, rows

    def _prepare(self, queries: int, k: int, params: Any) -> tuple[Any, list[int]]:
        """The parameters of the search below, and the temporary memory that it takes besides."""
        return self._selecting(params, None), []

    def _selecting(self, params: Any, inner: Any) -> Any:
        """The classic kernels drop ``params.sel`` without a word (gpu/impl/FlatIndex.cu and
        gpu/impl/IVFPQ.cu: query and search take it and never look); cuVS turns a Bitmap, Array or
        Range into bits over the rows (gpu/utils/CuvsFilterConvert.cu). That it refuses other kinds
        is not modelled: SWIG does not tell them apart."""
        selector = getattr(params, "sel", None)
        if selector is None or not (self._cuvs and self.handles_selector_with_cuvs):
            return inner
        inner = faiss.SearchParameters() if inner is None else inner
        inner.sel = selector
        return inner

    def _queries(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return x

    def _with_errors(
        self, x: NDArray[np.float32], distances: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        return distances

    def _in_precision(self, distances: NDArray[np.float32]) -> NDArray[np.float32]:
        return distances

    def train(self, x: NDArray[np.float32]) -> None:
        raise NotImplementedError("the double does not train on the device")

    def add(self, x: NDArray[np.float32]) -> None:
        if not self.is_trained:
            raise _error("Index not trained")
        self._inner.add(x)
        self._take_rows(len(x))

    def _take_rows(self, rows: int) -> None:
        raise NotImplementedError

    def add_with_ids(self, x: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
        raise _error("add_with_ids not supported")  # gpu/GpuIndexFlat.cu (addImpl_)

    def remove_ids(self, selector: Any) -> int:
        raise _error("remove_ids not implemented for this type of index")  # Index.cpp

    def range_search(self, x: NDArray[np.float32], radius: float) -> Any:
        raise _error("range search not implemented")  # Index.cpp

    def reconstruct(self, row: int) -> NDArray[np.float32]:
        raise _error("reconstruct not implemented for this type of index")  # Index.cpp

    def reconstruct_n(self, start: int, rows: int) -> NDArray[np.float32]:
        return np.stack([self.reconstruct(row) for row in range(start, start + rows)])

    def merge_from(self, other: Any, add_id: int = 0) -> None:
        raise _error("merge_from() not implemented")  # Index.cpp


class GpuIndexFlat(GpuIndex):
    """gpu/GpuIndexFlat.cu; gpu/impl/FlatIndex.cu: rows of 4 or 2 bytes a value, and a norm of 4
    bytes per row, whatever the metric; with fp16 rows the queries are rounded, too."""

    def __init__(
        self, resources: StandardGpuResources, device: int, index: Any, *, half: bool, cuvs: bool
    ):
        if half:
            inner = faiss.IndexScalarQuantizer(
                index.d, faiss.ScalarQuantizer.QT_fp16, index.metric_type
            )
            if index.ntotal:
                inner.add(index.reconstruct_n(0, index.ntotal))
        else:
            inner = faiss.clone_index(index)
        super().__init__(resources, device, inner, cuvs=cuvs)
        self._half = half
        if half:
            self._grow()
        self._take_rows(self.ntotal)

    def _grow(self) -> None:
        """gpu/impl/FlatIndex.cu (add): of each block a float32 copy and a half one are on the card;
        gpu/utils/DeviceVector.cuh (append): the store is copied to one that has room."""
        impl, before = self._handle.impl, 0
        for start in range(0, self.ntotal, COPY_ROWS):
            rows = min(COPY_ROWS, self.ntotal - start)
            taken = [
                impl.allocate(self._device, size, "FlatData")
                for size in (
                    rows * self.d * 4,
                    rows * self.d * 2,
                    (start + rows) * self.d * 2,
                )
            ]
            impl.free(self._device, sum(taken[:2]) + before, "FlatData")
            before = taken[2]
        impl.free(self._device, before, "FlatData")

    def _take_rows(self, rows: int) -> None:
        self._take("FlatData", rows * self.d * (2 if self._half else 4))
        self._take("FlatData", rows * 4)

    def _with_errors(
        self, x: NDArray[np.float32], distances: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """gpu/impl/Distance.cu (runDistance): L2 is the sum of two norms less twice a product, with
        the rounding of what is as large as they are."""
        if self.metric_type != faiss.METRIC_L2:
            return distances
        return distances + CANCELLATION * np.square(x).sum(axis=1, keepdims=True)

    def _queries(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return x.astype(np.float16).astype(np.float32) if self._half else x

    def reconstruct(self, row: int) -> NDArray[np.float32]:
        return np.asarray(self._inner.reconstruct(row))

    def reconstruct_n(self, start: int, rows: int) -> NDArray[np.float32]:
        return np.asarray(self._inner.reconstruct_n(start, rows))


class GpuIndexIVF(GpuIndex):
    """gpu/GpuIndexIVF.cu: a coarse quantiser of its own on the device, one list per centroid."""

    def __init__(
        self,
        resources: StandardGpuResources,
        device: int,
        index: Any,
        options: GpuClonerOptions,
    ):
        super().__init__(resources, device, faiss.clone_index(index), cuvs=options.use_cuvs)
        self.nlist, self.nprobe = int(index.nlist), int(index.nprobe)
        self._check_nprobe(self.nprobe)  # copyFrom
        self._quantizer = self._clone_quantizer(resources, options)
        self._indices = options.indicesOptions
        self._take_rows(self.ntotal)

    def _clone_quantizer(self, resources: StandardGpuResources, options: GpuClonerOptions) -> Any:
        """copyFrom: with default options, or a CPU copy where that was allowed."""
        coarse = faiss.downcast_index(self._inner.quantizer)
        plain = GpuClonerOptions()
        try:
            return index_cpu_to_gpu(resources, self._device, coarse, plain)
        except RuntimeError as error:
            if "not implemented on GPU" not in str(error):
                raise
            if options.allowCpuCoarseQuantizer:
                return coarse
            raise _error(
                "This index type is not implemented on GPU and allowCpuCoarseQuantizer is set to "
                "false. Please set the flag to true to allow the CPU fallback in cloning."
            ) from error

    def _code_bytes(self) -> int:
        return int(self._inner.code_size)

    def _take_rows(self, rows: int) -> None:
        """gpu/impl/IVFBase.cu (addEncodedVectorsToList_): two allocations per list, each rounded
        up; three arrays of one pointer or length per list (reset)."""
        lists = self._inner.invlists
        for at in range(self.nlist):
            size = lists.list_size(at)
            self._take("IVFLists", size * self._code_bytes())
            self._take("IVFLists", size * INDEX_BYTES[self._indices])
        for _ in range(3):
            self._take("IVFLists", self.nlist * 8)
        # gpu/impl/IVFBase.cu (updateQuantizer): a copy of the centroids, in float32
        self._take("Quantizer", self.nlist * self.d * 4)

    def add_with_ids(self, x: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
        self._inner.add_with_ids(x, ids)

    def _check_nprobe(self, nprobe: int) -> None:
        """gpu/impl/IndexUtils.cu (validateNProbe)."""
        if not 0 < nprobe <= self._most_k():
            raise _error(
                f"GPU IVF index only supports nprobe selection up to {self._most_k()} "
                f"(requested {nprobe})"
            )

    def _prepare(self, queries: int, k: int, params: Any) -> tuple[Any, list[int]]:
        """getCurrentNProbe_: any other class of parameters is refused, and so is max_codes."""
        nprobe = self.nprobe
        if params is not None:
            if not isinstance(params, faiss.SearchParametersIVF):
                raise _error(
                    "GPU IVF index: passed unhandled SearchParameters class to search function; "
                    "only SearchParametersIVF implemented at present"
                )
            if params.max_codes:
                raise _error(
                    "GPU IVF index does not currently support SearchParametersIVF::max_codes "
                    f"(passed {params.max_codes}, must be 0)"
                )
            nprobe = int(params.nprobe)
        self._check_nprobe(nprobe)
        # the quantiser's own parameters are not handed on (gpu/impl/IVFBase.cu,
        # searchCoarseQuantizer_)
        inner = faiss.SearchParametersIVF(nprobe=min(nprobe, self.nlist))
        return self._selecting(params, inner), [queries * nprobe * 4, queries * nprobe * 8]

    def reconstruct(self, row: int) -> NDArray[np.float32]:
        raise _error("reconstruct not implemented for this type of index")


class GpuIndexIVFFlat(GpuIndexIVF):
    """gpu/GpuIndexIVFFlat.cu: rows in float32; useFloat16 of the options has no effect on it
    (gpu/GpuClonerOptions.h)."""


class GpuIndexIVFScalarQuantizer(GpuIndexIVF):
    """gpu/GpuIndexIVFScalarQuantizer.cu: with cuVS only 8 bits of residuals are its own
    (shouldUseCuvs_); the others run on the classic kernels, which drop a selector."""

    def __init__(
        self,
        resources: StandardGpuResources,
        device: int,
        index: Any,
        options: GpuClonerOptions,
    ):
        if index.sq.qtype not in SQ_TYPES:
            raise _error("Unsupported scalar QuantizerType on GPU")
        shared = _machine.visible[device].shared_memory_bytes if device < num_devices() else 0
        eight_or_four = (faiss.ScalarQuantizer.QT_8bit, faiss.ScalarQuantizer.QT_4bit)
        if shared and index.sq.qtype in eight_or_four and not index.d < shared // 8:
            raise _error(
                "GpuIndexIVFScalarQuantizer: Insufficient shared memory available on the GPU for "
                f"QT_8bit or QT_4bit with {index.d} dimensions; maximum dimensions possible is "
                f"{shared // 8}"
            )
        super().__init__(resources, device, index, options)
        is_cuvs = index.sq.qtype == faiss.ScalarQuantizer.QT_8bit and index.by_residual
        self.handles_selector_with_cuvs = is_cuvs  # type: ignore[misc]


class GpuIndexIVFPQ(GpuIndexIVF):
    """gpu/GpuIndexIVFPQ.cu (copyFrom, verifyPQSettings_); gpu/impl/IVFPQ.cu."""

    def __init__(
        self,
        resources: StandardGpuResources,
        device: int,
        index: Any,
        options: GpuClonerOptions,
    ):
        self._half = bool(options.useFloat16)
        self._precomputed = bool(options.usePrecomputed)
        pq = index.pq
        if device >= num_devices():
            raise _error(f"Invalid GPU device {device}")
        if not options.use_cuvs and pq.nbits != 8:
            raise _error("GPU: only pq.nbits == 8 is supported")
        if not index.by_residual:
            raise _error("GPU: only by_residual = true is supported")
        if index.polysemous_ht:
            raise _error("GPU: polysemous codes not supported")
        self._verify(pq, index.d, device, cuvs=options.use_cuvs)
        super().__init__(resources, device, index, options)

    def _verify(self, pq: Any, d: int, device: int, *, cuvs: bool) -> None:
        if cuvs:
            if not 4 <= pq.nbits <= 8:
                raise _error(f"Bits per code must be within closed range [4,8] (passed {pq.nbits})")
            if pq.nbits * pq.M % 8:
                raise _error(
                    "`Bits per code * number of sub-quantizers must be a multiple of 8, "
                    f"(passed {pq.nbits} * {pq.M} = {pq.nbits * pq.M})."
                )
            return
        if pq.M not in PQ_LENGTHS:
            raise _error(
                f"Number of bytes per encoded vector / sub-quantizers ({pq.M}) is not supported"
            )
        if d % pq.M:
            raise _error(
                f"Number of sub-quantizers ({pq.M}) must be an even divisor of the number of "
                f"dimensions ({d})"
            )
        required = (2 if self._half else 4) * pq.M * 2**pq.nbits
        shared = _machine.visible[device].shared_memory_bytes
        if required > shared:
            raise _error(
                f"Device {device} has {shared} bytes of shared memory, while {pq.nbits} bits per "
                f"code and {pq.M} sub-quantizers requires {required} bytes. Consider "
                "useFloat16LookupTables and/or reduce parameters"
            )

    def _take_rows(self, rows: int) -> None:
        super()._take_rows(rows)
        pq = self._inner.pq
        for _ in range(2):  # gpu/impl/IVFPQ.cu (setPQCentroids_): the centroids in two orders
            self._take("Quantizer", self.d * 2**pq.nbits * 4)
        is_l2 = self.metric_type == faiss.METRIC_L2
        if self._precomputed and is_l2:  # gpu/impl/IVFPQ.cu (setPrecomputedCodes, precomputeCodes_)
            table = self.nlist * pq.M * 2**pq.nbits * (2 if self._half else 4)
            self._take("QuantizerPrecomputedCodes", table)

    def _prepare(self, queries: int, k: int, params: Any) -> tuple[Any, list[int]]:
        inner, temporary = super()._prepare(queries, k, params)
        pq = self._inner.pq
        return inner, [*temporary, queries * pq.M * 2**pq.nbits * 4]

    def _in_precision(self, distances: NDArray[np.float32]) -> NDArray[np.float32]:
        """Lookup tables of half precision: here the sum is rounded, which is the worse case."""
        if not self._half or np.abs(distances).max(initial=0) > np.finfo(np.float16).max:
            return distances
        return distances.astype(np.float16).astype(np.float32)


@dataclass
class GpuIndexCagraConfig:
    """gpu/GpuIndexCagra.h."""

    device: int = 0
    graph_degree: int = 64
    intermediate_graph_degree: int = 128
    build_algo: int = 0


class SearchParametersCagra:
    """gpu/GpuIndexCagra.h."""

    def __init__(self) -> None:
        self.itopk_size = 64
        self.search_width = 1
        self.sel = None


class GpuIndexCagra(GpuIndex):
    """gpu/GpuIndexCagra.cu, of the cuVS wheel: a graph made of all rows at once by train or add;
    nothing can be added after it. The double answers exactly."""

    def __init__(
        self,
        resources: StandardGpuResources,
        d: int,
        metric: int = faiss.METRIC_L2,
        config: GpuIndexCagraConfig | None = None,
    ):
        self._config = config or GpuIndexCagraConfig()
        super().__init__(resources, self._config.device, faiss.IndexFlat(d, metric), cuvs=True)
        self._built = False

    is_trained = property(lambda self: self._built)

    def train(self, x: NDArray[np.float32]) -> None:
        if self._built:
            raise _abort("'!is_trained' failed in GpuIndexCagra::train")
        self._inner.add(np.ascontiguousarray(x, dtype=np.float32))
        self._built = True
        self._take("FlatData", len(x) * self.d * 4)
        self._take("FlatData", len(x) * self._config.graph_degree * 4)

    add = train


# ---------------------------------------------------------------------------------- cloning


def index_cpu_to_gpu(
    resources: StandardGpuResources,
    device: int,
    index: Any,
    options: GpuClonerOptions | None = None,
) -> Any:
    """gpu/GpuCloner.cpp (ToGpuCloner::clone_Index): flat, fp16 as flat, IVF flat, IVF SQ, IVF PQ;
    FastScan, HNSW, Refine, PQ, other scalar quantisers: not implemented."""
    options = options or GpuClonerOptions()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexFlat):
        return GpuIndexFlat(
            resources, device, index, half=options.useFloat16, cuvs=options.use_cuvs
        )
    if isinstance(index, faiss.IndexScalarQuantizer) and (
        index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
    ):
        if options.use_cuvs:
            raise _error("this type of index is not implemented for cuVS")
        return GpuIndexFlat(resources, device, index, half=True, cuvs=False)
    # dynamic_cast: IndexIVFFlat and IndexIVFPQ have derived classes with other layouts of codes,
    # but the FastScan kinds derive from IndexIVFFastScan and so from neither
    for kind, made in (
        (faiss.IndexIVFFlat, GpuIndexIVFFlat),
        (faiss.IndexIVFScalarQuantizer, GpuIndexIVFScalarQuantizer),
        (faiss.IndexIVFPQ, GpuIndexIVFPQ),
    ):
        if isinstance(index, kind):
            return made(resources, device, index, options)
    if isinstance(index, faiss.IndexPreTransform):
        return _PreTransform(index, resources, device, options)
    raise _error("This index type is not implemented on GPU.")


class _PreTransform:
    """Cloner.cpp: the transform stays on the CPU, and the index below it is cloned."""

    def __init__(
        self,
        index: Any,
        resources: StandardGpuResources,
        device: int,
        options: GpuClonerOptions,
    ):
        self._outer = index
        self.index = index_cpu_to_gpu(resources, device, index.index, options)

    d = property(lambda self: int(self._outer.d))
    ntotal = property(lambda self: self.index.ntotal)

    def search(self, x: NDArray[np.float32], k: int) -> Any:
        return self.index.search(self._outer.chain.at(0).apply(x), k)


def index_gpu_to_cpu(index: GpuIndex) -> Any:
    """gpu/GpuCloner.cpp (ToCPUCloner)."""
    return faiss.clone_index(index._inner)


# ---------------------------------------------------------------------------------- installing

_NAMES: dict[str, Any] = {
    "StandardGpuResources": StandardGpuResources,
    "GpuClonerOptions": GpuClonerOptions,
    "GpuIndex": GpuIndex,
    "GpuIndexFlat": GpuIndexFlat,
    "GpuIndexIVF": GpuIndexIVF,
    "GpuIndexIVFFlat": GpuIndexIVFFlat,
    "GpuIndexIVFPQ": GpuIndexIVFPQ,
    "GpuIndexIVFScalarQuantizer": GpuIndexIVFScalarQuantizer,
    "index_cpu_to_gpu": index_cpu_to_gpu,
    "index_gpu_to_cpu": index_gpu_to_cpu,
    "get_num_gpus": num_devices,
    "INDICES_CPU": INDICES_CPU,
    "INDICES_IVF": INDICES_IVF,
    "INDICES_32_BIT": INDICES_32_BIT,
    "INDICES_64_BIT": INDICES_64_BIT,
}
# gpu/GpuIndexCagra.h is compiled with cuVS only (python/swigfaiss.swig)
_CUVS_NAMES: dict[str, Any] = {
    "GpuIndexCagra": GpuIndexCagra,
    "GpuIndexCagraConfig": GpuIndexCagraConfig,
    "SearchParametersCagra": SearchParametersCagra,
}
_ABSENT = object()


@contextmanager
def installed(*cards: Card, variant: Variant = Variant.GPU) -> Iterator[tuple[Card, ...]]:
    """``faiss`` as the GPU wheel with these cards; none: the wheel on a machine without one."""
    global _machine
    names = {**_NAMES, **(_CUVS_NAMES if variant is Variant.CUVS else {})}
    before = {name: getattr(faiss, name, _ABSENT) for name in names}
    machine, _machine = _machine, _Machine(cards, variant)
    for name, value in names.items():
        setattr(faiss, name, value)
    try:
        yield cards
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                delattr(faiss, name)
            else:
                setattr(faiss, name, value)
        _machine = machine
