"""A dataset folder: users, items, and interactions split into train, val and test.

    users.parquet         user_id int64, then feature columns
    items.parquet         item_id int64, then feature columns
    interactions.parquet  user_id int64, item_id int64, timestamp int64, split dictionary<string>
    oracle.safetensors    only of synthetic data: the hidden vectors; never a feature
    _manifest.json        name, rows, checksums, ceilings, parameters; written last

Ids are arbitrary int64 >= 0, unique and ascending in their table. The training part speaks of a
user or item by its *row* in that table: dense, and in the same order as the ids, so that "ties by
lower row" is "ties by lower id". ``rows_of`` translates. Feature columns are bool, integer,
float, string, list of strings or integers, or fixed_size_list<float32>[n]; no value is null, NaN
or infinite.

Parquet pages carry checksums, files are verified against the manifest when a folder is opened,
and a folder is complete or absent.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from shardline.shards.core.errors import CorruptFile, DataError, NotFound
from shardline.shards.core.files import (
    FileEntry,
    describe_file,
    read_manifest,
    staged_folder,
    verify_files,
    write_manifest,
)
from shardline.shards.core.schema import IdArray
from shardline.training.data.csr import Csr
from shardline.training.data.splits import SplitCodes
from shardline.training.data.table_checks import (
    INTERACTION_SCHEMA,
    SPLITS,
    check_references,
    feature_table,
    interaction_table,
    rows_of,
)

KIND = "dataset"
VERSION = 1
USERS, ITEMS, INTERACTIONS = "users.parquet", "items.parquet", "interactions.parquet"
ORACLE = "oracle.safetensors"
ORIGINAL_ID = "original_id"  # column of an id that an importer replaced; a key, never a feature
ROW_GROUP = 1 << 20  # interactions a row group; bounds what a streaming reader holds


@dataclass(frozen=True, slots=True)
class Dataset:
    """An opened folder; tables are read when asked for."""

    path: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def identity(self) -> dict[str, Any]:
        """Name and files with their checksums: equal for the same data wherever it lies."""
        return {"name": self.name, "files": self.manifest["files"]}

    def checksum(self, file: str) -> str:
        """SHA-256 of one of the files, from the manifest."""
        return str(next(e["sha256"] for e in self.manifest["files"] if e["name"] == file))

    @property
    def ceilings(self) -> dict[str, Any] | None:
        """Metrics that no model can beat on this split, when the generator knows them."""
        ceilings: dict[str, Any] | None = self.manifest["ceilings"]
        return ceilings

    @property
    def rows(self) -> dict[str, int]:
        """Row counts of ``users``, ``items`` and ``interactions``."""
        return dict(self.manifest["rows"])

    def users(self) -> pa.Table:
        return _read_table(self.path / USERS)

    def items(self) -> pa.Table:
        return _read_table(self.path / ITEMS)

    def interactions(self, split: str | tuple[str, ...] | None = None) -> pa.Table:
        """All interactions in file order, or those of the named split or splits."""
        table = _read_table(self.path / INTERACTIONS).unify_dictionaries()
        if split is None:
            return table
        wanted = (split,) if isinstance(split, str) else split
        for name in wanted:
            if name not in SPLITS:
                raise DataError("unknown split", expected=" | ".join(SPLITS), got=repr(name))
        return table.filter(pc.is_in(table["split"].cast(pa.string()), pa.array(wanted)))

    def oracle(self) -> dict[str, NDArray[np.float32]] | None:
        """The generator's hidden vectors, or None for data that has none."""
        path = self.path / ORACLE
        if ORACLE not in {entry["name"] for entry in self.manifest["files"]}:
            return None
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise CorruptFile(f"{path}: not readable", got=str(error)) from error


def open_dataset(path: Path, *, verify: bool = True) -> Dataset:
    """Opens a folder after checking sizes, checksums, schemas, ids and references.

    ``verify=False`` reads the manifest only, for the further ranks of a job whose first rank has
    verified the folder.

    Raises:
        NotFound: no complete dataset there. CorruptFile: a file does not match the manifest.
        NewerFormat: written by a newer version. DataError: a column is missing or of a wrong type,
        ids are negative or repeated, an interaction refers to an unknown user or item.
    """
    manifest = read_manifest(path, kind=KIND, version=VERSION)
    dataset = Dataset(path, manifest)
    if verify:
        verify_files(path, [FileEntry(**entry) for entry in manifest["files"]])
        _verify_tables(dataset)
    return dataset


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
        with pq.ParquetWriter(path, INTERACTION_SCHEMA, write_page_checksum=True) as writer:
            for batch in batches:
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
    path: Path, *, name: str, parameters: dict[str, Any] | None = None, overwrite: bool = False
) -> Iterator[DatasetWriter]:
    """Writes users, items, interactions (in this order) and the manifest; all appear at the end.

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
    overwrite: bool = False,
) -> Dataset:
    """Writes a folder in one call; ``interactions`` may be an iterator that is streamed.

    Users and items may come in any order and are sorted by id. Raises as ``dataset_writer``.
    """
    batches = interactions.to_batches() if isinstance(interactions, pa.Table) else interactions
    with dataset_writer(path, name=name, parameters=parameters, overwrite=overwrite) as writer:
        writer.users(users)
        writer.items(items)
        writer.interactions(batches)
        writer.ceilings = ceilings
    return open_dataset(path, verify=False)


def interaction_batch(
    users: IdArray, items: IdArray, timestamps: IdArray, codes: SplitCodes
) -> pa.RecordBatch:
    """Four columns of equal length as a record batch of the interactions table."""
    split = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(SPLITS))
    columns = [pa.array(a, pa.int64()) for a in (users, items, timestamps)]
    return pa.RecordBatch.from_arrays([*columns, split], schema=INTERACTION_SCHEMA)


def vector_column(vectors: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """(n, d) float32 as a fixed_size_list<float32>[d] column."""
    flat = np.ascontiguousarray(vectors, dtype=np.float32).ravel()
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), vectors.shape[1])


def vector_matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A fixed_size_list<float32>[d] column as (n, d) float32."""
    array = column.combine_chunks()
    flat: NDArray[np.float32] = array.flatten().to_numpy()
    return flat.reshape(len(array), column.type.list_size)


def positives_by_user(interactions: pa.Table, user_ids: IdArray, item_ids: IdArray) -> Csr:
    """Item rows of each listed user, in order of (timestamp, item id), repeats dropped.

    user_ids and item_ids are ascending: the id columns of the dataset's tables, or for users a
    part of it. Interactions of users that are not listed are left out.

    Raises:
        DataError: an interaction of a listed user refers to an item outside item_ids.
    """
    users, items, times = (
        interactions[name].to_numpy() for name in ("user_id", "item_id", "timestamp")
    )
    listed = np.isin(users, user_ids)
    users = np.searchsorted(user_ids, users[listed])
    rows = rows_of(item_ids, items[listed], field="interactions.item_id")
    order = np.lexsort((rows, times[listed], users))
    users, rows = users[order], rows[order]
    _, first = np.unique(users * np.int64(len(item_ids)) + rows, return_index=True)
    first.sort()  # back to the order of time
    counts = np.bincount(users[first], minlength=len(user_ids))
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Csr(indptr, rows[first])


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


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise CorruptFile(f"{path}: not readable as Parquet", got=str(error)) from error


def _verify_tables(dataset: Dataset) -> None:
    ids = {}
    for file, key, table in (
        (USERS, "user_id", dataset.users()),
        (ITEMS, "item_id", dataset.items()),
    ):
        where = str(dataset.path / file)
        ids[file] = feature_table(table, key, where)[key].to_numpy()
        if (np.diff(table[key].to_numpy()) < 0).any():
            raise DataError("ids are not ascending", field=f"{where}: {key}")
    where = str(dataset.path / INTERACTIONS)
    table = interaction_table(dataset.interactions(), where)
    for column, file in (("user_id", USERS), ("item_id", ITEMS)):
        check_references(ids[file], table, column, where, file)
    for file, rows in dataset.rows.items():
        found = {"users": len(ids[USERS]), "items": len(ids[ITEMS]), "interactions": len(table)}
        if rows != found[file]:
            raise CorruptFile(
                f"{dataset.path / file}.parquet: wrong number of rows",
                expected=str(rows),
                got=str(found[file]),
            )
