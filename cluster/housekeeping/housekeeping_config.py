"""What `shardline gc` leaves: the section ``housekeeping`` of the configuration."""

from pydantic import BaseModel, ConfigDict, Field


class HousekeepingConfig(BaseModel):
    """Housekeeping of a store, by `shardline gc`; nothing is removed by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_generations: int = Field(
        default=2,
        ge=0,
        description="[generations] Older generations that gc leaves, the newest of them, besides "
        "the live one, those that a cluster has loaded, and those newer than the live one.",
    )
