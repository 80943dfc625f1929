"""HTTP bodies to queries and answers to HTTP bodies, JSON or msgpack.

Arrays: in msgpack ``{"dtype": "<f4", "shape": [n, d], "data": bin}`` or plain lists, in JSON plain
lists. Nothing else is taken for a number: no strings, no booleans, no NaN, no ragged rows. An
answer's empty slots (id -1, score -inf) are kept in msgpack, where ids and scores are (n, k)
arrays; JSON has no infinity, so there each row is cut to its live results.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import msgpack
import numpy as np
import orjson
from pydantic import TypeAdapter, ValidationError

from shardline.router.contract import ARRAY_KEYS, Coverage, ItemAnswer, array_of, pack_array
from shardline.router.http.body_cost import COUNTED_FROM, UNCOUNTED_LENGTH, refuse_costly
from shardline.router.http.feature_values import checked_features
from shardline.router.http.media import Media
from shardline.router.http.models import ParamsBody, SearchBody
from shardline.router.http.problems import from_validation, short_name, unknown_field, wrong_type
from shardline.router.limits import check_batch, resolve
from shardline.router.query import QueryKind, ResolvedQuery, SearchAnswer
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import NO_OPTIONS, NO_PARAMS, SearchOptions, SearchParams
from shardline.shards.core.schema import EMPTY_ID

NUMBERS = frozenset({int, float})
INTEGERS = frozenset({int})
SEARCH_FIELDS = tuple(field.alias or name for name, field in SearchBody.model_fields.items())
OPTION_FIELDS = {field.name for field in fields(SearchOptions)} & set(SEARCH_FIELDS)
_SEARCH_FIELDS = frozenset(SEARCH_FIELDS)
PARAM_FIELDS = tuple(ParamsBody.model_fields)
MANY_FIELDS = 16 << 10  # bytes of a body that could hold more unknown fields than are worth a look
# Bytes of msgpack whose values are counted in the event loop: 15 ms where each is another token
COUNTED_IN_LOOP = 32 << 10
# Lists, maps and timestamps of a larger body that is unpacked there: each takes up to a microsecond
FEW = 4096
TIMESTAMPS = (b"\xd6\xff", b"\xd7\xff", b"\xc7\x0c\xff")
MAX_LISTED_DIM = 1 << 16
ARRAY_AT_ONCE = 1 << 18  # numbers of lists that become an array in one step
# SearchBody.model_validate without its layer of Python, a third of its time
validate_search = TypeAdapter(SearchBody).validator.validate_python


class TakesLong(Exception):
    """A body that is to be decoded by another thread than the event loop's."""


def decode_query(
    body: bytes, media: Media, config: RouterConfig, *, in_loop: bool = False
) -> ResolvedQuery:
    """A search request's body; its vectors and ids are numpy arrays, not yet checked one by one.

    Raises:
        TakesLong: ``in_loop``, and its values must be counted first, for which it is too large.
        InvalidInput: does not parse, has an unknown field, a field of the wrong type, or one that
            is out of range.
        PayloadTooLarge: would take too much memory or time.
    """
    if len(body) > COUNTED_FROM:
        refuse_costly(body, media)
    content = _load_json(body) if media is Media.JSON else _load_msgpack(body, in_loop)
    if not isinstance(content, dict):
        raise InvalidInput(
            "not an object",
            field="body",
            expected="a map of fields",
            got=type(content).__name__,
        )
    if len(body) > MANY_FIELDS:
        _refuse_unknown_fields(content)
    try:
        parsed = validate_search(content)
    except ValidationError as error:
        raise _complaint(error) from error
    vectors, features, item_ids = parsed.vectors, parsed.features, parsed.item_ids
    options = NO_OPTIONS
    if not parsed.model_fields_set.isdisjoint(OPTION_FIELDS):
        given = parsed.model_fields_set & OPTION_FIELDS
        options = SearchOptions(**{name: _hashable(getattr(parsed, name)) for name in given})
    return resolve(
        config,
        vectors=None if vectors is None else _matrix(vectors, config.max_batch),
        features=None if features is None else _features(features, config.max_batch),
        item_ids=None if item_ids is None else _ids(item_ids, config.max_batch),
        k=parsed.k,
        timeout_ms=parsed.timeout_ms,
        min_coverage=parsed.min_coverage,
        params=NO_PARAMS if parsed.params is None else SearchParams(**dict(parsed.params)),
        options=options,
        returned=parsed.returned or (),
        original_ids=parsed.return_original_ids,
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
        "generation": answer.generation,
        "model_version": answer.model_version,
        "coverage": coverage,
        "took_ms": _to_microseconds(answer.took_ms),
        "search_ms": _to_microseconds(answer.search_ms),
        "request_id": answer.request_id,
    }
    if answer.reasons:
        content["reasons"] = [asdict(reason) for reason in answer.reasons]
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


def _to_microseconds(ms: float) -> float:
    """Milliseconds >= 0 to three digits; ``round``, which is right to the last bit of every
    float, takes ten times as long."""
    return int(ms * 1000 + 0.5) / 1000


def _load_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(
            "not JSON",
            field="body",
            got=f"{error.msg} at line {error.lineno} column {error.colno}",
        ) from error


def _load_msgpack(body: bytes, in_loop: bool) -> Any:
    if len(body) > COUNTED_FROM:
        return _unpack(body, len(body))
    is_large = in_loop and len(body) > COUNTED_IN_LOOP
    if is_large and sum(map(body.count, TIMESTAMPS)) > FEW:
        raise TakesLong
    try:
        return _unpack(body, UNCOUNTED_LENGTH, _FewContainers() if is_large else None)
    except InvalidInput:
        if len(body) <= UNCOUNTED_LENGTH:
            raise
    if is_large:
        raise TakesLong
    refuse_costly(body, Media.MSGPACK)  # it may be for a longer list only
    return _unpack(body, len(body))


class _FewContainers:
    """Hooks of msgpack that give up a body of many lists and maps."""

    def __init__(self) -> None:
        self._left = FEW

    def pairs(self, pairs: list[tuple[str, Any]]) -> Any:
        self._count()
        return _unpack_map(pairs)

    def items(self, items: list[Any]) -> list[Any]:
        self._count()
        return items

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise TakesLong


def _unpack(body: bytes, max_length: int, few: _FewContainers | None = None) -> Any:
    try:
        return msgpack.unpackb(
            body,
            object_pairs_hook=_unpack_map if few is None else few.pairs,
            list_hook=None if few is None else few.items,
            strict_map_key=True,
            ext_hook=_refuse_ext,
            max_array_len=max_length,
            max_map_len=max_length,
        )
    except InvalidInput:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise InvalidInput(
            "not msgpack", field="body", got=str(error) or type(error).__name__
        ) from error


def _unpack_map(pairs: list[tuple[str, Any]]) -> Any:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise InvalidInput("a key comes twice", field="body", expected="distinct keys")
    return array_of(content) if content.keys() == ARRAY_KEYS else content


def _refuse_ext(code: int, data: bytes) -> Any:
    raise InvalidInput("msgpack extension types are not supported", field="body", got=str(code))


def _refuse_unknown_fields(content: dict[Any, Any]) -> None:
    """Unknown fields: pydantic would keep a complaint about each of millions of them."""
    if not _SEARCH_FIELDS.issuperset(content):
        raise unknown_field(_other_than(SEARCH_FIELDS, content), SEARCH_FIELDS)
    params = content.get("params")
    if type(params) is dict and len(params) > len(PARAM_FIELDS):
        raise unknown_field(f"params.{_other_than(PARAM_FIELDS, params)}", PARAM_FIELDS)


def _other_than(known: tuple[str, ...], content: dict[Any, Any]) -> str:
    return short_name(next(name for name in content if name not in known))


def _matrix(value: Any, max_batch: int) -> Any:
    """A numpy array as it is, or lists of numbers as (n, d) float64."""
    if isinstance(value, np.ndarray):
        return _with_ndim("vectors", value, 2)
    if not isinstance(value, list):
        raise wrong_type("vectors", "a list of rows", value)
    if len(value) > max_batch:
        check_batch(QueryKind.VECTORS, len(value), max_batch)
    for row, numbers in enumerate(value):
        if not isinstance(numbers, list):
            raise wrong_type(
                f"vectors[{row}]", "a list of numbers", numbers, "even one query is a list of one"
            )
        if len(numbers) > MAX_LISTED_DIM:
            raise InvalidInput(
                "too many numbers",
                field=f"vectors[{row}]",
                expected=f"<= {MAX_LISTED_DIM}",
                got=str(len(numbers)),
            )
        if not NUMBERS.issuperset(map(type, numbers)):
            wrong = next(item for item in numbers if type(item) not in NUMBERS)
            raise wrong_type(f"vectors[{row}]", "numbers", wrong)
        if len(numbers) != len(value[0]):
            raise InvalidInput(
                "rows of different lengths",
                field=f"vectors[{row}]",
                expected=f"{len(value[0])} numbers, as in row 0",
                got=f"{len(numbers)} numbers",
            )
    try:
        if value and len(value) * len(value[0]) > ARRAY_AT_ONCE:
            return _row_by_row(value)
        return np.array(value, dtype=np.float64).reshape(len(value), -1 if value else 0)
    except OverflowError as error:
        raise InvalidInput("number too large", field="vectors", expected="float32") from error


def _row_by_row(rows: list[Any]) -> Any:
    """(n, d) float64; empties the list on the way, because both of them whole would be too much."""
    matrix = np.empty((len(rows), len(rows[0])), np.float64)
    for row, numbers in enumerate(rows):
        matrix[row] = numbers
        rows[row] = None
    return matrix


def _with_ndim(field: str, array: np.ndarray[Any, Any], ndim: int) -> np.ndarray[Any, Any]:
    if array.ndim != ndim:
        raise InvalidInput(
            "wrong shape", field=field, expected=f"{ndim}-d array", got=f"{array.ndim}-d array"
        )
    return array


def _ids(value: Any, max_batch: int) -> Any:
    """A numpy array as it is, or the list of integers."""
    if isinstance(value, np.ndarray):
        return _with_ndim("item_ids", value, 1)
    if not isinstance(value, list):
        raise wrong_type("item_ids", "a list of integers", value)
    if len(value) > max_batch:
        check_batch(QueryKind.ITEM_IDS, len(value), max_batch)
    if not INTEGERS.issuperset(map(type, value)):
        row = next(row for row, item in enumerate(value) if type(item) is not int)
        raise wrong_type(f"item_ids[{row}]", "an integer", value[row])
    return value


def _features(value: Any, max_batch: int) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise wrong_type("features", "a list of maps", value)
    if len(value) > max_batch:
        check_batch(QueryKind.FEATURES, len(value), max_batch)
    return checked_features(value)


def _complaint(error: ValidationError) -> InvalidInput:
    inside_params = error.errors(include_url=False, include_context=False)[0]["loc"][:1]
    known = PARAM_FIELDS if inside_params == ("params",) else SEARCH_FIELDS
    return from_validation(error, known)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
