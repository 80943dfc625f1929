"""Why an answer is short: a table of what was searched, and of the reasons that follow."""

from typing import Any

import numpy as np
import pytest

from shardline.router.contract import Coverage, Degraded, Reason
from shardline.router.query import Merged
from shardline.router.shortfall import shortfall_reasons
from shardline.shards.core.messages import NO_FILTER
from shardline.shards.core.schema import Ranked

K = 10
MISSING = (Degraded(shard=1, code="unavailable", text="away"),)


def merged(
    found: list[int],
    *,
    rows: int = 100,
    asked: int | None = None,
    degraded: tuple[Degraded, ...] = (),
    **counts: list[int],
) -> Merged:
    """found: how many items each query has, of K + 1 slots."""
    slots = np.arange(K + 1)
    ids = np.where(slots < np.array(found)[:, None], slots, -1)
    scores = np.where(ids < 0, -np.inf, 1).astype(np.float32)
    coverage = Coverage(
        shards_asked=2,
        shards_answered=2 - len(degraded),
        rows_asked=rows if asked is None else asked,
        rows_answered=rows,
        degraded=degraded,
    )
    given: dict[str, Any] = {name: np.array(each) for name, each in counts.items()}
    return Merged(ranked=Ranked(ids, scores), coverage=coverage, search_ms=0, seq=(0,), **given)


def told(reasons: tuple[Reason, ...]) -> list[tuple[Any, ...]]:
    """(query, code, count, or what matched)."""
    return [
        (each.query, str(each.code), each.matched if each.count is None else each.count)
        for each in reasons
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(merged([10, 11]), [], id="enough"),
        pytest.param(merged([7], rows=7), [], id="the index has no more"),
        pytest.param(merged([3, 10], matched=[3, 50]), [(0, "filter", 3)], id="filter"),
        pytest.param(merged([0], matched=[0]), [(0, "filter", 0)], id="nothing matches"),
        pytest.param(
            merged([3, 7], rows=7, matched=[3, NO_FILTER]), [(0, "filter", 3)], id="one has none"
        ),
        pytest.param(merged([4], rows=7, excluded=[3]), [(0, "exclusion", 3)], id="exclusion"),
        pytest.param(merged([9], rows=50, excluded=[41]), [(0, "exclusion", 41)], id="many"),
        pytest.param(
            merged([2], matched=[6], excluded=[4]),
            [(0, "filter", 6), (0, "exclusion", 4)],
            id="filter and exclusion",
        ),
        pytest.param(
            merged([5], matched=[12], excluded=[7]),
            [(0, "exclusion", 7)],
            id="without exclusions there would be enough",
        ),
        pytest.param(merged([10], rows=50, excluded=[40]), [], id="just enough are left"),
        pytest.param(
            merged([6], rows=6, asked=100, degraded=MISSING),
            [(0, "coverage", 94)],
            id="coverage",
        ),
        pytest.param(
            merged([10], rows=60, asked=100, degraded=MISSING), [], id="partial, and enough"
        ),
        pytest.param(
            merged([1], rows=60, asked=100, degraded=MISSING, matched=[3], excluded=[2]),
            [(0, "filter", 3), (0, "exclusion", 2), (0, "coverage", 40)],
            id="three reasons",
        ),
        pytest.param(merged([4], rows=1000), [(0, "probe_limit", 6)], id="probe limit"),
        pytest.param(merged([4], rows=8), [(0, "probe_limit", 4)], id="of fewer than k"),
        pytest.param(
            merged([2], rows=12, excluded=[5]),
            [(0, "exclusion", 5), (0, "probe_limit", 5)],
            id="exclusion and probe limit",
        ),
        pytest.param(
            merged([2], rows=100, excluded=[5]),
            [(0, "probe_limit", 8)],
            id="exclusions took nothing that was needed",
        ),
        pytest.param(
            merged([6, 7], rows=7, left_out=[1, 0]), [], id="the item that was asked with"
        ),
        pytest.param(
            merged([2], rows=7, left_out=[1], excluded=[4]),
            [(0, "exclusion", 4)],
            id="the item that was asked with, and exclusions",
        ),
    ],
)
def test_reasons_of_short_answers(answer: Merged, expected: list[tuple[Any, ...]]) -> None:
    assert told(shortfall_reasons(answer, K)) == expected


def test_a_query_that_was_not_asked_has_its_reason_already() -> None:
    answer = merged([0, 3, 0], matched=[NO_FILTER, 3, 0])
    assert told(shortfall_reasons(answer, K, {0})) == [(1, "filter", 3), (2, "filter", 0)]


def test_texts_say_what_was_taken() -> None:
    answer = merged([0, 1], rows=60, asked=100, degraded=MISSING, matched=[1, 8], excluded=[1, 2])
    where = " in the shards that answered"
    assert [each.text for each in shortfall_reasons(answer, K)] == [
        f"1 item matches the filter{where}",
        f"1 item is excluded{where}",
        "40 of 100 items were not searched",
        f"8 items match the filter{where}",
        f"2 items are excluded{where}",
        "40 of 100 items were not searched",
        "5 items are beyond what the search parameters visit",
    ]
