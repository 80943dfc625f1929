"""The HTTP bodies: checked where they arrive, and described in OpenAPI from the same source.

The long arrays are not walked here (``SkipValidation``): the codec has turned them into numpy
arrays or plain lists, and the service checks them once more, as arrays.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, SkipValidation, WithJsonSchema

from shardline.router.contract import ReasonCode
from shardline.router.excluded import MAX_EXCLUDED
from shardline.router.experiments.assignment import MAX_KEY_CHARS
from shardline.router.http.filter_schema import FILTER_FIELD
from shardline.router.http.rearrange_schema import BOOST_FIELD, CAP_FIELD, DIVERSIFY_FIELD
from shardline.router.http.text_fields import KeyText
from shardline.router.http.write_models import TABLE_VERSION, FailedPartBody
from shardline.router.list_names import MAX_EXCLUDE_LISTS
from shardline.router.router_config import MAX_TEXT_CHARS, QUERIES_IN_TIME
from shardline.shards.core.messages import (
    MAX_EF_SEARCH,
    MAX_NPROBE,
    MAX_RERANK_FACTOR,
    MAX_RETURNED,
    MAX_SHARDS,
)
from shardline.shards.core.schema import MAX_K

ExcludedIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(max_length=MAX_EXCLUDED)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ParamsBody(_Body):
    """Search-time knobs of the index kinds; left out, the generation's own defaults hold."""

    nprobe: int | None = Field(
        default=None, ge=1, le=MAX_NPROBE, description="inverted lists visited"
    )
    ef_search: int | None = Field(
        default=None, ge=1, le=MAX_EF_SEARCH, description="candidate queue of hnsw"
    )
    rerank_factor: int | None = Field(
        default=None,
        ge=1,
        le=MAX_RERANK_FACTOR,
        description="candidates re-ranked exactly, a multiple of k",
    )


class SeqOriginBody(_Body):
    """Which state of the cluster numbers are from: `generation` and `table_version` of the answer
    whose `seq` they are."""

    generation: int = Field(ge=0, lt=2**63)
    table_version: int = Field(ge=0, lt=2**63)


class SearchBody(_Body):
    """Exactly one of vectors, features, item_ids, texts; everything else is optional."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        json_schema_extra={"example": {"item_ids": [42], "k": 10}},
    )

    vectors: Annotated[list[list[float]] | None, SkipValidation] = Field(
        default=None,
        description="query vectors, one row per query; in msgpack also an array "
        '{"dtype": "<f4", "shape": [n, dim], "data": bin}',
    )
    features: Annotated[list[dict[str, Any]] | None, SkipValidation] = Field(
        default=None, description="one map of features per query, encoded by the query tower"
    )
    item_ids: Annotated[list[int] | None, SkipValidation] = Field(
        default=None,
        description="items whose neighbours are asked for; an item is left out of its own answer",
    )
    texts: Annotated[list[str] | None, SkipValidation] = Field(
        default=None,
        description="one text per query, encoded by the cluster's text encoder "
        f"(router.text_encoder), of at most {MAX_TEXT_CHARS} characters and the tokens that its "
        "model reads; where the query tower has other features too, send features, with the text "
        "in its own",
    )
    exclude_lists: list[str] = Field(
        default_factory=list,  # a default is copied deeply for every request
        json_schema_extra={"default": []},
        max_length=MAX_EXCLUDE_LISTS,
        description="names of lists, /v1/lists: their items do not come back, for any query of the "
        "request. One that does not exist is taken for an empty one",
    )
    k: int | None = Field(
        default=None,
        description=f"results per query, 1 to {MAX_K}",
        json_schema_extra={"minimum": 1, "maximum": MAX_K, "default": 100},
    )
    timeout_ms: FiniteFloat | None = Field(
        default=None,
        description="milliseconds from the request's arrival to its answer; left out, "
        f"router.default_timeout_ms, longer in proportion above {QUERIES_IN_TIME} queries",
    )
    min_coverage: FiniteFloat | None = Field(
        default=None,
        description="share of rows that must have answered, 0 to 1; below it the answer is 503",
    )
    params: ParamsBody | None = Field(default=None, description="search-time knobs")
    min_seq: list[Annotated[int, Field(ge=0, lt=2**63)] | None] = Field(
        default_factory=list,  # a default is copied deeply for every request
        json_schema_extra={"default": []},
        max_length=MAX_SHARDS,
        description="of each shard, by its number, as in the `seq` of an answer: one that has "
        "applied fewer writes is left out of the answer; null and 0 ask for nothing",
    )
    min_seq_of: SeqOriginBody | None = Field(
        default=None,
        description="the answer that min_seq is from, so that the numbers hold across a switch to "
        "another generation; without it they are of the generation that is live",
    )
    background: bool = Field(
        default=False,
        description="nobody waits for the answer, as in a batch job: shards search it while no "
        "other search waits, and the answer says in others_share how busy they are with others",
    )
    exact: bool = Field(
        default=False,
        description="score every item with the best vector that its shard stores: for measuring "
        "recall, not for serving. Takes long, at low priority, one search at a time per shard; "
        "params say nothing then. Indexes that keep codes only (pq, ivfpq, sq8 without a re-rank) "
        "are exact over what the codes stand for",
    )
    filter: Annotated[Any, SkipValidation, WithJsonSchema(FILTER_FIELD)] = Field(
        default=None,
        description="only items that match come back: one filter for all queries, or a list with "
        "one per query, null for none",
    )
    exclude: Annotated[list[ExcludedIds] | None, SkipValidation] = Field(
        default=None,
        description="items that must not come back: a list with a list of item ids per query; in "
        "msgpack an array of integers may stand for a list of ids. Ids of no item do no harm",
    )
    exclude_history: bool = Field(
        default=False,
        description="only with features: the items that a query brings as its history are not in "
        f"its answer, of longer histories the newest {MAX_EXCLUDED}",
    )
    cap: Annotated[Any, SkipValidation, WithJsonSchema(CAP_FIELD)] = Field(
        default=None,
        description="at most so many items of an answer with the same value of an attribute: a "
        "map, or a list of maps",
    )
    boost: Annotated[Any, SkipValidation, WithJsonSchema(BOOST_FIELD)] = Field(
        default=None,
        description="adds to the scores of the best items, by an attribute: a map, or a list of "
        "maps. The answer's scores have it, and pool says of how many items",
    )
    diversify: Annotated[Any, SkipValidation, WithJsonSchema(DIVERSIFY_FIELD)] = Field(
        default=None,
        description="items that are much like others before them make way, among the best",
    )
    returned: list[str] | None = Field(
        default=None,
        alias="return",
        max_length=MAX_RETURNED,
        description="names of items' attributes that the answer is to bring with the results",
    )
    return_original_ids: bool = Field(
        default=False,
        description="bring the ids that items had before their import, where it numbered them",
    )
    experiment_key: KeyText | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_KEY_CHARS,
        description="who asks, as a user's or a session's id: by it the search gets one arm of "
        "each experiment of the configuration, always the same; without it, none",
    )


class DegradedBody(_Body):
    """Why a shard is missing from the answer."""

    shard: int
    code: str = Field(description="stable: unavailable, deadline_exceeded, overloaded, ...")
    text: str = Field(description="for people")


class ReasonBody(_Body):
    """Why a query of the batch has an empty or a short answer."""

    query: int = Field(description="its position in the request")
    code: ReasonCode = Field(description="stable")
    text: str = Field(description="for people")
    matched: int | None = Field(
        default=None,
        description="only with filter: items that match, in the shards that answered; without the "
        "item that was asked with",
    )
    count: int | None = Field(
        default=None,
        description="with exclusion: items that the query excludes, of those that match its "
        "filter; with coverage: items that were not searched; with cap: items considered that the "
        "caps refuse; with probe_limit: results that are missing",
    )


class CoverageBody(_Body):
    """How much of the corpus the answer saw."""

    shards_asked: int
    shards_answered: int
    rows_asked: int
    rows_answered: int
    degraded: list[DegradedBody] = Field(description="why each missing shard is missing")


class SearchResponse(_Body):
    """Columnar. In JSON each row is cut to its live results; in msgpack ids and scores are arrays
    (n, k) whose empty slots, last in a row, are -1 and -inf."""

    ids: list[list[int]] = Field(description="item ids, best first, one row per query")
    scores: list[list[float]] = Field(description="higher is better, for every metric")
    seq: list[int | None] = Field(
        description="of each shard, by its number, how many writes were in what it searched; null "
        "for one that did not answer. As min_seq it asks for nothing older"
    )
    generation: int
    table_version: int = Field(description=TABLE_VERSION)
    model_version: str
    coverage: CoverageBody
    took_ms: float = Field(description="milliseconds from arrival to answer")
    search_ms: float = Field(description="longest search of any shard, milliseconds")
    request_id: str
    reasons: list[ReasonBody] | None = Field(
        default=None,
        description="only when some query could not be asked, or has fewer than k results though "
        "the index has as many items: why",
    )
    others_share: float | None = Field(
        default=None,
        description="only with background, if shards were asked: the share of the last two "
        "seconds, 0 to 1, in which the busiest shard searched for others; 0 if nobody else did",
    )
    pool: list[int] | None = Field(
        default=None,
        description="only with cap, boost or diversify: of each query, how many items were "
        "considered for its answer",
    )
    attributes: dict[str, list[list[Any]]] | None = Field(
        default=None,
        description="only with return: of each attribute a row per query, a value per result",
    )
    attributes_missing: list[DegradedBody] | None = Field(
        default=None,
        description="only when a shard did not bring its items' attributes in time: they are null",
    )
    original_ids: list[list[int | str | None]] | None = Field(
        default=None,
        description="only with return_original_ids: a row per query, an id per result; "
        "an item whose id was kept at its import has that id",
    )
    arms: dict[str, str] | None = Field(
        default=None,
        description="only where the search was part of experiments: of each, the arm whose "
        "settings it had",
    )


class ItemResponse(_Body):
    """One item's stored vector, as the index keeps it (normalised under cosine)."""

    item_id: int
    vector: list[float]
    attributes: dict[str, Any] = Field(
        description=f"the catalogue's columns, the first {MAX_RETURNED} of them"
    )
    shard: int
    seq: int = Field(description="how many writes the shard had applied")
    generation: int
    model_version: str


class Problem(BaseModel):
    """RFC 9457 problem details. ``code`` is stable; the texts are for people."""

    type: str = Field(description="urn:shardline:problem:<code>")
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    field: str | None = Field(default=None, description="the offending field of the request")
    expected: str | None = None
    got: str | None = None
    hint: str | None = None
    failed: list[FailedPartBody] | None = Field(
        default=None, description="of a write: the parts that their shards have not acknowledged"
    )
    applied_items: int | None = Field(
        default=None, description="of a write with failed parts: items that were acknowledged"
    )
    idempotency_key: str | None = Field(
        default=None,
        description="of a write with failed parts: the whole request, repeated with this "
        "Idempotency-Key, applies what is missing, and nothing twice",
    )
