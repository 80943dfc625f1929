"""Arithmetic before anything runs: bytes that an index takes on a card, and floors of its searches.

Bytes are counted from faiss's source (1.15): a flat index keeps its vectors and one float32 norm
per row, and every added block moves all vectors into a new allocation (faiss/gpu/impl/FlatIndex.cu,
``add``); an inverted list is an allocation of its own that grows by doubling up to 4 MiB and by a
quarter up to 128 MiB (faiss/gpu/utils/DeviceVector.cuh), with an id of 8 bytes per row.

A floor is the larger of two times: the fewest bytes that must be read, at the copy bandwidth that
the card showed, and the operations, at the matrix rate that it showed. The roofline model:
Williams, Waterman and Patterson, CACM 2009.
"""

from dataclasses import dataclass

from shardline.shards.core.errors import ConfigError

TEMP_BYTES = 256 << 20  # of a resources object, instead of faiss's default of 1.5 GiB
HEADROOM_BYTES = 2 << 30  # matrix library, kernels, and blocks of vectors on their way in
ID_BYTES = 8
NORM_BYTES = 4
LIST_GROWTH = 2.0  # a list that has just been doubled
# sub-vectors of 8 bits whose codes faiss's device kernels take (IVFPQ.cu, isSupportedPQCodeLength)
CODE_LENGTHS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
FP16_TABLES_FROM = 56  # float32 tables of so many sub-vectors exceed 48 KiB of shared memory
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the card showed: bytes per second of a copy (read and written), flops per second."""

    bytes_per_s: float
    bf16: float
    fp16: float
    fp32: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bytes on the card by what they are for."""

    parts: tuple[tuple[str, int], ...]
    worst_parts: tuple[tuple[str, int], ...]  # the same, at the worst moment
    held: int  # at most so many once it is loaded

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.parts)

    @property
    def worst(self) -> int:
        return sum(size for _, size in self.worst_parts)

    @property
    def arithmetic(self) -> str:
        """The sum, term by term, of the worst moment."""
        terms = " + ".join(f"{name} {size / GIB:.2f}" for name, size in self.worst_parts)
        return f"{terms} = {self.worst / GIB:.2f} GiB"

    def refusal(self, free: int) -> str | None:
        """Why it does not fit into ``free`` bytes; None if it does."""
        if self.worst <= free:
            return None
        return f"needs {self.arithmetic}; free on the card: {free / GIB:.2f} GiB"


def flat_plan(rows: int, dim: int, value_bytes: int) -> Plan:
    """A flat index of (rows, dim); while blocks are added its vectors are there twice."""
    vectors = rows * dim * value_bytes
    rest = (("norms", rows * NORM_BYTES), ("temporary", TEMP_BYTES))
    loading = ("new allocation", vectors)
    return Plan(
        parts=(("vectors", vectors), *rest),
        worst_parts=(("vectors", vectors), loading, *rest, ("headroom", HEADROOM_BYTES)),
        held=vectors + sum(size for _, size in rest) + HEADROOM_BYTES,
    )


def ivf_plan(
    rows: int, dim: int, nlist: int, code_bytes: int, *, centroid_bytes: int = 4, copies: int = 0
) -> Plan:
    """Inverted lists of ``code_bytes`` per row; ``copies``: bytes per row of vectors to re-rank."""
    lists = rows * (code_bytes + ID_BYTES)
    rest = [("centroids", nlist * (dim * centroid_bytes + NORM_BYTES)), ("temporary", TEMP_BYTES)]
    if copies:
        rest.append(("copies", rows * copies))
    worst = (("lists", int(lists * LIST_GROWTH)), *rest, ("headroom", HEADROOM_BYTES))
    return Plan(
        parts=(("lists", lists), *rest),
        worst_parts=worst,
        held=sum(size for _, size in worst),
    )


def code_length(rows: int, dim: int, nlist: int, free: int, *, wanted: int) -> int:
    """The longest code of at most ``wanted`` bytes that fits into ``free`` bytes.

    Raises:
        ConfigError: none does.
    """
    allowed = [m for m in CODE_LENGTHS if m <= wanted and dim % m == 0]
    for m in sorted(allowed, reverse=True):
        if ivf_plan(rows, dim, nlist, m, centroid_bytes=2).refusal(free) is None:
            return m
    smallest = ivf_plan(rows, dim, nlist, min(allowed), centroid_bytes=2)
    raise ConfigError("the card is too small", expected=smallest.refusal(free), field="rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Milliseconds, and which of the two times is the larger."""

    ms: float
    bound_by: str


def floor(moved: float, flops: float, rates: Rates, flops_per_s: float) -> Floor:
    """Of ``moved`` bytes and ``flops`` operations at ``flops_per_s``."""
    by_bytes = 1000 * moved / rates.bytes_per_s
    by_flops = 1000 * flops / flops_per_s
    if by_bytes >= by_flops:
        return Floor(ms=by_bytes, bound_by="bandwidth")
    return Floor(ms=by_flops, bound_by="arithmetic")


def flat_floor(rows: int, dim: int, batch: int, value_bytes: int, rates: Rates) -> Floor:
    """Every vector is read once per batch; the matrix of scores is neither written nor read."""
    rate = rates.fp16 if value_bytes == 2 else rates.fp32
    return floor(rows * dim * value_bytes, 2.0 * rows * dim * batch, rates, rate)


def faiss_flat_ms(rows: int, dim: int, batch: int, value_bytes: int, rates: Rates) -> float:
    """The same search as faiss does it: float32 scores are written by the product and read by the
    selection (faiss/gpu/impl/Distance.cu, ``runDistance``)."""
    moved = rows * (dim * value_bytes + 2 * 4 * batch)
    return floor(moved, 0.0, rates, rates.fp32).ms


def ivf_floor(
    rows: int,
    dim: int,
    nlist: int,
    nprobe: int,
    batch: int,
    code_bytes: int,
    rates: Rates,
    *,
    reranked: int = 0,
) -> Floor:
    """Centroids once, the codes of visited lists (each list at most once per batch), ``reranked``
    float16 vectors per query; operations: the coarse product, and one per dimension, 256 centroids
    and visited list for the tables of a product quantiser."""
    visited = min(1.0, batch * nprobe / nlist)
    moved = nlist * dim * 2 + visited * rows * code_bytes + batch * reranked * dim * 2
    flops = 2.0 * batch * (nlist * dim + reranked * dim)
    return floor(moved, flops, rates, rates.fp16)


def step_floor(
    *,
    batch: int,
    dim: int,
    weights: int,
    parameters: int,
    rates: Rates,
) -> Floor:
    """A training step: three times the towers' and the loss's products at the bf16 rate, plus 28
    bytes per parameter of AdamW (four float32 read, three written) and the logits' bf16 square
    twice. The two add up: the optimiser begins when the gradients are there."""
    flops = 3 * 2.0 * (batch * weights + batch * batch * dim)
    moved = 28.0 * parameters + 2 * 2.0 * batch * batch
    by_flops = 1000 * flops / rates.bf16
    by_bytes = 1000 * moved / rates.bytes_per_s
    bound = "bandwidth" if by_bytes >= by_flops else "arithmetic"
    return Floor(ms=by_bytes + by_flops, bound_by=bound)
