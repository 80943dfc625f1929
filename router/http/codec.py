"""HTTP bodies to queries and answers to HTTP bodies, JSON or msgpack.

Arrays are as in ``body_values``. An answer's empty slots (id -1, score -inf) are kept in msgpack,
where ids and scores are (n, k) arrays; JSON has no infinity, so there each row is cut to its live
results.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import msgpack
import orjson
from pydantic import TypeAdapter, ValidationError

from shardline.router.contract import Coverage, ItemAnswer, pack_array
from shardline.router.experiments.assignment import KEY_FIELD, Experiments
from shardline.router.http.body_values import TakesLong, load_map, to_ids, to_matrix
from shardline.router.http.excluded_values import takes_long, to_excluded
from shardline.router.http.feature_values import checked_features
from shardline.router.http.media import Media
from shardline.router.http.models import ParamsBody, SearchBody, SeqOriginBody
from shardline.router.http.problems import from_validation, short_name, unknown_field, wrong_type
from shardline.router.http.rearrange_body import read_rearrangement
from shardline.router.http.text_fields import to_texts
from shardline.router.limits import check_batch, resolve
from shardline.router.list_names import check_list_name
from shardline.router.query import QueryKind, ResolvedQuery, SearchAnswer, SeqOrigin
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.filter_language import check_filter
from shardline.shards.core.messages import NO_OPTIONS, NO_PARAMS, SearchOptions, SearchParams
from shardline.shards.core.schema import EMPTY_ID

SEARCH_FIELDS = tuple(field.alias or name for name, field in SearchBody.model_fields.items())
# the filter is not as the options have it: it is checked and packed first
OPTION_FIELDS = {field.name for field in fields(SearchOptions)} & set(SEARCH_FIELDS) - {"filter"}
_SEARCH_FIELDS = frozenset(SEARCH_FIELDS)
PARAM_FIELDS = tuple(ParamsBody.model_fields)
ORIGIN_FIELDS = tuple(SeqOriginBody.model_fields)
NESTED_FIELDS = {"params": PARAM_FIELDS, "min_seq_of": ORIGIN_FIELDS}
MANY_FIELDS = 16 << 10  # bytes of a body that could hold more unknown fields than are worth a look
# What is checked of filters in the event loop, within 2 ms or so: a filter in a body of so many
# bytes; of a list so many, in a body of so many, as each condition takes 3 us and each filter 5
FILTERED_IN_LOOP = 32 << 10
FILTERS_IN_LOOP = 64
FILTERS_BYTES_IN_LOOP = 8 << 10
# SearchBody.model_validate without its layer of Python, a third of its time
validate_search = TypeAdapter(SearchBody).validator.validate_python
NO_EXPERIMENTS = Experiments()
NONE_FORCED: Mapping[str, str] = {}


def decode_query(
    body: bytes,
    media: Media,
    config: RouterConfig,
    *,
    in_loop: bool = False,
    experiments: Experiments = NO_EXPERIMENTS,
    forced: Mapping[str, str] = NONE_FORCED,
) -> ResolvedQuery:
    """A search request's body; its vectors and ids are numpy arrays, not yet checked one by one.

    What it does not give may come from its arms of ``experiments``; forced: experiment -> arm,
    whatever its key says.

    Raises:
        TakesLong: ``in_loop``, and it is too large for that: its values must be counted first, or
            it has filters.
        InvalidInput: does not parse, has an unknown field, a field of the wrong type, or one that
            is out of range.
        PayloadTooLarge: would take too much memory or time.
    """
    content = load_map(body, media, in_loop=in_loop)
    if len(body) > MANY_FIELDS:
        _refuse_unknown_fields(content)
    if in_loop and _takes_long(content.get("filter"), len(body)):
        raise TakesLong
    if in_loop and takes_long(content.get("exclude")):
        raise TakesLong
    if not forced and (not experiments or content.get(KEY_FIELD) is None):
        return _query_of(content, config)
    whole, assignment = experiments.enter(content, forced)
    try:
        query = _query_of(whole, config)
    except InvalidInput as error:
        raise error if assignment is None else experiments.of_arm(error, assignment) from None
    query.assignment = assignment
    return query


def _query_of(content: Mapping[Any, Any], config: RouterConfig) -> ResolvedQuery:
    """Raises as ``decode_query``, but for TakesLong."""
    try:
        parsed = validate_search(content)
    except ValidationError as error:
        raise _complaint(error) from error
    vectors, features, item_ids = parsed.vectors, parsed.features, parsed.item_ids
    options = NO_OPTIONS
    if not parsed.model_fields_set.isdisjoint(OPTION_FIELDS):
        given = parsed.model_fields_set & OPTION_FIELDS
        options = SearchOptions(**{name: _hashable(getattr(parsed, name)) for name in given})
    filters: tuple[bytes, ...] = ()
    if isinstance(parsed.filter, list):
        filters = _filters(parsed.filter, config.max_batch)
    elif parsed.filter is not None:
        options = replace(options, filter=check_filter(parsed.filter))
    return resolve(
        config,
        vectors=None if vectors is None else to_matrix(vectors, "vectors", config.max_batch),
        features=None if features is None else _features(features, config.max_batch),
        item_ids=None if item_ids is None else to_ids(item_ids, "item_ids", config.max_batch),
        texts=None if parsed.texts is None else to_texts(parsed.texts, config.max_batch),
        exclude_lists=_list_names(parsed.exclude_lists),
        k=parsed.k,
        timeout_ms=parsed.timeout_ms,
        min_coverage=parsed.min_coverage,
        params=NO_PARAMS if parsed.params is None else SearchParams(**dict(parsed.params)),
        options=options,
        returned=parsed.returned or (),
        original_ids=parsed.return_original_ids,
        min_seq_of=None if parsed.min_seq_of is None else SeqOrigin(**dict(parsed.min_seq_of)),
        filters=filters,
        excluded=None if parsed.exclude is None else to_excluded(parsed.exclude, config.max_batch),
        exclude_history=parsed.exclude_history,
        rearrange=read_rearrangement(parsed.cap, parsed.boost, parsed.diversify),
    )


def encode_answer(answer: SearchAnswer, media: Media) -> bytes:
    """A search's answer, columnar."""
    ids, scores = answer.ranked
    coverage = {name: getattr(answer.coverage, name) for name in Coverage.__slots__}
    if answer.coverage.degraded:
        coverage["degraded"] = [asdict(each) for each in answer.coverage.degraded]
    content: dict[str, Any] = {
        "ids": ids,
        "scores": scores,
        "seq": answer.seq,
        "generation": answer.generation,
        "table_version": answer.table_version,
        "model_version": answer.model_version,
        "coverage": coverage,
        "took_ms": to_microseconds(answer.took_ms),
        "search_ms": to_microseconds(answer.search_ms),
        "request_id": answer.request_id,
    }
    if answer.reasons:
        content["reasons"] = [reason.content for reason in answer.reasons]
    if answer.others_share is not None:
        content["others_share"] = answer.others_share
    if answer.considered is not None:
        content["pool"] = answer.considered.tolist()
    if answer.arms:
        content["arms"] = dict(answer.arms)
    if answer.returned is not None:
        if answer.returned.attributes:
            content["attributes"] = answer.returned.attributes
        if answer.returned.missing:
            content["attributes_missing"] = [asdict(each) for each in answer.returned.missing]
        if answer.returned.original_ids is not None:
            content["original_ids"] = answer.returned.original_ids
    if media is Media.JSON:
        live = (ids != EMPTY_ID).sum(axis=1)
        if (live < ids.shape[1]).any():
            content["ids"] = [row[:n] for row, n in zip(ids, live, strict=True)]
            content["scores"] = [row[:n] for row, n in zip(scores, live, strict=True)]
    return encode(content, media)


def encode_item(answer: ItemAnswer, media: Media) -> bytes:
    return encode({name: getattr(answer, name) for name in ItemAnswer.__slots__}, media)


def encode(content: Mapping[str, Any], media: Media) -> bytes:
    """Plain data and numpy arrays."""
    if media is Media.JSON:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    body: bytes = msgpack.packb(content, default=pack_array)
    return body


def to_microseconds(ms: float) -> float:
    """Milliseconds >= 0 to three digits; ``round``, which is right to the last bit of every
    float, takes ten times as long."""
    return int(ms * 1000 + 0.5) / 1000


def _refuse_unknown_fields(content: dict[Any, Any]) -> None:
    """Unknown fields: pydantic would keep a complaint about each of millions of them."""
    if not _SEARCH_FIELDS.issuperset(content):
        raise unknown_field(_other_than(SEARCH_FIELDS, content), SEARCH_FIELDS)
    for name, known in NESTED_FIELDS.items():
        given = content.get(name)
        if type(given) is dict and len(given) > len(known):
            raise unknown_field(f"{name}.{_other_than(known, given)}", known)


def _other_than(known: tuple[str, ...], content: dict[Any, Any]) -> str:
    return short_name(next(name for name in content if name not in known))


def _features(value: Any, max_batch: int) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise wrong_type("features", "a list of maps", value)
    if len(value) > max_batch:
        check_batch(QueryKind.FEATURES, len(value), max_batch)
    return checked_features(value)


def _list_names(given: list[str]) -> list[str]:
    return [check_list_name(name, f"exclude_lists[{at}]") for at, name in enumerate(given)]


def _takes_long(given: Any, body_bytes: int) -> bool:
    """Whether what a body has for ``filter`` is to be checked outside the event loop."""
    if isinstance(given, list):
        return len(given) > FILTERS_IN_LOOP or body_bytes > FILTERS_BYTES_IN_LOOP
    return given is not None and body_bytes > FILTERED_IN_LOOP


def _filters(value: list[Any], max_batch: int) -> tuple[bytes, ...]:
    """Of each query, b"" for null."""
    if not value or len(value) > max_batch:
        raise InvalidInput(
            "wrong number of filters",
            field="filter",
            expected=f"one map for all queries, or a list with one for each, at most {max_batch}",
            got=f"a list of {len(value)}",
        )
    return tuple(
        b"" if each is None else check_filter(each, f"filter[{row}]")
        for row, each in enumerate(value)
    )


def _complaint(error: ValidationError) -> InvalidInput:
    loc = error.errors(include_url=False, include_context=False)[0]["loc"]
    known = NESTED_FIELDS.get(str(loc[0]), SEARCH_FIELDS) if len(loc) > 1 else SEARCH_FIELDS
    return from_validation(error, known)


def _hashable(value: Any) -> Any:
    return tuple([each or 0 for each in value]) if isinstance(value, list) else value
