"""What goes into and out of a search: plain data, shared by service, codec, HTTP API and client."""

from dataclasses import dataclass, replace
from typing import Any

from shardline.shards.core.messages import NO_PARAMS, SearchParams
from shardline.shards.core.schema import FloatArray, IdArray


@dataclass(slots=True, kw_only=True)  # not frozen: as router.limits.Terms
class SearchQuery:
    """One request: exactly one of vectors, features, item_ids. None elsewhere means the default.

    vectors: (n, dim) numbers not yet checked; features: n maps; item_ids: n ids, not yet checked.
    """

    vectors: Any = None
    features: list[dict[str, Any]] | None = None
    item_ids: Any = None
    k: int | None = None
    timeout_ms: float | None = None
    min_coverage: float | None = None
    params: SearchParams = NO_PARAMS


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of the corpus an answer saw; ``degraded`` says why each missing shard is missing.

    Where items were looked up and some not found, a shard that missed the look-up is missing too.

    Rows are as the shard counts them where it answered, as the routing table does elsewhere.
    """

    shards_asked: int
    shards_answered: int
    rows_asked: int
    rows_answered: int
    degraded: list[str]

    @property
    def share(self) -> float:
        """Rows answered of rows asked, 0 to 1; shards instead of rows while there are no rows."""
        if self.rows_asked:
            return self.rows_answered / self.rows_asked
        return self.shards_answered / self.shards_asked if self.shards_asked else 0.0

    def joined(self, other: "Coverage") -> "Coverage":
        """Of an answer that needed both: the counts of the smaller, every reason of either."""
        smaller = min(self, other, key=lambda coverage: coverage.share)
        return replace(smaller, degraded=list(dict.fromkeys(self.degraded + other.degraded)))


@dataclass(slots=True, kw_only=True)  # not frozen: as router.limits.Terms
class SearchAnswer:
    """ids (n, k) int64 and scores (n, k) float32, best first; empty slots are -1 and -inf, last.

    reasons maps the position of a query that could not be asked to why. search_ms is the longest
    search any shard reported, took_ms the time from the request's arrival to its answer.
    """

    ids: IdArray
    scores: FloatArray
    generation: int
    model_version: str
    coverage: Coverage
    took_ms: float
    search_ms: float
    reasons: dict[int, str]
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemAnswer:
    """One item's stored vector (dim,) float32, and the shard that holds it."""

    item_id: int
    vector: FloatArray
    shard: int
    generation: int
    model_version: str
