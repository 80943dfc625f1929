"""The shape of filters, as OpenAPI describes it: docs/FILTERS.md says what they mean.

Only for readers and for tools that make requests: ``shards.core.filter_language`` checks filters.
"""

from typing import Any

REF = "#/components/schemas/"
VALUE: dict[str, Any] = {
    "description": "a text, number, boolean or null; dates and times are ISO 8601 texts",
    "anyOf": [{"type": kind} for kind in ("string", "number", "boolean", "null")],
}
VALUES: dict[str, Any] = {"type": "array", "items": VALUE}

FILTER_FIELD: dict[str, Any] = {
    "anyOf": [
        {"$ref": REF + "Filter"},
        {"type": "array", "items": {"anyOf": [{"$ref": REF + "Filter"}, {"type": "null"}]}},
        {"type": "null"},
    ],
    "default": None,
}


def _operator(description: str, shape: dict[str, Any]) -> dict[str, Any]:
    return {**shape, "description": description}


FILTER_SCHEMAS: dict[str, dict[str, Any]] = {
    "Filter": {
        "type": "object",
        "title": "Filter",
        "description": "Attributes of items (or item_id) and what must hold for them; all of it "
        "must. A value stands for $eq, null for a missing value.",
        "properties": {
            "$and": _operator(
                "all of these hold", {"type": "array", "items": {"$ref": REF + "Filter"}}
            ),
            "$or": _operator(
                "one of these holds", {"type": "array", "items": {"$ref": REF + "Filter"}}
            ),
            "$not": _operator("this does not hold", {"$ref": REF + "Filter"}),
        },
        "additionalProperties": {"anyOf": [*VALUE["anyOf"], {"$ref": REF + "FilterCondition"}]},
        "example": {"price": {"$lt": 20}, "category": {"$in": ["a", "b"]}},
    },
    "FilterCondition": {
        "type": "object",
        "title": "FilterCondition",
        "description": "What must hold for one attribute; of a list, for one of its elements.",
        "minProperties": 1,
        "properties": {
            "$eq": _operator("equal", VALUE),
            "$ne": _operator("not equal; holds for missing values too", VALUE),
            "$in": _operator("one of these", VALUES),
            "$nin": _operator("none of these; holds for missing values too", VALUES),
            "$gt": _operator("greater than", VALUE),
            "$gte": _operator("greater than or equal", VALUE),
            "$lt": _operator("less than", VALUE),
            "$lte": _operator("less than or equal", VALUE),
            "$exists": _operator("whether there is a value", {"type": "boolean"}),
            "$contains": _operator(
                "a list that has this element, or a text that has this part", VALUE
            ),
            "$not": _operator("these do not hold", {"$ref": REF + "FilterCondition"}),
        },
        "additionalProperties": False,
    },
}
