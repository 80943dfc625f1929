"""The columns of a step's loss: which items a row is compared with, and each one's correction.

Columns that all rows share, gathered from every rank where gradient flows: the items of all rows,
uniform draws, the rows' mined negatives if ``hard_shared``, and vectors kept from past steps. Each
row's own columns: its mined negatives, its random ones, and its item where ``in_batch`` is off.

    logit = q . v / temperature - correction of the column's item (``training.loss.logq``)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shardline.training import gather
from shardline.training.config.loss_config import LossConfig
from shardline.training.loss.logq import expected_counts
from shardline.training.loss.memory_bank import LossState

NOBODY = -1  # the user of a column that is no interaction


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """What the towers made of a rank's b rows; temperature ().

    queries and items (b, dim), uniform (u, dim), hard (b, H, dim), random (b, R, dim).
    """

    queries: Tensor
    items: Tensor
    uniform: Tensor
    hard: Tensor
    random: Tensor
    temperature: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Ids:
    """Whose vectors they are, int64: users (b,), and items as in ``Vectors``; -1 fills hard.

    known: (P,) pairs of a local row and an item its user has in train. weights (b,): what the rows'
    losses are multiplied by; None for 1.
    """

    users: Tensor
    items: Tensor
    uniform: Tensor
    hard: Tensor
    random: Tensor
    known_rows: Tensor
    known_items: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of one source: vectors (..., dim); items, users and correction (...)."""

    vectors: Tensor
    items: Tensor
    users: Tensor
    correction: Tensor


def gathered_positives(vectors: Vectors, ids: Ids) -> Columns:
    """The (W * b,) items of all ranks' rows, rank 0 first; not corrected yet."""
    items, users = gather.gather_values(ids.items), gather.gather_values(ids.users)
    return Columns(gather.gather_rows(vectors.items), items, users, torch.empty(0))


class Pool:
    """Which columns there are and what their items' corrections are."""

    def __init__(self, config: LossConfig, state: LossState, num_items: int, batch: int) -> None:
        self._config, self._state, self._num_items = config, state, num_items
        ready = state.memory.ready if state.memory is not None else 0
        self._by_share = batch * config.in_batch + ready
        self._uniform = config.uniform_negatives + config.random_negatives

    def correction(self, shares: Tensor) -> Tensor:
        """c_j of items with these shares of train; of their shape."""
        draws = self._by_share + self._uniform
        if draws == 0:  # mined negatives alone are no sample of anything
            return torch.zeros_like(shares)
        if self._config.logq == "none":
            # each logit of a sigmoid stands alone: this bias makes one column in draws a positive
            is_sigmoid = self._config.kind == "sigmoid"
            return torch.full_like(shares, draws).log() if is_sigmoid else torch.zeros_like(shares)
        counts = expected_counts(shares, self._by_share, self._uniform, self._num_items)
        relative = self._config.logq_strength * (counts / draws).log()
        if self._config.kind == "sigmoid":
            return relative + math.log(draws)
        if self._config.logq == "standard":
            return relative
        return self._config.logq_strength * counts.log()

    def shared(self, vectors: Vectors, ids: Ids, positives: Columns) -> Columns:
        """The columns of all rows, the positives first."""
        config, parts = self._config, []
        if config.in_batch:
            parts.append(self._drawn(positives.vectors, positives.items, positives.users))
        if config.uniform_negatives:
            items = gather.gather_values(ids.uniform)
            parts.append(self._drawn(gather.gather_rows(vectors.uniform), items))
        if config.hard_shared and ids.hard.numel():  # none before mining.start_epoch
            items = gather.gather_values(ids.hard.flatten())
            there = items >= 0
            hard = gather.gather_rows(vectors.hard.flatten(0, 1))
            parts.append(self._mined(hard[there], items[there]))
        if self._state.memory is not None and self._state.memory.ready:
            kept, items, users, shares = self._state.memory.columns()
            parts.append(Columns(kept, items, users, self.correction(shares)))
        nothing = self._drawn(vectors.items[:0], ids.items[:0])
        return _joined([nothing, *parts], dim=0)

    def own(self, vectors: Vectors, ids: Ids) -> Columns:
        """The columns (b, K) of each row alone, its item first where it is not shared."""
        parts = [self._drawn(vectors.random, ids.random)]
        if not self._config.hard_shared:
            parts.insert(0, self._mined(vectors.hard, ids.hard))
        if not self._config.in_batch:
            parts.insert(0, self._drawn(vectors.items[:, None], ids.items[:, None]))
        return _joined(parts, dim=1)

    def _drawn(self, vectors: Tensor, items: Tensor, users: Tensor | None = None) -> Columns:
        users = torch.full_like(items, NOBODY) if users is None else users
        return Columns(vectors, items, users, self.correction(self._state.shares.of(items)))

    def _mined(self, vectors: Tensor, items: Tensor) -> Columns:
        """Under expected_count mined items are not corrected: they stand for themselves."""
        weight = torch.full(items.shape, self._config.hard_weight, device=items.device).log()
        columns = self._drawn(vectors, items)
        if self._config.logq == "expected_count" and self._config.kind != "sigmoid":
            return Columns(vectors, items, columns.users, -weight)
        return Columns(vectors, items, columns.users, columns.correction - weight)


def _joined(parts: list[Columns], dim: int) -> Columns:
    kind = parts[0].vectors.dtype
    return Columns(
        torch.cat([part.vectors.to(kind) for part in parts], dim),
        torch.cat([part.items for part in parts], dim),
        torch.cat([part.users for part in parts], dim),
        torch.cat([part.correction for part in parts], dim),
    )
