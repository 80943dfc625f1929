"""Bodies of writes to plain data, and their answers to bodies; arrays as in ``body_values``.

Ids and vectors become arrays, or lists that are known to hold numbers; whether they are good is
checked once it is known what index they are for. Attributes are values of JSON, in msgpack too.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError

from shardline.router.contract import MAX_WRITE_ITEMS, PayloadTooLarge
from shardline.router.http.body_values import load_map, to_ids, to_matrix
from shardline.router.http.codec import encode, to_microseconds
from shardline.router.http.media import Media
from shardline.router.http.problems import from_validation, short_name, unknown_field, wrong_type
from shardline.router.http.write_models import DeleteBody, ItemBody, UpsertBody
from shardline.router.limits import write_timeout_ms
from shardline.router.router_config import RouterConfig
from shardline.router.written import Deletes, Upserts, WriteAnswer, WriteKind
from shardline.shards.core.errors import InvalidInput

UPSERT_FIELDS = tuple(UpsertBody.model_fields)
DELETE_FIELDS = tuple(DeleteBody.model_fields)
ITEM_FIELDS = tuple(ItemBody.model_fields)
FEATURES = "features"  # what an item may be written by one day
MAX_NAMES = 1024  # attributes of one request
MAX_CELLS = 1 << 20  # items x attributes: as many slots of lists, however few are filled
MAX_DEPTH = 16  # of lists and maps in an attribute
PLAIN = frozenset({bool, int, str, type(None)})  # both formats have integers of 64 bits only
_validate_upsert = TypeAdapter(UpsertBody).validator.validate_python
_validate_delete = TypeAdapter(DeleteBody).validator.validate_python


def decode_upsert(
    body: bytes, media: Media, config: RouterConfig, *, in_loop: bool = False
) -> Upserts:
    """The body of a request to write items.

    Raises:
        TakesLong: as ``load_map``.
        InvalidInput: does not parse, has an unknown field, or one of the wrong type or length.
        PayloadTooLarge: would take too much memory or time.
    """
    content = load_map(body, media, in_loop=in_loop)
    if FEATURES in content:
        raise _not_yet(FEATURES)
    parsed = _checked(content, UPSERT_FIELDS, _validate_upsert)
    columns = [name for name in ("item_ids", "vectors", "attributes") if name in content]
    if (parsed.items is None) == (parsed.item_ids is None) or (parsed.items and columns):
        raise InvalidInput(
            "one form of items is needed",
            field=columns[0] if columns else "items",
            expected="items, or item_ids and vectors",
            got=" and ".join([*(["items"] if parsed.items is not None else []), *columns])
            or "none of them",
        )
    timeout_ms = write_timeout_ms(config, parsed.timeout_ms)
    if parsed.items is not None:
        return _of_items(parsed.items, timeout_ms, parsed.model_version)
    item_ids = to_ids(parsed.item_ids, "item_ids", MAX_WRITE_ITEMS, "items")
    count = _check_count("item_ids", len(item_ids))
    if parsed.vectors is None:
        raise InvalidInput("no vectors", field="vectors", expected="a row per item", got="none")
    vectors = to_matrix(parsed.vectors, "vectors", MAX_WRITE_ITEMS, "items")
    if len(vectors) != count:
        raise InvalidInput(
            "not as many vectors as ids",
            field="vectors",
            expected=f"{count} rows, as item_ids has",
            got=f"{len(vectors)} rows",
        )
    return Upserts(
        item_ids=item_ids,
        vectors=vectors,
        attributes=_columns({} if parsed.attributes is None else parsed.attributes, count),
        timeout_ms=timeout_ms,
        model_version=parsed.model_version,
    )


def decode_delete(
    body: bytes, media: Media, config: RouterConfig, *, in_loop: bool = False
) -> Deletes:
    """The body of a request to delete items. Raises as ``decode_upsert``."""
    content = load_map(body, media, in_loop=in_loop)
    parsed = _checked(content, DELETE_FIELDS, _validate_delete)
    item_ids = to_ids(parsed.item_ids, "item_ids", MAX_WRITE_ITEMS, "items")
    _check_count("item_ids", len(item_ids))
    return Deletes(item_ids=item_ids, timeout_ms=write_timeout_ms(config, parsed.timeout_ms))


def encode_written(answer: WriteAnswer, media: Media) -> bytes:
    others = answer.rows - answer.existed
    is_upsert = answer.kind is WriteKind.UPSERT
    return encode(
        {
            "rows": answer.rows,
            **(
                {"created": others, "updated": answer.existed}
                if is_upsert
                else {"deleted": answer.existed, "missing": others}
            ),
            "duplicates": answer.duplicates,
            "seq": answer.seq,
            "generation": answer.generation,
            "model_version": answer.model_version,
            "took_ms": to_microseconds(answer.took_ms),
            "request_id": answer.request_id,
        },
        media,
    )


def _checked(
    content: dict[Any, Any], known: Sequence[str], validate: Callable[[Any], BaseModel]
) -> Any:
    # before pydantic, which would keep a complaint about each of millions of them
    _refuse_unknown(content, known, "")
    try:
        return validate(content)
    except ValidationError as error:
        raise from_validation(error, known) from error


def _refuse_unknown(content: dict[Any, Any], known: Sequence[str], within: str) -> None:
    for name in content:
        if name not in known:
            raise unknown_field(f"{within}{short_name(name)}", known)


def _check_count(field: str, count: int) -> int:
    if count == 0:
        raise InvalidInput("nothing to write", field=field, expected="at least one item")
    if count > MAX_WRITE_ITEMS:
        raise InvalidInput(
            "too many items",
            field=field,
            expected=f"<= {MAX_WRITE_ITEMS}",
            got=str(count),
            hint="send them in several requests",
        )
    return count


def _not_yet(field: str) -> InvalidInput:
    return InvalidInput(
        "items cannot be written by features yet",
        field=field,
        expected="a vector",
        hint="encode the items with their tower, and send vectors",
    )


def _of_items(items: Any, timeout_ms: float, model_version: str | None) -> Upserts:
    if not isinstance(items, list):
        raise wrong_type("items", "a list of items", items)
    count = _check_count("items", len(items))
    item_ids, vectors, given = [], [], []
    for row, item in enumerate(items):
        where = f"items[{row}]."
        if type(item) is not dict:
            raise wrong_type(where[:-1], "an item", item)
        if FEATURES in item:
            raise _not_yet(where + FEATURES)
        _refuse_unknown(item, ITEM_FIELDS, where)
        number, vector = item.get("item_id"), item.get("vector")
        if type(number) is not int:
            raise wrong_type(f"{where}item_id", "an integer", number)
        if isinstance(vector, np.ndarray) and vector.ndim == 1:
            vector = vector.tolist()
        if type(vector) is not list:
            raise wrong_type(f"{where}vector", "a list of numbers", vector)
        item_ids.append(number)
        vectors.append(vector)
        given.append(_map_of(item.get("attributes"), f"{where}attributes"))
    try:
        matrix = to_matrix(vectors, "items", count, "items")
    except InvalidInput as error:
        error.field = f"{error.field}.vector" if error.field != "items" else "items"
        raise
    return Upserts(
        item_ids=item_ids,
        vectors=matrix,
        attributes=_transposed(given),
        timeout_ms=timeout_ms,
        model_version=model_version,
        id_field=("items", "item_id"),
        vector_field=("items", "vector"),
    )


def _map_of(attributes: Any, field: str) -> dict[str, Any]:
    if attributes is None:
        return {}
    if type(attributes) is not dict:
        raise wrong_type(field, "a map of names to values", attributes)
    for name, value in attributes.items():
        _check_name(name, field)
        attributes[name] = _json_value(value, f"{field}.{name}")
    return attributes


def _transposed(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Of each name its value in every row, None where a row lacks it."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
        _check_names(len(names), len(rows))
    return {name: [row.get(name) for row in rows] for name in names}


def _columns(attributes: Any, count: int) -> dict[str, list[Any]]:
    if not isinstance(attributes, dict):
        raise wrong_type("attributes", "a map of names to lists", attributes)
    _check_names(len(attributes), count)
    columns = {}
    for name, values in attributes.items():
        _check_name(name, "attributes")
        field = f"attributes.{short_name(name)}"
        values = _listed(values)
        if type(values) is not list:
            raise wrong_type(field, "a list with a value per item", values)
        if len(values) != count:
            raise InvalidInput(
                "not as many values as items",
                field=field,
                expected=f"{count} values",
                got=f"{len(values)} values",
            )
        columns[name] = _json_values(values, field)
    return columns


def _check_name(name: Any, field: str) -> None:
    if type(name) is not str:
        raise wrong_type(f"{field}.{short_name(name)}", "a text as name", name)


def _check_names(names: int, items: int) -> None:
    if names > MAX_NAMES or names * items > MAX_CELLS:
        raise PayloadTooLarge(
            "too many attributes",
            field="attributes",
            expected=f"<= {MAX_NAMES} names, and items x names <= {MAX_CELLS}",
            got=f"{names} names, {items} items",
            hint="send the items in several requests",
        )


def _json_values(values: list[Any], field: str) -> list[Any]:
    if _are_plain(values):
        return values
    return [_json_value(value, f"{field}[{row}]") for row, value in enumerate(values)]


def _json_value(value: Any, field: str, depth: int = 0) -> Any:
    """The value, arrays in it made lists. Raises InvalidInput: it is none of JSON."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is float:
        if not math.isfinite(value):
            raise InvalidInput(
                "not finite", field=field, expected="a finite number, or null", got=str(value)
            )
        return value
    value = _listed(value)
    if depth >= MAX_DEPTH or type(value) not in (list, dict):
        expected = f"null, a boolean, number or text, lists and maps of these {MAX_DEPTH} deep"
        raise wrong_type(field, expected, value)
    if type(value) is list:
        if _are_plain(value):
            return value
        return [_json_value(each, field, depth + 1) for each in value]
    for name in value:
        _check_name(name, field)
    return {name: _json_value(each, field, depth + 1) for name, each in value.items()}


def _are_plain(values: list[Any]) -> bool:
    """Whether nothing is wrong with any of them, at a tenth of the cost of a look at each."""
    types = set(map(type, values))
    if types <= PLAIN:
        return True
    if not types <= PLAIN | {float}:
        return False
    return all(map(math.isfinite, [each for each in values if type(each) is float]))


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
