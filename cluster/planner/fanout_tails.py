"""What a fan-out does to the tail: latencies of queries that wait for their slowest shard. Pure.

A query asks every shard, so with N shards it is as slow as the slowest of N searches: a search that
one shard has once in a hundred, 63 of 100 queries have over 100 shards (Dean and Barroso, "The Tail
at Scale", CACM 56(2), 2013). Replicas and hedged requests, sent to a second replica when the first
is late, are their remedy. What that comes to also depends on queues, so it is simulated: queries
arrive at random (Poisson), each replica searches one query at a time in the order of arrival, of
two replicas drawn at random the one with less to do is asked, and after the hedge delay a second
one: delay and budget are the router's own code (``router.fanout.hedging``), of one router for all.

Simplified: what waits is not searched as one batch, as shards do, so long queues look longer than
they are; a hedged search that has lost is not cancelled, as in the router; replicas of equal load
are equally fast; searches take times that do not depend on each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from shardline.router.fanout.hedging import Budget, Pace

Times = NDArray[np.float64]  # milliseconds
KNOWN_AFTER = 64  # queries after which a router knows what one has taken, roughly
_Late = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution by its quantiles: ``shares`` ascending in (0, 1], ``values`` of the same
    number. Between two of them it is linear; below the first it is the first value."""

    shares: tuple[float, ...]
    values: tuple[float, ...]

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Times:
        drawn: Times = np.interp(rng.random(shape), self.shares, self.values)
        return drawn

    def at(self, share: float) -> float:
        return float(np.interp(share, self.shares, self.values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What answers. group: shards of one host, which share ``cores`` cores, where a host has fewer
    cores than shards; 1 and 1 where each search has a core.

    hedge_share: searches that may be sent a second time, per search; 0: none.
    hedge_min_ms: the least delay before that.
    """

    shards: int
    replicas: int
    group: int = 1
    cores: int = 1
    hedge_share: float = 0.0
    hedge_min_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """What is asked. search: times of one search without waiting, by their median
    ``search_p50_ms``; front: what a query takes outside of the shards, by its median
    ``front_p50_ms``. routers: processes, one of which each query occupies for ``router_ms``."""

    qps: float
    search_p50_ms: float
    search: Spread
    front_p50_ms: float
    front: Spread
    routers: int
    router_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tails:
    """Of all simulated queries, milliseconds. ``shard_p99_ms``: of single searches with their
    waiting. hedged_share: searches sent a second time. busy_share: of a core of a shard's group."""

    p50_ms: float
    p99_ms: float
    p99_9_ms: float
    shard_p50_ms: float
    shard_p99_ms: float
    hedged_share: float
    hedge_delay_ms: float | None
    busy_share: float


def simulate(fleet: Fleet, offered: Offered, *, queries: int, seed: int = 0) -> Tails:
    """As many queries, the first tenth of which only fills the queues and is not counted."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1e3 / offered.qps, queries))
    fronts = offered.front_p50_ms * offered.front.draw(rng, (queries,))
    groups = _Groups(fleet, np.random.default_rng(seed + 1))
    counts = _group_sizes(fleet)
    first_shard = np.concatenate([[0], np.cumsum(counts)[:-1]])
    asked_ms, end_ms = np.empty(queries), np.empty((queries, fleet.shards))
    hedges = _Hedges(fleet, offered, groups, end_ms, rng)
    routers = [0.0] * offered.routers
    for number, arrival in enumerate(arrivals.tolist()):
        router = number % offered.routers
        asked = max(arrival, routers[router])
        routers[router] = asked + offered.router_ms
        asked_ms[number] = asked
        hedges.send_until(asked)
        if number >= KNOWN_AFTER:
            known = number - KNOWN_AFTER
            hedges.took(end_ms[known] - asked_ms[known])
        for round_ in range(fleet.group):
            who = counts > round_
            took = offered.search_p50_ms * offered.search.draw(rng, (groups.groups,))
            replica = groups.pick()
            end = groups.search(asked, replica, took, who)
            end_ms[number, first_shard[who] + round_] = end[who]
            late = np.flatnonzero(who & (end > asked + hedges.delay_ms))
            if late.size:
                hedges.expect(asked, number, first_shard[late] + round_, late, replica)
    hedges.send_until(np.inf)
    shard_ms = end_ms - asked_ms[:, None]
    query_ms = asked_ms - arrivals + fronts + shard_ms.max(axis=1)
    kept = queries // 10
    p50, p99, p999 = np.quantile(query_ms[kept:], (0.5, 0.99, 0.999))
    shard_p50, shard_p99 = np.quantile(shard_ms[kept:], (0.5, 0.99))
    return Tails(
        p50_ms=float(p50),
        p99_ms=float(p99),
        p99_9_ms=float(p999),
        shard_p50_ms=float(shard_p50),
        shard_p99_ms=float(shard_p99),
        hedged_share=hedges.sent / (queries * fleet.shards),
        hedge_delay_ms=hedges.delay_ms if math.isfinite(hedges.delay_ms) else None,
        busy_share=groups.worked / (groups.free.size * float(arrivals[-1])),
    )


class _Groups:
    """When each core of each group of shards is free: (groups, replicas, cores) milliseconds."""

    def __init__(self, fleet: Fleet, rng: np.random.Generator) -> None:
        self.groups = -(-fleet.shards // fleet.group)
        self.free = np.zeros((self.groups, fleet.replicas, fleet.cores))
        self._all = np.arange(self.groups)
        self._rng = rng
        self.worked = 0.0

    def pick(self, besides: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """(groups,) a replica each: of two drawn at random the one that is free first; another one
        than ``besides``."""
        earliest = self.free.min(axis=2)
        replicas = earliest.shape[1]
        if besides is not None:
            earliest[self._all, besides] = np.inf
        if replicas > 2:
            draws = self._rng.random(earliest.shape)
            if besides is not None:
                draws[self._all, besides] = np.inf
            unasked = np.argpartition(draws, 1, axis=1)[:, 2:]
            np.put_along_axis(earliest, unasked, np.inf, axis=1)
        elif replicas == 2 and besides is None:
            earliest += self._rng.random(earliest.shape) * 1e-9  # equals by chance
        picked: NDArray[np.int64] = np.argmin(earliest, axis=1)
        return picked

    def search(
        self, now: float | Times, replica: NDArray[np.int64], took: Times, who: NDArray[np.bool_]
    ) -> Times:
        """(groups,) when searches of ``took`` (groups,) that are asked ``now`` end, one in each of
        the groups ``who``."""
        core = np.argmin(self.free[self._all, replica], axis=1)
        end: Times = np.maximum(self.free[self._all, replica, core], now) + took
        at = np.flatnonzero(who)
        self.free[at, replica[at], core[at]] = end[at]
        self.worked += float(took[at].sum())
        return end


class _Hedges:
    """Searches that are late, and when each is sent to a second replica, in the order of time.

    end_ms (queries, shards): when each search has its first answer; changed here.
    """

    def __init__(
        self,
        fleet: Fleet,
        offered: Offered,
        groups: _Groups,
        end_ms: Times,
        rng: np.random.Generator,
    ) -> None:
        self.sent = 0
        self._offered = offered
        self._groups = groups
        self._end_ms = end_ms
        self._rng = rng
        self._budget = Budget(fleet.hedge_share if fleet.replicas > 1 else 0.0)
        self._pace = Pace(self._budget, fleet.hedge_min_ms / 1e3)
        self._expected: list[tuple[float, int, int, _Late]] = []
        self._count = 0

    @property
    def delay_ms(self) -> float:
        """Infinite where nothing is sent twice, and at first."""
        return self._pace.delay_s * 1e3

    def took(self, shard_ms: Times) -> None:
        """What the searches (shards,) of one query have taken."""
        self._budget.sends(len(shard_ms))
        if self._budget.share:
            for took_ms in shard_ms.tolist():
                self._pace.took(took_ms / 1e3)

    def expect(
        self,
        asked_ms: float,
        number: int,
        shards: NDArray[np.int64],
        groups: NDArray[np.int64],
        replica: NDArray[np.int64],
    ) -> None:
        """Query ``number`` will be late at ``shards`` (m,), which lie in ``groups`` (m,); replica
        (all groups,): those that were asked."""
        self._count += 1  # of equal times the one that was expected first
        late = (shards, groups, replica)
        heappush(self._expected, (asked_ms + self.delay_ms, self._count, number, late))

    def send_until(self, now_ms: float) -> None:
        while self._expected and self._expected[0][0] <= now_ms:
            at_ms, _, number, (shards, groups, replica) = heappop(self._expected)
            allowed = [self._budget.allows(1) for _ in shards]
            shards, groups = shards[allowed], groups[allowed]
            if not groups.size:
                continue
            who = np.zeros(self._groups.groups, np.bool_)
            who[groups] = True
            took = self._offered.search.draw(self._rng, (self._groups.groups,))
            took *= self._offered.search_p50_ms
            end = self._groups.search(at_ms, self._groups.pick(replica), took, who)
            self._end_ms[number, shards] = np.minimum(self._end_ms[number, shards], end[groups])
            self.sent += int(groups.size)


def _group_sizes(fleet: Fleet) -> NDArray[np.int64]:
    """(groups,) shards of each; all groups are full but the last."""
    groups = -(-fleet.shards // fleet.group)
    sizes = np.full(groups, fleet.group)
    sizes[-1] = fleet.shards - fleet.group * (groups - 1)
    return sizes


def slowest_of(spread: Spread, shards: int, share: float) -> float:
    """The quantile ``share`` of the slowest of so many searches that do not wait: the one that a
    single search has at share^(1/shards)."""
    return spread.at(share ** (1 / shards))


def spread_of(quantiles: Sequence[tuple[float, float]]) -> Spread:
    """From (share, value), ascending."""
    shares, values = zip(*quantiles, strict=True)
    return Spread(tuple(shares), tuple(values))
