"""When an index needs repair: the section ``quality`` of the configuration."""

from pydantic import BaseModel, ConfigDict, Field


class QualityConfig(BaseModel):
    """Bounds on what `status` and `doctor` watch of the live index; beyond one a repair is due."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_recall: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="[share] recall@k of served queries against exact answers; below it the index "
        "is to be trained again. 0: any.",
    )
    min_queries: int = Field(
        default=32,
        ge=1,
        le=100_000,
        description="[queries] Watched queries, of all routers, below which recall says nothing.",
    )
    max_changed_share: float = Field(
        default=0.2,
        gt=0,
        description="[share of a shard's rows] Rows written, and rows hidden, since a shard's last "
        "compaction; above it compaction does not keep up. Well above live.compact_share.",
    )
    max_imbalance: float = Field(
        default=4.0,
        ge=1,
        description="[factor] Rows that a search scans per list, against lists of one length, ivf "
        "kinds; above it the lists no longer fit the items. A new build has 1.0 to 1.5.",
    )
    max_unseen_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="[share of rows] Items that the generation was built without; above it the "
        "model is to be trained again.",
    )
