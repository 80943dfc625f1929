"""A search on its way through the router: plain data of service, codec, fan-out and cache.

body of a request -> ResolvedQuery -> SearchRequest, a frame to every shard
replies -> Merged, what the shards found -> SearchAnswer, the body of the answer
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from shardline.shards.core.messages import SearchOptions, SearchParams
from shardline.shards.core.schema import FloatArray, IdArray, Ranked


class QueryKind(StrEnum):
    """What a search is asked with; the name of the field that holds its queries."""

    VECTORS = "vectors"
    FEATURES = "features"
    ITEM_IDS = "item_ids"


@dataclass(slots=True, kw_only=True)  # not frozen: every search makes one, in a third of the time
class ResolvedQuery:
    """A search with nothing left open: what the caller left out is filled in, the rest is checked.

    values holds the queries as ``kind`` says: (n, dim) numbers, n maps of features, or n ids, none
    of them empty or too many, but not looked at one by one. timeout_ms counts from the arrival.
    """

    kind: QueryKind
    values: Any
    k: int
    timeout_ms: float
    min_coverage: float
    params: SearchParams
    options: SearchOptions


class ReasonCode(StrEnum):
    """Why a query of a batch could not be asked."""

    NOT_FOUND = "not_found"  # no shard holds the item
    NOT_FOUND_PARTIAL = "not_found_partial"  # no shard that answered holds it, and one did not


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why the query at position ``query`` has an empty answer: a stable code, a text for people.

    code is a ``ReasonCode``, or what a newer server says.
    """

    query: int
    code: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Degraded:
    """Why a shard is missing from an answer; ``code`` is that of an error of shards.core.errors."""

    shard: int
    code: str
    text: str

    def __str__(self) -> str:
        return f"shard {self.shard}: {self.text}"


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
    degraded: tuple[Degraded, ...]

    @property
    def share(self) -> float:
        """Rows answered of rows asked, 0 to 1; shards instead of rows while there are no rows."""
        if self.rows_asked:
            return self.rows_answered / self.rows_asked
        return self.shards_answered / self.shards_asked if self.shards_asked else 0.0

    def joined(self, other: "Coverage") -> "Coverage":
        """Of an answer that needed both: the counts of the smaller, every reason of either."""
        smaller = min(self, other, key=lambda coverage: coverage.share)
        return replace(smaller, degraded=tuple(dict.fromkeys(self.degraded + other.degraded)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """The k best of all shards that answered; search_ms is the longest search any of them reported.

    Its arrays may be shared: nobody writes to them.
    """

    ranked: Ranked
    coverage: Coverage
    search_ms: float


@dataclass(slots=True, kw_only=True)  # not frozen: as ResolvedQuery
class SearchAnswer:
    """ranked: a row per query. took_ms is the time from the request's arrival to its answer."""

    ranked: Ranked
    generation: int
    model_version: str
    coverage: Coverage
    took_ms: float
    search_ms: float
    reasons: tuple[Reason, ...]
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemAnswer:
    """One item's stored vector (dim,) float32, and the shard that holds it."""

    item_id: int
    vector: FloatArray
    shard: int
    generation: int
    model_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundItems:
    """The items that were found, in no order: item_ids (m,), vectors (m, dim), shards (m,)."""

    item_ids: IdArray
    vectors: FloatArray
    shards: IdArray
    coverage: Coverage
