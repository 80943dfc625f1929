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


def test_no_rung_is_below_the_least() -> None:
    assert rungs(12, least=2) == (2, 4, 12)
    assert rungs(12, least=5) == (5, 12)
    assert rungs(12, least=30) == (12,)


def test_a_bracket_costs_what_its_trials_train_where_a_bad_base_is_kept() -> None:
    for size in range(1, 20):
        for ladder in ((1,), (1, 4), (1, 4, 12), (4, 13, 40)):
            for kept in (0, 1):
                trained = dict.fromkeys(range(size), 0)
                alive = list(trained)
                for epochs in ladder:
                    trained.update(dict.fromkeys(alive, epochs))
                    going = survivors({number: float(number) for number in alive})
                    alive = sorted({*going, *range(kept)})  # number 0 is the worst
                assert bracket_epochs(size, ladder, kept) == sum(trained.values())


def test_the_best_third_goes_on_and_the_lower_number_of_equal_ones() -> None:
    values = {3: 0.2, 4: 0.5, 7: 0.5, 9: 0.1, 11: 0.5}
    assert survivors(values) == [4, 7]
    assert survivors({1: 0.0}) == [1]
    assert promoted(7) == -(-7 // ETA) == 3


def test_a_plan_stays_within_its_time_and_judges_nothing_by_the_first_rung_alone() -> None:
    for epochs in (1, 2, 8, 12, 40):
        ladder = rungs(epochs)
        for affordable in range(400):
            for first in (True, False):
                planned = plan(affordable, ladder, first=first)
                if planned is None:
                    assert bracket_epochs(2, ladder[:2], int(first)) > affordable
                    continue
                size, taken = planned
                assert bracket_epochs(size, taken, int(first)) <= affordable
                assert 2 <= size <= MOST_TRIALS
                assert taken == ladder[: len(taken)] and len(taken) >= min(2, len(ladder))


def test_a_first_bracket_leaves_half_the_time_and_a_short_one_leaves_out_the_last_rung() -> None:
    ladder = (1, 4, 12)
    assert plan(2 * bracket_epochs(9, ladder, 1), ladder, first=True) == (9, ladder)
    # six trials: 6 x 1 + 3 x 3, and 2 x 8 more up to the end
    assert plan(31, ladder, first=True) == (FEWEST_TRIALS, ladder)
    assert plan(30, ladder, first=True) == (12, (1, 4))
    assert plan(14, ladder, first=False) == (FEWEST_LATER_TRIALS, ladder)
    assert plan(8, ladder, first=True) == (2, (1, 4))
    assert plan(7, ladder, first=True) is None
