"""What kind of values an attribute has, as far as a router must know it: plain names, no Arrow."""

from enum import StrEnum


class AttributeKind(StrEnum):
    """Of the values of one attribute, as answers have them (``live.item_attributes``)."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"  # with a fraction: floats, decimals, and seconds of times and durations
    BOOLEAN = "boolean"
    DATE = "date"  # ISO 8601 texts
    TIMESTAMP = "timestamp"  # ISO 8601 texts
    NOTHING = "nothing"  # a column in which every value is missing
    OTHER = "other"  # lists, maps, bytes, ids of other systems
