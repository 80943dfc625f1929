"""Which items besides the positives a step encodes as negatives: uniform, random, mined.

Everything is drawn for the global batch and cut by rank, so that W ranks see what one would.
"""

from dataclasses import dataclass

import numpy as np

from shardline.shards.core.errors import ConfigError
from shardline.shards.core.schema import EMPTY_ID, IdArray
from shardline.training.config.loss_config import LossConfig
from shardline.training.data.csr import Csr


@dataclass(frozen=True, slots=True)
class Negatives:
    """Item rows, int64: uniform (u,) for all rows, hard (b, H) and random (b, R) for each.

    Where a row's user has fewer mined items, or the row is to get none, hard is filled with -1.
    """

    uniform: IdArray
    hard: IdArray
    random: IdArray

    def of_rank(self, rank: int, world: int) -> "Negatives":
        """The rank's equal share of each."""
        parts = (np.split(part, world)[rank] for part in (self.uniform, self.hard, self.random))
        return Negatives(*parts)

    @property
    def encoded(self) -> IdArray:
        """All item rows in the order above, end to end; an empty slot is encoded as item 0."""
        ends = (self.uniform, np.maximum(self.hard, 0).ravel(), self.random.ravel())
        return np.concatenate(ends)


def draw(
    config: LossConfig,
    users: IdArray,
    num_items: int,
    hard: Csr | None,
    rng: np.random.Generator,
) -> Negatives:
    """For the global batch of users (B,). hard: mined item rows per user row."""
    random = rng.integers(0, num_items, (len(users), config.random_negatives))
    return Negatives(
        uniform=rng.integers(0, num_items, config.uniform_negatives),
        random=random,
        hard=_mined(config, users, hard, rng),
    )


def check_hard(config: LossConfig, hard: Csr | None, num_users: int) -> None:
    """Raises ConfigError where mined negatives are asked for and there is no list for each user."""
    if not config.hard_negatives:
        return
    if hard is None or len(hard.indptr) - 1 != num_users:
        raise ConfigError(
            "hard negatives need a mined list per user",
            field="loss.hard_negatives",
            expected=f"lists of {num_users} users",
            got="none" if hard is None else f"lists of {len(hard.indptr) - 1}",
            hint="--hard names a table of `shardline mine`, --mine-every N mines while it trains; "
            "or --set training.loss.hard_negatives=0",
        )


def _mined(
    config: LossConfig, users: IdArray, hard: Csr | None, rng: np.random.Generator
) -> IdArray:
    """(B, H) of each user's list, without repetition, all subsets equally likely."""
    wanted = config.hard_negatives
    drawn = np.full((len(users), wanted), EMPTY_ID, np.int64)
    if not wanted or hard is None:
        return drawn
    given = rng.random(len(users)) < config.hard_share
    lists = hard.take(users)
    lengths = np.where(given, lists.lengths, 0)
    longest = max(wanted, int(lists.lengths.max(initial=0)))
    # the H smallest of random keys; keys > 1 are slots past the end of a list
    keys = rng.random((len(users), longest))
    keys[np.arange(longest) >= lengths[:, None]] = 2.0
    places = np.argpartition(keys, wanted - 1, axis=1)[:, :wanted]
    rows, slots = np.nonzero(np.take_along_axis(keys, places, axis=1) < 1)
    drawn[rows, slots] = lists.items[lists.indptr[rows] + places[rows, slots]]
    return drawn
