"""From rows, rate and a bound on p99 to shards, replicas and hosts: the cheapest that hold. Pure.

Layouts are listed by arithmetic alone (memory, processor time), cheapest first, and simulated in
that order until one meets the bound. Nothing here asks a machine or a clock.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from shardline.cluster.planner.fanout_tails import Fleet, Offered, Tails, simulate, slowest_of
from shardline.cluster.planner.front_latency import Front, front_of
from shardline.cluster.planner.index_sizes import ShardSize, shard_size
from shardline.cluster.planner.measured_costs import (
    BEYOND_INDEX,
    COLD_AFTER_MS,
    COLD_FACTOR,
    COLD_SEARCH,
    MEASURED_SHARDS,
    NETWORK_MS,
    RECALL_BY_NPROBE,
    RECALL_FACTOR,
    RECALL_GROWTH,
    RECALL_ROWS,
    ROUTER,
    ROUTER_SHARD,
    SEARCH_SPREAD,
)
from shardline.cluster.planner.search_costs import Depth, Term, search_terms
from shardline.cluster.preflight.free_memory import OTHER_BYTES, ROUTER_BYTES
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import Metric
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexKind, IndexSpec, ResolvedIndex

MOST_BUSY = 0.6  # of a core: beyond it queues grow faster than the load, and a lost host is felt
ROUTER_BUSY = 0.4  # of a router: all queries pass it, so its queue is in every latency
MEMORY_SHARE = 0.9  # of a host: the rest is the system's
MOST_SHARDS = 1024
SHARD_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
LEAST_LISTS = 256
MOST_REPLICAS = 64
MOST_HOSTS = 10_000
MORE_HOSTS = 1.03  # tried next where memory does not suffice
ROUGH_QUERIES, PRECISE_QUERIES = 2_000, 10_000
ROUGHLY = 1.25  # times the bound: a rough p99 that may prove to be within it
MOST_SIMULATIONS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is planned for. None: chosen here. host_bytes, host_cores: of each host."""

    rows: int
    dim: int
    qps: float
    p99_ms: float
    k: int
    metric: Metric
    kind: IndexKind
    recall: float | None
    nprobe: int | None
    rerank_factor: int | None
    nlist: int | None
    shards: int | None
    replicas: int | None
    host_bytes: int
    host_cores: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to serve it, by arithmetic alone. routers: processes. search_cold, router_cold: from
    0, where a process has always something to do, to 1, where it pauses before each query."""

    index: ResolvedIndex
    depth: Depth
    shards: int
    replicas: int
    hosts: int
    routers: int
    size: ShardSize
    terms: tuple[Term, ...]
    search_cold: float
    router_cold: float

    @property
    def hot_us(self) -> float:
        """Processor time of one search in its index, of many that follow each other."""
        return sum(term.us for term in self.terms)

    @property
    def index_us(self) -> float:
        return self.hot_us + self.search_cold * COLD_SEARCH.us

    @property
    def shard_us(self) -> float:
        """The same with reading the request, writing the reply, and the delta."""
        return self.index_us + BEYOND_INDEX.us * _slower(self.search_cold)

    @property
    def further_shards(self) -> int:
        """Beyond those of the fan-out that was measured as a whole."""
        return max(0, self.shards - MEASURED_SHARDS)

    @property
    def router_us(self) -> float:
        """Processor time of router and HAProxy per query."""
        hot = ROUTER.us + self.further_shards * ROUTER_SHARD.us
        return hot * _slower(self.router_cold)

    @property
    def query_us(self) -> float:
        return self.router_us + self.shards * self.shard_us

    @property
    def shards_per_host(self) -> int:
        return -(-self.shards * self.replicas // self.hosts)

    @property
    def routers_per_host(self) -> int:
        return -(-self.routers // self.hosts)

    @property
    def host_bytes(self) -> int:
        """Of the fullest host, with filters, and Ray's and Serve's own processes."""
        routers = self.routers_per_host * (ROUTER_BYTES + RouterConfig().cache_bytes)
        return self.shards_per_host * self.size.most_bytes + routers + OTHER_BYTES

    def cores(self, qps: float) -> float:
        return qps * self.query_us / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The layout chosen, what was asked of it, and what the simulation gave."""

    asked: Asked
    layout: Layout
    tails: Tails
    front_ms: float
    tried: int


def plan(asked: Asked, *, seed: int = 0) -> Plan:
    """The fewest hosts, then the least processor time, that hold the load and meet the bound; where
    nothing meets it, what comes nearest (``missed``).

    Raises:
        ConfigError: an index that cannot be built over so many rows.
        InvalidInput: no layout holds the rows or the rate.
    """
    layouts = sorted(layouts_of(asked), key=_price)
    if not layouts:
        raise _nothing_fits(asked)
    nearest: Plan | None = None
    tried = 0
    for layout in layouts:
        if tried >= MOST_SIMULATIONS:
            break
        if nearest is not None and _rough_p99_ms(layout) > asked.p99_ms:
            continue
        tried += 1
        found = simulated(asked, layout, queries=ROUGH_QUERIES, seed=seed, tried=tried)
        if found.tails.p99_ms <= ROUGHLY * asked.p99_ms:
            found = simulated(asked, layout, queries=PRECISE_QUERIES, seed=seed, tried=tried)
            if found.tails.p99_ms <= asked.p99_ms:
                return found
        if nearest is None or found.tails.p99_ms < nearest.tails.p99_ms:
            nearest = found
    assert nearest is not None
    return simulated(asked, nearest.layout, queries=PRECISE_QUERIES, seed=seed, tried=tried)


def missed(found: Plan) -> InvalidInput | None:
    """The error of a plan that does not meet its bound; None where it does."""
    layout, p99_ms = found.layout, found.tails.p99_ms
    if p99_ms <= found.asked.p99_ms:
        return None
    return InvalidInput(
        "no layout that was tried meets the bound",
        field="--p99-ms",
        expected=f">= {p99_ms:.1f} ms, which the nearest one has: {layout.shards} shards, "
        f"{layout.replicas} replicas, {layout.hosts} hosts",
        got=f"{found.asked.p99_ms:g} ms",
        hint="allow a higher p99, or fewer lists (--recall, --nprobe)",
    )


def layouts_of(asked: Asked) -> Iterator[Layout]:
    """All that hold the rows in memory and the load in processor time."""
    for index in _indexes(asked):
        depth = depth_of(asked, index)
        counts = (asked.shards,) if asked.shards else SHARD_COUNTS
        for shards in counts:
            if shards <= asked.rows:
                yield from _with_replicas(asked, index, depth, shards)


def simulated(asked: Asked, layout: Layout, *, queries: int, seed: int, tried: int = 1) -> Plan:
    """The layout with its latencies. Where a host has more replicas than cores, they share them."""
    config = RouterConfig()
    per_host, cores = layout.shards_per_host, asked.host_cores
    shared = per_host > cores
    front = _front_of(layout)
    fleet = Fleet(
        shards=layout.shards,
        replicas=layout.replicas,
        group=min(per_host, layout.shards) if shared else 1,
        cores=cores if shared else 1,
        hedge_share=config.hedge_share,
        hedge_min_ms=config.hedge_min_ms,
    )
    offered = Offered(
        qps=asked.qps,
        search_p50_ms=layout.index_us / 1e3,
        search=SEARCH_SPREAD,
        front_p50_ms=front.p50_ms,
        front=front.spread,
        routers=layout.routers,
        router_ms=layout.router_us / 1e3,
    )
    tails = simulate(fleet, offered, queries=queries, seed=seed)
    return Plan(asked=asked, layout=layout, tails=tails, front_ms=front.p50_ms, tried=tried)


def depth_of(asked: Asked, index: ResolvedIndex) -> Depth:
    """What was asked for, or what reaches the recall in the measurement that the plan relies on.

    Raises:
        InvalidInput: what the kind does not have, or a recall that the measurement does not reach.
    """
    unused = {
        "--nprobe": asked.nprobe if index.nlist is None else None,
        "--recall": asked.recall if index.nlist is None else None,
        "--rerank-factor": asked.rerank_factor if index.rerank_factor is None else None,
    }
    for name, given in unused.items():
        if given is not None:
            message = f"has no effect with kind {index.kind}"
            raise InvalidInput(message, field=name, expected="unset", got=f"{given:g}")
    if index.nlist is None:
        return Depth(nprobe=None, rerank_factor=None)
    factor = None if index.rerank_factor is None else asked.rerank_factor or RECALL_FACTOR
    if asked.nprobe is not None:
        return Depth(nprobe=min(asked.nprobe, index.nlist), rerank_factor=factor)
    wanted = asked.recall if asked.recall is not None else IndexSpec().target_recall
    most = max(recall for _, recall in RECALL_BY_NPROBE)
    if wanted > most:
        raise InvalidInput(
            "a recall that the measurement behind the plan does not reach",
            field="--recall",
            expected=f"<= {most:g}",
            got=f"{wanted:g}",
            hint="give --nprobe as `shardline tune` finds it for your vectors, or --kind flat",
        )
    return Depth(nprobe=min(lists_for(wanted, asked.rows), index.nlist), rerank_factor=factor)


def lists_for(recall: float, rows: int) -> int:
    """Lists that reach it in an index over all ``rows`` with the lists that a build takes; between
    the numbers measured by their logarithm, and beyond the rows measured by a power of them."""
    lists, recalls = zip(*RECALL_BY_NPROBE, strict=True)
    measured = 2 ** float(np.interp(recall, recalls, np.log2(lists)))
    grown: float = measured * (rows / RECALL_ROWS) ** RECALL_GROWTH
    return max(1, math.ceil(grown))


def coldness(interval_ms: float, *, hot_us: float, more_us: float) -> float:
    """0 to 1, by the pause between queries that come to a process every ``interval_ms``: what is
    left of it after the work, which takes hot_us, and up to more_us longer the colder it begins."""
    pause_ms = (interval_ms - hot_us / 1e3) / (1 + more_us / 1e3 / COLD_AFTER_MS)
    return min(max(pause_ms, 0.0) / COLD_AFTER_MS, 1.0)


def _slower(cold: float) -> float:
    """By what processor time grows that is not a search's."""
    return 1 + cold * (COLD_FACTOR - 1)


def _indexes(asked: Asked) -> Iterator[ResolvedIndex]:
    """What a build takes, and then fewer lists, because every shard compares all centroids."""
    spec = IndexSpec(kind=asked.kind, nlist=asked.nlist)
    index = resolve(spec, rows=asked.rows, dim=asked.dim, metric=asked.metric)
    yield index
    if index.nlist is None or asked.nlist is not None:
        return
    nlist = index.nlist // 2
    while nlist >= LEAST_LISTS:
        fewer = spec.model_copy(update={"nlist": nlist})
        yield resolve(fewer, rows=asked.rows, dim=asked.dim, metric=asked.metric)
        nlist //= 2


def _with_replicas(
    asked: Asked, index: ResolvedIndex, depth: Depth, shards: int
) -> Iterator[Layout]:
    rows = -(-asked.rows // shards)
    size = shard_size(index, rows=rows, dim=asked.dim, metric=asked.metric)
    terms = search_terms(index, depth, rows=rows, dim=asked.dim, metric=asked.metric, k=asked.k)
    first = Layout(
        index=index,
        depth=depth,
        shards=shards,
        replicas=1,
        hosts=1,
        routers=1,
        size=size,
        terms=terms,
        search_cold=0.0,
        router_cold=0.0,
    )
    busy = asked.qps * first.shard_us / 1e6  # of one replica alone, in the hot case
    least = max(1, math.ceil(busy / MOST_BUSY))
    counts = [asked.replicas] if asked.replicas else [least, least + 1, math.ceil(1.5 * least)]
    for replicas in dict.fromkeys(counts):
        if busy / replicas > MOST_BUSY or replicas > MOST_REPLICAS:
            continue
        routers = math.ceil(asked.qps * first.router_us / 1e6 / ROUTER_BUSY)
        warm = replace(
            first,
            replicas=replicas,
            search_cold=coldness(
                1e3 * replicas / asked.qps,
                hot_us=first.shard_us,
                more_us=COLD_SEARCH.us + BEYOND_INDEX.us,
            ),
        )
        yield from _on_hosts(asked, _with_routers(asked, warm, routers))


def _with_routers(asked: Asked, layout: Layout, least: int) -> Layout:
    routers = max(layout.routers, least)
    hot_us = replace(layout, router_cold=0.0).router_us
    cold = coldness(1e3 * routers / asked.qps, hot_us=hot_us, more_us=hot_us * (COLD_FACTOR - 1))
    return replace(layout, routers=routers, router_cold=cold)


def _on_hosts(asked: Asked, layout: Layout) -> Iterator[Layout]:
    """One host, whose cores its shards may have to share, if that holds all of it; and the fewest
    hosts on which every replica and router has a core."""
    usable = MEMORY_SHARE * asked.host_bytes
    processes = layout.shards * layout.replicas + layout.routers
    by_memory = layout.shards * layout.replicas * layout.size.most_bytes / usable
    least = max(layout.replicas, math.ceil(processes / asked.host_cores), math.ceil(by_memory))
    is_held = layout.cores(asked.qps) <= MOST_BUSY * asked.host_cores
    if layout.replicas == 1 and layout.host_bytes <= usable and is_held:
        yield layout
        if least == 1:
            return
    if layout.size.most_bytes > usable:
        return
    hosts = max(least, 2)
    while hosts <= MOST_HOSTS:
        placed = _with_routers(asked, replace(layout, hosts=hosts), 2)
        if placed.host_bytes <= usable:
            yield placed
            return
        if placed.shards_per_host == 1:
            return
        hosts = max(hosts + 1, math.ceil(hosts * MORE_HOSTS))


def _price(layout: Layout) -> tuple[float, ...]:
    return (layout.hosts, layout.query_us, layout.shards, layout.replicas)


def _rough_p99_ms(layout: Layout) -> float:
    """Without queues, hedging and shared cores: what is worth a simulation has less."""
    front = _front_of(layout)
    front_p99_ms = front.p50_ms * front.spread.at(0.99)
    search_ms = layout.index_us / 1e3
    p50, p99 = (
        search_ms * slowest_of(SEARCH_SPREAD, layout.shards, share) for share in (0.5, 0.99)
    )
    return front.p50_ms + p50 + math.hypot(front_p99_ms - front.p50_ms, p99 - p50)


def _front_of(layout: Layout) -> Front:
    added_ms = layout.further_shards * ROUTER_SHARD.us * _slower(layout.router_cold) / 1e3
    if layout.hosts > 1:
        added_ms += NETWORK_MS
    return front_of(round(layout.router_cold, 2), round(added_ms, 3))


def _nothing_fits(asked: Asked) -> InvalidInput:
    index = next(_indexes(asked))
    row_bytes = shard_size(index, rows=1, dim=asked.dim, metric=asked.metric).row_bytes
    return InvalidInput(
        "no layout holds the rows in the memory of a host, or the rate in its cores",
        expected=f"a shard of at most {MEMORY_SHARE:.0%} of {asked.host_bytes / (1 << 30):g} GiB, "
        f"and at most {MOST_BUSY:.0%} of a core per replica",
        got=f"{asked.rows:,} rows of {row_bytes:.0f} bytes, {asked.qps:g} queries/s"
        + (f", {asked.shards} shards" if asked.shards else "")
        + (f", {asked.replicas} replicas" if asked.replicas else ""),
        hint="more --host-memory, more --replicas or --shards, fewer lists (--nprobe)",
    )
