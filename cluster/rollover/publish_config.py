"""What a generation must reach to go live: the section ``publish`` of the configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shardline.shards.core.errors import InvalidInput


class PublishConfig(BaseModel):
    """The gate before a switch, and how long the generation before stays loaded after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    queries: int = Field(
        default=64,
        ge=1,
        le=1024,
        description="[queries] Sample queries that the gate asks, and as many of those served "
        "lately.",
    )
    min_recall: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="[share] recall@100 against exact answers, of the sample queries, and of those "
        "served lately where the model is the same. 0: any.",
    )
    held_out: Path | None = Field(
        default=None,
        description="Parquet file of held-out interactions that every publish is measured with: "
        "one query per row, as a vector or as the encoder's features, and the list of item ids "
        "`relevant`. null: none.",
    )
    min_held_out_recall: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="[share] Of the relevant items of held_out, those among the first 100. 0: any.",
    )
    max_latency_ratio: float = Field(
        default=2.0,
        ge=0,
        description="[factor] p99 of single queries against that of the live generation, asked "
        "in turns; below 1 ms counts as 1 ms. 0: any.",
    )
    min_rows_ratio: float = Field(
        default=0.8,
        ge=0,
        description="[factor] Rows against those of the live generation, at least.",
    )
    max_rows_ratio: float = Field(
        default=2.0,
        ge=0,
        description="[factor] Rows against those of the live generation, at most. 0: any.",
    )
    min_overlap: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="[share] Of the live generation's first 100 results, those that are among the "
        "first 100 of the new one, by the same queries; with another model by those of held_out. "
        "0: any.",
    )
    max_unreplayed_rows: int = Field(
        default=0,
        ge=0,
        description="[rows] Written rows that could not be brought to the new generation: written "
        "by vector, where its model is another.",
    )
    keep_s: float = Field(
        default=3600.0,
        ge=0,
        description="[s] Time that the generation before stays loaded after a switch, for a "
        "rollback at once. It takes its memory.",
    )

    def with_bounds(self, bounds: Mapping[str, Any]) -> Self:
        """With values of JSON in place of some of its own, for one publish.

        Raises:
            InvalidInput: they are not to be had, or do not go with the others.
        """
        try:
            return self.model_validate(self.model_dump() | dict(bounds))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise InvalidInput(
                f"bounds that cannot be: {problem['msg']}",
                field=".".join(("publish", *map(str, problem["loc"]))),
                hint="the other values are those that `shardline serve` was started with",
            ) from error

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if self.min_held_out_recall and self.held_out is None:
            raise ValueError("min_held_out_recall needs held_out, the file that it is measured on")
        if self.max_rows_ratio and self.min_rows_ratio > self.max_rows_ratio:
            low, high = self.min_rows_ratio, self.max_rows_ratio
            raise ValueError(f"min_rows_ratio = {low} is above max_rows_ratio = {high}")
        return self
