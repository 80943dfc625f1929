"""HTTP bodies to queries and answers to HTTP bodies, JSON or msgpack.

Arrays: in msgpack ``{"dtype": "<f4", "shape": [n, d], "data": bin}`` or plain lists, in JSON plain
lists. Nothing else is taken for a number: no strings, no booleans, no NaN, no ragged rows. An
answer's empty slots (id -1, score -inf) are kept in msgpack, where ids and scores are (n, k)
arrays; JSON has no infinity, so there each row is cut to its live results.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import msgpack
import numpy as np
import orjson
from pydantic import TypeAdapter, ValidationError

from shardline.router.contract import ARRAY_KEYS, Coverage, ItemAnswer, array_of, pack_array
from shardline.router.http.media import Media
from shardline.router.http.models import ParamsBody, SearchBody
from shardline.router.http.problems import from_validation
from shardline.router.limits import resolve
from shardline.router.query import ResolvedQuery, SearchAnswer
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import NO_OPTIONS, NO_PARAMS, SearchOptions, SearchParams
from shardline.shards.core.schema import EMPTY_ID

NUMBERS = frozenset({int, float})
INTEGERS = frozenset({int})
SCALARS = frozenset({int, float, bool, str, type(None)})
SEARCH_FIELDS = tuple(field.alias or name for name, field in SearchBody.model_fields.items())
OPTION_FIELDS = {field.name for field in fields(SearchOptions)} & set(SEARCH_FIELDS)
PARAM_FIELDS = tuple(ParamsBody.model_fields)
# SearchBody.model_validate without its layer of Python, a third of its time
validate_search = TypeAdapter(SearchBody).validator.validate_python


def decode_query(body: bytes, media: Media, config: RouterConfig) -> ResolvedQuery:
    """A search request's body; its vectors and ids are numpy arrays, not yet checked one by one.

    Raises:
        InvalidInput: does not parse, has an unknown field, a field of the wrong type, or one that
            is out of range.
    """
    content = _load_json(body) if media is Media.JSON else _load_msgpack(body)
    if not isinstance(content, dict):
        raise InvalidInput(
            "not an object",
            field="body",
            expected="a map of fields",
            got=type(content).__name__,
        )
    try:
        parsed = validate_search(content)
    except ValidationError as error:
        raise _complaint(error) from error
    vectors, features, item_ids = parsed.vectors, parsed.features, parsed.item_ids
    options = NO_OPTIONS
    if not parsed.model_fields_set.isdisjoint(OPTION_FIELDS):
        given = parsed.model_fields_set & OPTION_FIELDS
        options = SearchOptions(**{name: getattr(parsed, name) for name in given})
    return resolve(
        config,
        vectors=None if vectors is None else _matrix(vectors),
        features=None if features is None else _features(features),
        item_ids=None if item_ids is None else _ids(item_ids),
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


def _load_msgpack(body: bytes) -> Any:
    try:
        return msgpack.unpackb(
            body, object_pairs_hook=_unpack_map, strict_map_key=True, ext_hook=_refuse_ext
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


def _matrix(value: Any) -> Any:
    """A numpy array as it is, or lists of numbers as (n, d) float64."""
    if isinstance(value, np.ndarray):
        return _with_ndim("vectors", value, 2)
    if not isinstance(value, list):
        raise _wrong_type("vectors", "a list of rows", value)
    for row, numbers in enumerate(value):
        if not isinstance(numbers, list):
            raise _wrong_type(
                f"vectors[{row}]", "a list of numbers", numbers, "even one query is a list of one"
            )
        if not NUMBERS.issuperset(map(type, numbers)):
            wrong = next(item for item in numbers if type(item) not in NUMBERS)
            raise _wrong_type(f"vectors[{row}]", "numbers", wrong)
        if len(numbers) != len(value[0]):
            raise InvalidInput(
                "rows of different lengths",
                field=f"vectors[{row}]",
                expected=f"{len(value[0])} numbers, as in row 0",
                got=f"{len(numbers)} numbers",
            )
    try:
        return np.array(value, dtype=np.float64).reshape(len(value), -1 if value else 0)
    except OverflowError as error:
        raise InvalidInput("number too large", field="vectors", expected="float32") from error


def _with_ndim(field: str, array: np.ndarray[Any, Any], ndim: int) -> np.ndarray[Any, Any]:
    if array.ndim != ndim:
        raise InvalidInput(
            "wrong shape", field=field, expected=f"{ndim}-d array", got=f"{array.ndim}-d array"
        )
    return array


def _ids(value: Any) -> Any:
    """A numpy array as it is, or the list of integers."""
    if isinstance(value, np.ndarray):
        return _with_ndim("item_ids", value, 1)
    if not isinstance(value, list):
        raise _wrong_type("item_ids", "a list of integers", value)
    if not INTEGERS.issuperset(map(type, value)):
        row = next(row for row, item in enumerate(value) if type(item) is not int)
        raise _wrong_type(f"item_ids[{row}]", "an integer", value[row])
    return value


def _features(value: Any) -> list[dict[str, Any]]:
    """Maps of feature names to finite scalars or lists of them; the encoder knows the rest."""
    if not isinstance(value, list):
        raise _wrong_type("features", "a list of maps", value)
    for row, features in enumerate(value):
        if not isinstance(features, dict):
            raise _wrong_type(f"features[{row}]", "a map of features", features)
        for name, item in features.items():
            if isinstance(item, np.ndarray):
                item = features[name] = item.tolist()
            _check_feature(f"features[{row}].{name}", item)
    return value


def _check_feature(field: str, value: Any) -> None:
    for item in value if isinstance(value, list) else (value,):
        if type(item) not in SCALARS:
            raise _wrong_type(field, "a number, string, boolean or a list of them", item)
        if isinstance(item, float) and not math.isfinite(item):
            raise InvalidInput("not finite", field=field, expected="a finite number", got=str(item))


def _wrong_type(field: str, expected: str, value: Any, hint: str | None = None) -> InvalidInput:
    return InvalidInput(
        "wrong type", field=field, expected=expected, got=type(value).__name__, hint=hint
    )


def _complaint(error: ValidationError) -> InvalidInput:
    inside_params = error.errors(include_url=False, include_context=False)[0]["loc"][:1]
    known = PARAM_FIELDS if inside_params == ("params",) else SEARCH_FIELDS
    return from_validation(error, known)
