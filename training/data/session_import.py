"""Tables of clicks into a dataset folder of pairs of items, for item-to-item models.

The users of such a dataset are its items, under the same ids and with the same columns, so that
towers may be tied. Its weights say how often a pair was seen. ``training.data.sessions`` makes the
pairs.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from shardline.shards.core.errors import DataError, InvalidInput
from shardline.training.data.formats import ImportConfig, ImportReport, OnError
from shardline.training.data.importers import drop_unknown
from shardline.training.data.sessions import Clicks, session_pairs, session_splits
from shardline.training.data.table_checks import SPLITS
from shardline.training.data.table_format import read_tables
from shardline.training.data.table_writer import interaction_batch, write_dataset
from shardline.training.data.tables import ITEM_TO_ITEM


class SessionConfig(BaseModel):
    """How to read clicks, and what becomes of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    session_column: str = Field(default="session_id", description="which session a click is in")
    item_column: str = Field(default="item_id", description="item id, in clicks and items")
    time_column: str | None = Field(
        default="timestamp", description="of clicks; None takes the order of rows"
    )
    booked_column: str | None = Field(
        default=None, description="true or above 0 where the click ended in a booking or purchase"
    )
    market_column: str | None = Field(
        default=None, description="of items, which shall be there for negatives of one market"
    )
    interactions_file: str = Field(default="interactions", description="the table of clicks")
    items_file: str | None = Field(default="items", description="None derives the items")
    window: int = Field(default=5, ge=1, le=100, description="[clicks] apart, at most, in a pair")
    val_share: float = Field(default=0.05, ge=0, lt=1, description="of sessions, before the test")
    test_share: float = Field(default=0.1, ge=0, lt=1, description="of sessions, the latest")
    on_error: OnError = Field(default="raise", description="a click of an unknown item")

    @model_validator(mode="after")
    def _something_is_trained_on(self) -> "SessionConfig":
        if self.val_share + self.test_share >= 1:
            raise ValueError("val_share and test_share leave no session to train on")
        return self


@dataclass(slots=True, kw_only=True)
class SessionReport:
    """What was read and written."""

    sessions: int
    clicks: int
    booked: int
    items: int
    pairs: dict[str, int] = field(default_factory=dict)
    unknown_items: int = 0
    warnings: list[str] = field(default_factory=list)


def import_sessions(
    source: Path | str, target: Path, config: SessionConfig, *, overwrite: bool = False
) -> SessionReport:
    """Reads the clicks of ``source``, writes the dataset folder ``target``.

    Raises:
        NotFound, InvalidInput: as ``training.data.table_format.read_tables``; no market column.
        DataError: a column that cannot be used; no session with two different items; an item that
            the table of items does not list, unless skipped; a target that exists.
    """
    settings = _import_config(config)
    report = ImportReport()
    parsed = drop_unknown(read_tables(source, settings, report), settings, report)
    check_market(parsed.items, config.market_column)
    booked = np.zeros(len(parsed.user_ids), np.bool_)
    if parsed.weights is not None:
        booked = parsed.weights > 0  # NaN is not
    clicks = Clicks.of(parsed.user_ids, parsed.item_ids, parsed.times, booked)
    codes = session_splits(clicks, val_share=config.val_share, test_share=config.test_share)
    pairs = session_pairs(clicks, codes, window=config.window)
    if not (pairs.codes == 0).any():
        raise DataError(
            "no pair to train on",
            field=f"{source}: {config.session_column}",
            expected="a session of two different items, or more of them",
            got=f"{clicks.number} sessions of {len(clicks.items)} clicks",
        )
    names = ["user_id" if name == "item_id" else name for name in parsed.items.column_names]
    batch = interaction_batch(pairs.asked, pairs.found, pairs.times, pairs.codes, pairs.counts)
    write_dataset(
        target,
        parsed.items.rename_columns(names),
        parsed.items,
        pa.Table.from_batches([batch]),
        name=Path(str(source)).name,
        parameters={"importer": "sessions", ITEM_TO_ITEM: True, **config.model_dump(mode="json")},
        overwrite=overwrite,
    )
    return SessionReport(
        sessions=clicks.number,
        clicks=len(clicks.items),
        booked=int(clicks.booked.sum()),
        items=len(parsed.items),
        pairs=dict(zip(SPLITS, np.bincount(pairs.codes, minlength=3).tolist(), strict=True)),
        unknown_items=report.unknown_items,
        warnings=[each for each in report.warnings if "users" not in each],
    )


def check_market(items: pa.Table, column: str | None) -> None:
    """Raises InvalidInput where a market column is named that the items do not have."""
    if column is not None and column not in items.column_names:
        raise InvalidInput(
            "no such column of items",
            field="market_column",
            expected=", ".join(items.column_names[1:]) or "a table of items with columns",
            got=column,
        )


def _import_config(config: SessionConfig) -> ImportConfig:
    values = {
        "user_column": config.session_column,
        "item_column": config.item_column,
        "time_column": config.time_column,
        "weight_column": config.booked_column,
        "users_file": None,
        "on_error": config.on_error,
    }
    for name in ("interactions_file", "items_file"):  # a file named by the caller has to be there
        if name in config.model_fields_set:
            values[name] = getattr(config, name)
    return ImportConfig.model_validate(values)
