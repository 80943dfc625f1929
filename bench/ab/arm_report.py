"""Arms of an experiment compared by what was stored of them: latency, recall, outcomes.

The unit of outcomes is the key: each counts once, in the arm of its searches, with all of its
events since its first search. Keys whose searches were in several arms are left out of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardline.bench.ab import intervals
from shardline.bench.ab.event_table import NOBODY, EventTable
from shardline.bench.ab.intervals import NOTHING, Estimate, Numbers
from shardline.router.experiments.stored_event import OWN, RECALL, SEARCH

MISMATCH = 0.001  # a probability below which keys were not dealt out as configured
NO_ARM = -1
WHOLE_SECOND = 1_000_000  # microseconds: callers' times may be cut to seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one kind of event, per key of an arm. converted: share of the keys with one at least;
    events: number per key; value: sum of values per key. The differences are to the first arm, NaN
    of the first itself."""

    event: str
    converted: Estimate
    events: Estimate
    value: Estimate
    converted_difference: Estimate
    events_difference: Estimate
    value_difference: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFigures:
    """keys: those that outcomes are counted of. Latencies in milliseconds, of all searches.
    recall: of those that were asked again exactly. filled: results per result asked for."""

    arm: str
    keys: int
    searches: int
    p50_ms: Estimate
    p99_ms: Estimate
    p50_difference_ms: Estimate
    p99_difference_ms: Estimate
    recall: Estimate
    recall_samples: int
    recall_difference: Estimate
    filled: float
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentReport:
    """mixed: keys with searches in several arms. unowned: events that belong to no search of the
    experiment, or are older than the first. mismatch: the probability of numbers of keys that are
    as far from the configured shares by chance; None: the shares are not known."""

    experiment: str
    arms: tuple[ArmFigures, ...]
    mixed: int
    unowned: int
    mismatch: float | None


@dataclass(frozen=True, slots=True, eq=False)
class _Keys:
    """Of each owner: its arm's number (NO_ARM: none, or several), and its first search's time."""

    arms: NDArray[np.int64]
    first_at: NDArray[np.int64]
    mixed: int


def report(table: EventTable, experiment: str, shares: dict[str, float] | None) -> ExperimentReport:
    """shares: of the arms, the first before the others, as the configuration has them; None: it has
    no such experiment, and the arms are those of the events, by name."""
    kinds, names = table.kinds(), table.arms(experiment)
    is_search = (kinds == SEARCH) & (names != None)  # noqa: E711  element by element
    seen = {str(name) for name in names[is_search]}
    order = [*(shares or {}), *sorted(seen - set(shares or {}))]
    numbers = {name: place for place, name in enumerate(order)}
    arms = np.array([numbers.get(name, NO_ARM) for name in names], np.int64)
    keys = _keys_of(table, arms, is_search)
    counted, unowned = _counted(table, kinds, keys)
    figures: list[ArmFigures] = []
    by_kind = {
        kind: _per_key(table, counted & (kinds == kind), len(table.keys))
        for kind in sorted(set(kinds[counted]))
    }
    for number, name in enumerate(order):
        first = np.flatnonzero(keys.arms == 0)
        mine = np.flatnonzero(keys.arms == number)
        outcomes = tuple(
            _outcome(kind, found, mine, None if number == 0 else first)
            for kind, found in by_kind.items()
        )
        figures.append(_figures(table, kinds, arms, number, name, len(mine), outcomes))
    counts = [each.keys for each in figures]
    known = shares is not None and seen <= set(shares)
    return ExperimentReport(
        experiment=experiment,
        arms=tuple(figures),
        mixed=keys.mixed,
        unowned=unowned,
        mismatch=intervals.mismatch(counts, list(shares.values())) if known and shares else None,
    )


def _keys_of(table: EventTable, arms: NDArray[np.int64], is_search: NDArray[np.bool_]) -> _Keys:
    owners, at = table.owners[is_search], _microseconds(table)[is_search]
    count, largest = len(table.keys), np.iinfo(np.int64).max
    lowest, highest = np.full(count, largest), np.full(count, NO_ARM)
    first_at = np.full(count, largest)
    np.minimum.at(lowest, owners, arms[is_search])
    np.maximum.at(highest, owners, arms[is_search])
    np.minimum.at(first_at, owners, at)
    is_mixed = (highest != NO_ARM) & (lowest != highest)
    return _Keys(np.where(is_mixed, NO_ARM, highest), first_at, int(is_mixed.sum()))


def _counted(
    table: EventTable, kinds: NDArray[np.object_], keys: _Keys
) -> tuple[NDArray[np.bool_], int]:
    """(n,) which events are outcomes of keys of the experiment; and how many others there are."""
    is_outcome = ~np.isin(kinds, OWN)
    is_owned = table.owners != NOBODY
    of_key = np.where(is_owned, table.owners, 0)
    counted = np.zeros(len(kinds), np.bool_)
    if len(table.keys):
        in_arm = keys.arms[of_key] != NO_ARM
        since = keys.first_at[of_key] - WHOLE_SECOND
        counted = is_outcome & is_owned & in_arm & (_microseconds(table) >= since)
    return counted, int((is_outcome & ~counted).sum())


def _per_key(table: EventTable, chosen: NDArray[np.bool_], keys: int) -> tuple[Numbers, Numbers]:
    """(keys,) the number of the chosen events of each key, and the sum of their values."""
    values = table.rows["value"].to_numpy(zero_copy_only=False).astype(np.float64)
    owners = table.owners[chosen]
    counts = np.bincount(owners, minlength=keys).astype(np.float64)
    sums = np.bincount(owners, np.nan_to_num(values[chosen]), minlength=keys)
    return counts, sums.astype(np.float64)


def _outcome(
    kind: str,
    found: tuple[Numbers, Numbers],
    mine: NDArray[np.int64],
    first: NDArray[np.int64] | None,
) -> Outcome:
    counts, sums = found
    converted = (counts > 0).astype(np.float64)

    def differs(values: Numbers) -> Estimate:
        return NOTHING if first is None else intervals.difference(values[first], values[mine])

    return Outcome(
        event=kind,
        converted=intervals.share(int(converted[mine].sum()), len(mine)),
        events=intervals.mean(counts[mine]),
        value=intervals.mean(sums[mine]),
        converted_difference=differs(converted),
        events_difference=differs(counts),
        value_difference=differs(sums),
    )


def _figures(
    table: EventTable,
    kinds: NDArray[np.object_],
    arms: NDArray[np.int64],
    number: int,
    name: str,
    keys: int,
    outcomes: tuple[Outcome, ...],
) -> ArmFigures:
    def column(column: str, kind: str, arm: int = number) -> Numbers:
        chosen = (kinds == kind) & (arms == arm)
        values = table.rows[column].to_numpy(zero_copy_only=False)
        return np.asarray(values[chosen], dtype=np.float64)

    took, recalls = column("took_ms", SEARCH), column("value", RECALL)
    asked = float((column("queries", SEARCH) * column("k", SEARCH)).sum())
    is_first = number == 0
    p50, p99 = (intervals.quantile(took, q) for q in (0.5, 0.99))
    first_took = column("took_ms", SEARCH, 0)
    of_p50, of_p99 = (
        NOTHING if is_first else intervals.apart(intervals.quantile(first_took, q), mine)
        for q, mine in ((0.5, p50), (0.99, p99))
    )
    return ArmFigures(
        arm=name,
        keys=keys,
        searches=len(took),
        p50_ms=p50,
        p99_ms=p99,
        p50_difference_ms=of_p50,
        p99_difference_ms=of_p99,
        recall=intervals.mean(recalls),
        recall_samples=len(recalls),
        recall_difference=NOTHING
        if is_first
        else intervals.difference(column("value", RECALL, 0), recalls),
        filled=float(column("results", SEARCH).sum()) / asked if asked else float("nan"),
        outcomes=outcomes,
    )


def _microseconds(table: EventTable) -> NDArray[np.int64]:
    times: Any = table.rows["at"].cast("int64").to_numpy(zero_copy_only=False)
    return np.asarray(times, dtype=np.int64)
