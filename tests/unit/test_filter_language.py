"""The language of filters: what is one, its canonical form, and what is refused, with its path."""

from shardline.shards.core.filter_language import (
    AnyOf,
    Condition,
    Negation,
    Operator,
    check_filter,
    read_filter,
)


def test_reads_what_was_checked() -> None:
    packed = check_filter(
        {"price": {"$lt": 20}, "$not": {"$or": [{"a": 1}, {"b": {"$in": ["y", "x"]}}]}}
    )
    assert set(read_filter(packed).parts) == {
        Condition("price", Operator.LT, 20),
        Negation(AnyOf((Condition("a", Operator.EQ, 1), Condition("b", Operator.IN, ("x", "y"))))),
    }
