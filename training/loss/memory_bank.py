"""What a loss carries from step to step: past item vectors, and the estimated shares.

Both are the same on every rank and part of a checkpoint.
"""

import torch
from torch import Tensor, nn

from shardline.training.config.loss_config import LossConfig
from shardline.training.loss.logq import CountedShares, Shares, StreamedShares


class VectorMemory(nn.Module):
    """The newest ``size`` positives of past global batches as further columns, without gradient.

    Cross-batch memory (Wang et al., CVPR 2020). Item, user and share of train, as known when the
    vector was kept, stay with it. Vectors of a young model go stale within a few steps, so none is
    used before ``warmup_steps`` steps.
    """

    def __init__(self, size: int, dim: int, warmup_steps: int) -> None:
        super().__init__()
        self.warmup_steps = warmup_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("kept", torch.zeros((), dtype=torch.int64))  # ever, for place and fill
        self.register_buffer("_vectors", torch.zeros(size, dim))
        self.register_buffer("_items", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("_users", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("_shares", torch.zeros(size))
        self.steps: Tensor
        self.kept: Tensor
        self._vectors: Tensor
        self._items: Tensor
        self._users: Tensor
        self._shares: Tensor

    @property
    def ready(self) -> int:
        """Columns that there are to use."""
        if self.steps < self.warmup_steps:
            return 0
        return min(int(self.kept), len(self._items))

    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Vectors (M, dim), items (M,), users (M,) and shares (M,) of the ``ready`` columns."""
        ready = self.ready
        parts = (self._vectors, self._items, self._users, self._shares)
        vectors, items, users, shares = (part[:ready].clone() for part in parts)
        return vectors, items, users, shares

    @torch.no_grad()
    def keep(self, vectors: Tensor, items: Tensor, users: Tensor, shares: Tensor) -> None:
        """Takes in a step's global positives, (B, ...) each; the oldest make room."""
        size = len(self._items)
        self.steps += 1
        first = max(0, len(items) - size)
        places = (self.kept + torch.arange(first, len(items), device=items.device)) % size
        for kept, part in (
            (self._vectors, vectors),
            (self._items, items),
            (self._users, users),
            (self._shares, shares),
        ):
            kept[places] = part[first:].detach().to(kept.dtype)
        self.kept += len(items)


class LossState(nn.Module):
    """Shares of train, and the memory; ``state_dict`` has what a checkpoint needs, maybe nothing.

    counts (items,) int64: occurrences in train.
    """

    def __init__(self, config: LossConfig, counts: Tensor, dim: int) -> None:
        super().__init__()
        self.shares: Shares = (
            CountedShares(counts)
            if config.logq_source == "counts"
            else StreamedShares(len(counts), config.streaming_rate)
        )
        self.memory = (
            VectorMemory(config.memory_size, dim, config.memory_warmup_steps)
            if config.memory_size
            else None
        )
