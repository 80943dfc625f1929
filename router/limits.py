"""What one query may ask for, and how many may be worked on at once.

The values that a query leaves out are filled in, the others checked; vectors and ids are checked by
the service.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shardline.router.query import QueryKind, ResolvedQuery, SeqOrigin
from shardline.router.rearrange.rearrangement import Rearrangement, sized
from shardline.router.router_config import MAX_TEXT_CHARS, QUERIES_IN_TIME, RouterConfig
from shardline.shards.core.errors import InvalidInput, Overloaded
from shardline.shards.core.filter_language import MAX_FILTER_BYTES
from shardline.shards.core.messages import (
    NO_OPTIONS,
    NO_PARAMS,
    SearchOptions,
    SearchParams,
)
from shardline.shards.core.metrics import REJECTED, Recorder
from shardline.shards.core.schema import FloatArray, IdArray, check_k
from shardline.shards.wire.frames import MAX_FRAME_BYTES

# Vectors of one request travel in one frame, with a filter; the rest takes far less than this.
MAX_QUERY_BYTES = MAX_FRAME_BYTES - MAX_FILTER_BYTES - 4096
KINDS = tuple(QueryKind)  # iterating over the class itself makes a generator per query
MAX_RETURNED_VALUES = 1 << 18  # attributes of one answer: put in order in tens of milliseconds

MAX_NAME_CHARACTERS = 1 << 16  # of attributes to return, which every shard is sent


class InFlightLimit:
    """Counts the requests being worked on, each in a ``with`` of its own; refuses too many.

    Raises, where the block begins:
        Overloaded: as many requests as allowed are being worked on.
    """

    def __init__(self, limit: int, recorder: Recorder) -> None:
        self.taken = 0
        self._limit = limit
        self._recorder = recorder

    def __enter__(self) -> None:
        if self.taken >= self._limit:
            self._recorder.count(REJECTED, Overloaded.code)
            raise Overloaded(
                "too many requests at once",
                expected=f"<= {self._limit} in flight",
                hint="try again after the time in Retry-After",
            )
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        self.taken -= 1


def resolve(
    config: RouterConfig,
    *,
    vectors: Any = None,
    features: list[dict[str, Any]] | None = None,
    item_ids: Any = None,
    texts: list[str] | None = None,
    exclude_lists: Sequence[str] = (),
    k: int | None = None,
    timeout_ms: float | None = None,
    min_coverage: float | None = None,
    params: SearchParams = NO_PARAMS,
    options: SearchOptions = NO_OPTIONS,
    returned: Sequence[str] = (),
    original_ids: bool = False,
    min_seq_of: SeqOrigin | None = None,
    filters: tuple[bytes, ...] = (),
    excluded: tuple[IdArray, ...] | None = None,
    exclude_history: bool = False,
    rearrange: Rearrangement | None = None,
) -> ResolvedQuery:
    """A query as it came, exactly one of vectors, features, item_ids, texts; None stands for the
    default. filters: one per query, or none at all. excluded: of each query, ascending, each once.
    rearrange: without its pool.

    Raises:
        InvalidInput: not one kind, an empty or too large batch, a value out of range.
    """
    kind, values = _queries_of(vectors, features, item_ids, texts)
    check_batch(kind, len(values), config.max_batch)
    if timeout_ms is None:
        timeout_ms = default_timeout_ms(config, len(values))
    else:
        check_timeout_ms(config, timeout_ms)
    if min_coverage is None:
        min_coverage = config.default_min_coverage
    elif not 0 <= min_coverage <= 1:
        raise _out_of_range("min_coverage", min_coverage, "0 to 1")
    k = check_k(config.default_k if k is None else k, limit=config.max_k)
    if filters:
        check_filters(len(filters), len(values))
        if len(set(filters)) == 1:
            options, filters = replace(options, filter=filters[0]), ()
    if excluded is not None:
        excluded = check_excluded(excluded, len(values))
    if exclude_history and kind is not QueryKind.FEATURES:
        raise InvalidInput(
            "there is no history",
            field="exclude_history",
            expected="queries by features",
            got=f"queries by {kind}",
            hint="name the items in exclude",
        )
    if returned or original_ids:
        _check_returned(len(values) * k * (len(returned) + original_ids), returned)
    return ResolvedQuery(
        kind=kind,
        values=values,
        exclude_lists=tuple(exclude_lists),
        k=k,
        timeout_ms=timeout_ms,
        min_coverage=min_coverage,
        params=params,
        options=options,
        returned=tuple(dict.fromkeys(returned)) if returned else (),
        original_ids=original_ids,
        min_seq_of=min_seq_of,
        filters=filters,
        excluded=excluded or (),
        exclude_history=exclude_history,
        rearrange=rearrange and sized(rearrange, k, config.max_k, len(values)),
    )


def check_filters(filters: int, queries: int) -> None:
    """Raises InvalidInput for a list of filters that is not as long as the queries are many."""
    if filters != queries:
        raise InvalidInput(
            "wrong number of filters",
            field="filter",
            expected=f"one map for all queries, or a list with one for each of {queries}",
            got=f"a list of {filters}",
        )


def check_excluded(excluded: tuple[IdArray, ...], queries: int) -> tuple[IdArray, ...]:
    """As it is, or empty where no query excludes anything. Raises InvalidInput for a list of
    exclusions that is not as long as the queries are many."""
    if len(excluded) != queries:
        raise InvalidInput(
            "wrong number of exclusions",
            field="exclude",
            expected=f"a list with a list of item ids for each of {queries} queries",
            got=f"a list of {len(excluded)}",
        )
    return excluded if any(map(len, excluded)) else ()


def check_text(text: str, field: str) -> None:
    """Raises InvalidInput: an empty text, or one of more than MAX_TEXT_CHARS characters."""
    if not text.strip():
        raise InvalidInput(
            "empty text", field=field, expected="one character or more that is no space"
        )
    if len(text) > MAX_TEXT_CHARS:
        raise InvalidInput(
            "text too long",
            field=field,
            expected=f"<= {MAX_TEXT_CHARS} characters",
            got=f"{len(text)} characters",
        )


def _check_returned(num_values: int, names: Sequence[str]) -> None:
    if sum(map(len, names)) > MAX_NAME_CHARACTERS:
        raise InvalidInput(
            "names too long",
            field="return",
            expected=f"<= {MAX_NAME_CHARACTERS} characters in all",
            got="more",
        )
    if num_values > MAX_RETURNED_VALUES:
        raise InvalidInput(
            "too much to return",
            field="return",
            expected=f"queries x k x attributes <= {MAX_RETURNED_VALUES}",
            got=str(num_values),
            hint="ask for fewer attributes, fewer results or fewer queries",
        )


def check_timeout_ms(config: RouterConfig, timeout_ms: float) -> None:
    """Raises InvalidInput where it is out of range."""
    if not 0 < timeout_ms <= config.max_timeout_ms:
        limit = f"above 0 and at most {config.max_timeout_ms:g}"
        raise _out_of_range("timeout_ms", timeout_ms, limit)


def default_timeout_ms(config: RouterConfig, queries: int) -> float:
    """Of a request that names none: the configured one for up to QUERIES_IN_TIME queries, beyond
    that in proportion, up to the largest that may be asked for."""
    longer = config.default_timeout_ms * max(1.0, queries / QUERIES_IN_TIME)
    return min(longer, config.max_timeout_ms)


def write_timeout_ms(config: RouterConfig, timeout_ms: float | None) -> float:
    """Of a request to write; None: it names none. Raises as ``check_timeout_ms``."""
    if timeout_ms is None:
        return min(config.write_timeout_ms, config.max_timeout_ms)
    check_timeout_ms(config, timeout_ms)
    return timeout_ms


def check_size(vectors: FloatArray, kind: str, num_excluded: int = 0) -> None:
    """Raises InvalidInput for more vectors (n, dim), and ids that they exclude, than one frame to a
    shard can carry."""
    excluded_bytes = 8 * num_excluded + 4 * len(vectors) if num_excluded else 0
    if vectors.nbytes <= MAX_QUERY_BYTES < vectors.nbytes + excluded_bytes:
        raise InvalidInput(
            "too many items excluded",
            field="exclude",
            expected=f"<= {MAX_QUERY_BYTES - vectors.nbytes} bytes, 8 per id, of all queries",
            got=f"{excluded_bytes} bytes",
            hint="send the queries in several requests",
        )
    if vectors.nbytes > MAX_QUERY_BYTES:
        raise InvalidInput(
            "batch too large",
            field=kind,
            expected=f"<= {MAX_QUERY_BYTES} bytes of float32",
            got=f"{vectors.nbytes} bytes",
            hint="send it in several requests",
        )


def _queries_of(*values: Any) -> tuple[QueryKind, Any]:
    """The one of the kinds' values, in the order of ``QueryKind``, that is given."""
    given = [(kind, each) for kind, each in zip(KINDS, values, strict=True) if each is not None]
    if len(given) != 1:
        raise InvalidInput(
            "exactly one kind of query is needed",
            field=given[1][0] if given else QueryKind.VECTORS,
            expected=f"one of {', '.join(QueryKind)}",
            got=" and ".join(kind for kind, _ in given) or "none of them",
        )
    return given[0]


def check_batch(kind: QueryKind, size: int, limit: int) -> None:
    """Raises InvalidInput for a batch of no queries, or of too many."""
    if size == 0:
        raise InvalidInput(
            "empty batch", field=kind, expected="at least one query", got="0 queries"
        )
    if size > limit:
        raise too_many(kind, size, limit)


def too_many(field: str, size: int, limit: int, what: str = "queries") -> InvalidInput:
    return InvalidInput(
        "batch too large",
        field=field,
        expected=f"<= {limit} {what}",
        got=f"{size} {what}",
        hint="send them in several requests",
    )


def _out_of_range(field: str, value: float, expected: str) -> InvalidInput:
    return InvalidInput("out of range", field=field, expected=expected, got=f"{value:g}")
