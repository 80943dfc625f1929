"""The arithmetic of successive halving, against counting trial by trial."""

import pytest

from shardline.training.search.ladder import (
    ETA,
    FEWEST_LATER_TRIALS,
    FEWEST_TRIALS,
    MOST_TRIALS,
    bracket_epochs,
    plan,
    promoted,
    rungs,
    survivors,
)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(1, (1,)), (2, (1, 2)), (8, (1, 3, 8)), (12, (1, 4, 12)), (40, (4, 13, 40))],
)
def test_rungs_end_with_all_epochs(epochs: int, expected: tuple[int, ...]) -> None:
    assert rungs(epochs) == expected


def test_a_bracket_costs_what_its_trials_train() -> None:
    for size in range(1, 20):
        for ladder in ((1,), (1, 4), (1, 4, 12), (4, 13, 40)):
            trained = dict.fromkeys(range(size), 0)
            alive = list(trained)
            for epochs in ladder:
                trained.update(dict.fromkeys(alive, epochs))
                alive = survivors({number: float(number) for number in alive})
            assert bracket_epochs(size, ladder) == sum(trained.values())


def test_the_best_third_goes_on_and_the_lower_number_of_equal_ones() -> None:
    values = {3: 0.2, 4: 0.5, 7: 0.5, 9: 0.1, 11: 0.5}
    assert survivors(values) == [4, 7]
    assert survivors({1: 0.0}) == [1]
    assert promoted(7) == -(-7 // ETA) == 3


def test_a_plan_stays_within_its_time_and_is_none_only_where_two_trials_are_too_many() -> None:
    for epochs in (1, 2, 8, 12, 40):
        ladder = rungs(epochs)
        for affordable in range(300):
            for first in (True, False):
                planned = plan(affordable, ladder, first=first)
                if planned is None:
                    assert bracket_epochs(2, ladder[:1]) > affordable
                    continue
                size, taken = planned
                assert bracket_epochs(size, taken) <= affordable
                assert 2 <= size <= MOST_TRIALS
                assert taken == ladder[: len(taken)]


def test_a_first_bracket_leaves_half_the_time_and_a_short_one_leaves_out_rungs() -> None:
    ladder = (1, 4, 12)
    size, taken = plan(2 * bracket_epochs(9, ladder), ladder, first=True) or (0, ())
    assert (size, taken) == (9, ladder)
    # 14 epochs: three trials up to the end, six up to the second rung
    assert plan(14, ladder, first=True) == (6, (1, 4))
    assert plan(14, ladder, first=False) == (FEWEST_LATER_TRIALS, ladder)
    assert plan(FEWEST_TRIALS, ladder, first=True) == (FEWEST_TRIALS, (1,))
    assert plan(1.9, ladder, first=False) is None
