"""Training data on disk, mapped by every rank, and the batches each rank draws from it.

``prepare`` writes the dataset once as Arrow IPC files of dense rows; ``TrainingData.open`` maps
them, so all ranks of a host share the same pages and a rank reads only the rows of its batches.
Users and items go by their row in users.parquet and items.parquet, not by id.

The order of examples and the values hidden from the model depend on (seed, epoch, step) alone:
the global batch is the same for any number of ranks, and a resumed run draws what it would have.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.errors import ConfigError, DataError
from shards.files import atomic_path
from shards.schema import IdArray
from training.config import LossConfig
from training.features import Block, FeatureSpace
from training.metrics import Csr
from training.negatives import Negatives, check_hard, draw
from training.tables import ITEMS, USERS, Dataset, positives_by_user


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of a step: b examples, one positive item each.

    users, items: input rows of both towers; items are the positives, then ``negatives.encoded``.
    history: input rows of the past items of all b users, one user after the other, history_lengths
    (b,) int64 of them each. user_rows and item_rows (b,) int64: the interactions. known: (P,) pairs
    of an example, 0 to b - 1, and an item its user has in train.
    """

    users: Block
    items: Block
    history: Block
    history_lengths: IdArray
    user_rows: IdArray
    item_rows: IdArray
    known_rows: IdArray
    known_items: IdArray
    negatives: Negatives


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The prepared dataset, mapped. train and val: item rows per user row, oldest first.

    keep_target: an example's own item stays in its history (``HistoryFeature.keep_target``).
    """

    items: Block
    users: Block
    train: Csr
    train_users: IdArray  # train.items[i] is an interaction of train_users[i]
    val: Csr
    keep_target: bool = False

    @classmethod
    def open(cls, folder: Path) -> "TrainingData":
        """Maps what ``prepare`` wrote; nothing is read until a batch asks for it."""
        train, val = _map(folder / "train.arrow"), _map(folder / "val.arrow")
        indptr = _map(folder / "indptr.arrow")
        return cls(
            items=_map_block(folder / "items.arrow"),
            users=_map_block(folder / "users.arrow"),
            train=Csr(indptr["train"], train["items"]),
            train_users=train["users"],
            val=Csr(indptr["val"], val["items"]),
            keep_target=bool(_map(folder / "history.arrow")["keep_target"][0]),
        )

    def item_counts(self) -> IdArray:
        """(items,) int64, occurrences in train."""
        return np.bincount(self.train.items, minlength=len(self.items)).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Which examples one rank sees at each step, and what is hidden from the model in them."""

    data: TrainingData
    batch_size: int  # global
    rank: int
    world: int
    seed: int
    unknown_rate: float
    history_length: int  # 0 without a history feature
    loss: LossConfig  # which negatives to draw
    hard: Csr | None = None  # mined item rows per user row

    def __post_init__(self) -> None:
        check_hard(self.loss, self.hard, len(self.data.users))

    @property
    def steps_per_epoch(self) -> int:
        """The same on every rank: gloo aborts on uneven batches, so the rest is left out."""
        return len(self.data.train.items) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from its step ``start`` on, in order."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data.train.items))
        for step in range(start, self.steps_per_epoch):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            # [seed, epoch, 0] is the stream of [seed, epoch], which ordered the examples
            yield self.batch(rows, np.random.default_rng([self.seed, epoch, step + 1]))

    def batch(self, rows: IdArray, rng: np.random.Generator) -> Batch:
        """This rank's slice of the global batch of train interactions ``rows``."""
        data, size = self.data, len(rows) // self.world
        mine = slice(self.rank * size, (self.rank + 1) * size)
        num_user, num_item = data.users.hideable, data.items.hideable
        # drawn for the global batch and cut, so that the ranks together see what one would
        draws = rng.random((len(rows), num_user + num_item + 1), dtype=np.float32)
        hidden = draws[mine] < self.unknown_rate
        users, items = data.train_users[rows[mine]], data.train.items[rows[mine]]
        history = self._history(users, rows[mine])
        lengths = np.where(hidden[:, -1], 0, history.lengths)
        kept = np.repeat(~hidden[:, -1], history.lengths)
        known = data.train.take(users)
        drawn = draw(self.loss, data.train_users[rows], len(data.items), self.hard, rng)
        negatives = drawn.of_rank(self.rank, self.world)
        hidden_items = np.concatenate([hidden[:, num_user:-1], self._hidden_negatives(drawn, rng)])
        return Batch(
            users=data.users.take(users).hide(hidden[:, :num_user]),
            items=data.items.take(np.concatenate([items, negatives.encoded])).hide(hidden_items),
            history=data.items.take(history.items[kept]),
            history_lengths=lengths,
            user_rows=users,
            item_rows=items,
            known_rows=np.repeat(np.arange(size), known.lengths),
            known_items=known.items,
            negatives=negatives,
        )

    def _history(self, users: IdArray, rows: IdArray) -> Csr:
        """The past items of each example, the interactions ``rows`` of ``users``."""
        if self.data.keep_target:
            return self.data.train.take(users, self.history_length)
        return others(self.data.train, users, rows, self.history_length)

    def _hidden_negatives(self, drawn: Negatives, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Which values of this rank's encoded negatives are hidden, at the rate of the positives.

        Were they not, a hidden value would give a positive away.
        """
        width = self.data.items.hideable
        parts = []
        for part in (drawn.uniform, drawn.hard, drawn.random):
            draws = rng.random((len(part), part[:1].size, width), dtype=np.float32)
            mine = np.split(draws, self.world)[self.rank]
            parts.append(mine.reshape(mine.shape[0] * mine.shape[1], width))
        return np.concatenate(parts) < self.unknown_rate


def prepare(
    dataset: Dataset,
    space: FeatureSpace,
    folder: Path,
    fitted: tuple[str, ...] = ("train",),
) -> None:
    """Writes the dataset as dense, mappable Arrow files: inputs of both towers, train and val.

    train holds the splits that are fitted; where val is one of them, there is no val left.

    Raises:
        DataError: a feature column does not fit, or there is nothing to train on.
    """
    train, val = train_lists(dataset, fitted), item_lists(dataset, ("val",))
    if "val" in fitted:
        val = Csr(np.zeros_like(val.indptr), val.items[:0])
    items = space.item.encode(dataset.items(), ITEMS)
    users = space.query.encode(dataset.users(), USERS)
    _write_block(folder / "items.arrow", items)
    _write_block(folder / "users.arrow", users)
    _write(folder / "train.arrow", users=train.owners, items=train.items)
    _write(folder / "val.arrow", items=val.items)
    _write(folder / "indptr.arrow", train=train.indptr, val=val.indptr)
    keep_target = space.history is not None and space.history.keep_target
    _write(folder / "history.arrow", keep_target=np.array([keep_target], np.int64))


def train_lists(dataset: Dataset, fitted: tuple[str, ...] = ("train",)) -> Csr:
    """The training examples: ``item_lists`` of the fitted splits; DataError if there are none."""
    train = item_lists(dataset, fitted)
    if not len(train.items):
        raise DataError("no interactions to train on", field="split", expected="train rows")
    return train


def check_batch(batch_size: int, ranks: int, examples: int) -> None:
    """Raises ConfigError where a global batch does not split evenly, or exceeds the examples."""
    if batch_size % ranks:
        raise ConfigError(
            "the global batch does not split evenly",
            field="batch_size",
            expected=f"a multiple of {ranks} ranks",
            got=str(batch_size),
        )
    if batch_size > examples:
        raise ConfigError(
            "the global batch is larger than the train split",
            field="batch_size",
            expected=f"<= {examples}",
            got=str(batch_size),
        )


def item_lists(dataset: Dataset, splits: tuple[str, ...]) -> Csr:
    """Item rows of every user row over some splits, oldest first, no item twice."""
    user_ids = dataset.users()["user_id"].to_numpy()
    item_ids = dataset.items()["item_id"].to_numpy()
    return positives_by_user(dataset.interactions(splits), user_ids, item_ids)


def others(train: Csr, users: IdArray, rows: IdArray, newest: int) -> Csr:
    """The newest other items of each user: interaction ``rows[i]``, of users[i], is left out.

    That is what keeps the history from giving the answer away.
    """
    if newest == 0:
        return Csr(np.zeros(len(rows) + 1, np.int64), train.items[:0])
    ends = train.indptr[1:][users]
    # one more where the positive will be taken out of the window again
    starts = np.maximum(train.indptr[:-1][users], ends - newest - (rows >= ends - newest))
    window = _places(starts, ends - starts)
    kept = window.items != rows[window.owners]
    return Csr(_indptr(window.lengths - (rows >= starts)), train.items[window.items[kept]])


def _places(starts: IdArray, lengths: IdArray) -> Csr:
    """start, start + 1, ... start + length - 1 of each pair."""
    indptr = _indptr(lengths)
    return Csr(indptr, np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], lengths))


def _indptr(lengths: IdArray) -> IdArray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


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
