"""Puts an index on a CUDA device. Not yet run on a GPU: written from faiss's documentation.

Used with the ``faiss-gpu`` wheel, for flat, ivf and ivfpq. Its GPU indexes ignore an IDSelector
without an error, so MainIndex over-fetches and filters. Two searches may not share one resources
object; they do not, because a shard has one search thread.
"""

from typing import Any

import faiss
import numpy as np

from shardline.shards.core.errors import ConfigError
from shardline.shards.index.layers import layers_of

GPU_MAX_K = 2048  # faiss's limit for k and for nprobe
TEMP_MEMORY_BYTES = 256 << 20  # faiss's default of 1.5 GiB per shard is more than needed here
FP16_LOOKUP_M = 56  # from this m on, float32 lookup tables exceed the GPU's shared memory
SELF_TEST_ROWS = 8
SELF_TEST_TOLERANCE = 1e-3


def gpu_count() -> int:
    """CUDA devices that this build of faiss can use; 0 for the CPU wheel."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def to_gpu(index: Any) -> tuple[Any, Any]:
    """(a copy of the index on device 0, the resources that must outlive it).

    Raises:
        ConfigError: no usable GPU.
    """
    if gpu_count() == 0:
        raise ConfigError(
            "no GPU can be used here",
            field="index.device",
            expected="a CUDA device and a GPU build of faiss",
            hint="install the gpu extra, or build with index.device cpu",
        )
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(TEMP_MEMORY_BYTES)
    options = faiss.GpuClonerOptions()
    base = layers_of(index).base
    # for an ivfpq index this sets the type of the lookup tables, not of the codes
    options.useFloat16 = hasattr(base, "pq") and base.pq.M >= FP16_LOOKUP_M
    return faiss.index_cpu_to_gpu(resources, 0, index, options), resources


def self_test(index: Any, on_gpu: Any) -> None:
    """Compares scores of a few stored rows, used as queries, on both devices.

    Raises:
        ConfigError: the GPU's answers differ from the CPU's.
    """
    rows = min(SELF_TEST_ROWS, index.ntotal)
    if rows == 0:
        return
    queries = index.reconstruct_n(0, rows)
    expected, _ = index.search(queries, 1)
    got, _ = on_gpu.search(queries, 1)
    if not np.allclose(got, expected, rtol=SELF_TEST_TOLERANCE, atol=SELF_TEST_TOLERANCE):
        raise ConfigError(
            "the GPU's answers differ from the CPU's",
            field="index.device",
            expected=str(expected[:, 0]),
            got=str(got[:, 0]),
            hint="serve with index.device cpu, and check the driver and the faiss wheel",
        )
