"""How a shard keeps what is written to it: the section ``live`` of the configuration."""

from pydantic import BaseModel, ConfigDict, Field


class LiveConfig(BaseModel):
    """Live writes: when a shard's main index is made anew, and how much may wait for that."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    compact_share: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="[share of the main index's rows] Rows written, and rows hidden, since the "
        "last compaction, from which the next one begins.",
    )
    compact_min_rows: int = Field(
        default=1000,
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

    def is_due(self, changed: int, rows: int) -> bool:
        """Whether a compaction is to begin: ``changed`` of ``rows`` were written or hidden."""
        return changed >= max(self.compact_min_rows, self.compact_share * rows)
