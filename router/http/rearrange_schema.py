"""The shape of ``cap``, ``boost`` and ``diversify``, as OpenAPI describes it.

Only for readers and for tools that make requests: ``rearrange_body`` checks them, and
docs/RESULTS.md says what they mean.
"""

from typing import Any

from shardline.router.rearrange.rearrangement import MAX_BOOSTS, MAX_CAPS, MAX_NAME_CHARACTERS
from shardline.shards.core.schema import MAX_K

REF = "#/components/schemas/"


def _one_or_more(name: str, most: int) -> dict[str, Any]:
    ref = {"$ref": REF + name}
    listed = {"type": "array", "items": ref, "maxItems": most}
    return {"anyOf": [ref, listed, {"type": "null"}], "default": None}


def _map(description: str, required: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


CAP_FIELD = _one_or_more("Cap", MAX_CAPS)
BOOST_FIELD = _one_or_more("Boost", MAX_BOOSTS)
DIVERSIFY_FIELD = {"anyOf": [{"$ref": REF + "Diversify"}, {"type": "null"}], "default": None}
_COLUMN = {"type": "string", "maxLength": MAX_NAME_CHARACTERS}
_POOL = {
    "anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_K}, {"type": "null"}],
    "description": "best items of each query that are considered, k or more",
}

REARRANGE_SCHEMAS: dict[str, dict[str, Any]] = {
    "Cap": _map(
        "At most max items of an answer have the same value of column.",
        ["column", "max"],
        {
            "column": {**_COLUMN, "description": "an attribute: texts, integers, booleans, dates"},
            "max": {"type": "integer", "minimum": 1, "maximum": MAX_K},
        },
    ),
    "Boost": _map(
        "Adds to scores: weight times a number, or weight times 2^(-age / half-life) of a date.",
        ["column", "weight"],
        {
            "column": {**_COLUMN, "description": "an attribute: numbers, booleans, dates, times"},
            "weight": {"type": "number"},
            "half_life_days": {
                "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}],
                "description": "of a date: the age at which it adds half of weight",
            },
            "pool": _POOL,
        },
    ),
    "Diversify": _map(
        "Maximal marginal relevance: items like others before them make way.",
        ["lambda"],
        {
            "lambda": {
                "type": "number",
                "minimum": 0,
                "maximum": 1,
                "description": "1: relevance alone, 0: difference alone",
            },
            "pool": _POOL,
        },
    ),
}
