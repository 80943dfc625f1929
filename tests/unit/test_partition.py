"""Boundaries, balance, and where an id lives."""

import numpy as np
import pytest

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.partition import Partitioning, partition, partition_keys


@pytest.mark.parametrize("partitioning", list(Partitioning))
@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_shards_hold_equal_rows_and_every_id_has_one_home(
    partitioning: Partitioning, num_shards: int
) -> None:
    rng = np.random.default_rng(1)
    ids = rng.choice(1_000_000, size=5_003, replace=False).astype(np.int64)
    cut = partition(ids, num_shards, partitioning)
    rows = np.bincount(cut.shard_of(ids), minlength=num_shards)
    assert rows.sum() == ids.size
    assert rows.max() - rows.min() <= 1
    assert cut.num_shards == num_shards


def test_range_shards_are_contiguous_in_id() -> None:
    ids = np.arange(0, 1000, 7, dtype=np.int64)
    homes = partition(ids, 4, Partitioning.RANGE).shard_of(ids)
    assert (np.diff(homes) >= 0).all()


def test_hash_range_spreads_neighbouring_ids() -> None:
    ids = np.arange(10_000, dtype=np.int64)
    homes = partition(ids, 4, Partitioning.HASH_RANGE).shard_of(ids)
    assert np.bincount(homes[:400], minlength=4).min() > 60


def test_mixing_is_a_bijection_on_a_large_sample() -> None:
    ids = np.concatenate([np.arange(100_000), 2**62 + np.arange(100_000)]).astype(np.int64)
    assert np.unique(partition_keys(ids, Partitioning.HASH_RANGE)).size == ids.size


def test_ids_not_in_the_catalogue_have_a_home_too() -> None:
    cut = partition(np.array([10, 20, 30, 40], dtype=np.int64), 2, Partitioning.RANGE)
    assert cut.shard_of(np.array([0, 29, 30, 999], dtype=np.int64)).tolist() == [0, 0, 1, 1]


def test_more_shards_than_items_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"cluster\.shards.*expected <= 3; got 4"):
        partition(np.arange(3, dtype=np.int64), 4, Partitioning.RANGE)
