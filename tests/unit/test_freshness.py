"""How new a cached answer must be."""

from hypothesis import given
from hypothesis import strategies as st

from shardline.router.freshness import FRESH_S, Freshness


def test_nothing_is_known_before_the_first_answer() -> None:
    assert Freshness(1).seq_at(0.0) is None


def test_an_answer_confirms_the_numbers_for_a_while() -> None:
    freshness = Freshness(1)
    assert freshness.heard((3, 4), asked_at=10.0)
    assert freshness.seq_at(10.0 + FRESH_S) == (3, 4)
    assert freshness.seq_at(10.1 + FRESH_S) is None
    assert freshness.heard((3, 4), asked_at=12.0)
    assert freshness.seq_at(12.0) == (3, 4)


def test_an_answer_that_lacks_a_shard_or_is_behind_confirms_nothing() -> None:
    freshness = Freshness(1)
    assert freshness.heard((3, 4), asked_at=0.0)
    assert not freshness.heard((3, None), asked_at=1.0)
    assert not freshness.heard((2, 4), asked_at=1.0)
    assert freshness.seq_at(0.5) == (3, 4)
    assert freshness.seq_at(1.5) is None


def test_a_write_makes_older_answers_useless_at_once() -> None:
    freshness = Freshness(1)
    assert freshness.heard((3, 4), asked_at=0.0)
    freshness.wrote(1, 5)
    assert freshness.seq_at(0.0) == (3, 5)
    freshness.wrote(1, 4)
    assert freshness.seq_at(0.0) == (3, 5), "of two that cross, the newer one counts"
    assert not freshness.heard((4, 4), asked_at=0.1)
    assert freshness.seq_at(0.1) == (4, 5)


def test_a_write_before_any_answer() -> None:
    freshness = Freshness(1)
    freshness.wrote(2, 1)
    assert freshness.seq_at(0.0) is None
    assert freshness.heard((0, 0, 1), asked_at=0.0)
    assert freshness.seq_at(0.0) == (0, 0, 1)


@given(st.lists(st.tuples(*[st.none() | st.integers(0, 3)] * 2), max_size=20))
def test_what_is_required_is_the_highest_of_each_shard(heard: list[tuple]) -> None:
    freshness = Freshness(1)
    highest: tuple = (None, None)
    for seq in heard:
        pairs = zip(highest, seq, strict=True)
        highest = tuple(max((n for n in each if n is not None), default=None) for each in pairs)
        assert freshness.heard(seq, asked_at=0.0) == (seq == highest and None not in seq)
        assert freshness.seq_at(0.0) in (highest, None)
