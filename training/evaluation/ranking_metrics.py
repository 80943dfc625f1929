"""Retrieval metrics over ranked lists; ``training.evaluation.ranking`` makes the exact ones.

A ranked list is a row of ids, best first; -1 marks an empty slot. For a user with R relevant items:

    recall@k    relevant items among the first k, divided by R
    hit_rate@k  1 if there is at least one among the first k
    ndcg@k      sum of 1 / log2(rank + 1) over hits in the first k, divided by the same sum for
                ranks 1 .. min(k, R)
    mrr         1 / rank of the first hit in the whole list, 0 without a hit

and, of relevant items with grades, such as ratings (Burges et al., ICML 2005):

    graded_ndcg@k  sum of (2^grade - 1) / log2(rank + 1) over hits in the first k, divided by the
                same sum for the relevant items in the order of their grades; 0 for a user none of
                whose items has a grade above 0

Users without relevant items have no recall; they are left out of every mean and counted. Means
are sums over users, so parts of a test set can be scored apart and merged (``MetricSums``).
Pure numpy: nothing here knows about models, tables or indexes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray, check_k
from shardline.training.data.csr import Csr

DEFAULT_KS = (10, 100, 1000)
MAX_GRADE = 50.0  # 2 to this power, and sums of it, are exact in float64 where grades are whole


@dataclass(frozen=True, slots=True, kw_only=True)
class UserMetrics:
    """values[name] (u,) float64 of the u ``users`` (places in the batch) with relevant items,
    ``relevant`` of them together."""

    users: IdArray
    values: dict[str, NDArray[np.float64]]
    relevant: int
    skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricResult:
    """Means over ``users`` users with ``relevant`` items; ``skipped`` users had none.

    segments: the same of parts of the users and items (``training.data.segments``); None where a
    part has no relevant item. about: what was chosen on the way, in words.
    """

    means: dict[str, float]
    users: int
    relevant: int
    skipped: int
    segments: dict[str, "MetricResult | None"] = field(default_factory=dict)
    about: str = ""


@dataclass(slots=True)
class MetricSums:
    """Running sums of per-user metrics: add batches, merge those of other workers, then result."""

    sums: dict[str, float] = field(default_factory=dict)
    users: int = 0
    relevant: int = 0
    skipped: int = 0

    def add(self, batch: UserMetrics) -> None:
        self._add({name: float(v.sum()) for name, v in batch.values.items()}, len(batch.users))
        self.relevant += batch.relevant
        self.skipped += batch.skipped

    def merge(self, other: "MetricSums") -> None:
        self._add(other.sums, other.users)
        self.relevant += other.relevant
        self.skipped += other.skipped

    def result(self) -> MetricResult:
        """Raises InvalidInput when no user had a relevant item, so that no mean exists."""
        if self.users == 0:
            raise InvalidInput(
                "nothing to measure",
                field="relevant",
                expected="at least one user with a relevant item",
                got=f"{self.skipped} users without any",
            )
        means = {name: total / self.users for name, total in self.sums.items()}
        return MetricResult(
            means=means, users=self.users, relevant=self.relevant, skipped=self.skipped
        )

    def _add(self, sums: dict[str, float], users: int) -> None:
        if self.users and users and self.sums.keys() != sums.keys():
            raise InvalidInput(
                "metrics of different kinds cannot be added",
                expected=", ".join(self.sums),
                got=", ".join(sums),
            )
        for name, total in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.users += users


def checked_ks(ks: Sequence[int], rows: int) -> tuple[int, ...]:
    """The cut-offs to use on a corpus of ``rows`` items; the defaults shrink to what it has.

    Raises:
        InvalidInput: no cut-off, or one that is not 1 to ``rows``.
    """
    if tuple(ks) == DEFAULT_KS:
        return tuple(k for k in DEFAULT_KS if k <= rows) or (rows,)
    if not ks:
        raise InvalidInput("no cut-off", field="k", expected=f"1 to {rows}", got="none")
    return tuple(check_k(k, limit=rows) for k in ks)


def metric_names(ks: Sequence[int], *, graded: bool = False) -> tuple[str, ...]:
    """The names of ``score_lists``, in its order."""
    kinds = ("recall", "hit_rate", "ndcg") + ("graded_ndcg",) * graded
    return (*(f"{kind}@{k}" for k in ks for kind in kinds), "mrr")


def hit_matrix(ranked: IdArray, relevant: Csr) -> NDArray[np.bool_]:
    """(n, K) bool: whether each ranked id is relevant to its row's user.

    Raises:
        InvalidInput: not one list per user, or an id that occurs twice in a user's relevant items
            or, being a hit, twice in a list (it would be counted twice).
    """
    if ranked.ndim != 2 or len(ranked) != len(relevant.indptr) - 1:
        raise InvalidInput(
            "one ranked list per user",
            field="ranked",
            expected=f"({len(relevant.indptr) - 1}, K)",
            got=str(ranked.shape),
        )
    known, compact = np.unique(relevant.items, return_inverse=True)
    if not len(known):
        return np.zeros(ranked.shape, dtype=np.bool_)
    wanted = np.sort(relevant.owners * len(known) + compact)
    _refuse_repeats(wanted, "relevant", len(known))
    place = np.minimum(np.searchsorted(known, ranked), len(known) - 1)
    is_known = (known[place] == ranked) & (ranked != EMPTY_ID)
    rows, columns = np.nonzero(is_known)
    keys = rows * len(known) + place[rows, columns]
    is_hit = wanted[np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)] == keys
    _refuse_repeats(np.sort(keys[is_hit]), "ranked", len(known))
    hits = np.zeros(ranked.shape, dtype=np.bool_)
    hits[rows[is_hit], columns[is_hit]] = True
    return hits


def score_lists(
    ranked: IdArray,
    relevant: Csr,
    ks: Sequence[int] = DEFAULT_KS,
    grades: FloatArray | None = None,
) -> UserMetrics:
    """Metrics of each user; ranked (n, K) int64 best first, -1 empty; every k of ks <= K.

    grades: of each entry of ``relevant``, 0 to MAX_GRADE; 1 where it is NaN. None leaves out the
    graded metric.

    Raises:
        InvalidInput: a k below 1 or beyond the lists' length, a grade out of range, or see
            ``hit_matrix``.
    """
    hits = hit_matrix(ranked, relevant)
    width = hits.shape[1]
    if not ks or min(ks) < 1 or max(ks) > width:
        raise InvalidInput("k out of range", field="ks", expected=f"1 to {width}", got=str(ks))
    users = np.flatnonzero(relevant.lengths)
    hits_of_all = hits
    hits, sizes = hits[users], relevant.lengths[users]
    gains = 1.0 / np.log2(np.arange(2, width + 2))
    ideal = np.concatenate([[0.0], np.cumsum(gains)])
    graded = None if grades is None else _graded(ranked, relevant, grades, hits_of_all)
    first = np.where(hits.any(axis=1), hits.argmax(axis=1), -1)
    values: dict[str, NDArray[np.float64]] = {}
    for k in ks:
        head = hits[:, :k]
        values[f"recall@{k}"] = head.sum(axis=1) / sizes
        values[f"hit_rate@{k}"] = ((first >= 0) & (first < k)).astype(np.float64)
        values[f"ndcg@{k}"] = (head @ gains[:k]) / ideal[np.minimum(sizes, k)]
        if graded is not None:
            found, best = (part[users, :k] @ gains[:k] for part in graded)
            values[f"graded_ndcg@{k}"] = found / np.where(best > 0, best, 1.0)
    values["mrr"] = np.where(first >= 0, 1.0 / np.maximum(first + 1, 1), 0.0)
    return UserMetrics(
        users=users,
        values=values,
        relevant=len(relevant.items),
        skipped=len(relevant.indptr) - 1 - len(users),
    )


def _graded(
    ranked: IdArray, relevant: Csr, grades: FloatArray, hits: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n, K) 2^grade - 1 of each ranked id, 0 where it is no hit; and of the best lists."""
    known = np.nan_to_num(grades.astype(np.float64), nan=1.0)
    if len(known) and (known.min() < 0 or known.max() > MAX_GRADE):
        raise InvalidInput(
            "grades out of range",
            field="weight",
            expected=f"0 to {MAX_GRADE:g}, because 2 to their power is what counts",
            got=f"{known.min():g} to {known.max():g}",
        )
    gains, owners = 2.0**known - 1.0, relevant.owners
    shape, width = hits.shape, hits.shape[1]
    # a user's entries by id, in which the hits are looked up
    ids = np.unique(relevant.items)
    by_id = np.lexsort((relevant.items, owners))
    keys = owners[by_id] * len(ids) + np.searchsorted(ids, relevant.items[by_id])
    rows, columns = np.nonzero(hits)
    wanted = rows * len(ids) + np.searchsorted(ids, ranked[rows, columns])
    found = np.zeros(shape)
    found[rows, columns] = gains[by_id[np.searchsorted(keys, wanted)]]
    by_gain = np.lexsort((-gains, owners))
    place = np.arange(len(owners)) - np.repeat(relevant.indptr[:-1], relevant.lengths)
    best = np.zeros(shape)
    kept = place < width
    best[owners[kept], place[kept]] = gains[by_gain][kept]
    return found, best


def _refuse_repeats(ordered: IdArray, name: str, stride: int) -> None:
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise InvalidInput(
            "an id occurs twice", field=f"{name}[{repeated[0] // stride}]", expected="unique ids"
        )
