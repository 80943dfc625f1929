"""The router's configuration: limits of a request, admission, and connections to shards."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shardline.router.experiments.experiment_config import (
    MAX_EXPERIMENTS,
    ExperimentConfig,
    check_together,
)
from shardline.router.list_names import LARGEST_LIST
from shardline.shards.core.schema import MAX_K

# Queries that the default time limit is meant for; more get longer. Flat, 60,000 x 784, two cores:
# 64 queries take 20 to 440 ms, 1024 take 0.7 to 0.9 s.
QUERIES_IN_TIME = 64

MAX_TEXT_CHARS = 4096  # of a query's text, several times what the usual models read


class RouterConfig(BaseModel):
    """Limits of a request, admission of requests, cache, and connections to shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_k: int = Field(
        default=100, ge=1, le=MAX_K, description="[results] Results per query when no k is given."
    )
    max_k: int = Field(default=MAX_K, ge=1, le=MAX_K, description="[results] Largest k.")
    max_batch: int = Field(
        default=1024, ge=1, le=65536, description="[queries] Queries per request."
    )
    default_timeout_ms: float = Field(
        default=500.0,
        gt=0,
        le=600_000,
        description="Time limit of a request that names no timeout_ms, of up to "
        f"{QUERIES_IN_TIME} queries; that of more is longer in proportion, up to "
        "max_timeout_ms. Shards that have not answered by then are missing from the answer.",
    )
    max_timeout_ms: float = Field(
        default=10_000.0,
        gt=0,
        le=600_000,
        description="Largest timeout_ms that a request may ask for.",
    )
    default_min_coverage: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="[share] Share of rows that must have been searched, for a request that names "
        "no min_coverage. 0 accepts any answer, 1 refuses partial ones.",
    )
    max_body_bytes: int = Field(
        default=32 << 20, ge=1024, le=1 << 30, description="Largest request body; else 413."
    )
    body_timeout_ms: float = Field(
        default=10_000.0,
        gt=0,
        le=600_000,
        description="Time in which a client must send its whole body; 408 after that.",
    )
    max_in_flight: int = Field(
        default=128,
        ge=1,
        le=65536,
        description="[requests] Requests that each router replica works on at once; more are "
        "refused with 429: by HAProxy, which counts those of all replicas together, and as a "
        "second line by the replica itself. At 1500 answers per second the last of 128 waits "
        "85 ms. On a launched cluster HAProxy takes it from deploy/ray/haproxy.sh.",
    )
    max_writes_in_flight: int = Field(
        default=64,
        ge=1,
        le=65536,
        description="[requests] Requests to write items that each router replica works on at once, "
        "apart from max_in_flight; more are refused with 429. HAProxy counts both together.",
    )
    write_timeout_ms: float = Field(
        default=5000.0,
        gt=0,
        le=600_000,
        description="Time limit of a request to write items that names no timeout_ms; at most "
        "max_timeout_ms. It is longer than a search's, because a shard whose primary fails has "
        "another one within it.",
    )
    retry_after_s: int = Field(
        default=1,
        ge=1,
        le=3600,
        description="Retry-After header of 429 and 503 answers, HAProxy's included; "
        "encoder_unavailable has none.",
    )
    cache_bytes: int = Field(
        default=64 << 20,
        ge=0,
        le=1 << 40,
        description="Memory per router for complete answers to repeated queries; 0 turns the cache "
        "off.",
    )
    lists_fresh_ms: float = Field(
        default=100.0,
        ge=0,
        le=60_000,
        description="Time for which a router goes by what it has read of a list; then it looks "
        "whether there is a newer version. So a change is seen by every router at the latest this "
        "long after it was acknowledged (on NFS add `actimeo`). 0 looks every time.",
    )
    lists_cache_bytes: int = Field(
        default=64 << 20,
        ge=0,
        le=1 << 40,
        description="Memory per router for lists that searches have named.",
    )
    max_list_ids: int = Field(
        default=10_000, ge=1, le=LARGEST_LIST, description="[ids] Largest list."
    )
    max_lists: int = Field(
        default=1_000_000,
        ge=1,
        le=1 << 30,
        description="[lists] Lists per store; no more are created then. Approximately: a router "
        "may miss some hundreds that others have created lately. Deleted ones count until "
        "`shardline gc` removes them.",
    )
    max_listed_ids: int = Field(
        default=20_000,
        ge=1,
        le=16 * LARGEST_LIST,
        description="[ids] Different ids that the lists named by one search may hold together.",
    )
    shard_max_in_flight: int = Field(
        default=256,
        ge=1,
        le=65536,
        description="[requests] Requests in flight to one shard. Beyond it an answer is sent "
        "without that shard, which its coverage reports as overloaded.",
    )
    connect_timeout_ms: float = Field(
        default=1000.0,
        gt=0,
        le=60_000,
        description="Time limit for connecting to a shard, handshake included.",
    )
    backoff_base_ms: float = Field(
        default=20.0,
        gt=0,
        le=60_000,
        description="Pause before the first reconnection to a shard; doubles with each failure, "
        "and half of it is random.",
    )
    backoff_max_ms: float = Field(
        default=2000.0, gt=0, le=600_000, description="Longest pause between two reconnections."
    )
    hedge_share: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="[share] Where shards have several replicas: most queries, per query, that a "
        "router sends to a second replica because the first takes longer than is usual. 0 sends "
        "none.",
    )
    hedge_min_ms: float = Field(
        default=5.0,
        gt=0,
        le=60_000,
        description="Shortest time after which a second replica is asked; the usual one is 1.5 "
        "times the 95th percentile of requests of the same size.",
    )
    silent_after_ms: float = Field(
        default=300.0,
        gt=0,
        le=600_000,
        description="Silence of a replica that owes answers, after which another replica is asked "
        "for them and preferred to it until it sends again. Shards that are at work send something "
        "every 100 ms.",
    )
    late_after_ms: float = Field(
        default=1000.0,
        gt=0,
        le=600_000,
        description="Silence of a shard that owes answers, after which queries go without it until "
        "it sends again.",
    )
    stall_timeout_ms: float = Field(
        default=5000.0,
        gt=0,
        le=600_000,
        description="Silence of a shard that owes answers, after which its connection is closed "
        "and opened anew.",
    )
    switch_wait_ms: float = Field(
        default=1000.0,
        ge=0,
        le=60_000,
        description="Time that a new routing table waits for its new connections before it "
        "replaces the old one, which serves until then. One of another generation waits up to 10 s "
        "longer while fewer of its rows can be asked than of the old one's.",
    )

    watch_interval_s: float = Field(
        default=5.0,
        ge=0,
        le=86_400,
        description="Time between two served queries that each router asks again exactly, to watch "
        "recall; 0 watches nothing. It is longer where an exact search takes more than a twentieth "
        "of it.",
    )

    text_encoder: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Text encoder for queries by text (docs/TEXT.md): a folder on every host that "
        "runs a router, or an installed Python package that carries the model. It must be the one "
        "that `shardline data embed-text` had. null encodes no texts.",
    )
    text_max_waiting: int = Field(
        default=64,
        ge=1,
        le=65536,
        description="[texts] Texts that wait for the text encoder of one router; more are refused "
        "with 429, and a request of more than these with 400.",
    )
    text_threads: int = Field(
        default=1,
        ge=1,
        le=256,
        description="[threads] Threads of the text encoder's process, one process per router.",
    )

    experiments: tuple[ExperimentConfig, ...] = Field(
        default=(),
        min_length=0,
        max_length=MAX_EXPERIMENTS,
        description="Experiments that searches with an experiment_key are part of "
        "(docs/EXPERIMENTS.md).",
    )
    event_share: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="[share] Share of the experiment keys whose searches are stored as events; "
        "reports are over those keys.",
    )
    events_mib: int = Field(
        default=1024,
        ge=0,
        le=1 << 20,
        description="Disk for the events of all routers, in <store>/events. Beyond it `shardline "
        "gc` removes the oldest days; at twice as much routers store none. 0 stores none.",
    )

    @model_validator(mode="after")
    def _experiments_fit_together(self) -> Self:
        check_together(self.experiments)
        return self

    @model_validator(mode="after")
    def _defaults_within_limits(self) -> Self:
        pairs = (
            ("default_k", self.default_k, "max_k", self.max_k),
            ("default_timeout_ms", self.default_timeout_ms, "max_timeout_ms", self.max_timeout_ms),
            ("backoff_base_ms", self.backoff_base_ms, "backoff_max_ms", self.backoff_max_ms),
        )
        for name, value, limit_name, limit in pairs:
            if value > limit:
                raise ValueError(f"{name} = {value} is above {limit_name} = {limit}")
        return self
