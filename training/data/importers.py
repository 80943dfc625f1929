"""Real data into a dataset folder: LightGCN text, MovieLens 100k, and tables in many formats.

A reader of the format parses; ``import_dataset`` drops repeats, assigns splits and
writes. What was wrong with the source is counted in an ``ImportReport``, with file and line of the
first few cases. A malformed line stops the import unless ``on_error="skip"``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shardline.shards.core.errors import DataError
from shardline.shards.core.schema import IdArray
from shardline.shards.storage.cut import Cut
from shardline.training.data.formats import SHOWN, Format, ImportConfig, ImportReport, Source
from shardline.training.data.splits import SplitCodes, cold_rows, hold_out, split_codes
from shardline.training.data.table_checks import SPLITS
from shardline.training.data.table_format import read_tables
from shardline.training.data.table_writer import interaction_batch, write_dataset
from shardline.training.data.text_formats import read_lightgcn, read_movielens

TRAIN, VAL, TEST = range(3)  # places in SPLITS
READERS: dict[Format, Callable[[Any, ImportConfig, ImportReport], Source]] = {
    Format.LIGHTGCN: read_lightgcn,
    Format.MOVIELENS_100K: read_movielens,
    Format.TABLE: read_tables,
    Format.PARQUET: read_tables,
}

__all__ = ["Format", "ImportConfig", "ImportReport", "import_dataset"]


def import_dataset(
    kind: Format,
    source: Path | str,
    target: Path,
    config: ImportConfig | None = None,
    *,
    cut: Cut | None = None,
    overwrite: bool = False,
) -> ImportReport:
    """Reads ``source``, writes the dataset folder ``target``, says what it met.

    Repeated (user, item) pairs keep their first row, and a pair of train and test stays in train:
    it would be masked in the evaluation. A source with a test or val split keeps it; otherwise
    test is as in ``splits.split_codes`` and val as in ``splits.hold_out``, by the config. Cold
    items are drawn last, whatever split their interactions were in.

    Raises:
        NotFound: a file is missing. DataError: a malformed line (unless skipped), a missing
        column, an id unknown to its table, or a target that exists.
    """
    settings = config or ImportConfig()
    report = ImportReport()
    parsed = READERS[kind](_place(kind, source), settings, report)
    parsed = drop_unknown(parsed, settings, report)
    parsed = _drop_repeats(parsed, report)
    codes = _split(parsed, settings)
    _describe(parsed, codes, report)
    batch = interaction_batch(
        *(parsed.user_ids, parsed.item_ids, parsed.times, codes), parsed.weights
    )
    write_dataset(
        target,
        parsed.users,
        parsed.items,
        iter([batch]),
        name=Path(str(source)).name,
        parameters={"importer": kind.value, **settings.model_dump(mode="json")},
        cut=cut,
        overwrite=overwrite,
    )
    return report


def _place(kind: Format, source: Path | str) -> Path | str:
    """Tables may lie behind a URL, which a Path would spoil."""
    return source if kind in (Format.TABLE, Format.PARQUET) else Path(source)


def drop_unknown(parsed: Source, config: ImportConfig, report: ImportReport) -> Source:
    """Interactions with users or items that are in no table: an error, or skipped and counted."""
    keep = np.ones(len(parsed.user_ids), dtype=np.bool_)
    for kind, ids, table in (
        ("user", parsed.user_ids, parsed.users),
        ("item", parsed.item_ids, parsed.items),
    ):
        known = np.isin(ids, table[f"{kind}_id"].to_numpy())
        for row in np.flatnonzero(~known)[:SHOWN]:
            message = f"{parsed.where(int(row))}: {kind} not in the table of {kind}s"
            if config.on_error == "raise":
                raise DataError(message, hint="--on-error skip leaves such rows out")
            report.note(message)
        setattr(report, f"unknown_{kind}s", int((~known).sum()))
        keep &= known
    return _select(parsed, np.flatnonzero(keep))


def _drop_repeats(parsed: Source, report: ImportReport) -> Source:
    # rows of train come before rows of test, so that the first of a pair is the one to keep
    order = np.arange(len(parsed.user_ids))
    if parsed.codes is not None:
        order = np.argsort(parsed.codes, kind="stable")
    pairs = np.stack([parsed.user_ids[order], parsed.item_ids[order]], axis=1)
    _, first = np.unique(pairs, axis=0, return_index=True)
    kept = np.sort(order[first])
    report.duplicates = len(order) - len(kept)
    for row in np.setdiff1d(order, kept)[:SHOWN]:
        report.note(f"{parsed.where(int(row))}: user and item occur before")
    return _select(parsed, kept)


def _select(parsed: Source, rows: IdArray) -> Source:
    return Source(
        parsed.users,
        parsed.items,
        parsed.user_ids[rows],
        parsed.item_ids[rows],
        parsed.times[rows],
        None if parsed.codes is None else parsed.codes[rows],
        lambda row: parsed.where(int(rows[row])),
        None if parsed.weights is None else parsed.weights[rows],
    )


def _split(parsed: Source, config: ImportConfig) -> SplitCodes:
    rng = np.random.default_rng(config.seed)
    rows = (parsed.user_ids, parsed.item_ids, parsed.times)
    if parsed.codes is None:
        nobody = np.empty(0, dtype=np.int64)
        codes = split_codes(*rows, test_per_user=config.test_per_user, val_ids=nobody)
    else:
        codes = parsed.codes.copy()
    if not (codes == VAL).any():
        train = np.flatnonzero(codes == TRAIN)
        held = hold_out(
            *(column[train] for column in rows),
            per_user=config.val_per_user,
            most_users=config.val_users,
            order=config.val_items,
            rng=rng,
        )
        codes[train[held]] = VAL
    if config.cold_items:
        codes[cold_rows(parsed.item_ids, config.cold_items, rng)] = TEST
    return codes


def _describe(parsed: Source, codes: SplitCodes, report: ImportReport) -> None:
    report.users, report.items = len(parsed.users), len(parsed.items)
    counts = np.bincount(codes, minlength=len(SPLITS))
    report.interactions = dict(zip(SPLITS, counts.tolist(), strict=True))
    users, items = parsed.users["user_id"].to_numpy(), parsed.items["item_id"].to_numpy()
    report.user_holes, report.item_holes = _holes(users), _holes(items)
    report.users_without_interactions = len(np.setdiff1d(users, parsed.user_ids))
    report.items_without_interactions = len(np.setdiff1d(items, parsed.item_ids))


def _holes(ids: IdArray) -> int:
    """Ids missing between the smallest and the largest."""
    return int(ids.max() - ids.min()) + 1 - len(np.unique(ids)) if len(ids) else 0
