"""Users of a dataset as queries: who is asked in an evaluation, and with what. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shardline.shards.core.errors import InvalidInput, NotFound
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.data.csr import Csr, places_of
from shardline.training.data.segments import Segment, filtered, segments_of
from shardline.training.data.tables import USERS, Dataset
from shardline.training.evaluation.ranking_metrics import DEFAULT_KS, checked_ks
from shardline.training.features.tied import own_items, with_own

KNOWN_BEFORE = {"val": ("train",), "test": ("train", "val")}  # split -> splits that may be used
SAMPLE_SEED = 0  # fixed, so that every model, baseline and cluster is asked the same users

Candidates = Literal["all", "cold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTask:
    """Who is asked, what they must not be shown, and what they should be.

    users (u,) int64 rows to ask. known, relevant: item rows of *all* users, oldest first, in the
    splits before the measured one and in that one; known is also what a baseline learns from.
    own (all users,): the item row that each user is, which is not shown either; -1 or None for
    none. shows_known: known items may be found again. grades: the weight of each entry of
    ``relevant``, for graded metrics; None without.
    candidates: the item rows that are ranked, ascending; None for all of them.
    """

    users: IdArray
    known: Csr
    relevant: Csr
    num_items: int
    ks: tuple[int, ...]
    segments: tuple[Segment, ...]
    candidates: IdArray | None
    own: IdArray | None = None
    shows_known: bool = False
    grades: FloatArray | None = None

    def grades_of(self, users: IdArray) -> FloatArray | None:
        """The weights of the entries of ``relevant.take(users)``."""
        if self.grades is None:
            return None
        starts = self.relevant.indptr[:-1][users]
        return self.grades[places_of(starts, self.relevant.lengths[users]).items]

    def not_shown(self, users: IdArray) -> Csr:
        """Item rows that are left out of the lists of the users (n,)."""
        known = self.known.take(users)
        if self.shows_known:
            known = Csr(np.zeros(len(users) + 1, np.int64), known.items[:0])
        return known if self.own is None else with_own(known, self.own[users])


def evaluation_task(
    dataset: Dataset,
    split: str,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    max_users: int | None = None,
    with_segments: bool = False,
    candidates: Candidates = "all",
    without_own: bool = False,
    graded: bool = False,
) -> EvaluationTask:
    """Asks the users with items in the split, at most ``max_users``, the same at every call.

    With cold candidates only items without a train interaction are ranked, and relevant.
    without_own: for users who are items: nobody is shown themselves. graded: the interactions'
    weights are grades of relevance.

    Raises:
        InvalidInput: an unknown split, nothing to measure in it, a k beyond the candidates,
            max_users < 1, or grades where there are no weights.
    """
    if split not in KNOWN_BEFORE:
        raise InvalidInput(
            "unknown split", field="split", expected=" | ".join(KNOWN_BEFORE), got=repr(split)
        )
    if max_users is not None and max_users < 1:
        raise InvalidInput("out of range", field="max_users", expected=">= 1", got=str(max_users))
    grades = dataset.weights(split) if graded else None
    if graded and grades is None:
        raise InvalidInput(
            "the interactions have no weights to be grades",
            field="graded",
            expected="a dataset with weights",
            got=dataset.name,
            hint="`shardline data import --weight-column` reads them",
        )
    num_items, train = dataset.rows["items"], dataset.positives("train")
    relevant, rows = dataset.positives(split), None
    if candidates == "cold":
        cold = np.bincount(train.items, minlength=num_items) == 0
        grades = None if grades is None else grades[cold[relevant.items]]
        relevant, rows = filtered(relevant, cold[relevant.items]), np.flatnonzero(cold)
    users = np.flatnonzero(relevant.lengths)
    if not len(users):
        among = " with items that train lacks" if candidates == "cold" else ""
        raise InvalidInput(
            "nothing to measure", field="split", got=f"no interactions in {split}{among}"
        )
    return EvaluationTask(
        users=sample_users(users, max_users, np.random.default_rng(SAMPLE_SEED)),
        known=dataset.positives(*KNOWN_BEFORE[split]),
        relevant=relevant,
        num_items=num_items,
        ks=checked_ks(ks, num_items if rows is None else len(rows)),
        segments=segments_of(train, num_items) if with_segments else (),
        candidates=rows,
        own=own_items(dataset) if without_own or dataset.item_to_item else None,
        shows_known=dataset.item_to_item,
        grades=grades,
    )


def sample_users(users: IdArray, most: int | None, rng: np.random.Generator) -> IdArray:
    """At most ``most`` of the users, ascending as they came; all of them for None."""
    if most is None or len(users) <= most:
        return users
    return np.sort(rng.choice(users, most, replace=False))


def query_features(
    dataset: Dataset, kinds: dict[str, str], users: IdArray, splits: tuple[str, ...]
) -> list[dict[str, Any]]:
    """One query per user row. The history holds item ids of ``splits``, oldest first.

    kinds: name and kind of the features that the encoder wants.

    Raises:
        NotFound: a feature that is no column of the users table.
    """
    table = dataset.users().take(pa.array(users))
    columns: dict[str, list[Any]] = {}
    for name, kind in kinds.items():
        if kind == "history":
            columns[name] = _histories(dataset, users, splits)
        elif name in table.column_names:
            columns[name] = _as_sent(table[name])
        else:
            raise NotFound(
                f"{dataset.path}: users have no column {name!r}",
                expected=", ".join(table.column_names),
                hint="the model was trained on other data",
            )
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _as_sent(column: pa.ChunkedArray) -> list[Any]:
    """The values as a query brings them: plain ones, times in seconds since 1970."""
    if pa.types.is_timestamp(column.type):
        ticks = column.cast(pa.timestamp("us")).cast(pa.int64()).cast(pa.float64(), safe=False)
        column = pc.divide(ticks, 1e6)
    return list(column.to_pylist())


def query_features_of_user(
    dataset: Dataset,
    kinds: dict[str, str],
    name: str,
    splits: tuple[str, ...] = ("train", "val"),
) -> dict[str, Any]:
    """The query of one user, by an id of ``Dataset.id_of``; NotFound if there is none."""
    rows = np.flatnonzero(dataset.user_ids == dataset.id_of(USERS, name))
    return query_features(dataset, kinds, rows.astype(np.int64), splits)[0]


def _histories(dataset: Dataset, users: IdArray, splits: tuple[str, ...]) -> list[list[int]]:
    past = dataset.positives(*splits).take(users)
    ids = dataset.item_ids[past.items]
    return [part.tolist() for part in np.split(ids, past.indptr[1:-1])]
