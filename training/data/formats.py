"""What a reader of real data takes and gives: its settings, its report, the parsed ``Source``.

Ids that are integers >= 0 are kept. Other ids are numbered 0, 1, ... in sorted order, and the
original is kept in a column ``original_id``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.data.splits import SplitCodes

SHOWN = 5  # offending lines quoted in a report

OnError = Literal["raise", "skip"]


class Format(StrEnum):
    LIGHTGCN = "lightgcn"
    MOVIELENS_100K = "movielens-100k"
    TABLE = "table"
    PARQUET = "parquet"  # the older name of ``table``


class ImportConfig(BaseModel):
    """How to read a source. What is said of columns and files applies to tables only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    on_error: OnError = Field(
        default="raise", description="malformed line: stop, or skip and count it"
    )
    seed: int = Field(default=0, ge=0, description="draws users and items of the splits")
    val_users: int = Field(default=2000, ge=0, description="users with items in val")
    val_per_user: int = Field(default=1, ge=1, description="train items that such a user gives")
    val_items: Literal["last", "random"] = Field(
        default="last", description="which: the last by time, or random ones, as the test split is"
    )
    cold_items: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the items that train does not see: all they have goes to test",
    )
    test_per_user: int = Field(
        default=4, ge=0, description="items of a user held out, where the source has no test split"
    )
    min_rating: int = Field(
        default=1, ge=1, le=5, description="MovieLens ratings below are left out"
    )
    users_file: str | None = Field(
        default="users",
        description="in the source's folder, with or without its extension; None derives users",
    )
    items_file: str | None = Field(
        default="items",
        description="in the source's folder, with or without its extension; None derives items",
    )
    interactions_file: str = Field(
        default="interactions", description="below the source, or the source itself"
    )
    user_column: str = Field(default="user_id", description="user id, in users and interactions")
    item_column: str = Field(default="item_id", description="item id, in items and interactions")
    time_column: str | None = Field(
        default="timestamp",
        description="integers, dates, times or ISO 8601 texts; None takes the order of rows",
    )
    weight_column: str | None = Field(
        default=None,
        description="of interactions, such as a rating: numbers >= 0, null where one is not "
        "known; None reads no weights",
    )
    types: tuple[str, ...] = Field(
        default=(), description="column=type, where a text format would infer another type"
    )
    drop: tuple[str, ...] = Field(default=(), description="columns that are not read as features")
    only: tuple[str, ...] | None = Field(
        default=None, description="the columns that may be features; None for all"
    )


@dataclass(slots=True, kw_only=True)
class ImportReport:
    """What was read, written and found wrong; ``examples`` are "file:line: message"."""

    users: int = 0
    items: int = 0
    interactions: dict[str, int] = field(default_factory=dict)
    malformed: int = 0
    duplicates: int = 0
    unknown_users: int = 0
    unknown_items: int = 0
    user_holes: int = 0
    item_holes: int = 0
    users_without_interactions: int = 0
    items_without_interactions: int = 0
    below_min_rating: int = 0
    examples: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def note(self, message: str) -> None:
        if len(self.examples) < SHOWN:
            self.examples.append(message)


@dataclass(slots=True)
class Source:
    """A parsed source. codes is None where it brings no test split; where[i] locates row i."""

    users: pa.Table
    items: pa.Table
    user_ids: IdArray
    item_ids: IdArray
    times: IdArray
    codes: SplitCodes | None
    where: Callable[[int], str]
    weights: FloatArray | None = None  # NaN where one is not known
