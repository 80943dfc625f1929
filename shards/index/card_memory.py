"""What an index takes of a card's memory, worked out before any of it is read.

Sizes are those of faiss's classic kernels (faiss/gpu/impl/FlatIndex.cu, IVFBase.cu, IVFPQ.cu):
every allocation is rounded up to 256 bytes, and an IVF list has two. Bytes throughout.
"""

from dataclasses import dataclass

import faiss

from shardline.shards.core.errors import ConfigError
from shardline.shards.index.layers import Layers

MIB = 1 << 20
TEMP_MEMORY_BYTES = 256 * MIB  # faiss's default of 1.5 GiB per shard is more than needed here
# Of the CUDA context's growth, cuBLAS, and results that temporary memory does not hold: measured on
# no card yet.
HEAD_ROOM_BYTES = 512 * MIB
ALLOCATION_BYTES = 256
INDEX_BYTES = 8  # of a row's number, on the card too
LOADING, HEAD_ROOM = "while it is loaded", "head-room"  # the parts that a loaded index may not use
COPY_ROWS = 1 << 20  # that faiss copies at a time where it rounds to half precision


@dataclass(frozen=True, slots=True)
class CardMemory:
    """parts: (what it is, its arithmetic, bytes), in the order of ``lines``."""

    parts: tuple[tuple[str, str, int], ...]

    @property
    def total(self) -> int:
        return sum(size for _, _, size in self.parts)

    @property
    def lines(self) -> list[str]:
        """One per part, and the sum: for documents and commands."""
        listed = [f"{name}: {text} = {in_mib(size)}" for name, text, size in self.parts]
        return [*listed, f"together: {in_mib(self.total)}"]


def _rounded(size: int) -> int:
    return -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES


def in_mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"


def card_memory(layers: Layers, rows: int) -> CardMemory:
    """Of the base of an index, empty or not, with so many rows. A re-rank takes none: its copies
    stay in the host's memory."""
    base = layers.base
    d, code = int(base.d), int(base.code_size)
    parts = [("rows", f"{rows:,} x {code} bytes", rows * code)]
    if layers.is_ivf:
        nlist = int(base.nlist)
        parts += [
            ("row numbers", f"{rows:,} x {INDEX_BYTES} bytes", rows * INDEX_BYTES),
            # rounding up: two allocations per list, each by up to 255 bytes; three tables
            (
                "lists",
                f"{nlist:,} x (2 x {ALLOCATION_BYTES} + 3 x 8) bytes",
                nlist * (2 * ALLOCATION_BYTES + 24),
            ),
            # those of the quantiser with their norms, and a copy of them
            ("centroids", f"{nlist:,} x (2 x {4 * d} + 4) bytes", nlist * (8 * d + 4)),
        ]
        if hasattr(base, "pq"):
            ksub = int(base.pq.ksub)
            parts.append(("codebooks", f"2 x {d} x {ksub} x 4 bytes", 2 * d * ksub * 4))
    else:
        parts.append(("norms", f"{rows:,} x 4 bytes", rows * 4))
        if code < 4 * d:  # half precision: rows come in blocks, and the store is copied to grow
            block = min(rows, COPY_ROWS)
            growth = (rows - block) * code
            text = f"{block:,} x {4 * d + code} bytes + {rows - block:,} x {code} bytes"
            parts.append((LOADING, text, block * (4 * d + code) + growth))
    # what is one allocation is rounded up; of lists this is in ``lists``
    parts = [(name, text, _rounded(size)) for name, text, size in parts]
    parts += [
        ("temporary memory", "per shard", TEMP_MEMORY_BYTES),
        (HEAD_ROOM, "per shard", HEAD_ROOM_BYTES),
    ]
    return CardMemory(tuple(parts))


def refuse_without_room(memory: CardMemory, free_bytes: int, card: int) -> None:
    """Raises ConfigError where a card has less free memory than is planned, with the arithmetic."""
    if memory.total <= free_bytes:
        return
    sums = " + ".join(f"{name} {in_mib(size)}" for name, _, size in memory.parts)
    raise ConfigError(
        f"the shard does not fit on card {card}",
        field="index.device",
        expected=f"{in_mib(memory.total)} free ({sums})",
        got=in_mib(free_bytes),
        hint="use more shards or cards, a smaller index.storage or kind ivfpq, or index.device cpu",
    )


def is_half(index: object) -> bool:
    """Whether it stores half precision, which faiss has as a flat index on a card."""
    quantizer = getattr(index, "sq", None)
    return quantizer is not None and quantizer.qtype == faiss.ScalarQuantizer.QT_fp16
