"""Popularity bands and segments against loops."""

import numpy as np
import pytest

from shardline.training.data.csr import Csr
from shardline.training.data.segments import Segment, filtered, popularity_bands, segments_of


def csr(lists: list[list[int]]) -> Csr:
    flat = np.array([item for items in lists for item in items], dtype=np.int64)
    return Csr(np.cumsum([0, *map(len, lists)]).astype(np.int64), flat)


def slow_bands(counts: list[int]) -> list[int]:
    """Fills a third of the interactions with the most popular items, then the next third."""
    bands = [3] * len(counts)
    held = 0
    for item in sorted(range(len(counts)), key=lambda i: (-counts[i], i)):
        if counts[item]:
            bands[item] = 0 if 3 * held < sum(counts) else 1 if 3 * held < 2 * sum(counts) else 2
        held += counts[item]
    return bands


@pytest.mark.parametrize("seed", range(5))
def test_bands_as_a_loop_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = np.floor(rng.pareto(0.8, 60) * 2).astype(np.int64)
    bands = popularity_bands(counts)
    assert bands.tolist() == slow_bands(counts.tolist())
    head, torso = counts[bands == 0].sum(), counts[bands == 1].sum()
    assert 3 * head >= counts.sum()
    assert 3 * (head + torso) >= 2 * counts.sum()


def test_bands_by_hand() -> None:
    assert popularity_bands(np.array([2, 0, 2, 2])).tolist() == [0, 3, 1, 2]
    assert popularity_bands(np.array([7])).tolist() == [0]
    assert popularity_bands(np.array([0, 0])).tolist() == [3, 3]  # nothing was trained on
    assert popularity_bands(np.array([100, 1, 1])).tolist() == [0, 2, 2]  # the head takes it all


def test_every_item_and_every_user_is_in_one_segment() -> None:
    train = csr([[0, 1, 2, 3, 4], [0], [], [0, 1, 2, 3]])
    segments = segments_of(train, 7)
    items = np.stack([s.items for s in segments if s.items is not None])
    users = np.stack([s.users for s in segments if s.users is not None])
    assert (items.sum(axis=0) == 1).all()
    assert users.argmax(axis=0).tolist() == [2, 1, 0, 1]  # regular, sparse, new, sparse
    assert (users.sum(axis=0) == 1).all()
    assert [s.name for s in segments] == [
        "head items", "torso items", "tail items", "cold items",
        "new users", "sparse users", "regular users",
    ]  # fmt: skip


def test_what_a_segment_holds() -> None:
    wanted, users = csr([[4, 5], [], [5]]), np.array([7, 8, 9])
    mask = np.zeros(10, dtype=bool)
    mask[[5, 9]] = True
    assert Segment(name="i", items=mask).holds(users, wanted).tolist() == [False, True, True]
    assert Segment(name="u", users=mask).holds(users, wanted).tolist() == [False, False, True]


def test_filtered_keeps_users_without_entries() -> None:
    got = filtered(csr([[1, 2], [3], [], [4, 5]]), np.array([True, False, False, True, True]))
    assert got.indptr.tolist() == [0, 1, 1, 1, 3]
    assert got.items.tolist() == [1, 4, 5]
