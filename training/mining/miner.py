"""A model's users mined for hard negatives: between two epochs of training, or for a table.

Users are embedded with all their items of train as history, in blocks that are the same for any
number of ranks; a rank takes every W-th block. In training the example's own item is left out of
the history, unless keep_target is set, so here a user's known items score a little higher than
there, and the margin below them is a little more generous.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray
from shardline.training import gather
from shardline.training.config.training_config import MiningConfig
from shardline.training.data.csr import Csr
from shardline.training.evaluation.searchers import ExactSearch, Search
from shardline.training.features.prepared import TrainingData
from shardline.training.mining.candidates import (
    Mined,
    blocks_of,
    choose,
    depth_of,
    joined,
    merged,
    reference_scores,
)
from shardline.training.model.encoding import encode_items_sharded, encode_queries
from shardline.training.model.towers import TwoTower

BLOCK_USERS = 64  # users searched at a time, and queries in one request to a cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Miner:
    """Mines blocks of users; item_vectors (items, dim) are the model's own, whoever searches.

    known: item rows of all users that are never negatives.
    """

    model: TwoTower
    data: TrainingData
    config: MiningConfig
    seed: int
    item_vectors: FloatArray
    known: Csr

    def blocks(self) -> list[IdArray]:
        """All users with something in train, by user row, in the blocks to mine."""
        users = np.flatnonzero(self.data.train.lengths)
        return blocks_of(self.known, users, BLOCK_USERS)

    def mine(self, search: Search, blocks: Sequence[IdArray]) -> Iterator[Mined]:
        """One after the other, as ``search.in_flight`` of them are searched at once."""
        calls = (self._call(search, users) for users in blocks)
        with ThreadPoolExecutor(search.in_flight) as pool:
            yield from _ahead(pool, calls, search.in_flight)

    def _call(self, search: Search, users: IdArray) -> Callable[[], Mined]:
        """What is left to do for a block once its users are embedded, which torch does here."""
        positives = self.data.train.take(users)
        queries = encode_queries(
            self.model, self.data.users.take(users), positives, self.data.items
        )
        return lambda: self._negatives(search, users, positives, queries)

    def _negatives(
        self, search: Search, users: IdArray, positives: Csr, queries: FloatArray
    ) -> Mined:
        known = self.known.take(users)
        items, scores = search(queries, depth_of(self.config, known))
        reference = reference_scores(queries, self.item_vectors, positives, self.config.reference)
        return choose(
            scores,
            items,
            users=users,
            known=known,
            reference=reference,
            config=self.config,
            seed=self.seed,
        )


def build_miner(model: TwoTower, data: TrainingData, config: MiningConfig, seed: int) -> Miner:
    """A miner of the model as it is now, in evaluation mode; a collective of all ranks."""
    known = data.known(np.arange(len(data.users)))
    if config.drop_val:
        known = merged(known, data.val, len(data.items))
    return Miner(
        model=model,
        data=data,
        config=config,
        seed=seed,
        item_vectors=encode_items_sharded(model, data.items),
        known=known,
    )


def mine_in_process(model: TwoTower, data: TrainingData, config: MiningConfig, seed: int) -> Csr:
    """Item rows of each user row, by exact search; a collective, at which each mines its share.

    The same lists on every rank, and for any number of them. ``training.mining.starved_share``
    says how many are short.
    """
    with evaluating(model):
        miner = build_miner(model, data, config, seed)
        blocks = miner.blocks()
        ours = blocks[gather.rank() :: gather.world_size()]
        mined = list(miner.mine(ExactSearch(miner.item_vectors), ours))
    share = -(-len(blocks) // gather.world_size())
    local = np.full((share, BLOCK_USERS, config.per_user), EMPTY_ID, dtype=np.int64)
    for place, part in enumerate(mined):
        local[place, : len(part.users)] = part.items
    users = np.concatenate(blocks)
    gathered = gather.gather_interleaved(torch.from_numpy(local).to(model.log_temperature.device))
    # only the last block is short, so its empty slots are the very last ones
    items = gathered.cpu().numpy().reshape(-1, config.per_user)[: len(users)]
    everyone = Mined(users=users, items=items, scores=np.zeros(items.shape, np.float32))
    return everyone.lists(len(data.users))


def mine_table(search: Search, miner: Miner, progress: Progress | None = None) -> Mined:
    """All users by any searcher, ascending, in this process alone. Progress stage: ``mine``."""
    blocks, parts, done = miner.blocks(), [], 0
    total = sum(len(users) for users in blocks)
    for part in miner.mine(search, blocks):
        parts.append(part)
        done += len(part.users)
        if progress is not None:
            progress("mine", done, total)
    return joined(parts, miner.config).sorted()


@contextmanager
def evaluating(model: TwoTower) -> Iterator[None]:
    """Evaluation mode, and back to what it was."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def _ahead(
    pool: ThreadPoolExecutor, calls: Iterator[Callable[[], Mined]], width: int
) -> Iterator[Mined]:
    """Results in the order of the calls, ``width`` of which run or wait at a time."""
    waiting: deque[Future[Mined]] = deque()
    for call in calls:
        waiting.append(pool.submit(call))
        if len(waiting) > width:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
