"""Items that are written by features: their vectors, and the attributes that features fill.

Pure. A write belongs to one generation, whose item encoder it is given; where several are written
to, each encodes the same ``Upserts`` with its own.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shardline.router.encoder.item_encoder import ItemEncoder
from shardline.router.written import ABSENT, Upserts, naming
from shardline.shards.core.schema import check_ids


def encoded(given: Upserts, encoder: ItemEncoder) -> Upserts:
    """The same items with vectors, and with the attributes that are features too, unless given.

    Raises:
        InvalidInput: ids that are none; a feature that the item tower lacks or refuses, or one that
            is missing. The field is that of the body.
    """
    assert given.features is not None
    with naming(*given.id_field):
        item_ids = check_ids(given.item_ids, field=given.id_field[0])
    vectors = encoder.encode(item_ids, given.features, _field_of(given))
    return replace(given, vectors=vectors, attributes=_filled(given, given.features, encoder))


def _filled(
    given: Upserts, features: list[dict[str, Any]], encoder: ItemEncoder
) -> dict[str, list[Any]]:
    """Of each attribute a value per item, null where it is neither given nor a feature."""
    nothing = [ABSENT] * len(features)
    filled = {}
    for name in dict.fromkeys((*given.attributes, *encoder.attributes.names)):
        own = given.attributes.get(name, nothing)
        if name in encoder.attributes.names:
            instead = encoder.attributes.column(name, [each[name] for each in features])
        else:
            instead = [None] * len(features)
        filled[name] = [
            other if value is ABSENT else value for value, other in zip(own, instead, strict=True)
        ]
    return filled


def _field_of(given: Upserts) -> Callable[[int, str, str], str]:
    is_by_item = given.id_field[0] == "items"

    def field(row: int, name: str, where: str) -> str:
        if is_by_item:
            return f"items[{row}].features.{name}{where}" if name else f"items[{row}].features"
        return f"features.{name}[{row}]{where}" if name else f"item_ids[{row}]"

    return field
