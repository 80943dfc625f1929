"""How a job's queries are cut into blocks: by row number alone, the same at every start."""

from collections.abc import Sequence
from dataclasses import dataclass

from shardline.shards.core.errors import InvalidInput

# Results of a block, in slots of 12 bytes. 2^20 of them are 12 MB: enough queries for faiss to
# work at its full rate, few enough for a block per core to be in memory, and for the arrays of a
# merge to stay below 32 MB, above which the C library maps fresh pages for each.
SLOTS_PER_BLOCK = 1 << 20
# Attributes of a block's results: a worker holds them three times while it puts them in order and
# writes them, and Arrow counts the characters of a column in 31 bits.
ATTRIBUTE_BYTES_PER_BLOCK = 64 << 20
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 256, 8192


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Block ``number`` of a job: its queries from row ``start`` to before ``stop``."""

    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def default_block_rows(k: int, attribute_bytes: float = 0.0) -> int:
    """Queries per block for k results: a power of two, so that every k has few sizes.

    attribute_bytes: of all attributes of an item that are added, on average.
    """
    rows = 1 << ((SLOTS_PER_BLOCK // k).bit_length() - 1)
    rows = max(MIN_BLOCK_ROWS, min(rows, MAX_BLOCK_ROWS))
    fitting = int(ATTRIBUTE_BYTES_PER_BLOCK / max(1.0, k * attribute_bytes))
    return min(rows, 1 << max(0, fitting.bit_length() - 1))


def spans_of(rows: int, block_rows: int) -> list[Span]:
    """The blocks of ``rows`` queries, in order; the last may be shorter.

    Raises:
        InvalidInput: no queries, or a block without rows.
    """
    if rows < 1:
        raise InvalidInput("no queries", expected="at least one row")
    if block_rows < 1:
        raise InvalidInput("out of range", field="block_rows", expected=">= 1", got=str(block_rows))
    starts = range(0, rows, block_rows)
    return [
        Span(number, start, min(start + block_rows, rows)) for number, start in enumerate(starts)
    ]


def waves_of(spans: Sequence[Span], blocks: int) -> list[Sequence[Span]]:
    """The spans in groups of at most ``blocks``, in order."""
    return [spans[start : start + blocks] for start in range(0, len(spans), blocks)]
