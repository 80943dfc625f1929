"""Drawn negatives: their numbers, ranks' shares, and mined lists without repetition."""

import numpy as np
import pytest

from shardline.shards.core.errors import ConfigError
from shardline.training.config.loss_config import LossConfig
from shardline.training.data.csr import Csr
from shardline.training.loss.negatives import check_hard, draw

HARD = Csr(np.array([0, 0, 2, 5, 11]), np.array([7, 8, 1, 2, 3, 20, 21, 22, 23, 24, 25]))
CONFIG = LossConfig(uniform_negatives=12, random_negatives=2, hard_negatives=3)


def test_mined_items_are_those_of_the_user_and_none_comes_twice() -> None:
    users = np.repeat(np.arange(4), 50)
    drawn = draw(CONFIG, users, 30, HARD, np.random.default_rng(0))
    for user, items in zip(users, drawn.hard, strict=True):
        there = items[items >= 0].tolist()
        own = HARD.items[HARD.indptr[user] : HARD.indptr[user + 1]].tolist()
        assert len(there) == min(3, len(own)) == len(set(there))
        assert set(there) <= set(own)


def test_all_mined_items_are_equally_likely() -> None:
    drawn = draw(CONFIG, np.full(20_000, 3), 30, HARD, np.random.default_rng(1))
    shares = np.bincount(drawn.hard.ravel(), minlength=26)[20:] / 20_000
    assert shares == pytest.approx(np.full(6, 0.5), abs=0.02)


def test_hard_share_is_the_share_of_rows() -> None:
    config = CONFIG.model_copy(update={"hard_share": 0.25})
    drawn = draw(config, np.full(20_000, 3), 30, HARD, np.random.default_rng(1))
    given = (drawn.hard >= 0).all(axis=1)
    assert given.mean() == pytest.approx(0.25, abs=0.02)
    assert (drawn.hard[~given] == -1).all()


def test_uniform_and_random_items_cover_the_catalogue() -> None:
    config = LossConfig(uniform_negatives=30_000, random_negatives=5)
    drawn = draw(config, np.zeros(6000, np.int64), 30, None, np.random.default_rng(2))
    for items in (drawn.uniform, drawn.random):
        counts = np.bincount(items.ravel(), minlength=30)
        assert counts / 1000 == pytest.approx(np.ones(30), abs=0.15)
    assert drawn.hard.shape == (6000, 0)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_what_one_would_draw(world: int) -> None:
    drawn = draw(CONFIG, np.arange(12) % 4, 30, HARD, np.random.default_rng(4))
    parts = [drawn.of_rank(rank, world) for rank in range(world)]
    for name in ("uniform", "hard", "random"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert (joined == getattr(drawn, name)).all()
    assert (parts[0].encoded >= 0).all()
    assert len(parts[0].encoded) == (12 + 12 * 5) // world


@pytest.mark.parametrize("hard", [None, HARD])
def test_hard_negatives_need_lists_of_all_users(hard: Csr | None) -> None:
    check_hard(LossConfig(), None, 5)
    check_hard(CONFIG, HARD, 4)
    with pytest.raises(ConfigError, match=r"expected lists of 5 users; got (none|lists of 4)"):
        check_hard(CONFIG, hard, 5)
