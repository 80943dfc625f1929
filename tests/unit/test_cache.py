"""The result cache against a plain model, and what it must never keep."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline.router.cache import ENTRY_BYTES, ResultCache, cache_key
from shardline.router.contract import Coverage, Degraded
from shardline.router.limits import resolve
from shardline.router.query import Merged
from shardline.router.router_config import RouterConfig
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Ranked

DIM = 4
SIZE = ENTRY_BYTES + 12 * 3 + DIM * 4  # of an answer of three results to one query

SEQ = (3, 0)


def key(number: int, generation: int = 1, k: int = 3, params: SearchParams | None = None):
    query = resolve(RouterConfig(), item_ids=[1], params=params or SearchParams())
    return cache_key(generation, np.full((1, DIM), number, np.float32), k, query)


def found(number: int, degraded: tuple[Degraded, ...] = ()) -> Merged:
    return Merged(
        ranked=Ranked(
            ids=np.full((1, 3), number, np.int64), scores=np.full((1, 3), number, np.float32)
        ),
        coverage=Coverage(
            shards_asked=2,
            shards_answered=2 - len(degraded),
            rows_asked=10,
            rows_answered=10,
            degraded=degraded,
        ),
        search_ms=2.5,
        seq=SEQ,
    )


def test_what_was_put_comes_back_until_others_are_used_more_recently() -> None:
    cache = ResultCache(20 * SIZE)
    for number in range(20):
        cache.put(key(number), found(number))
    assert cache.get(key(0), SEQ).ranked.ids.tolist() == [[0, 0, 0]]
    cache.put(key(20), found(20))
    assert cache.get(key(1), SEQ) is None  # the least recently used, since 0 was asked for
    assert cache.get(key(0), SEQ) is not None
    assert cache.stats.bytes == 20 * SIZE
    assert (cache.stats.hits, cache.stats.misses, cache.stats.evicted) == (2, 1, 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=200))
def test_it_is_a_bounded_lru(steps: list[tuple[bool, int]]) -> None:
    cache, model = ResultCache(16 * SIZE), OrderedDict()
    for is_put, number in steps:
        if is_put:
            cache.put(key(number), found(number))
            model[number] = None
            model.move_to_end(number)
            if len(model) > 16:
                model.popitem(last=False)
        else:
            got = cache.get(key(number), SEQ)
            assert (got is not None) == (number in model)
            if got is not None:
                assert got.ranked.scores[0, 0] == number
                model.move_to_end(number)
    assert cache.stats.bytes == len(model) * SIZE
    assert cache.stats.entries == len(model)


@pytest.mark.parametrize(
    "other",
    [
        {"generation": 2},
        {"k": 4},
        {"params": SearchParams(nprobe=2)},
        {"number": 2},
    ],
)
def test_another_question_is_another_key(other) -> None:
    cache = ResultCache(1 << 20)
    cache.put(key(1), found(1))
    assert cache.get(key(**({"number": 1} | other)), SEQ) is None


def test_two_short_queries_are_not_one_long_one() -> None:
    one, two = np.zeros((1, 8), np.float32), np.zeros((2, 4), np.float32)
    query = resolve(RouterConfig(), item_ids=[1])
    assert cache_key(1, one, 3, query) != cache_key(1, two, 3, query)


def test_many_excluded_ids_take_no_more_of_the_cache_than_one() -> None:
    kept = []
    for count in (1, 30_000):
        cache = ResultCache(1 << 20)
        excluded = (np.arange(count, dtype=np.int64),)
        query = resolve(RouterConfig(), item_ids=[1], excluded=excluded)
        asked = cache_key(1, np.zeros((1, DIM), np.float32), 3, query)
        cache.put(asked, found(1))
        assert cache.get(asked, SEQ) is not None
        kept.append(cache.stats.bytes)
    assert kept[0] == kept[1] < 2 * SIZE


def test_a_partial_answer_and_a_huge_one_are_not_kept() -> None:
    cache = ResultCache(16 * SIZE - 1)
    cache.put(key(1), found(1))
    assert cache.stats.entries == 0
    cache = ResultCache(1 << 20)
    cache.put(key(1), found(1, (Degraded(shard=0, code="unavailable", text="connection lost"),)))
    assert cache.get(key(1), SEQ) is None


def test_kept_arrays_are_its_own_and_read_only() -> None:
    cache = ResultCache(1 << 20)
    frame = np.arange(300, dtype=np.int64).reshape(100, 3)
    answer = found(1)
    cache.put(key(1), replace(answer, ranked=Ranked(frame[:1], answer.ranked.scores)))
    frame[:] = -5
    kept = cache.get(key(1), SEQ)
    assert kept.ranked.ids.tolist() == [[0, 1, 2]]
    assert kept.ranked.ids.base is None
    assert kept.search_ms == 0.0
    with pytest.raises(ValueError, match="read-only"):
        kept.ranked.ids[0, 0] = 1


def test_no_bytes_means_no_cache() -> None:
    cache = ResultCache(0)
    assert not cache.enabled
    cache.put(key(1), found(1))
    assert cache.get(key(1), SEQ) is None


def test_clearing_forgets_all() -> None:
    cache = ResultCache(1 << 20)
    cache.put(key(1), found(1))
    cache.clear()
    assert cache.get(key(1), SEQ) is None
    assert (cache.stats.entries, cache.stats.bytes) == (0, 0)
