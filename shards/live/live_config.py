"""How a shard keeps what is written to it: the section ``live`` of the configuration.

The default share is for a shard of 250,000 x 128 that is asked 2,000 queries per second, while 125
rows per second are written. With R rows in the delta before a compaction, half of them on average,
and 10 us per query and 1,000 rows, the delta takes 1e-5 R of a core. A compaction, its change-over
included, takes .9 s of a core, half of that at any size, and comes every R / 125 s, so that it
takes 112 / R of a core. The sum is least at R = 3,350, which are 5,000 changes if half of them
hide a row: 2 % of the shard. For small shards, with the fixed part alone, it is at 2,400. Each
compaction writes the whole main index again: 85 MB in 27 s, 50 rows per changed row.
"""

import math

from pydantic import BaseModel, ConfigDict, Field

# Shards are written alike, and would all begin at once: some begin up to so much earlier. Multiples
# of the golden ratio spread any number of shards evenly.
EARLIER = 0.3
GOLDEN = (math.sqrt(5) - 1) / 2


class LiveConfig(BaseModel):
    """Live writes: when a shard's main index is made anew, and how much may wait for that."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    compact_share: float = Field(
        default=0.02,
        gt=0,
        le=1,
        description="[share of the main index's rows] Rows written, and rows hidden, since the "
        "last compaction, from which the next one begins; in some shards up to 30 % earlier, so "
        "that not all begin at once.",
    )
    compact_min_rows: int = Field(
        default=3000,
        ge=1,
        description="[rows] Below so many of them none begins.",
    )
    max_delta_rows: int = Field(
        default=65_536,
        ge=1,
        le=1 << 24,
        description="[rows] Written rows that may wait for a compaction, replaced ones included; "
        "beyond that upserts are refused with delta_full.",
    )

    compact_writes: int = Field(
        default=100_000,
        ge=1,
        description="[writes] Writes since the last compaction from which the next one begins, "
        "whatever they changed: until then the log keeps them.",
    )

    keep_log_mib: float = Field(
        default=1024,
        ge=0,
        le=1 << 20,
        description="[MiB per shard] Log that is kept after a compaction has made it unnecessary, "
        "the newest of it: `publish` brings a new generation the writes since its cut from there, "
        "and where a newest main index is damaged, the shard is made of it and the one before. "
        "What is deleted stays readable in it until then; 0 keeps nothing.",
    )

    @property
    def keep_log_bytes(self) -> int:
        return int(self.keep_log_mib * (1 << 20))

    def is_due(self, *, written: int, hidden: int, rows: int, writes: int, shard: int = 0) -> bool:
        """Whether a compaction is to begin: rows of the delta, hidden ones of ``rows`` in the main
        index, and writes since it was made.

        In any case before half of the room for written rows is used, whatever the main index has.
        """
        changed = max(self.compact_min_rows, self.compact_share * rows)
        changed *= 1 - EARLIER * (shard * GOLDEN % 1)
        is_filling = written >= max(1, self.max_delta_rows // 2)
        return is_filling or written + hidden >= changed or writes >= self.compact_writes
