"""Every metric of routers and shards, in one table, and the recorder that collects them cheaply.

Recording appends to a list or adds to a number: a fraction of a microsecond, while handing a value
to Ray costs ten. ``shards.process.ray_metrics`` hands over what was recorded, in small portions,
off the path of the queries. Ray serves the result to Prometheus, each name with ``ray_`` in front.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

MS_BUCKETS = (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000, 5000)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHARE_BUCKETS = (0.01, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)
MAX_WAITING = 20_000  # samples; beyond it the oldest are lost, and counted as lost


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, eq=False)  # each is itself alone: hashed by identity
class Metric:
    """unit is that of a value; labels are given in this order when a value is recorded."""

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

REQUESTS = Metric(
    "shardline_requests", _C, "requests", "Requests answered, by HTTP status.", ("status",)
)
REJECTED = Metric(
    "shardline_rejected",
    _C,
    "requests",
    "Searches that failed after their body was read, and refused requests, by code.",
    ("code",),
)
REQUEST_MS = Metric(
    "shardline_request_ms", _H, "ms", "Search, arrival to answer.", ("kind",), MS_BUCKETS
)
STAGE_MS = Metric(
    "shardline_stage_ms",
    _H,
    "ms",
    "Part of a search in the router: parse, prepare (encode or look up, check), find (cache, "
    "shards, merge). One search in eight.",
    ("stage",),
    MS_BUCKETS,
)
SHARD_MS = Metric(
    "shardline_shard_ms",
    _H,
    "ms",
    "From a frame's departure to the last reply it waited for.",
    (),
    MS_BUCKETS,
)
SHARD_MISSING = Metric(
    "shardline_shard_missing", _C, "answers", "Answers that went without a shard.", ("shard",)
)
COVERAGE = Metric(
    "shardline_coverage", _H, "share", "Rows answered of rows asked.", (), SHARE_BUCKETS
)
REQUEST_QUERIES = Metric(
    "shardline_request_queries", _H, "queries", "Queries in a request.", (), SIZE_BUCKETS
)
FRAME_QUERIES = Metric(
    "shardline_frame_queries", _H, "queries", "Queries that left in one frame.", (), SIZE_BUCKETS
)
IN_FLIGHT = Metric(
    "shardline_in_flight", _G, "requests", "Searches and item look-ups being worked on."
)
GENERATION = Metric("shardline_generation", _G, "number", "Generation a router serves.")
SHARDS_CONNECTED = Metric(
    "shardline_shards_connected", _G, "shards", "Shards a router is connected to."
)
CACHE_HITS = Metric(
    "shardline_cache_hits", _C, "requests", "Requests answered from the result cache."
)
CACHE_MISSES = Metric("shardline_cache_misses", _C, "requests", "Asked for, and not in the cache.")
CACHE_BYTES = Metric("shardline_cache_bytes", _G, "bytes", "Answers kept in the result cache.")
SEARCH_MS = Metric(
    "shardline_search_ms", _H, "ms", "One batch in a shard's index.", ("shard",), MS_BUCKETS
)
BATCH_QUERIES = Metric(
    "shardline_batch_queries",
    _H,
    "queries",
    "Queries a shard searched at once.",
    ("shard",),
    SIZE_BUCKETS,
)
QUEUE_DEPTH = Metric(
    "shardline_queue_depth", _G, "requests", "Requests a shard has not answered.", ("shard",)
)
SHARD_REFUSED = Metric(
    "shardline_shard_refused",
    _C,
    "requests",
    "Requests a shard refused (overloaded), dropped (expired) or could not search (failed).",
    ("shard", "why"),
)
SAMPLES_LOST = Metric(
    "shardline_samples_lost", _C, "samples", "Values lost because they came faster than exported."
)

METRICS = (
    REQUESTS,
    REJECTED,
    REQUEST_MS,
    STAGE_MS,
    SHARD_MS,
    SHARD_MISSING,
    COVERAGE,
    REQUEST_QUERIES,
    FRAME_QUERIES,
    IN_FLIGHT,
    GENERATION,
    SHARDS_CONNECTED,
    CACHE_HITS,
    CACHE_MISSES,
    CACHE_BYTES,
    SEARCH_MS,
    BATCH_QUERIES,
    QUEUE_DEPTH,
    SHARD_REFUSED,
    SAMPLES_LOST,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One value for an exporter: added to a counter, set on a gauge, observed by a histogram."""

    metric: Metric
    value: float
    labels: tuple[str, ...]


class Recorder:
    """Collects in one thread; another may drain it."""

    def __init__(self) -> None:
        # totals only ever grow here: taking them away would race with the thread that adds
        self._totals: defaultdict[tuple[Metric, tuple[str, ...]], float] = defaultdict(float)
        self._drained: dict[tuple[Metric, tuple[str, ...]], float] = {}
        # plain tuples: a Sample takes several times as long to make, and nobody waits for drain
        self._observed: deque[tuple[Metric, float, tuple[str, ...]]] = deque()
        self._gauges: dict[tuple[Metric, tuple[str, ...]], float] = {}

    def count(self, metric: Metric, *labels: str, by: float = 1) -> None:
        self._totals[metric, labels] += by

    def total(self, metric: Metric, value: float, *labels: str) -> None:
        """For what is counted elsewhere: its count since the start."""
        self._totals[metric, labels] = value

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        if len(self._observed) >= MAX_WAITING:
            self._observed.popleft()
            self.count(SAMPLES_LOST)
        self._observed.append((metric, value, labels))

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        self._gauges[metric, labels] = value

    def drain(self) -> Iterator[Sample]:
        """What was recorded since the last drain; gauges come each time."""
        for key, total in list(self._totals.items()):
            added = total - self._drained.get(key, 0)
            if added > 0:
                self._drained[key] = total
                yield Sample(key[0], added, key[1])
        for _ in range(len(self._observed)):
            try:
                yield Sample(*self._observed.popleft())
            except IndexError:  # full, so that the recording thread took some away meanwhile
                break
        for (metric, labels), value in list(self._gauges.items()):
            yield Sample(metric, value, labels)
