"""Caps, boosts and diversity over one pool, beside slow and obvious versions of them."""

import math
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardline.router.rearrange.boosts import added, boosted
from shardline.router.rearrange.greedy import NO_VALUE, Counts, capped, comparable, diverse
from shardline.router.rearrange.pool_items import Brought, PoolItems, Steps, brought_of
from shardline.router.rearrange.pool_search import Pool, choose_all
from shardline.router.rearrange.rearrangement import (
    MAX_POOLED,
    Boost,
    Cap,
    Rearrangement,
    check_kinds,
    sized,
)
from shardline.shards.core.attribute_kinds import AttributeKind
from shardline.shards.core.errors import DeadlineExceeded, InvalidInput
from shardline.shards.core.schema import Metric
from shardline.shards.live.item_attributes import ItemAttributes, kind_of_values

NOW = datetime(2026, 3, 8, tzinfo=UTC).timestamp()


def slow_capped(rows: list[list[int]], limits: list[int], k: int) -> list[int]:
    taken: list[int] = []
    counts: list[Counter[int]] = [Counter() for _ in limits]
    for place, row in enumerate(rows):
        fits = all(
            code == NO_VALUE or count[code] < most
            for code, count, most in zip(row, counts, limits, strict=True)
        )
        if fits and len(taken) < k:
            taken.append(place)
            for code, count in zip(row, counts, strict=True):
                count[code] += 1
    return taken


def slow_diverse(
    relevance: list[float],
    vectors: np.ndarray,
    rows: list[list[int]],
    limits: list[int],
    k: int,
    share: float,
) -> list[int]:
    """Formula and caps as they are written, over all pairs, at each step."""
    taken: list[int] = []
    while len(taken) < k:
        best: tuple[float, int] | None = None
        for place in range(len(relevance)):
            if place in taken:
                continue
            if any(
                row_code != NO_VALUE
                and sum(rows[other][cap] == row_code for other in taken) >= limits[cap]
                for cap, row_code in enumerate(rows[place])
            ):
                continue
            value = share * relevance[place]
            if taken:
                closest = max(float(np.dot(vectors[place], vectors[other])) for other in taken)
                value -= (1 - share) * closest
            if best is None or value > best[0]:
                best = value, place
        if best is None:
            return taken
        taken.append(best[1])
    return taken


CODES = st.integers(1, 3).flatmap(
    lambda caps: st.lists(
        st.lists(st.integers(NO_VALUE, 3), min_size=caps, max_size=caps), min_size=1, max_size=40
    )
)


@given(rows=CODES, k=st.integers(1, 30), seed=st.integers(0, 1000))
@settings(max_examples=300, deadline=None)
def test_capped_is_going_down_the_ranking(rows: list[list[int]], k: int, seed: int) -> None:
    limits = np.random.default_rng(seed).integers(1, 4, len(rows[0])).tolist()
    counts = Counts(limits)
    got = capped(np.array(rows).T.copy(), counts, k).tolist()
    assert got == slow_capped(rows, limits, k)
    taken = [Counter(rows[place][cap] for place in got) for cap in range(len(limits))]
    for cap, full in enumerate(counts.full()):
        named = {code for code, n in taken[cap].items() if code != NO_VALUE and n >= limits[cap]}
        assert set(full) == named


def test_without_caps_the_first_k_are_taken() -> None:
    assert capped(np.empty((0, 5), np.int64), Counts([]), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_diverse_is_the_formula(seed: int, share: float) -> None:
    """Vectors repeat, so that ties occur at every step."""
    rng = np.random.default_rng(seed)
    count, caps = int(rng.integers(1, 60)), int(rng.integers(0, 3))
    distinct = rng.standard_normal((max(1, count // 2), 12)).astype(np.float32)
    distinct /= np.linalg.norm(distinct, axis=1, keepdims=True)
    vectors = distinct[rng.integers(0, len(distinct), count)]
    vectors[rng.random(count) < 0.05] = 0  # of an item that was not found
    relevance = np.sort(rng.integers(0, 20, count) / 20)[::-1].astype(np.float64)
    rows = rng.integers(-1, 4, (count, caps)).tolist()
    limits = rng.integers(1, 4, caps).tolist()
    k = int(rng.integers(1, count + 3))
    codes = np.array(rows, np.int64).reshape(count, caps).T.copy()
    got = diverse(relevance, vectors, codes, Counts(limits), k, share)
    assert got.tolist() == slow_diverse(relevance.tolist(), vectors, rows, limits, k, share)


def test_items_like_those_before_make_way() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    none = np.empty((0, 3), np.int64)
    relevance = np.array([1.0, 0.9, 0.5])
    assert diverse(relevance, vectors, none, Counts([]), 3, 0.5).tolist() == [0, 2, 1]
    assert diverse(relevance, vectors, none, Counts([]), 3, 1.0).tolist() == [0, 1, 2]


def test_scores_become_comparable_with_cosines() -> None:
    scores = np.array([-1.0, -3.0, -5.0])
    assert comparable(scores, Metric.L2).tolist() == [1.0, 0.5, 0.0]
    assert comparable(scores, Metric.DOT).tolist() == [1.0, 0.5, 0.0]
    assert comparable(scores, Metric.COSINE) is scores
    assert comparable(np.array([2.0, 2.0]), Metric.DOT).tolist() == [1.0, 1.0]
    assert comparable(np.empty(0), Metric.DOT).tolist() == []


@pytest.mark.parametrize(
    ("half_life", "value", "expected"),
    [
        (None, 3, 1.5),
        (None, -2.5, -1.25),
        (None, True, 0.5),
        (None, None, 0.0),
        (None, "1.50", 0.75),  # a decimal that no float holds
        (None, math.nan, 0.0),
        (None, math.inf, 0.0),
        (None, -math.inf, 0.0),
        (None, 2**64 - 1, float(2**64) / 2),
        (7.0, "2026-03-08", 0.5),
        (7.0, "2026-03-01", 0.25),
        (7.0, "2026-02-22", 0.125),
        (7.0, "2026-03-01T00:00:00", 0.25),
        (7.0, "2026-03-01T01:00:00+01:00", 0.25),
        (7.0, "2030-01-01T00:00:00+00:00", 0.5),
        (7.0, "0001-01-01", 0.0),
        (7.0, None, 0.0),
        (1e-300, "2026-03-01", 0.0),
        (1e-300, "2026-03-09", 0.5),
    ],
)
def test_what_a_boost_of_one_half_adds(half_life: Any, value: Any, expected: float) -> None:
    boost = Boost(column="c", weight=0.5, field="boost", half_life_days=half_life)
    (got,) = added(boost, [value], NOW).tolist()
    assert got == pytest.approx(expected, rel=1e-12)


def test_boosts_stay_within_what_a_score_can_hold() -> None:
    largest = float(np.finfo(np.float32).max)
    boosts = [Boost(column="c", weight=weight, field="boost") for weight in (1e300, -1e300)]
    one, other = (added(boost, [1e300, 1.0, 0.0], NOW) for boost in boosts)
    assert one.tolist() == [largest, largest, 0.0]
    assert (one + other).tolist() == [0.0, 0.0, 0.0]
    scores = boosted(np.ones(3, np.float32), one)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()


def steps(**changes: Any) -> Steps:
    given = {"k": 3, "caps": (), "boosts": (), "relevance": None, "metric": Metric.DOT, "now": NOW}
    return Steps(**given | changes)


def cap(column: str, most: int) -> Cap:
    return Cap(column=column, most=most, field="cap")


def test_an_answer_has_the_boosted_scores_in_their_order() -> None:
    boost = Boost(column="n", weight=1.0, field="boost")
    items = PoolItems(steps(boosts=(boost,)))
    items.add(np.arange(5), Brought(ids=np.arange(5), columns={"n": [0, 0, 5, 5, 5]}, vectors=None))
    chosen = items.choose(np.array([0, 1, 4, 3, 2]), np.array([4, 3, 1, 1, 0], np.float32))
    assert chosen.ids.tolist() == [3, 4, 2]  # equal scores by id
    assert chosen.scores.tolist() == [6.0, 6.0, 5.0]
    assert (chosen.considered, chosen.refused) == (5, 0)


def test_items_are_added_in_any_order_and_those_not_brought_are_left_out() -> None:
    items = PoolItems(steps(caps=(cap("s", 1),), k=2, relevance=0.5))
    vectors = np.array([[3, 0], [0, 2]], np.float32)
    items.add(
        np.array([7, 8, 9]),
        Brought(ids=np.array([7, 9]), columns={"s": ["a", None]}, vectors=vectors),
    )
    more = Brought(ids=np.array([1, 8]), columns={"s": [None, "a"]}, vectors=vectors)
    assert items.unasked(np.array([9, 1, 7, 1])).tolist() == [1]
    items.add(np.array([1]), more)
    assert items.ids.tolist() == [1, 7, 8, 9]
    assert items.vectors.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert items.codes.tolist() == [[NO_VALUE, 0, 0, NO_VALUE]]
    chosen = items.choose(np.array([8, 7, 4]), np.array([3, 2, 1], np.float32))
    assert chosen.ids.tolist() == [8]
    assert (chosen.considered, chosen.refused, chosen.full) == (2, 1, {"s": ["a"]})


def test_only_items_of_which_all_came_are_known() -> None:
    columns = {"a": {1: "x", 3: None, 5: "y"}, "b": {5: 2, 3: 1}}
    vectors = np.array([5, 3, 1]), np.array([[5.0], [3.0], [1.0]], np.float32)
    brought = brought_of(np.array([1, 2, 3, 5]), columns, vectors)
    assert brought.ids.tolist() == [3, 5]
    assert brought.columns == {"a": [None, "y"], "b": [1, 2]}
    assert brought.vectors is not None
    assert brought.vectors.tolist() == [[3.0], [5.0]]
    assert brought_of(np.array([4, 6]), {}, None).ids.tolist() == [4, 6]


def test_a_cap_of_k_or_more_asks_for_nothing_and_lambda_1_for_no_vectors() -> None:
    asked = Rearrangement(caps=(cap("a", 3), cap("b", 2)), relevance=1.0)
    made = Steps.of(asked, 3, Metric.COSINE, NOW)
    assert made.columns == ("b",)
    assert made.relevance is None


@pytest.mark.parametrize(
    ("asked", "k", "pool"),
    [
        (Rearrangement(caps=(cap("a", 1),)), 10, 100),
        (Rearrangement(caps=(cap("a", 1),)), 100, 400),
        (Rearrangement(caps=(cap("a", 1),)), 2000, 2048),
        (Rearrangement(boosts=(Boost(column="a", weight=1, field="boost"),)), 10, 200),
        (Rearrangement(relevance=0.5), 10, 200),
        (Rearrangement(relevance=0.5), 300, 600),
        (Rearrangement(relevance=0.5, caps=(cap("a", 1),)), 300, 1200),
        (Rearrangement(relevance=0.5, named_pools=(("diversify.pool", 10),)), 10, 10),
        (Rearrangement(relevance=0.5, named_pools=(("a", 10), ("b", 50))), 10, 50),
    ],
)
def test_the_size_of_a_pool(asked: Rearrangement, k: int, pool: int) -> None:
    assert sized(asked, k, 2048, 1).pool == pool


def test_a_pool_below_k_or_above_the_largest_k_or_too_many_items_are_refused() -> None:
    for size, max_k in ((9, 2048), (101, 100)):
        asked = Rearrangement(relevance=0.5, named_pools=(("diversify.pool", size),))
        with pytest.raises(InvalidInput) as caught:
            sized(asked, 10, max_k, 1)
        assert caught.value.field == "diversify.pool"
        assert caught.value.got == str(size)
    with pytest.raises(InvalidInput, match="queries x pool") as caught:
        sized(Rearrangement(caps=(cap("a", 1),)), 10, 2048, MAX_POOLED // 100 + 1)
    assert caught.value.field == "cap"


def test_comparisons_of_a_request_are_bounded() -> None:
    asked = Rearrangement(relevance=0.5)
    assert sized(asked, 2048, 2048, 16).pool == 2048
    with pytest.raises(InvalidInput, match="queries x pool x k") as caught:
        sized(asked, 2048, 2048, 17)
    assert caught.value.field == "diversify"


def test_a_value_that_is_no_longer_full_is_asked_for_again() -> None:
    """The second pool's item displaces what the first one's filter took for full."""
    boost = Boost(column="n", weight=1.0, field="boost")
    items = PoolItems(steps(k=4, caps=(cap("s", 1), cap("b", 1)), boosts=(boost,)))
    columns = {"s": ["x", "y"], "b": ["p", "q"], "n": [0, 0]}
    items.add(np.arange(2), Brought(ids=np.arange(2), columns=columns, vectors=None))
    pool = Pool(0, b"", np.arange(2), np.array([2, 1], np.float32), True)
    assert choose_all(items, [pool], can_grow=False, look=lambda: None) == [pool]
    assert pool.left_out == {"s": ["x", "y"], "b": ["p", "q"]}
    # one that has another seller and brand p, as the pool was found in another state, ranks first
    more = Brought(ids=np.array([2]), columns={"s": ["z"], "b": ["p"], "n": [9]}, vectors=None)
    items.add(np.array([2]), more)
    pool.add(np.array([2]), np.array([0], np.float32), is_full=False)
    assert choose_all(items, [pool], can_grow=False, look=lambda: None) == [pool], "x is free again"
    assert pool.left_out == {"s": ["z", "y"], "b": ["p", "q"]}
    assert choose_all(items, [pool], can_grow=False, look=lambda: None) == []


def test_time_that_runs_out_ends_between_two_pools() -> None:
    items = PoolItems(steps(k=1, caps=(cap("s", 1),)))
    items.add(np.arange(2), Brought(ids=np.arange(2), columns={"s": ["x", "y"]}, vectors=None))
    pools = [Pool(row, b"", np.arange(2), np.array([2, 1], np.float32), False) for row in (0, 1)]
    looks = []

    def look() -> None:
        looks.append(1)
        if len(looks) > 1:
            raise DeadlineExceeded("too late")

    with pytest.raises(DeadlineExceeded):
        choose_all(items, pools, can_grow=False, look=look)
    assert pools[0].chosen is not None
    assert pools[1].chosen is None


@pytest.mark.parametrize("kind", AttributeKind)
def test_kinds_of_columns(kind: AttributeKind) -> None:
    """A table of what each kind may be used for, in the words of docs/RESULTS.md."""
    may = {
        "cap": {"text", "integer", "boolean", "date", "nothing"},
        "boost": {"integer", "number", "boolean", "nothing"},
        "dated": {"date", "timestamp", "nothing"},
    }
    asked = {
        "cap": Rearrangement(caps=(cap("c", 1),)),
        "boost": Rearrangement(boosts=(Boost(column="c", weight=1, field="boost"),)),
        "dated": Rearrangement(
            boosts=(Boost(column="c", weight=1, field="boost", half_life_days=1),)
        ),
    }
    for name, each in asked.items():
        if kind in may[name]:
            check_kinds(each, {"c": kind})
            continue
        with pytest.raises(InvalidInput) as caught:
            check_kinds(each, {"c": kind})
        field = "cap" if name == "cap" else "boost"
        is_undated = name == "boost" and kind in may["dated"]
        assert caught.value.field == f"{field}.{'half_life_days' if is_undated else 'column'}"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (pa.string(), "text"),
        (pa.large_string(), "text"),
        (pa.string_view(), "text"),
        (pa.dictionary(pa.int8(), pa.string()), "text"),
        (pa.run_end_encoded(pa.int32(), pa.int16()), "integer"),
        (pa.uint64(), "integer"),
        (pa.bool_(), "boolean"),
        (pa.float16(), "number"),
        (pa.decimal128(5, 2), "number"),
        (pa.time64("us"), "number"),
        (pa.duration("s"), "number"),
        (pa.date32(), "date"),
        (pa.date64(), "date"),
        (pa.timestamp("ns", "UTC"), "timestamp"),
        (pa.null(), "nothing"),
        (pa.binary(), "other"),
        (pa.uuid(), "other"),
        (pa.list_(pa.string()), "other"),
        (pa.struct({"a": pa.int8()}), "other"),
    ],
    ids=str,
)
def test_what_types_are_to_a_router(kind: pa.DataType, expected: str) -> None:
    assert kind_of_values(kind) == expected
    columns = ItemAttributes(pa.table({"c": pa.nulls(2, kind)}))
    assert columns.kinds(["c", "original_id"]) == (expected, "other")
    with pytest.raises(InvalidInput, match="no such attribute"):
        columns.kinds(["c", "d"])
