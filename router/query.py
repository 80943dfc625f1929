"""A search on its way through the router: plain data of service, codec, fan-out and cache.

body of a request -> ResolvedQuery -> SearchRequest, a frame to every shard
replies -> Merged, what the shards found -> SearchAnswer, the body of the answer
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from shardline.router.contract import Coverage, Degraded, Reason
from shardline.router.experiments.assignment import Arms, Assignment
from shardline.router.rearrange.rearrangement import Rearrangement
from shardline.shards.core.attribute_kinds import AttributeKind
from shardline.shards.core.messages import SearchOptions, SearchParams
from shardline.shards.core.schema import FloatArray, IdArray, Ranked


class QueryKind(StrEnum):
    """What a search is asked with; the name of the field that holds its queries."""

    VECTORS = "vectors"
    FEATURES = "features"
    ITEM_IDS = "item_ids"
    TEXTS = "texts"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqOrigin:
    """Of the answer that sequence numbers are from: its generation, and the version of the routing
    table that it was made with."""

    generation: int
    table_version: int


@dataclass(slots=True, kw_only=True)  # not frozen: every search makes one, in a third of the time
class ResolvedQuery:
    """A search with nothing left open: what the caller left out is filled in, the rest is checked.

    values holds the queries as ``kind`` says: (n, dim) numbers, n maps of features, n ids or n
    texts, none of them empty or too many, but not looked at one by one. timeout_ms counts from the
    arrival. min_seq_of: where ``options.min_seq`` is from; None: from the generation that is live.
    filters: where queries differ in them, the ``options.filter`` of each; else empty. excluded: of
    each query the ids (m,) int64 that must not come back, ascending, each once; empty where no
    query has any. exclude_history: nor the items of its history feature; exclude_lists: nor those
    of lists of these names. Neither are in ``excluded`` yet.
    """

    kind: QueryKind
    values: Any
    k: int
    timeout_ms: float
    min_coverage: float
    params: SearchParams
    options: SearchOptions
    returned: tuple[str, ...] = ()  # attributes wanted beside the results
    exclude_lists: tuple[str, ...] = ()
    original_ids: bool = False
    min_seq_of: SeqOrigin | None = None
    filters: tuple[bytes, ...] = ()
    excluded: tuple[IdArray, ...] = ()
    exclude_history: bool = False
    rearrange: Rearrangement | None = None
    assignment: Assignment | None = None  # its arms of experiments; None: it is in none


@dataclass(slots=True, kw_only=True)
class Rearranged:
    """Of each query (n,) how many items were considered for its answer; where that is short, how
    many of them caps have refused, else 0; 1 where others were given up that may fit; and how many
    items were found that are left out, as their shards did not bring what was asked of them."""

    considered: IdArray
    refused: IdArray
    is_cut: IdArray
    dropped: IdArray


@dataclass(slots=True, kw_only=True)  # not frozen: as ResolvedQuery
class Merged:
    """The k best of all shards that answered; search_ms is the longest search any of them reported.

    seq: of each shard, how many writes its rows had; None for one that did not answer. Its arrays
    may be shared: nobody writes to them. others_share: the largest of the replies; None
    without any. matched (n,) int64: of each query, how many rows match its filter, NO_FILTER
    without one; None: none has a filter. excluded (n,): of each query with fewer than k results,
    how many rows, that match if it has a filter, its exclusions left out; None: none has any.
    left_out (n,): how many rows that were found are not in its answer, 1 for an item that was asked
    with; None: none. rearranged: of a search with caps, boosts or diversity.
    """

    ranked: Ranked
    coverage: Coverage
    search_ms: float
    seq: tuple[int | None, ...]
    others_share: float | None = None
    matched: IdArray | None = None
    excluded: IdArray | None = None
    left_out: IdArray | None = None
    rearranged: Rearranged | None = None


@dataclass(slots=True, kw_only=True)  # not frozen: as ResolvedQuery
class SearchAnswer:
    """ranked: a row per query. took_ms is the time from the request's arrival to its answer.

    seq: as of ``Merged``. table_version: of the table that the shards were asked by. others_share:
    as of ``Merged``, of a background search, else None. considered: as of ``Rearranged``; None
    without caps, boosts and diversity.
    """

    ranked: Ranked
    generation: int
    model_version: str
    coverage: Coverage
    took_ms: float
    search_ms: float
    reasons: tuple[Reason, ...]
    request_id: str
    returned: "Returned | None" = None
    seq: tuple[int | None, ...] = ()
    table_version: int = 0
    others_share: float | None = None
    considered: IdArray | None = None
    arms: Arms = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """What was asked for beside the results: of each query a list, with a value per result.

    Empty slots have none; the value of an item whose shard did not bring it is None, and
    ``missing`` says why. original_ids is None where they were not asked for.
    """

    attributes: dict[str, list[list[Any]]]
    original_ids: list[list[Any]] | None
    missing: tuple[Degraded, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundItems:
    """The items that were found, in no order: item_ids (m,), vectors (m, dim), shards (m,).

    seq: as of ``Merged``.
    """

    item_ids: IdArray
    vectors: FloatArray
    shards: IdArray
    coverage: Coverage
    seq: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundAttributes:
    """Of each attribute asked for, the values by item id; items that were not found have none.

    item_ids: those that were found, in no order. size: bytes of the values, packed. seq: as of
    ``Merged``; of items that were asked for in several parts, of the last. kinds: of the attributes
    asked for, as far as a shard answered.
    """

    item_ids: IdArray
    values: dict[str, dict[int, Any]]
    size: int
    missing: tuple[Degraded, ...]
    seq: tuple[int | None, ...] = ()
    kinds: dict[str, AttributeKind] = field(default_factory=dict)
