"""A data set prepared for training: dense rows on disk, mapped by every rank.

``prepare`` writes the dataset once as Arrow IPC files of dense rows; ``TrainingData.open`` maps
them, so all ranks of a host share the same pages and a rank reads only the rows of its batches.
Users and items go by their row in users.parquet and items.parquet, not by id.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shardline.shards.core.errors import ConfigError, DataError
from shardline.shards.core.files import atomic_path
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.data.csr import Csr
from shardline.training.data.tables import USERS, Dataset
from shardline.training.features.audience import Audience
from shardline.training.features.fitted import Block, FeatureSpace
from shardline.training.features.item_inputs import item_inputs
from shardline.training.features.tied import own_items, with_own

OWN = "own.arrow"  # of tied towers alone
AUDIENCE, AUDIENCE_LISTS = "audience.arrow", "audience-lists.arrow"  # only where there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The prepared dataset, mapped. train and val: item rows per user row, oldest first.

    keep_target: an example's own item stays in its history (``HistoryFeature.keep_target``).
    own (users,): the item row that is the user, or -1, where users are items. shows_known: what a
    user has in train may be found again, as in ``Dataset.item_to_item``. weights
    (len(train.items),) float32: of each example, NaN where unknown; None where there are none.
    """

    items: Block
    users: Block
    train: Csr
    train_users: IdArray  # train.items[i] is an interaction of train_users[i]
    val: Csr
    keep_target: bool = False
    own: IdArray | None = None
    shows_known: bool = False
    weights: FloatArray | None = None

    @classmethod
    def open(cls, folder: Path) -> "TrainingData":
        """Maps what ``prepare`` wrote; nothing is read until a batch asks for it."""
        train, val = _map(folder / "train.arrow"), _map(folder / "val.arrow")
        indptr = _map(folder / "indptr.arrow")
        own = folder / OWN
        return cls(
            items=replace(_map_block(folder / "items.arrow"), audience=_map_audience(folder)),
            users=_map_block(folder / "users.arrow"),
            train=Csr(indptr["train"], train["items"]),
            train_users=train["users"],
            val=Csr(indptr["val"], val["items"]),
            keep_target=bool(_map(folder / "history.arrow")["keep_target"][0]),
            own=_map(own)["items"] if own.exists() else None,
            weights=train.get("weights"),
            shows_known="shows_known" in _map(folder / "history.arrow"),
        )

    def known(self, users: IdArray) -> Csr:
        """What is no negative of the users (n,): their items of train, and themselves."""
        lists = self.train.take(users)
        return lists if self.own is None else with_own(lists, self.own[users])

    def not_shown(self, users: IdArray) -> Csr:
        """What is not to be found for the users (n,)."""
        if not self.shows_known or self.own is None:
            return self.known(users)
        nothing = Csr(np.zeros(len(users) + 1, np.int64), self.train.items[:0])
        return with_own(nothing, self.own[users])

    def row_weights(self, exponent: float) -> FloatArray | None:
        """(len(train.items),) float32: what each example's loss is multiplied by, 1 on average;
        None where all are alike (``loss.weight_exponent``).

        Raises:
            ConfigError: weights are asked for, and the dataset has none, or none above 0.
        """
        return example_weights(self.weights, exponent) if exponent else None

    def item_counts(self) -> IdArray:
        """(items,) int64, occurrences in train."""
        return np.bincount(self.train.items, minlength=len(self.items)).astype(np.int64)


def prepare(
    dataset: Dataset,
    space: FeatureSpace,
    folder: Path,
    fitted: tuple[str, ...] = ("train",),
    *,
    tied: bool = False,
) -> None:
    """Writes the dataset as dense, mappable Arrow files: inputs of both towers, train and val.

    tied: also which item each user is (``training.features.tied``).

    train holds the splits that are fitted; where val is one of them, there is no val left.

    Raises:
        DataError: a feature column does not fit, or there is nothing to train on.
    """
    train, val = train_lists(dataset, fitted), dataset.positives("val")
    if "val" in fitted:
        val = Csr(np.zeros_like(val.indptr), val.items[:0])
    own = own_items(dataset) if tied or dataset.item_to_item else None
    items = item_inputs(space, dataset, fitted)
    users = space.query.encode(dataset.users(), USERS)
    _write_block(folder / "items.arrow", items)
    _write_block(folder / "users.arrow", users)
    if items.audience is not None:
        _write_audience(folder, items.audience)
    examples: dict[str, NDArray[Any]] = {"users": train.owners, "items": train.items}
    weights = dataset.weights(*fitted)
    if weights is not None:
        examples["weights"] = weights
    _write(folder / "train.arrow", **examples)
    _write(folder / "val.arrow", items=val.items)
    _write(folder / "indptr.arrow", train=train.indptr, val=val.indptr)
    keep_target = space.history is not None and space.history.keep_target
    flags = {"keep_target": np.array([keep_target], np.int64)}
    if dataset.item_to_item:
        flags["shows_known"] = np.array([1])
    _write(folder / "history.arrow", **flags)
    if own is not None:
        _write(folder / OWN, items=own)


def train_lists(dataset: Dataset, fitted: tuple[str, ...] = ("train",)) -> Csr:
    """The training examples: positives of the fitted splits; DataError if there are none."""
    train = dataset.positives(*fitted)
    if not len(train.items):
        raise DataError("no interactions to train on", field="split", expected="train rows")
    return train


def example_weights(given: FloatArray | None, exponent: float) -> FloatArray:
    """given ** exponent over its mean, float32; 1 where one is NaN. Errors as ``row_weights``."""
    if given is None:
        raise ConfigError(
            "the interactions have no weights",
            field="loss.weight_exponent",
            expected="0, or a dataset with weights",
            got=str(exponent),
            hint="`shardline data import --weight-column` reads them",
        )
    powers = given.astype(np.float64) ** exponent
    known = powers[~np.isnan(powers)]
    if not known.sum() > 0:
        raise ConfigError(
            "no interaction of train has a weight above 0",
            field="loss.weight_exponent",
            expected="0, or weights above 0",
            got=str(exponent),
        )
    return np.where(np.isnan(powers), 1.0, powers / known.mean()).astype(np.float32)


def _write_block(path: Path, block: Block) -> None:
    # Arrow has no lists of width 0: such a matrix is left out, its row count is in ``rows``
    matrices: dict[str, NDArray[Any]] = {
        "categorical": block.categorical,
        "numeric": block.numeric,
    }
    wide = {name: matrix for name, matrix in matrices.items() if matrix.shape[1]}
    bags = {f"bag.{place}": bag for place, bag in enumerate(block.bags)}
    _write(path, rows=np.arange(len(block)), **wide, **bags)


def _map_block(path: Path) -> Block:
    arrays = _map(path)
    rows = len(arrays["rows"])
    return Block(
        arrays.get("categorical", np.empty((rows, 0), np.int64)),
        arrays.get("numeric", np.empty((rows, 0), np.float32)),
        _map_lists(path),
    )


def _write_audience(folder: Path, audience: Audience) -> None:
    _write(folder / AUDIENCE_LISTS, users=audience.lists)
    options = (audience.longest, audience.user_column, audience.keep_target)
    _write(folder / AUDIENCE, options=np.array(options, np.int64))


def _map_audience(folder: Path) -> Audience | None:
    if not (folder / AUDIENCE).exists():
        return None
    (lists,) = _map_lists(folder / AUDIENCE_LISTS)
    longest, user_column, keep_target = _map(folder / AUDIENCE)["options"].tolist()
    return Audience(lists, longest, user_column, bool(keep_target))


def _write(path: Path, **arrays: NDArray[Any] | Csr) -> None:
    """Arrays of equal length as one record batch of an Arrow IPC file, so they map as they are."""
    columns = {}
    for name, array in arrays.items():
        if isinstance(array, Csr):
            columns[name] = pa.LargeListArray.from_arrays(pa.array(array.indptr), array.items)
            continue
        flat = pa.array(np.ascontiguousarray(array).ravel())
        is_matrix = array.ndim == 2
        columns[name] = (
            pa.FixedSizeListArray.from_arrays(flat, array.shape[1]) if is_matrix else flat
        )
    batch = pa.RecordBatch.from_pydict(columns)
    with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), batch.schema) as writer:
        writer.write_batch(batch)


def _map(path: Path) -> dict[str, NDArray[Any]]:
    """Read-only views of a file written by ``_write``; it stays mapped while they live."""
    batch = _map_batch(path)
    arrays = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_large_list(column.type):
            continue
        if pa.types.is_fixed_size_list(column.type):
            matrix = column.flatten().to_numpy()
            arrays[name] = matrix.reshape(len(column), column.type.list_size)
        else:
            arrays[name] = column.to_numpy()
    return arrays


def _map_lists(path: Path) -> tuple[Csr, ...]:
    """The lists among the arrays of such a file, in order, mapped too."""
    lists = (column for column in _map_batch(path).columns if pa.types.is_large_list(column.type))
    return tuple(Csr(column.offsets.to_numpy(), column.values.to_numpy()) for column in lists)


def _map_batch(path: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
