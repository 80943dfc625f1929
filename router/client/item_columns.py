"""Items to write, in whatever form a caller has them, as columns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from shardline.router.client.conversions import (
    MAX_GOT,
    listed,
    refuse_hidden,
    to_attribute,
    to_ids,
    to_json,
    to_matrix,
)
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import FloatArray, IdArray

ID_NAME, VECTOR_NAME, FEATURES, ATTRIBUTES = "item_id", "vector", "features", "attributes"

Columns: TypeAlias = Mapping[str, list[Any]]  # values of JSON, as many per name as there are items


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenItems:
    """item_ids (n,) int64, and vectors (n, dim) float32 or features."""

    item_ids: IdArray
    vectors: FloatArray | None
    features: Columns | None
    attributes: Columns


def written_items(
    items: Any, item_ids: Any, vectors: Any, features: Any, attributes: Any
) -> WrittenItems:
    """``items`` alone, or item_ids with vectors or features, and attributes.

    Raises:
        InvalidInput: another combination, columns of different lengths, or no columns.
    """
    by_name = (item_ids, vectors, features)
    if (items is None) == (item_ids is None) or (items is not None and any(_given(by_name))):
        raise InvalidInput(
            "one form of items is needed",
            field="items",
            expected="items, or item_ids and vectors or features",
        )
    if items is not None:
        item_ids, vectors, features, attributes = _of_items(items)
    if (vectors is None) == (features is None):
        raise InvalidInput(
            "no vectors" if vectors is None else "vectors and features",
            field="vectors",
            expected="a row per item, or features instead",
            got="none" if vectors is None else "both",
        )
    written = WrittenItems(
        item_ids=to_ids(item_ids),
        vectors=None if vectors is None else to_matrix(vectors),
        features=None if features is None else _converted(features, FEATURES),
        attributes=_converted(attributes, ATTRIBUTES),
    )
    _check_lengths(written)
    return written


def _given(values: Sequence[Any]) -> list[bool]:
    return [value is not None for value in values]


def _converted(values: Any, field: str) -> Columns:
    convert = to_attribute if field == ATTRIBUTES else to_json
    return {
        name: _values(column, f"{field}.{name}", convert)
        for name, column in _columns(values, field).items()
    }


def _check_lengths(written: WrittenItems) -> None:
    lengths = {} if written.vectors is None else {"vectors": len(written.vectors)}
    for field, columns in ((FEATURES, written.features or {}), (ATTRIBUTES, written.attributes)):
        lengths |= {f"{field}.{name}": len(values) for name, values in columns.items()}
    for field, length in lengths.items():
        if length != len(written.item_ids):
            raise InvalidInput(
                "columns of different lengths",
                field=field,
                expected=f"{len(written.item_ids)}, as item_ids has",
                got=str(length),
            )


def _of_items(items: Any) -> tuple[Any, Any, Any, Any]:
    """ids, vectors, features, attributes: of a table, whose other columns are attributes, or of
    maps."""
    if _is_table(items):
        columns = _columns(items, "items")
        for name in (ID_NAME, VECTOR_NAME):
            if name not in columns:
                raise InvalidInput(
                    "no such column",
                    field=f"items.{name}",
                    got=", ".join(map(str, columns)),
                    hint="items without vectors: name item_ids and features",
                )
        return columns.pop(ID_NAME), listed(columns.pop(VECTOR_NAME)), None, columns
    rows = list(items)
    by = FEATURES if rows and isinstance(rows[0], Mapping) and FEATURES in rows[0] else VECTOR_NAME
    for row, item in enumerate(rows):
        known = isinstance(item, Mapping) and {ID_NAME, by} <= item.keys()
        if not known or item.keys() - {ID_NAME, by, ATTRIBUTES}:
            raise InvalidInput(
                "not an item",
                field=f"items[{row}]",
                expected=f"{ID_NAME}, {by}, as the first has it, and maybe {ATTRIBUTES}",
                got=repr(item)[:MAX_GOT],
            )
    written, given = [item[by] for item in rows], [item.get(ATTRIBUTES) or {} for item in rows]
    names = dict.fromkeys(name for each in given for name in each)
    item_ids = [item[ID_NAME] for item in rows]
    if by == VECTOR_NAME:
        columns = {name: [each.get(name) for each in given] for name in names}
        return item_ids, written, None, columns
    features = _features(written)
    # an attribute that an item does not name is its feature of that name
    columns = {
        name: [own.get(name, each.get(name)) for own, each in zip(given, written, strict=True)]
        for name in names
    }
    return item_ids, None, features, columns


def _features(rows: list[Any]) -> dict[str, list[Any]]:
    names = list(rows[0]) if isinstance(rows[0], Mapping) else []
    for row, features in enumerate(rows):
        if not isinstance(features, Mapping) or features.keys() != set(names):
            raise InvalidInput(
                "not a map of features, or not those of the first item",
                field=f"items[{row}].{FEATURES}",
                expected=f"{', '.join(map(str, names))}; None for what is not known",
                got=repr(features)[:MAX_GOT],
            )
    return {name: [each[name] for each in rows] for name in names}


def _is_table(value: Any) -> bool:
    return any(hasattr(value, name) for name in ("to_dicts", "column_names", "to_dict", "schema"))


def _columns(values: Any, field: str) -> dict[str, Any]:
    """Of a map of columns, or a table of pyarrow, pandas or polars."""
    if values is None:
        return {}
    if isinstance(values, Mapping):
        return dict(values)
    names = getattr(values, "column_names", None) or list(getattr(values, "columns", ()))
    if not names or not all(isinstance(name, str) for name in names):
        raise InvalidInput(
            "not columns",
            field=field,
            expected="a map of names to lists, or a table",
            got=repr(values)[:MAX_GOT],
        )
    is_arrow = hasattr(values, "column_names")
    return {name: values.column(name) if is_arrow else values[name] for name in names}


def _values(values: Any, field: str, convert: Callable[[Any], Any]) -> list[Any]:
    """Of a column, as JSON has them; NaN is how frames write what is missing."""
    refuse_hidden(field, values)
    if isinstance(values, str | bytes) or not (
        isinstance(values, Sequence | np.ndarray) or hasattr(values, "__len__")
    ):
        raise InvalidInput(
            "not a column",
            field=field,
            expected="a list with a value per item",
            got=repr(values)[:MAX_GOT],
        )
    plain = values.tolist() if isinstance(values, np.ndarray) else listed(values)
    return [_value(each, convert) for each in plain]


def _value(value: Any, convert: Callable[[Any], Any]) -> Any:
    if isinstance(value, list | tuple | np.ndarray):
        return [_value(each, convert) for each in value]
    if isinstance(value, Mapping):
        return {str(name): _value(each, convert) for name, each in value.items()}
    return convert(value)
