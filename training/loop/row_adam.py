"""Embedding tables with sparse gradients: a step exchanges and updates only the rows it used.

A dense step over a table reads and writes all of it several times, though a batch looks up a few
thousand rows. Here every rank sends the rows it used, and a lazy AdamW touches only those: the
moments of a row, and its decay, stand still while no step uses it (torch.optim.SparseAdam's rule).
With dense gradients they would go on; the two train slightly different models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardline.training import gather

EPSILON = 1e-8  # as in torch.optim.AdamW


@dataclass(slots=True)
class RowAdam:
    """Lazy AdamW over one table (rows, dim): Adam's moments of the same shape."""

    weight: nn.Parameter
    betas: tuple[float, float]
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def of(cls, weight: nn.Parameter, betas: tuple[float, float]) -> "RowAdam":
        return cls(weight, betas, torch.zeros_like(weight), torch.zeros_like(weight))

    @torch.no_grad()
    def step(self, gradient: Tensor, step: int, rate: float, decay: float, *, l2: bool) -> None:
        """One update by a coalesced sparse (rows, dim) gradient; ``step`` counts from 1.

        decay shrinks the rows by rate x decay, or with l2 is added times the row to the gradient.
        """
        rows, values = gradient.indices()[0], gradient.values()
        used = self.weight.index_select(0, rows)
        if l2:
            values = values.add(used, alpha=decay)
        else:
            used.mul_(1 - rate * decay)
        first, second = self.betas
        mean = self.exp_avg.index_select(0, rows).lerp_(values, 1 - first)
        square = self.exp_avg_sq.index_select(0, rows).mul_(second)
        square.addcmul_(values, values, value=1 - second)
        self.exp_avg.index_copy_(0, rows, mean)
        self.exp_avg_sq.index_copy_(0, rows, square)
        scale = square.div_(1 - second**step).sqrt_().add_(EPSILON)
        used.addcdiv_(mean, scale, value=-rate / (1 - first**step))
        self.weight.index_copy_(0, rows, used)


def tables(model: nn.Module) -> dict[str, nn.Embedding | nn.EmbeddingBag]:
    """The trained embedding tables of a model by the name of their parameter."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.weight.requires_grad
    }


def average_rows(weight: nn.Parameter) -> Tensor:
    """(rows, dim) sparse, coalesced: the gradient of a table averaged over ranks.

    A collective: every rank takes part for every table in the same order, and without a gradient
    where it used no row. gloo could reduce sparse tensors by itself, NCCL could not; gathering
    rows works on both, and all ranks add them up in the same order.
    """
    local = _coalesced(weight)
    world = gather.world_size()
    if world == 1:
        return local
    rows = gather.gather_ragged(local.indices()[0])
    values = gather.gather_ragged(local.values()) / world
    return torch.sparse_coo_tensor(
        rows[None], values, weight.shape, check_invariants=False
    ).coalesce()


def _coalesced(weight: nn.Parameter) -> Tensor:
    if weight.grad is not None:
        return weight.grad.coalesce()
    empty = torch.zeros((1, 0), dtype=torch.int64, device=weight.device)
    return torch.sparse_coo_tensor(
        empty, weight.new_empty(0, weight.shape[1]), weight.shape, check_invariants=False
    ).coalesce()
