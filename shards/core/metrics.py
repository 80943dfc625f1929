"""Every metric of routers and shards, in one table, and the recorder that collects them cheaply.

Recording appends to a list or adds to a number and takes a fraction of a microsecond; passing one
value to Ray takes ten. ``shards.process.ray_metrics`` exports the recorded values to Ray in small
portions, on a thread that no query waits for. Ray serves them to Prometheus under the same names
with the prefix ``ray_``.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

REPLICA = ("generation", "shard", "replica")  # labels: those of a ReplicaKey
MS_BUCKETS = (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000, 5000)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHARE_BUCKETS = (0.01, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)
MAX_WAITING = 20_000  # samples; beyond it the oldest are dropped, and counted as lost


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, eq=False)  # each exists once: hashed by identity, faster
class Metric:
    """``unit`` is the unit of a value; label values are passed in the order of ``labels``."""

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
    "shardline_request_ms", _H, "ms", "From arrival to answer.", ("kind",), MS_BUCKETS
)
STAGE_MS = Metric(
    "shardline_stage_ms",
    _H,
    "ms",
    "Part of a search in the router: parse, prepare (encode or look up, check), find (cache, "
    "shards, merge) of one search in eight; attributes of every one that returns some.",
    ("stage",),
    MS_BUCKETS,
)
SHARD_MS = Metric(
    "shardline_shard_ms",
    _H,
    "ms",
    "From sending a frame to the last reply that was waited for.",
    (),
    MS_BUCKETS,
)
SHARD_MISSING = Metric(
    "shardline_shard_missing", _C, "answers", "Answers without the rows of a shard.", ("shard",)
)
HEDGES = Metric(
    "shardline_hedges",
    _C,
    "requests",
    "Requests to a shard that went to a second replica as well, because the first took longer than "
    "is usual.",
    ("shard",),
)
HEDGES_WON = Metric(
    "shardline_hedges_won",
    _C,
    "requests",
    "Of shardline_hedges, those that the second replica answered first.",
    ("shard",),
)
RESENT = Metric(
    "shardline_resent",
    _C,
    "requests",
    "Requests to a shard that were sent to another replica, because the first one's connection "
    "broke (lost), it was silent (silent), or it refused or answered nonsense (refused).",
    ("shard", "why"),
)
COVERAGE = Metric(
    "shardline_coverage", _H, "share", "Share of all rows that an answer covers.", (), SHARE_BUCKETS
)
REQUEST_QUERIES = Metric(
    "shardline_request_queries", _H, "queries", "Queries in a request.", (), SIZE_BUCKETS
)
FRAME_QUERIES = Metric(
    "shardline_frame_queries", _H, "queries", "Queries sent in one frame.", (), SIZE_BUCKETS
)
IN_FLIGHT = Metric(
    "shardline_in_flight", _G, "requests", "Searches and item look-ups being worked on."
)
GENERATION = Metric("shardline_generation", _G, "number", "Generation that the router serves.")
SHARDS_CONNECTED = Metric(
    "shardline_shards_connected", _G, "shards", "Shards that the router is connected to."
)
CACHE_HITS = Metric(
    "shardline_cache_hits", _C, "requests", "Requests answered from the result cache."
)
CACHE_MISSES = Metric("shardline_cache_misses", _C, "requests", "Not in the result cache.")
CACHE_BYTES = Metric("shardline_cache_bytes", _G, "bytes", "Answers kept in the result cache.")
RECALL = Metric(
    "shardline_recall",
    _G,
    "share",
    "recall@k of the last 256 watched queries, against exact answers.",
)
RECALL_SAMPLES = Metric(
    "shardline_recall_samples",
    _C,
    "queries",
    "Served queries that were asked again exactly: compared, changed (a shard was written in "
    "between) or unanswered.",
    ("outcome",),
)
ARM_REQUESTS = Metric(
    "shardline_arm_requests",
    _C,
    "requests",
    "Searches of each arm of an experiment, by the code of their answer, ok or an error's.",
    ("experiment", "arm", "code"),
)
ARM_REQUEST_MS = Metric(
    "shardline_arm_request_ms",
    _H,
    "ms",
    "From arrival to answer, of searches of each arm.",
    ("experiment", "arm"),
    MS_BUCKETS,
)
ARM_RECALL = Metric(
    "shardline_arm_recall",
    _G,
    "share",
    "recall@k of the last 256 watched queries of each arm, against exact answers.",
    ("experiment", "arm"),
)
EVENTS = Metric(
    "shardline_events",
    _C,
    "events",
    "Events of callers and of this router itself: stored on the disk, or dropped because it failed "
    "or too many waited.",
    ("outcome",),
)
WRITES = Metric(
    "shardline_writes",
    _C,
    "requests",
    "Requests to write whose body was read, by kind (upsert, delete) and the code of their answer; "
    "ok where every shard has acknowledged its part.",
    ("kind", "code"),
)
WRITTEN_ROWS = Metric(
    "shardline_written_rows", _C, "rows", "Items of acknowledged writes.", ("kind",)
)
WRITE_MS = Metric(
    "shardline_write_ms",
    _H,
    "ms",
    "From the arrival of a write to its acknowledgement by every shard.",
    ("kind",),
    MS_BUCKETS,
)
LIST_READS = Metric(
    "shardline_list_reads",
    _C,
    "lists",
    "Named lists that searches and readers asked for: cached (known to be fresh), unchanged (one "
    "look at the store), read (its file).",
    ("how",),
)
LIST_WRITES = Metric(
    "shardline_list_writes",
    _C,
    "requests",
    "Requests to write a list, by kind (put, change, delete) and the code of their answer.",
    ("kind", "code"),
)
SEARCH_MS = Metric(
    "shardline_search_ms", _H, "ms", "Time of one batch in a shard's index.", REPLICA, MS_BUCKETS
)
BATCH_QUERIES = Metric(
    "shardline_batch_queries",
    _H,
    "queries",
    "Queries that a shard searched as one batch.",
    REPLICA,
    SIZE_BUCKETS,
)
QUEUE_DEPTH = Metric(
    "shardline_queue_depth", _G, "requests", "Requests a shard has not answered yet.", REPLICA
)
SHARD_REFUSED = Metric(
    "shardline_shard_refused",
    _C,
    "requests",
    "Requests that a shard refused (overloaded), dropped (expired) or failed to search (failed).",
    (*REPLICA, "why"),
)
SAMPLES_LOST = Metric(
    "shardline_samples_lost", _C, "samples", "Values recorded faster than exported, and dropped."
)

METRICS = (
    REQUESTS,
    REJECTED,
    REQUEST_MS,
    STAGE_MS,
    SHARD_MS,
    SHARD_MISSING,
    HEDGES,
    HEDGES_WON,
    RESENT,
    COVERAGE,
    REQUEST_QUERIES,
    FRAME_QUERIES,
    IN_FLIGHT,
    GENERATION,
    SHARDS_CONNECTED,
    CACHE_HITS,
    CACHE_MISSES,
    CACHE_BYTES,
    RECALL,
    RECALL_SAMPLES,
    ARM_REQUESTS,
    ARM_REQUEST_MS,
    ARM_RECALL,
    EVENTS,
    WRITES,
    WRITTEN_ROWS,
    WRITE_MS,
    LIST_READS,
    LIST_WRITES,
    SEARCH_MS,
    BATCH_QUERIES,
    QUEUE_DEPTH,
    SHARD_REFUSED,
    SAMPLES_LOST,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One value to export: added to a counter, set on a gauge, or observed by a histogram."""

    metric: Metric
    value: float
    labels: tuple[str, ...]


class Recorder:
    """Collects values in one thread; another thread may drain it."""

    def __init__(self) -> None:
        # totals only grow: resetting them in drain would race with the thread that adds
        self._totals: defaultdict[tuple[Metric, tuple[str, ...]], float] = defaultdict(float)
        self._drained: dict[tuple[Metric, tuple[str, ...]], float] = {}
        # plain tuples, because a Sample takes several times as long to make; drain converts them
        self._observed: deque[tuple[Metric, float, tuple[str, ...]]] = deque()
        self._gauges: dict[tuple[Metric, tuple[str, ...]], float] = {}

    def count(self, metric: Metric, *labels: str, by: float = 1) -> None:
        self._totals[metric, labels] += by

    def total(self, metric: Metric, value: float, *labels: str) -> None:
        """Sets a counter whose count since the start is kept elsewhere."""
        self._totals[metric, labels] = value

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        if len(self._observed) >= MAX_WAITING:
            self._observed.popleft()
            self.count(SAMPLES_LOST)
        self._observed.append((metric, value, labels))

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        self._gauges[metric, labels] = value

    def drain(self) -> Iterator[Sample]:
        """The values recorded since the last drain, and the present value of every gauge."""
        for key, total in list(self._totals.items()):
            added = total - self._drained.get(key, 0)
            if added > 0:
                self._drained[key] = total
                yield Sample(key[0], added, key[1])
        for _ in range(len(self._observed)):
            try:
                yield Sample(*self._observed.popleft())
            except IndexError:  # full: the recording thread has dropped some meanwhile
                break
        for (metric, labels), value in list(self._gauges.items()):
            yield Sample(metric, value, labels)
