"""The table of mined hard negatives: a folder that is complete or absent, checksummed.

negatives.arrow   user_id int64, item_ids list<int64>, scores list<float>, users ascending,
                  items best first; a user of whom nothing was found has an empty list
_manifest.json    which model, fitted on which splits, and generation found them, with which
                  settings, in which dataset
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.shards.core.errors import ConfigError, CorruptFile, DataError
from shardline.shards.core.files import (
    MANIFEST_NAME,
    FileEntry,
    describe_file,
    read_manifest,
    staged_folder,
    verify_files,
    write_manifest,
)
from shardline.shards.core.schema import EMPTY_ID
from shardline.training.config.training_config import MiningConfig
from shardline.training.data.csr import Csr
from shardline.training.data.table_checks import rows_of
from shardline.training.data.tables import Dataset, check_identity
from shardline.training.mining.candidates import Mined
from shardline.training.model.checkpoint import refuse_older

KIND = "hard negatives"
VERSION = 2  # 1 did not say what the model was fitted on
TABLE = "negatives.arrow"
ROWS_PER_BATCH = 1 << 16

SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What found the negatives; generation None for exact search in one process.

    fit_splits: of the run that mined: what its users have there is what the table leaves out.
    """

    model_version: str
    fit_splits: str
    generation: int | None
    config: MiningConfig
    seed: int
    created_at: str


def write_negatives(
    folder: Path, mined: Mined, dataset: Dataset, origin: Origin, *, overwrite: bool = False
) -> None:
    """Writes the folder in one piece; an older table there is replaced only if asked to.

    Raises:
        ConfigError: something is there, and ``overwrite`` is not set or it is no such table.
    """
    check_target(folder, overwrite=overwrite)
    table = _table(mined.sorted(), dataset)
    with staged_folder(folder) as staging:
        with pa.ipc.new_file(str(staging / TABLE), SCHEMA) as writer:
            writer.write_table(table, max_chunksize=ROWS_PER_BATCH)
        body = {
            **asdict(origin),
            "config": origin.config.model_dump(mode="json"),
            "dataset": dataset.identity,
            "rows": table.num_rows,
            "starved": mined.starved,
            "starved_share": mined.starved_share,
            "files": [asdict(describe_file(staging, TABLE, table.num_rows))],
        }
        write_manifest(staging, kind=KIND, version=VERSION, body=body)
        if folder.exists():
            shutil.rmtree(folder)  # a table of ours, asked to be replaced: see check_target


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raises ConfigError where a table may not be written, before hours are spent on mining it."""
    if not folder.exists():
        return
    if not overwrite:
        raise ConfigError(
            f"{folder}: exists already", hint="--overwrite replaces a table of hard negatives"
        )
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if not names <= {TABLE, MANIFEST_NAME}:
        raise ConfigError(f"{folder}: no table of hard negatives, so it will not be replaced")


def load_hard(path: Path, dataset: Dataset, *, fit_splits: str, per_row: int) -> Csr:
    """Item rows of each user row of the dataset, best first; none for users not in the table.

    fit_splits: what the run that shall learn from them is fitted on. per_row: how many of its
    user's negatives a row gets.

    Raises:
        NotFound: no complete table there. NewerFormat: written by a newer version.
        CorruptFile: a file does not match the manifest, or is of an older version.
        DataError: mined from another dataset, or columns, order or ids that do not fit this one.
        ConfigError: mined by a run fitted on other splits, or fewer per user than a row gets.
    """
    manifest = read_manifest(path, kind=KIND, version=VERSION)
    refuse_older(path, manifest, VERSION, "mine again")
    check_identity(
        f"{path}: mined from another dataset",
        expected=dataset.identity,
        got=manifest["dataset"],
        hint="mine again with a model of this dataset",
    )
    _check_fit(path, manifest, fit_splits, per_row)
    verify_files(path, [FileEntry(**entry) for entry in manifest["files"]])
    table = _read(path / TABLE)
    if table.num_rows != manifest["rows"]:
        raise DataError(
            f"{path / TABLE}: wrong number of rows",
            expected=str(manifest["rows"]),
            got=str(table.num_rows),
        )
    users = rows_of(dataset.user_ids, table["user_id"].to_numpy(), field="user_id")
    if (np.diff(users) <= 0).any():
        place = int(np.flatnonzero(np.diff(users) <= 0)[0]) + 1
        raise DataError(
            f"{path / TABLE}: users are not ascending, each once", field=f"user_id[{place}]"
        )
    lists = table["item_ids"].combine_chunks()
    items = rows_of(dataset.item_ids, lists.flatten().to_numpy(), field="item_ids")
    lengths = np.zeros(len(dataset.user_ids), dtype=np.int64)
    lengths[users] = np.diff(lists.offsets.to_numpy())
    return Csr.of(lengths, items)


def _table(mined: Mined, dataset: Dataset) -> pa.Table:
    filled = mined.items != EMPTY_ID
    indptr = np.concatenate([[0], np.cumsum(np.count_nonzero(filled, axis=1))])
    offsets = pa.array(indptr, pa.int32())
    item_ids = dataset.item_ids[mined.items[filled]]
    columns = [
        pa.array(dataset.user_ids[mined.users], pa.int64()),
        pa.ListArray.from_arrays(offsets, pa.array(item_ids, pa.int64())),
        pa.ListArray.from_arrays(offsets, pa.array(mined.scores[filled], pa.float32())),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _check_fit(path: Path, manifest: Mapping[str, Any], fit_splits: str, per_row: int) -> None:
    if manifest["fit_splits"] != fit_splits:
        raise ConfigError(
            f"{path}: mined by a run that was fitted on other splits",
            field="fit_splits",
            expected=fit_splits,
            got=str(manifest["fit_splits"]),
            hint="items of val are negatives in one of the two and positives in the other: mine "
            "again with a run that was fitted alike",
        )
    check_per_user(per_row, manifest["config"]["per_user"], str(path))


def check_per_user(per_row: int, per_user: int, source: str) -> None:
    """Raises ConfigError where rows are to get more negatives than are mined for a user."""
    if per_row > per_user:
        raise ConfigError(
            "a row is to get more hard negatives than its user has",
            field="loss.hard_negatives",
            expected=f"<= {per_user}, the per_user of {source}",
            got=str(per_row),
        )


def _read(path: Path) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise CorruptFile(f"{path}: not an Arrow file", got=str(error)) from error
    if table.schema.names != SCHEMA.names or table.schema.types != SCHEMA.types:
        raise DataError(
            f"{path}: other columns than those of hard negatives",
            expected=", ".join(f"{field.name} {field.type}" for field in SCHEMA),
            got=", ".join(f"{field.name} {field.type}" for field in table.schema),
        )
    for name in SCHEMA.names:
        column = table[name]
        holes = column.null_count
        if pa.types.is_list(column.type):
            holes += column.combine_chunks().flatten().null_count
        if holes:
            raise DataError(f"{path}: values are missing", field=name, got=f"{holes} null")
    return table
