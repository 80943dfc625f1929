"""Writes a dataset folder, all of it or nothing; ``training.data.tables`` reads it."""

import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import save_file

from shardline.shards.core.errors import DataError, NotFound
from shardline.shards.core.files import (
    describe_file,
    read_manifest,
    staged_folder,
    write_manifest,
)
from shardline.shards.core.schema import IdArray
from shardline.shards.storage.cut import Cut
from shardline.training.data.splits import SplitCodes
from shardline.training.data.table_checks import (
    INTERACTION_SCHEMA,
    SPLITS,
    WEIGHT,
    WEIGHTED_SCHEMA,
    check_references,
    feature_table,
    interaction_table,
)
from shardline.training.data.tables import (
    INTERACTIONS,
    ITEMS,
    KIND,
    ORACLE,
    USERS,
    VERSION,
    Dataset,
    open_dataset,
)

ROW_GROUP = 1 << 20  # interactions per row group; bounds what a streaming reader holds


class DatasetWriter:
    """Fills a staged folder; see ``dataset_writer``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, int] = {}
        self.ceilings: dict[str, Any] | None = None
        self._ids: dict[str, IdArray] = {}

    def users(self, table: pa.Table) -> None:
        self._features(USERS, "user_id", table)

    def items(self, table: pa.Table) -> None:
        self._features(ITEMS, "item_id", table)

    def interactions(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Written as they come; users and items must have been written before."""
        path, rows = self.folder / INTERACTIONS, 0
        ahead = iter(batches)
        first = next(ahead, pa.RecordBatch.from_pylist([], schema=INTERACTION_SCHEMA))
        schema = WEIGHTED_SCHEMA if WEIGHT in first.schema.names else INTERACTION_SCHEMA
        with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
            for batch in itertools.chain([first], ahead):
                table = interaction_table(pa.Table.from_batches([batch]), INTERACTIONS)
                for column, file in (("user_id", USERS), ("item_id", ITEMS)):
                    check_references(self._ids[file], table, column, INTERACTIONS, file)
                writer.write_table(table, row_group_size=ROW_GROUP)
                rows += table.num_rows
        self.rows["interactions"] = rows

    def oracle(self, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        save_file(dict(arrays), self.folder / ORACLE)

    def _features(self, file: str, key: str, table: pa.Table) -> None:
        checked = feature_table(table, key, file)
        pq.write_table(checked, self.folder / file, write_page_checksum=True)
        self._ids[file] = checked[key].to_numpy()
        self.rows[file.removesuffix(".parquet")] = checked.num_rows


@contextmanager
def dataset_writer(
    path: Path,
    *,
    name: str,
    parameters: dict[str, Any] | None = None,
    cut: Cut | None = None,
    overwrite: bool = False,
) -> Iterator[DatasetWriter]:
    """Writes users, items, interactions (in this order) and the manifest; all appear at the end.

    cut: what the items contain of a live generation's writes, where that is known.

    Raises:
        DataError: the target exists and ``overwrite`` is not set, or a table is not acceptable.
    """
    _refuse_existing(path, overwrite)
    with staged_folder(path) as staging:
        writer = DatasetWriter(staging)
        yield writer
        names = [USERS, ITEMS, INTERACTIONS]
        files = [describe_file(staging, n, writer.rows[n.removesuffix(".parquet")]) for n in names]
        if (staging / ORACLE).exists():
            files.append(describe_file(staging, ORACLE))
        body = {
            "name": name,
            "rows": writer.rows,
            "ceilings": writer.ceilings,
            "parameters": parameters,
            "cut": None if cut is None else cut.to_json(),
            "files": [asdict(entry) for entry in files],
        }
        write_manifest(staging, kind=KIND, version=VERSION, body=body)
        if path.exists():
            shutil.rmtree(path)  # a dataset of ours, asked to be replaced: see _refuse_existing


def write_dataset(
    path: Path,
    users: pa.Table,
    items: pa.Table,
    interactions: pa.Table | Iterable[pa.RecordBatch],
    *,
    name: str,
    ceilings: dict[str, Any] | None = None,
    parameters: dict[str, Any] | None = None,
    cut: Cut | None = None,
    overwrite: bool = False,
) -> Dataset:
    """Writes a folder in one call; ``interactions`` may be an iterator that is streamed.

    Users and items may come in any order and are sorted by id. Raises as ``dataset_writer``.
    """
    batches = interactions.to_batches() if isinstance(interactions, pa.Table) else interactions
    with dataset_writer(
        path, name=name, parameters=parameters, cut=cut, overwrite=overwrite
    ) as writer:
        writer.users(users)
        writer.items(items)
        writer.interactions(batches)
        writer.ceilings = ceilings
    return open_dataset(path, verify=False)


def interaction_batch(
    users: IdArray,
    items: IdArray,
    timestamps: IdArray,
    codes: SplitCodes,
    weights: NDArray[np.float32] | None = None,
) -> pa.RecordBatch:
    """Columns of equal length as a record batch of the interactions table; NaN is no weight."""
    split = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(SPLITS))
    columns = [pa.array(a, pa.int64()) for a in (users, items, timestamps)]
    columns.append(split)
    if weights is None:
        return pa.RecordBatch.from_arrays(columns, schema=INTERACTION_SCHEMA)
    columns.append(pa.array(weights, pa.float32(), from_pandas=True))
    return pa.RecordBatch.from_arrays(columns, schema=WEIGHTED_SCHEMA)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise DataError(
            f"{path}: already exists", hint="name another folder, or --overwrite to replace it"
        )
    try:  # only ever delete what is a dataset
        read_manifest(path, kind=KIND, version=VERSION)
    except NotFound as error:
        if not path.is_dir() or any(path.iterdir()):
            raise DataError(
                f"{path}: not a dataset, so it is not overwritten", hint="remove it yourself"
            ) from error
