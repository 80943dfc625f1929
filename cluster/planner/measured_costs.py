"""Every measured number that a plan rests on, with its date, its conditions and its command.

Conditions, unless a line says otherwise: two cores of a shared virtual machine (AMD EPYC, 2.4 GHz),
one thread, faiss 1.15.1, 128 dimensions, k = 100, clustered corpus. Other work on the machine makes
processor times longer by up to a half, medians more than tails, so that a spread looks narrower.
``NETWORK_MS`` and what concerns GPUs (``card_plan``) are not measured: they are marked as assumed
wherever they are printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from shardline.cluster.planner.fanout_tails import spread_of
from shardline.shards.index.spec import IndexKind

MEASURED_DIM = 128
MEASURED_SHARDS = 4  # of the fan-out whose time and router's cost are known as a whole
PLAN_COSTS = "python -m shardline.bench.plan_costs"
BUSY = "niceness 15, other work on the machine (load 6)"
QUIET = "no other work on the machine"
TODAY = "2026-11-30"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One measured figure, or several of one run, as it is printed below a plan."""

    what: str
    date: str
    conditions: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Microseconds of processor time."""

    us: float
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class KindCosts:
    """Microseconds of one thread; code_bytes: of the code that ``row_us`` was measured with."""

    call_us: float
    list_us: float
    row_us: float
    candidate_us: float
    code_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Two published percentiles of one measurement, milliseconds."""

    p50_ms: float
    p99_ms: float
    source: Source

    def between(self, other: "Latency", weight: float) -> tuple[float, float]:
        """(p50, p99): this one at weight 0, the other at 1."""
        return (
            self.p50_ms + weight * (other.p50_ms - self.p50_ms),
            self.p99_ms + weight * (other.p99_ms - self.p99_ms),
        )


SEARCHES = Source(
    what="searches of one shard of 250,000 rows: call, centroid, list, row, candidate",
    date=TODAY,
    conditions=f"processor time, the least of 5 rounds of 64 queries; {QUIET}",
    command=PLAN_COSTS,
)
# Centroids: 1 MiB of them, and 32 MiB, which lie in no cache of a core.
CENTROID_COSTS = ((2048, 0.0114), (65_536, 0.0193))
KIND_COSTS: Mapping[IndexKind, KindCosts] = {
    IndexKind.FLAT: KindCosts(
        call_us=0.0, list_us=0.0, row_us=0.0242, candidate_us=0.0, code_bytes=512
    ),
    IndexKind.IVF: KindCosts(
        call_us=19.6, list_us=0.303, row_us=0.0467, candidate_us=0.0, code_bytes=512
    ),
    IndexKind.IVFPQ: KindCosts(
        call_us=23.5, list_us=0.744, row_us=0.0136, candidate_us=0.0, code_bytes=32
    ),
    IndexKind.IVFPQ_FS: KindCosts(
        call_us=24.8, list_us=0.811, row_us=0.00457, candidate_us=0.0255, code_bytes=32
    ),
}

# A search after a pause finds the processor's caches cold: so much is added, whatever it costs hot.
# Earlier: 268 instead of 67 us after 5 ms (bench/LOG.md, 2026-11-22 and -23).
COLD_AFTER_MS = 5.0
COLD_SEARCH = Cost(
    us=123.0,
    source=Source(
        what="a search that begins after a pause, beyond one that follows another",
        date=TODAY,
        conditions=f"200 against 77 us, 100 queries per second at random, nprobe 16; {QUIET}",
        command=PLAN_COSTS,
    ),
)
# Of router and of what a shard does besides its index (docs/PERFORMANCE.md, "Where a query's time
# goes": processor time doubles at 20 queries per second).
COLD_FACTOR = 2.0
BEYOND_INDEX = Cost(
    us=46.0,
    source=Source(
        what="a shard's work besides its index: request, reply, delta",
        date=TODAY,
        conditions="98 us per shard and query of a served cluster, 16 connections, less 52 us that "
        "the same search costs by the figures above; bench/LOG.md, rows of a delta",
        command="shardline bench load capacity --rows 1000000, shards' cores by queries",
    ),
)
ROUTER = Cost(
    us=500.0,
    source=Source(
        what="router and HAProxy, 4 shards",
        date="2026-11-23",
        conditions="2,000 single queries per second and core, docs/OPERATIONS.md",
        command="shardline bench load capacity",
    ),
)
ROUTER_SHARD = Cost(
    us=28.0,
    source=Source(
        what="router, per further shard",
        date=TODAY,
        conditions=f"131, 179, 301 us for 2, 4, 8 shards without an index; {BUSY}",
        command="python -m shardline.bench.load.hedging_bench --shards N --search-ms 0 "
        "--stall-share 0 --rounds 2 --seconds 3",
    ),
)

HTTP_HOT = Latency(
    p50_ms=0.4,
    p99_ms=1.2,
    source=Source(
        what="HTTP without a search, one request after the other",
        date="2026-11-23",
        conditions="docs/PERFORMANCE.md and bench/LOG.md, client on the same cores",
        command="shardline bench latency",
    ),
)
HTTP_COLD = Latency(
    p50_ms=0.8,
    p99_ms=2.8,
    source=Source(
        what="HTTP without a search, 100 requests per second",
        date="2026-11-23",
        conditions="docs/PERFORMANCE.md and bench/LOG.md, client on the same cores",
        command="shardline bench latency --rate 100",
    ),
)
FAN_OUT_HOT = Latency(
    p50_ms=0.51,
    p99_ms=1.4,
    source=Source(
        what="router to 4 shards and back without index, sequential",
        date="2026-11-23",
        conditions="docs/PERFORMANCE.md and bench/LOG.md",
        command="python -m shardline.bench.load.fanout_bench",
    ),
)
FAN_OUT_COLD = Latency(
    p50_ms=1.10,
    p99_ms=4.7,
    source=Source(
        what="router to 4 shards and back without index, 20 per second",
        date="2026-11-23",
        conditions="bench/LOG.md; 1.07 ms at 100 per second on 2026-11-30",
        command="python -m shardline.bench.load.fanout_bench",
    ),
)
NETWORK_MS = 0.2  # assumed: one round trip between hosts of one data centre

LATENCIES = Source(
    what="how the latencies of one shard's searches are spread",
    date=TODAY,
    conditions=f"2,000 searches of 250,000 rows at 100 per second, at random; {QUIET}",
    command=PLAN_COSTS,
)
# By the median of the same run.
SEARCH_SPREAD = spread_of(
    (
        (0.01, 0.658),
        (0.1, 0.724),
        (0.25, 0.816),
        (0.5, 1.0),
        (0.75, 1.366),
        (0.9, 1.698),
        (0.95, 1.909),
        (0.99, 2.290),
        (0.995, 2.416),
        (0.999, 2.725),
        (1.0, 3.187),
    )
)

RECALLS = Source(
    what="recall@100 by lists searched, ivfpq-fs, 4 candidates re-ranked per result",
    date=TODAY,
    conditions="a 16-dimensional surface without clusters, 256 queries, 1,000,000 rows in 2,048 "
    "lists; lists for .98: 62, 79, 102 of 512, 1,024, 2,048 for 62,500, 250,000, 1,000,000 rows",
    command=f"{PLAN_COSTS} --recall-rows ROWS",
)
RECALL_FACTOR = 4
RECALL_ROWS = 1_000_000
RECALL_BY_NPROBE = (
    (1, 0.1807),
    (2, 0.2944),
    (4, 0.4339),
    (8, 0.5999),
    (16, 0.7666),
    (32, 0.8965),
    (64, 0.9652),
    (128, 0.9872),
    (256, 0.9901),
)
# lists that a recall needs grow as rows to this power, over a factor of 16 of the rows
RECALL_GROWTH = 0.181

SOURCES = (
    SEARCHES,
    COLD_SEARCH.source,
    BEYOND_INDEX.source,
    ROUTER.source,
    ROUTER_SHARD.source,
    HTTP_HOT.source,
    HTTP_COLD.source,
    FAN_OUT_HOT.source,
    FAN_OUT_COLD.source,
    LATENCIES,
    RECALLS,
)
