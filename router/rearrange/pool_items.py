"""What is known of the items of some queries' pools, and what an answer makes of a pool.

An item is known by the values that caps count, by what boosts add to its score, and by its vector
where diversity is asked for. Items whose shard did not bring these are left out. Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardline.router.rearrange.boosts import added, boosted
from shardline.router.rearrange.greedy import (
    NO_VALUE,
    Codes,
    Counts,
    Floats,
    capped,
    comparable,
    diverse,
)
from shardline.router.rearrange.rearrangement import Boost, Cap, Rearrangement
from shardline.shards.core.filter_language import Scalar
from shardline.shards.core.schema import FloatArray, IdArray, Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What is done to every pool of a search: caps that can refuse an item, boosts, and the share
    of relevance where similar items make way for others, else None. now: seconds since 1970."""

    k: int
    caps: tuple[Cap, ...]
    boosts: tuple[Boost, ...]
    relevance: float | None
    metric: Metric
    now: float

    @classmethod
    def of(cls, asked: Rearrangement, k: int, metric: Metric, now: float) -> "Steps":
        return cls(
            k=k,
            # an answer of k items has no more than k of any value
            caps=tuple(cap for cap in asked.caps if cap.most < k),
            boosts=asked.boosts,
            # with lambda 1 no item makes way for another
            relevance=None if asked.relevance == 1 else asked.relevance,
            metric=metric,
            now=now,
        )

    @property
    def by_column(self) -> list[Cap | Boost]:
        """What needs an attribute."""
        return [*self.caps, *self.boosts]

    @property
    def columns(self) -> tuple[str, ...]:
        """Attributes that it needs, each once."""
        return tuple(dict.fromkeys(each.column for each in self.by_column))


@dataclass(slots=True, kw_only=True)
class Chosen:
    """Of one query the items of its answer, in its order. considered: items of its pool; refused:
    those that caps keep out of it where it is short, else 0. full: of each capped column the
    values of which no more items are allowed."""

    ids: IdArray
    scores: FloatArray
    considered: int
    refused: int
    full: dict[str, list[Scalar]]


@dataclass(slots=True, kw_only=True)
class Brought:
    """Of items, ids (m,) ascending, what shards have brought: of each column a value per item;
    vectors (m, dim) of any length, None where they are not needed."""

    ids: IdArray
    columns: Mapping[str, list[Any]]
    vectors: FloatArray | None


@dataclass(slots=True)
class PoolItems:
    """ids (u,) ascending; codes (caps, u) of their values; additions (u,) of boosts; unit vectors
    (u, dim), of no columns where none are needed. ``asked`` are all that shards were asked for.
    """

    steps: Steps
    ids: IdArray = field(init=False)
    asked: IdArray = field(init=False)
    codes: Codes = field(init=False)
    additions: Floats = field(init=False)
    vectors: FloatArray = field(init=False)
    _values: list[dict[Scalar, int]] = field(init=False)  # of each cap, value -> code

    def __post_init__(self) -> None:
        self.ids = self.asked = np.empty(0, np.int64)
        self.codes = np.empty((len(self.steps.caps), 0), np.int64)
        self.additions = np.empty(0)
        self.vectors = np.empty((0, 0), np.float32)
        self._values = [{} for _ in self.steps.caps]

    def unasked(self, ids: IdArray) -> IdArray:
        """Those of ids that nobody has asked shards for yet, ascending."""
        return np.setdiff1d(ids, self.asked)

    def add(self, asked: IdArray, brought: Brought) -> None:
        """What shards have brought of the items asked for, none of which was before."""
        steps, columns = self.steps, brought.columns
        additions = np.zeros(len(brought.ids))
        for boost in steps.boosts:
            additions += added(boost, columns[boost.column], steps.now)
        codes = np.empty((len(steps.caps), len(brought.ids)), np.int64)
        for row, (cap, known) in enumerate(zip(steps.caps, self._values, strict=True)):
            codes[row] = [
                NO_VALUE if value is None else known.setdefault(value, len(known))
                for value in columns[cap.column]
            ]
        order = np.argsort(np.concatenate([self.ids, brought.ids]))
        self.asked = np.union1d(self.asked, asked)
        self.ids = np.concatenate([self.ids, brought.ids])[order]
        self.codes = np.concatenate([self.codes, codes], axis=1)[:, order]
        self.additions = np.concatenate([self.additions, additions])[order]
        if brought.vectors is not None:
            vectors = _unit(brought.vectors)
            if len(self.vectors):
                vectors = np.concatenate([self.vectors, vectors])
            self.vectors = vectors[order]

    def choose(self, ids: IdArray, scores: FloatArray) -> Chosen:
        """The answer made of a pool: ids (m,), scores (m,), in any order, each item once."""
        steps = self.steps
        places = np.searchsorted(self.ids, ids)
        is_known = places < len(self.ids)
        is_known[is_known] = self.ids[places[is_known]] == ids[is_known]
        ids, scores, places = ids[is_known], scores[is_known], places[is_known]
        if steps.boosts:
            scores = boosted(scores, self.additions[places])
        order = np.lexsort((ids, -scores))
        ids, scores, places = ids[order], scores[order], places[order]
        codes, counts = self.codes[:, places], Counts([cap.most for cap in steps.caps])
        if steps.relevance is None:
            taken = capped(codes, counts, steps.k)
        else:
            relevance = comparable(scores.astype(np.float64), steps.metric)
            vectors = self.vectors[places]
            taken = diverse(relevance, vectors, codes, counts, steps.k, steps.relevance)
        return Chosen(
            ids=ids[taken],
            scores=scores[taken],
            considered=len(ids),
            # only caps end an answer before the pool does
            refused=len(ids) - len(taken) if len(taken) < steps.k else 0,
            full=self._named(counts.full()),
        )

    def _named(self, full: list[list[int]]) -> dict[str, list[Scalar]]:
        named = {}
        for cap, known, codes in zip(self.steps.caps, self._values, full, strict=True):
            if codes:
                values = list(known)
                named[cap.column] = [values[code] for code in codes]
        return named


def brought_of(
    asked: IdArray,
    columns: Mapping[str, Mapping[int, Any]],
    vectors: tuple[IdArray, FloatArray] | None,
) -> Brought:
    """Of the items asked for those of which all came: each value by item, and vectors by id."""
    held = [np.fromiter(values, np.int64, len(values)) for values in columns.values()]
    if vectors is not None:
        held.append(vectors[0])
    for ids in held:
        asked = np.intersect1d(asked, ids)
    wanted = asked.tolist()
    rows = None
    if vectors is not None:
        ids, stored = vectors
        order = np.argsort(ids)
        rows = stored[order[np.searchsorted(ids, asked, sorter=order)]]
    return Brought(
        ids=asked,
        columns={name: [values[item] for item in wanted] for name, values in columns.items()},
        vectors=rows,
    )


def _unit(vectors: FloatArray) -> FloatArray:
    """(m, dim) of unit length; a zero vector stays one."""
    wide = vectors.astype(np.float64)
    norms = np.sqrt(np.vecdot(wide, wide))
    wide /= np.where(norms > 0, norms, 1.0)[:, None]
    return wide.astype(np.float32)
