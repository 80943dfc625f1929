"""A dataset folder: users, items, and interactions split into train, val and test.

    users.parquet         user_id int64, then feature columns
    items.parquet         item_id int64, then feature columns
    interactions.parquet  user_id int64, item_id int64, timestamp int64, split dictionary<string>
    oracle.safetensors    only of synthetic data: the hidden vectors; never a feature
    _manifest.json        name, rows, checksums, ceilings, parameters, cut; written last

Ids are arbitrary int64 >= 0, unique and ascending in their table. The training part speaks of a
user or item by its *row* in that table: dense, and in the same order as the ids, so that "ties by
lower row" is "ties by lower id". ``rows_of`` translates. Feature columns are bool, integer,
float, string, timestamp, list of strings or integers, or fixed_size_list<float32>[n]; a null is a
missing value, and no value is NaN or infinite.

Parquet pages carry checksums, files are verified against the manifest when a folder is opened,
and a folder is complete or absent.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from shardline.shards.core.errors import CorruptFile, DataError, NotFound
from shardline.shards.core.files import FileEntry, read_manifest, verify_files
from shardline.shards.core.schema import ORIGINAL_ID, FloatArray, IdArray
from shardline.shards.storage.cut import Cut, cut_from_json
from shardline.training.data.csr import Csr
from shardline.training.data.sequences import Sequences
from shardline.training.data.table_checks import (
    check_references,
    feature_table,
    interaction_table,
    split_code,
)

KIND = "dataset"
VERSION = 1
USERS, ITEMS, INTERACTIONS = "users.parquet", "items.parquet", "interactions.parquet"
ORACLE = "oracle.safetensors"
ITEM_TO_ITEM = "item_to_item"  # among the parameters of the manifest
TEXT_ENCODERS = "text_encoders"  # likewise: "items.<column>" or "users.<column>" -> encoder id


@dataclass(frozen=True)  # no slots, which would leave the cached properties no place
class Dataset:
    """An opened folder. A table is read whenever it is asked for, unless it was opened to keep
    them; ids and sequences are read once.
    """

    path: Path
    manifest: dict[str, Any]
    _kept: dict[str, pa.Table] = field(default_factory=dict, repr=False, compare=False)

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
    def cut(self) -> Cut | None:
        """What the items contain of a live generation's writes; None where nobody has said it."""
        return cut_from_json(self.manifest.get("cut"))

    @property
    def item_to_item(self) -> bool:
        """Whether users are the items themselves, asked for what goes with them: nothing asks for
        itself, and what is known may be found again (``training.data.session_import``)."""
        return bool((self.manifest["parameters"] or {}).get(ITEM_TO_ITEM, False))

    @property
    def text_encoders(self) -> dict[str, str]:
        """Which text encoder made a vector column, by "items.<column>" or "users.<column>"."""
        return dict((self.manifest["parameters"] or {}).get(TEXT_ENCODERS, {}))

    @property
    def rows(self) -> dict[str, int]:
        """Row counts of ``users``, ``items`` and ``interactions``."""
        return dict(self.manifest["rows"])

    def users(self) -> pa.Table:
        return self._table(USERS)

    def items(self) -> pa.Table:
        return self._table(ITEMS)

    def interactions(self, split: str | None = None) -> pa.Table:
        """All interactions in file order, or those of the named split."""
        table = self._table(INTERACTIONS).unify_dictionaries()
        if split is None:
            return table
        split_code(split)  # refuses another name
        return table.filter(pc.equal(table["split"].cast(pa.string()), split))

    @cached_property
    def user_ids(self) -> IdArray:
        """(users,) int64, ascending: the id of each user row."""
        return self._ids(USERS, "user_id")

    @cached_property
    def item_ids(self) -> IdArray:
        """(items,) int64, ascending: the id of each item row."""
        return self._ids(ITEMS, "item_id")

    def id_of(self, file: str, name: str) -> int:
        """The id of what its source called ``name``; where ids were numbered, the numbers are none.

        file: USERS or ITEMS. Raises NotFound: there is none.
        """
        table, kind = self._table(file), file.removesuffix("s.parquet")
        ids = table[f"{kind}_id"]
        if ORIGINAL_ID in table.column_names:
            row = pc.index(table[ORIGINAL_ID].cast(pa.string()), name).as_py()
            if row >= 0:
                return int(ids[row].as_py())
        elif name.isascii() and name.isdigit() and int(name) in ids.to_numpy():
            return int(name)
        raise NotFound(f"{self.path}: no {kind} {name}")

    def positives(self, *splits: str) -> Csr:
        """Item rows of every user row over the splits, oldest first, no item twice."""
        return self._sequences.positives(splits, len(self.item_ids))

    def weights(self, *splits: str) -> FloatArray | None:
        """(n,) float32: the weight of each entry of ``positives``, NaN where it is not known.

        None where the interactions have no weights. A repeated pair has that of its first row.
        """
        return self._sequences.weights_of(splits, len(self.item_ids))

    def counts(self, *splits: str) -> tuple[IdArray, IdArray]:
        """(users,) and (items,) int64: interactions of each over the splits, repeats included."""
        return self._sequences.counts(splits, len(self.item_ids))

    def oracle(self) -> dict[str, NDArray[np.float32]] | None:
        """The generator's hidden vectors, or None for data that has none."""
        path = self.path / ORACLE
        if ORACLE not in {entry["name"] for entry in self.manifest["files"]}:
            return None
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise CorruptFile(f"{path}: not readable", got=str(error)) from error

    @cached_property
    def _sequences(self) -> Sequences:
        return Sequences.of(self._table(INTERACTIONS), self.user_ids, self.item_ids)

    def _table(self, file: str) -> pa.Table:
        return self._kept[file] if file in self._kept else _read_table(self.path / file)

    def _ids(self, file: str, key: str) -> IdArray:
        """From the kept table, or else from its one column."""
        table = self._kept.get(file, self._kept.get(key))
        if table is None:
            table = _read_table(self.path / file, [key])
        ids: IdArray = table[key].to_numpy()
        return ids


def open_dataset(path: Path, *, verify: bool = True, keep: bool = False) -> Dataset:
    """Opens a folder after checking sizes, checksums, schemas, ids and references.

    ``verify=False`` reads the manifest only, for the further ranks of a job whose first rank has
    verified the folder. ``keep``: the tables of users and items stay in memory once verified, for
    a caller that goes over them several times.

    Raises:
        NotFound: no complete dataset there. CorruptFile: a file does not match the manifest.
        NewerFormat: written by a newer version. DataError: a column is missing or of a wrong type,
        ids are negative or repeated, an interaction refers to an unknown user or item.
    """
    manifest = read_manifest(path, kind=KIND, version=VERSION)
    dataset = Dataset(path, manifest)
    if verify:
        verify_files(path, [FileEntry(**entry) for entry in manifest["files"]])
        _verify_tables(dataset, keep)
    return dataset


def check_identity(
    what: str, *, expected: Mapping[str, Any], got: Mapping[str, Any], hint: str
) -> None:
    """Raises DataError, whose message is ``what``, where two ``Dataset.identity`` differ."""
    if expected != got:
        raise DataError(what, expected=_described(expected), got=_described(got), hint=hint)


def vector_column(vectors: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """(n, d) float32 as a fixed_size_list<float32>[d] column."""
    flat = np.ascontiguousarray(vectors, dtype=np.float32).ravel()
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), vectors.shape[1])


def vector_matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A fixed_size_list<float32>[d] column as (n, d) float32; a null row is of NaN."""
    array = column.combine_chunks()
    flat: NDArray[np.float32] = array.flatten().to_numpy(zero_copy_only=False)
    rows = flat.reshape(-1, column.type.list_size)
    if not array.null_count:
        return rows
    matrix = np.full((len(array), column.type.list_size), np.nan, dtype=np.float32)
    matrix[array.is_valid().to_numpy(zero_copy_only=False)] = rows
    return matrix


def _described(identity: Mapping[str, Any]) -> str:
    """The name, and digits that tell apart datasets of one name."""
    files = json.dumps(identity["files"], sort_keys=True).encode()
    return f"{identity['name']!r} ({hashlib.sha256(files).hexdigest()[:8]})"


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise CorruptFile(f"{path}: not readable as Parquet", got=str(error)) from error


def _verify_tables(dataset: Dataset, keep: bool) -> None:
    ids = {}
    for file, key in ((USERS, "user_id"), (ITEMS, "item_id")):
        where, table = str(dataset.path / file), _read_table(dataset.path / file)
        feature_table(table, key, where)
        ids[file] = table[key].to_numpy()
        if (np.diff(ids[file]) < 0).any():
            raise DataError("ids are not ascending", field=f"{where}: {key}")
        # at least the ids, which nearly every caller asks for
        dataset._kept[file if keep else key] = table if keep else table.select([key])
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
