"""Which of the items found nearest to a user become hard negatives: known items, ranks, margin.

A searcher ranks items for users' query vectors; this module decides, and knows nothing of models or
indexes. Of each user's list, best first:

    1. the items that the user is known to like are dropped, and ranks counted from 1 after that;
    2. ranks range_min to range_max are kept: the first ones are often likes not yet seen;
    3. what scores more than s - margin x |s| is dropped, s being the score of the user's own items
       (the "positive-aware" filter TopK-PercPos of Moreira et al., NV-Retriever, arXiv 2407.15831;
       |s| lets the margin mean the same for negative scores);
    4. of the rest ``per_user`` are drawn at random, all equally likely.

Random draws are a function of (seed, user, item) alone, so neither batches nor the number of ranks
nor the order of the list changes them. Users and items go by their rows in the dataset's tables.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.partition import mix_bits
from shardline.shards.core.schema import EMPTY_ID, EMPTY_SCORE, FloatArray, IdArray
from shardline.training.config.training_config import MiningConfig
from shardline.training.data.csr import Csr
from shardline.training.evaluation.ranking_metrics import hit_matrix

_LAST_KEY = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mined:
    """Hard negatives of n users.

    users (n,) int64 user rows, in any order, each once. items (n, per_user) int64 item rows and
    scores (n, per_user) float32, best first; -1 and -inf fill the slots of a starved user.
    """

    users: IdArray
    items: IdArray
    scores: FloatArray

    @property
    def starved(self) -> int:
        """Users with fewer negatives than wanted."""
        return int(np.count_nonzero((self.items == EMPTY_ID).any(axis=1)))

    @property
    def starved_share(self) -> float:
        return self.starved / len(self.users) if len(self.users) else 0.0

    def sorted(self) -> "Mined":
        """The same, users ascending."""
        order = np.argsort(self.users)
        return Mined(users=self.users[order], items=self.items[order], scores=self.scores[order])

    def lists(self, num_users: int) -> Csr:
        """Item rows of each of all ``num_users`` user rows; none for users that were not mined."""
        ordered = self.sorted()
        filled = ordered.items != EMPTY_ID
        lengths = np.zeros(num_users, dtype=np.int64)
        lengths[ordered.users] = np.count_nonzero(filled, axis=1)
        return Csr.of(lengths, ordered.items[filled])


def blocks_of(known: Csr, users: IdArray, size: int) -> list[IdArray]:
    """The users in blocks of ``size``, those with few known items first; the last may be shorter.

    A block is searched as deep as its user with the most known items needs, so users alike in that
    go together. known: of all user rows.
    """
    order = users[np.argsort(known.lengths[users], kind="stable")]
    return [order[start : start + size] for start in range(0, len(order), size)]


def depth_of(config: MiningConfig, known: Csr) -> int:
    """How many items a search must rank so that range_max are left without the known ones."""
    return config.range_max + int(known.lengths.max(initial=0))


def reference_scores(
    queries: FloatArray,
    items: FloatArray,
    positives: Csr,
    rule: Literal["lowest", "mean", "highest"],
) -> FloatArray:
    """(n,) float32, the dot products of query i with its own items, reduced to one by the rule.

    queries (n, d), items (m, d) float32; positives: item rows of the n queries, at least one each.
    """
    assert positives.lengths.min(initial=1) > 0, "a query without an item has no score to hold to"
    if not len(queries):
        return np.empty(0, dtype=np.float32)
    scores = np.einsum("ij,ij->i", queries[positives.owners], items[positives.items])
    starts, lengths = positives.indptr[:-1], positives.lengths
    if rule == "mean":
        return (np.add.reduceat(scores, starts) / lengths).astype(np.float32)
    reduced: FloatArray = {"lowest": np.minimum, "highest": np.maximum}[rule].reduceat(
        scores, starts
    )
    return reduced


def choose(
    scores: FloatArray,
    items: IdArray,
    *,
    users: IdArray,
    known: Csr,
    reference: FloatArray,
    config: MiningConfig,
    seed: int,
) -> Mined:
    """Steps 1 to 4 of the module's docstring for n users at once.

    scores (n, K) float32 and items (n, K) int64 item rows, best first, -inf and -1 at the end;
    users (n,) user rows; known: item rows of each, never chosen; reference (n,) float32, the s.

    Raises:
        InvalidInput: a known item stands twice in one list, or not one list per user.
    """
    candidate = (items != EMPTY_ID) & ~hit_matrix(items, known)
    ranks = np.cumsum(candidate, axis=1)
    highest = reference - np.float32(config.margin) * np.abs(reference)
    eligible = (
        candidate
        & (ranks >= config.range_min)
        & (ranks <= config.range_max)
        & (scores <= highest[:, None])
    )
    keys = np.where(eligible, draws(seed, users[:, None], items), _LAST_KEY)
    drawn = np.sort(np.argsort(keys, axis=1, kind="stable")[:, : config.per_user], axis=1)
    # a starved row drew ineligible places too, anywhere in its list: those to the end, empty
    taken = np.take_along_axis(eligible, drawn, axis=1)
    order = np.argsort(~taken, axis=1, kind="stable")
    drawn, taken = (np.take_along_axis(array, order, axis=1) for array in (drawn, taken))
    found = np.where(taken, np.take_along_axis(items, drawn, axis=1), EMPTY_ID)
    values = np.where(taken, np.take_along_axis(scores, drawn, axis=1), EMPTY_SCORE)
    width = ((0, 0), (0, config.per_user - drawn.shape[1]))  # a list shorter than per_user
    return Mined(
        users=users,
        items=np.pad(found, width, constant_values=EMPTY_ID),
        scores=np.pad(values.astype(np.float32), width, constant_values=EMPTY_SCORE),
    )


def joined(parts: Iterator[Mined] | list[Mined], config: MiningConfig) -> Mined:
    """One after the other; empty of no parts."""
    none = Mined(
        users=np.empty(0, np.int64),
        items=np.empty((0, config.per_user), np.int64),
        scores=np.empty((0, config.per_user), np.float32),
    )
    every = [none, *parts]
    return Mined(
        users=np.concatenate([part.users for part in every]),
        items=np.concatenate([part.items for part in every]),
        scores=np.concatenate([part.scores for part in every]),
    )


def starved_share(lists: Csr, mined: NDArray[np.bool_], config: MiningConfig) -> float:
    """Share of the ``mined`` users (users,) whose list is shorter than wanted; 0 of none."""
    short = lists.lengths[mined] < config.per_user
    return float(short.mean()) if len(short) else 0.0


def draws(seed: int, users: IdArray, items: IdArray) -> NDArray[np.uint64]:
    """Uniform 64-bit numbers, a function of seed, user and item alone; broadcasts as ``+`` does.

    SplitMix64 of the seed, of that plus the user, and of that plus the item.
    """
    start = _mixed(np.array([seed], dtype=np.uint64))
    by_user = _mixed(start + users.astype(np.uint64))
    return _mixed(by_user + items.astype(np.uint64))


def merged(first: Csr, second: Csr, num_items: int) -> Csr:
    """The items of both of each user, ascending, none twice."""
    owners = np.concatenate([first.owners, second.owners])
    keys = np.unique(owners * num_items + np.concatenate([first.items, second.items]))
    counts = np.bincount(keys // num_items, minlength=len(first.indptr) - 1)
    return Csr.of(counts, keys % num_items)


def _mixed(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # arrays wrap around silently, as the algorithm wants; numpy scalars would warn
    return mix_bits(keys + np.uint64(0x9E3779B97F4A7C15))
