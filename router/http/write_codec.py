"""Bodies of writes to plain data, and their answers to bodies; arrays as in ``body_values``.

Ids and vectors become arrays, or lists that are known to hold numbers; whether they are good is
checked once it is known what index they are for. Attributes are values of JSON, in msgpack too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError

from shardline.router.contract import MAX_WRITE_ITEMS
from shardline.router.http.body_values import load_map, to_ids, to_matrix
from shardline.router.http.codec import encode, to_microseconds
from shardline.router.http.feature_values import feature_columns, feature_maps
from shardline.router.http.media import Media
from shardline.router.http.problems import from_validation, short_name, unknown_field, wrong_type
from shardline.router.http.write_attributes import attribute_columns, attribute_map, transposed
from shardline.router.http.write_models import DeleteBody, ItemBody, UpsertBody
from shardline.router.limits import write_timeout_ms
from shardline.router.router_config import RouterConfig
from shardline.router.written import ABSENT, Deletes, Upserts, WriteAnswer, WriteKind
from shardline.shards.core.errors import InvalidInput

UPSERT_FIELDS = tuple(UpsertBody.model_fields)
DELETE_FIELDS = tuple(DeleteBody.model_fields)
ITEM_FIELDS = tuple(ItemBody.model_fields)
VECTOR, FEATURES = "vector", "features"  # an item has one of them
COLUMNS = ("item_ids", "vectors", FEATURES, "attributes")
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
    parsed = checked_fields(content, UPSERT_FIELDS, _validate_upsert)
    columns = [name for name in COLUMNS if name in content]
    if (parsed.items is None) == (parsed.item_ids is None) or (parsed.items and columns):
        raise InvalidInput(
            "one form of items is needed",
            field=columns[0] if columns else "items",
            expected="items, or item_ids and vectors or features",
            got=" and ".join([*(["items"] if parsed.items is not None else []), *columns])
            or "none of them",
        )
    timeout_ms = write_timeout_ms(config, parsed.timeout_ms)
    if parsed.items is not None:
        return _of_items(parsed.items, timeout_ms, parsed.model_version)
    return _of_columns(parsed, timeout_ms)


def decode_delete(
    body: bytes, media: Media, config: RouterConfig, *, in_loop: bool = False
) -> Deletes:
    """The body of a request to delete items. Raises as ``decode_upsert``."""
    content = load_map(body, media, in_loop=in_loop)
    parsed = checked_fields(content, DELETE_FIELDS, _validate_delete)
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
            "table_version": answer.table_version,
            "model_version": answer.model_version,
            "took_ms": to_microseconds(answer.took_ms),
            "request_id": answer.request_id,
        },
        media,
    )


def checked_fields(
    content: dict[Any, Any], known: Sequence[str], validate: Callable[[Any], BaseModel]
) -> Any:
    """The model of a body. Raises InvalidInput: a field is unknown, or has a wrong value."""
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


def _of_columns(parsed: UpsertBody, timeout_ms: float) -> Upserts:
    item_ids = to_ids(parsed.item_ids, "item_ids", MAX_WRITE_ITEMS, "items")
    count = _check_count("item_ids", len(item_ids))
    attributes = attribute_columns({} if parsed.attributes is None else parsed.attributes, count)
    if (parsed.vectors is None) == (parsed.features is None):
        raise InvalidInput(
            "one of vectors and features is needed",
            field="vectors",
            expected="a row per item, or features instead",
            got="none" if parsed.vectors is None else "both",
        )
    vectors = features = None
    if parsed.features is not None:
        features = feature_columns(parsed.features, count)
    else:
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
        features=features,
        attributes=attributes,
        timeout_ms=timeout_ms,
        model_version=parsed.model_version,
    )


def _of_items(items: Any, timeout_ms: float, model_version: str | None) -> Upserts:
    if not isinstance(items, list):
        raise wrong_type("items", "a list of items", items)
    count = _check_count("items", len(items))
    item_ids, written, given = [], [], []
    by = FEATURES if type(items[0]) is dict and FEATURES in items[0] else VECTOR
    for row, item in enumerate(items):
        where = f"items[{row}]."
        if type(item) is not dict:
            raise wrong_type(where[:-1], "an item", item)
        _refuse_unknown(item, ITEM_FIELDS, where)
        _check_kind(item, by, row)
        number = item.get("item_id")
        if type(number) is not int:
            raise wrong_type(f"{where}item_id", "an integer", number)
        item_ids.append(number)
        written.append(item[FEATURES] if by == FEATURES else _vector(item, where))
        given.append(attribute_map(item.get("attributes"), f"{where}attributes"))
    is_by_features = by == FEATURES
    return Upserts(
        item_ids=item_ids,
        vectors=None if is_by_features else _matrix(written, count),
        features=feature_maps(written) if is_by_features else None,
        attributes=transposed(given, ABSENT if is_by_features else None),
        timeout_ms=timeout_ms,
        model_version=model_version,
        id_field=("items", "item_id"),
        vector_field=("items", VECTOR),
    )


def _check_kind(item: dict[Any, Any], by: str, row: int) -> None:
    """InvalidInput where an item is not written by the same as the first one."""
    other = VECTOR if by == FEATURES else FEATURES
    if item.get(other) is None and item.get(by) is not None:
        return
    if other in item and by in item:
        raise InvalidInput(
            "one of vector and features is needed", field=f"items[{row}].{other}", got="both"
        )
    if other in item:
        raise InvalidInput(
            "items of two kinds",
            field=f"items[{row}].{other}",
            expected=f"{by}, as items[0] has",
            hint="send those with vectors and those with features in requests of their own",
        )
    expected = "a list of numbers" if by == VECTOR else "a map of features"
    raise wrong_type(f"items[{row}].{by}", expected, item.get(by))


def _vector(item: dict[Any, Any], where: str) -> list[Any]:
    vector = item[VECTOR]
    if isinstance(vector, np.ndarray) and vector.ndim == 1:
        vector = vector.tolist()
    if type(vector) is not list:
        raise wrong_type(f"{where}vector", "a list of numbers", vector)
    return vector


def _matrix(vectors: list[Any], count: int) -> Any:
    try:
        return to_matrix(vectors, "items", count, "items")
    except InvalidInput as error:
        error.field = f"{error.field}.vector" if error.field != "items" else "items"
        raise
