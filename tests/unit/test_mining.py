"""What becomes a hard negative: the vectorised rules against plain loops, and their edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.config.training_config import MiningConfig
from shardline.training.data.csr import Csr
from shardline.training.evaluation.ranking import rank_exact
from shardline.training.mining.candidates import (
    Mined,
    blocks_of,
    choose,
    depth_of,
    draws,
    joined,
    merged,
    reference_scores,
    starved_share,
)

MASK = 2**64 - 1


def csr(*lists: list[int]) -> Csr:
    indptr = np.concatenate([[0], np.cumsum([len(each) for each in lists])]).astype(np.int64)
    return Csr(indptr, np.array([i for each in lists for i in each], dtype=np.int64))


def slow_draw(seed: int, user: int, item: int) -> int:
    """splitmix64 in Python's integers."""
    state = 0
    for key in (seed, user, item):
        state = (state + key + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def slow_choose(
    scores: FloatArray,
    items: IdArray,
    users: IdArray,
    known: Csr,
    reference: FloatArray,
    config: MiningConfig,
    seed: int,
) -> dict[int, list[tuple[int, float]]]:
    """One user and one candidate at a time, with a set and a counter."""
    chosen = {}
    for row, user in enumerate(users.tolist()):
        positives = set(known.items[known.indptr[row] : known.indptr[row + 1]].tolist())
        highest = reference[row] - np.float32(config.margin) * abs(reference[row])
        rank, allowed = 0, []
        for score, item in zip(scores[row].tolist(), items[row].tolist(), strict=True):
            if item == -1 or item in positives:
                continue
            rank += 1
            if config.range_min <= rank <= config.range_max and score <= highest:
                allowed.append((slow_draw(seed, user, item), rank, item, score))
        drawn = sorted(allowed)[: config.per_user]
        chosen[user] = [(item, score) for _, rank, item, score in sorted(drawn, key=by_rank)]
    return chosen


def by_rank(entry: tuple[int, int, int, float]) -> int:
    return entry[1]


def as_lists(mined: Mined) -> dict[int, list[tuple[int, float]]]:
    return {
        user: [(item, score) for item, score in zip(items, scores, strict=True) if item >= 0]
        for user, items, scores in zip(
            mined.users.tolist(), mined.items.tolist(), mined.scores.tolist(), strict=True
        )
    }


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    num_items=st.integers(1, 40),
    width=st.integers(1, 30),
    per_user=st.integers(1, 8),
    range_min=st.integers(1, 10),
    margin=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_chosen_as_by_a_loop_over_users_and_candidates(
    seed: int, num_items: int, width: int, per_user: int, range_min: int, margin: float
) -> None:
    rng = np.random.default_rng(seed)
    count = 7
    config = MiningConfig(
        per_user=per_user, range_min=range_min, range_max=range_min + per_user + 5, margin=margin
    )
    lists = [rng.permutation(num_items)[: rng.integers(1, num_items + 1)] for _ in range(count)]
    known = csr(*(np.sort(each).tolist() for each in lists))
    queries = rng.standard_normal((count, 4)).astype(np.float32)
    vectors = rng.integers(-1, 2, (num_items, 4)).astype(np.float32)  # many equal scores
    items, scores = rank_exact(queries, vectors, k=min(width, num_items))
    users = rng.permutation(100)[:count].astype(np.int64)
    reference = reference_scores(queries, vectors, known, "mean")
    mined = choose(
        scores, items, users=users, known=known, reference=reference, config=config, seed=seed
    )
    expected = slow_choose(scores, items, users, known, reference, config, seed)
    assert as_lists(mined) == expected
    assert mined.items.shape == mined.scores.shape == (count, per_user)
    filled = mined.items >= 0
    assert (np.sort(~filled, axis=1) == ~filled).all(), "empty slots stand at the end"
    assert np.isneginf(mined.scores[~filled]).all()
    assert mined.starved == sum(len(each) < per_user for each in expected.values())


@pytest.mark.parametrize("rule", ["lowest", "mean", "highest"])
def test_the_reference_is_the_lowest_mean_or_highest_of_the_known_items(rule: str) -> None:
    rng = np.random.default_rng(1)
    queries, items = rng.standard_normal((3, 5)), rng.standard_normal((6, 5))
    positives = csr([0], [1, 2, 3], [5, 0])
    reduce = {"lowest": min, "mean": np.mean, "highest": max}[rule]
    expected = [
        reduce([float(queries[user] @ items[item]) for item in each])
        for user, each in enumerate(([0], [1, 2, 3], [5, 0]))
    ]
    found = reference_scores(queries.astype(np.float32), items.astype(np.float32), positives, rule)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == np.float32


def one_user(scores: list[float], known: list[int], reference: float, **values: object) -> list:
    config = MiningConfig.model_validate({"per_user": 1, "range_max": 50} | values)
    mined = choose(
        np.array([scores], np.float32),
        np.arange(len(scores), dtype=np.int64)[None],
        users=np.array([0]),
        known=csr(known),
        reference=np.array([reference], np.float32),
        config=config,
        seed=0,
    )
    return mined.items[0][mined.items[0] >= 0].tolist()


def test_ranks_count_from_one_after_the_known_items_are_gone() -> None:
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    chosen = one_user(scores, [0, 2], 1.0, per_user=2, range_min=2, range_max=3, margin=0.0)
    assert chosen == [3, 4], "rank 1 is item 1"


def test_the_margin_is_relative_and_keeps_its_sense_below_zero() -> None:
    assert one_user([0.96, 0.95, 0.94], [], 1.0, per_user=3, margin=0.055) == [2]
    assert one_user([-0.9, -1.02, -1.06], [], -1.0, per_user=3, margin=0.05) == [2]
    assert one_user([0.5, 0.4], [], 0.5, per_user=2, margin=0.0) == [0, 1]


def test_a_short_or_empty_list_starves_its_user() -> None:
    assert one_user([0.3], [], 1.0, per_user=4) == [0]
    assert one_user([0.3, 0.2], [0, 1], 1.0, per_user=4) == []
    config = MiningConfig(per_user=2)
    mined = choose(
        np.full((2, 3), -np.inf, np.float32),
        np.full((2, 3), -1, np.int64),
        users=np.array([4, 1]),
        known=csr([0], []),
        reference=np.ones(2, np.float32),
        config=config,
        seed=0,
    )
    assert mined.starved == 2
    assert mined.starved_share == 1.0
    assert mined.lists(6).lengths.tolist() == [0] * 6


def test_draws_are_those_of_splitmix64_and_uniform() -> None:
    users, items = np.array([0, 3, 2**40]), np.array([0, 1, 10**12])
    expected = [[slow_draw(9, int(user), int(item)) for item in items] for user in users]
    assert draws(9, users[:, None], items).tolist() == expected
    many = draws(1, np.arange(100)[:, None], np.arange(1000))
    counts = np.bincount((many >> np.uint64(60)).ravel().astype(np.int64), minlength=16)
    expected_count = many.size / 16
    chi_squared = ((counts - expected_count) ** 2 / expected_count).sum()
    assert chi_squared < 37.7, "above it once in a thousand for 15 degrees of freedom"


def test_every_allowed_item_is_drawn_as_often() -> None:
    config = MiningConfig(per_user=2, range_max=8, margin=0.0)
    users = np.arange(20_000)
    mined = choose(
        np.tile(np.linspace(0.9, 0.2, 8, dtype=np.float32), (len(users), 1)),
        np.tile(np.arange(8), (len(users), 1)),
        users=users,
        known=Csr(np.zeros(len(users) + 1, np.int64), np.empty(0, np.int64)),
        reference=np.ones(len(users), np.float32),
        config=config,
        seed=5,
    )
    share = np.bincount(mined.items.ravel(), minlength=8) / len(users)
    np.testing.assert_allclose(share, 0.25, atol=0.013)  # four standard deviations


def test_the_sample_depends_on_user_item_and_seed_not_on_the_batch() -> None:
    rng = np.random.default_rng(2)
    queries, vectors = (rng.standard_normal((n, 6)).astype(np.float32) for n in (9, 50))
    known, users = csr(*([user] for user in range(9))), np.arange(9)
    config = MiningConfig(per_user=4, range_max=20, reference="highest", margin=0.0)

    def mine(rows: IdArray, seed: int) -> Mined:
        items, scores = rank_exact(queries, vectors, k=30)
        positives = known.take(rows)
        reference = reference_scores(queries[rows], vectors, positives, config.reference)
        return choose(
            scores[rows],
            items[rows],
            users=users[rows],
            known=positives,
            reference=reference,
            config=config,
            seed=seed,
        )

    whole = mine(users, 0)
    order = rng.permutation(9)
    parts = joined([mine(order[:4], 0), mine(order[4:], 0)], config).sorted()
    np.testing.assert_array_equal(parts.items, whole.items)
    np.testing.assert_array_equal(parts.scores, whole.scores)
    assert as_lists(mine(users, 1)) != as_lists(whole)


def test_lists_are_by_user_row_whatever_the_order_mined() -> None:
    mined = Mined(
        users=np.array([4, 1]),
        items=np.array([[7, 8, -1], [5, -1, -1]]),
        scores=np.array([[0.2, 0.1, -np.inf], [0.3, -np.inf, -np.inf]], np.float32),
    )
    lists = mined.lists(6)
    assert lists.indptr.tolist() == [0, 0, 1, 1, 1, 3, 3]
    assert lists.items.tolist() == [5, 7, 8]
    trained = np.array([False, True, False, False, True, False])
    assert starved_share(lists, trained, MiningConfig(per_user=2)) == 0.5
    assert starved_share(lists, np.zeros(6, bool), MiningConfig()) == 0.0


def test_nothing_to_mine_is_an_empty_result() -> None:
    config = MiningConfig()
    mined = joined([], config)
    assert mined.items.shape == (0, config.per_user)
    assert mined.starved_share == 0.0
    assert mined.lists(3).lengths.tolist() == [0, 0, 0]
    assert reference_scores(
        np.empty((0, 2), np.float32), np.empty((4, 2), np.float32), csr(), "mean"
    ).shape == (0,)


def test_blocks_put_users_alike_in_known_items_together() -> None:
    known = csr([1], [1, 2, 3], [], [4], [5, 6])
    blocks = blocks_of(known, np.array([0, 1, 3, 4]), size=2)
    assert [block.tolist() for block in blocks] == [[0, 3], [4, 1]]
    config = MiningConfig(range_max=20)
    assert [depth_of(config, known.take(block)) for block in blocks] == [21, 23]


def test_merged_holds_each_item_once() -> None:
    both = merged(csr([3, 1], [], [2]), csr([1, 0], [4], []), 5)
    assert both.indptr.tolist() == [0, 3, 4, 5]
    assert both.items.tolist() == [0, 1, 3, 4, 2]


def test_a_searcher_that_repeats_a_known_item_is_refused() -> None:
    with pytest.raises(InvalidInput, match="twice"):
        choose(
            np.ones((1, 2), np.float32),
            np.array([[3, 3]]),
            users=np.array([0]),
            known=csr([3]),
            reference=np.ones(1, np.float32),
            config=MiningConfig(),
            seed=0,
        )


@pytest.mark.parametrize(
    "values",
    [
        {"per_user": 0},
        {"range_min": 0},
        {"range_max": 2049},
        {"range_min": 95, "range_max": 100, "per_user": 7},
        {"range_min": 9, "range_max": 3, "per_user": 1},
        {"margin": -0.1},
        {"margin": float("nan")},
        {"reference": "median"},
        {"perUser": 3},
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MiningConfig.model_validate(values)
