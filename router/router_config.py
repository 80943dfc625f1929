"""The router's configuration: what one request may ask for, and how shards are reached."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shardline.shards.core.schema import MAX_K


class RouterConfig(BaseModel):
    """Limits of a request, admission, and connections to shards. Every default is usable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_k: int = Field(
        default=100, ge=1, le=MAX_K, description="results per query when the request names no k"
    )
    max_k: int = Field(default=MAX_K, ge=1, le=MAX_K, description="largest k a request may ask for")
    max_batch: int = Field(default=1024, ge=1, le=65536, description="most queries in one request")
    default_timeout_ms: float = Field(
        default=500.0,
        gt=0,
        le=600_000,
        description="milliseconds a request may take when it names no timeout_ms; "
        "shards that have not answered by then are left out of the answer",
    )
    max_timeout_ms: float = Field(
        default=10_000.0,
        gt=0,
        le=600_000,
        description="largest timeout_ms a request may ask for, milliseconds",
    )
    default_min_coverage: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of rows that must have answered, 0 to 1, when the request names no "
        "min_coverage; 0 takes any answer, 1 refuses partial ones",
    )
    max_body_bytes: int = Field(
        default=32 << 20, ge=1024, le=1 << 30, description="largest request body, bytes"
    )
    body_timeout_ms: float = Field(
        default=10_000.0,
        gt=0,
        le=600_000,
        description="milliseconds a client has to send its whole body",
    )
    max_in_flight: int = Field(
        default=512,
        ge=1,
        le=65536,
        description="requests being worked on at once; one more is refused with 429. HAProxy in "
        "front refuses above 128 a replica already (router/serve/haproxy.py), so "
        "more than that counts only for requests that do not come through it",
    )
    retry_after_s: int = Field(
        default=1, ge=1, le=3600, description="seconds, the Retry-After of 429 and 503 answers"
    )
    cache_bytes: int = Field(
        default=64 << 20,
        ge=0,
        le=1 << 40,
        description="bytes of complete answers each router keeps for queries that come again; "
        "0 turns the cache off",
    )
    shard_max_in_flight: int = Field(
        default=256,
        ge=1,
        le=65536,
        description="requests waiting for one shard; one more goes without that shard, which "
        "the answer's coverage reports as overloaded",
    )
    connect_timeout_ms: float = Field(
        default=1000.0,
        gt=0,
        le=60_000,
        description="milliseconds for connecting to a shard, handshake included",
    )
    backoff_base_ms: float = Field(
        default=20.0,
        gt=0,
        le=60_000,
        description="milliseconds before the first reconnection to a shard; doubles with each "
        "failure, and half of it is random",
    )
    backoff_max_ms: float = Field(
        default=2000.0,
        gt=0,
        le=600_000,
        description="longest wait between two reconnections, milliseconds",
    )
    late_after_ms: float = Field(
        default=1000.0,
        gt=0,
        le=600_000,
        description="milliseconds without a byte from a shard that owes answers, after which "
        "queries go without it, until it speaks again",
    )
    stall_timeout_ms: float = Field(
        default=5000.0,
        gt=0,
        le=600_000,
        description="milliseconds without a byte from a shard that owes answers, after which its "
        "connection is dropped and made anew",
    )
    switch_wait_ms: float = Field(
        default=1000.0,
        ge=0,
        le=60_000,
        description="milliseconds a new routing table waits for its new connections before it "
        "replaces the old one, which serves until then",
    )

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
