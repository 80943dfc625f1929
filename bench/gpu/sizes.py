"""How large each part is: ``FULL`` on a card, ``TINY`` for a run without one."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Rows, lists and repetitions of every part."""

    name: str
    dim: int
    k: int
    batches: tuple[int, ...]
    seconds: float  # per timed operation
    fewest: int  # samples per timed operation
    copy_bytes: int
    matrix_side: int
    block_rows: int
    truth_queries: int
    checked_rows: int  # held against the CPU
    checked_lists: int
    shard_rows: int  # more than faiss copies at a time (card_memory.COPY_ROWS)
    kinds_rows: int
    kinds_lists: int
    flat_rows: tuple[int, int]
    pq_rows: int
    pq_lists: int
    pq_code: int  # bytes per row
    nprobes: tuple[int, ...]
    rerank_factors: tuple[int, ...]
    target_recall: float
    billion_rows: int
    billion_lists: int
    billion_code: int  # at most
    billion_search_seconds: float  # kept for searching, if adding takes longer than there is time
    sample_per_list: int
    users: int
    items: int
    train_batch: int
    hidden: int


FULL = Sizes(
    name="full",
    dim=128,
    k=100,
    batches=(1, 8, 64, 512),
    seconds=0.5,
    fewest=10,
    copy_bytes=2 << 30,
    matrix_side=8192,
    # faiss splits what is more than 524,288 rows or 256 MiB into pages of 32,768 rows, and a flat
    # index moves all its vectors for each (faiss/gpu/GpuIndex.cu, addPaged_ex_)
    block_rows=1 << 19,
    truth_queries=128,
    checked_rows=100_000,
    checked_lists=256,
    shard_rows=2_000_000,
    kinds_rows=1_000_000,
    kinds_lists=2048,
    flat_rows=(10_000_000, 100_000_000),
    pq_rows=100_000_000,
    pq_lists=16_384,
    pq_code=32,
    nprobes=(8, 16, 32, 64, 128),
    rerank_factors=(1, 4, 10),
    target_recall=0.95,
    billion_rows=1_000_000_000,
    billion_lists=16_384,
    billion_code=64,
    billion_search_seconds=45.0,
    sample_per_list=40,
    users=2_000_000,
    items=2_000_000,
    train_batch=8192,
    hidden=512,
)

TINY = Sizes(
    name="tiny",
    dim=32,
    k=10,
    batches=(1, 8),
    seconds=0.0,
    fewest=2,
    copy_bytes=1 << 20,
    matrix_side=64,
    block_rows=1024,
    truth_queries=8,
    checked_rows=1000,
    checked_lists=8,
    shard_rows=1200,
    kinds_rows=1200,
    kinds_lists=8,
    flat_rows=(1000, 2000),
    pq_rows=1500,
    pq_lists=8,
    pq_code=8,
    nprobes=(2, 8),
    rerank_factors=(1, 20),
    target_recall=0.95,
    billion_rows=2000,
    billion_lists=8,
    billion_code=4,
    billion_search_seconds=0.0,
    sample_per_list=40,
    users=500,
    items=500,
    train_batch=64,
    hidden=32,
)
