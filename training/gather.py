"""Gathering rows from every rank, with and without gradient.

With DDP averaging gradients over ranks, a loss over local rows and all gathered columns gives the
gradient of the full batch when the gather's backward sums what the ranks send back: no factor W
anywhere. A gather without gradient would leave the item tower half its signal, pointing elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class Traffic:
    """Bytes that came to this rank from others, by gathers and their gradients, since it began."""

    received: int = 0


TRAFFIC = Traffic()


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return gather_values(local)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0]
        size = len(gradient) // world_size()
        TRAFFIC.received += gradient.nbytes - gradient[:size].nbytes
        if dist.get_backend() == "nccl":
            local = gradient.new_empty(size, *gradient.shape[1:])
            dist.reduce_scatter_tensor(local, gradient.contiguous())
            return local
        # gloo has no reduce_scatter; the incoming gradient is autograd's and stays as it is
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[rank() * size : (rank() + 1) * size]


_gather: Callable[[Tensor], Tensor] = _Gather.apply  # untyped


def gather_rows(local: Tensor) -> Tensor:
    """(W * b, ...) of (b, ...), rank 0 first; its gradient is summed over ranks. Same b on all."""
    if world_size() == 1:
        return local
    return _gather(local)


def gather_values(local: Tensor) -> Tensor:
    """(W * b, ...) of (b, ...), rank 0 first, without gradient."""
    if world_size() == 1:
        return local
    local = local.contiguous()
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local)
    TRAFFIC.received += (world_size() - 1) * local.nbytes
    return torch.cat(parts)


def gather_interleaved(local: Tensor) -> Tensor:
    """(W * n, ...) in order, of the (n, ...) that are every W-th on each rank; no gradient."""
    gathered = gather_values(local).reshape(world_size(), *local.shape)
    return gathered.transpose(0, 1).reshape(-1, *local.shape[1:])


def gather_ragged(local: Tensor) -> Tensor:
    """The ranks' (n, ...) one after the other, rank 0 first, n differing by rank; no gradient."""
    if world_size() == 1:
        return local
    lengths = gather_values(torch.tensor([len(local)], device=local.device)).tolist()
    padded = local.new_zeros(max(lengths), *local.shape[1:])
    padded[: len(local)] = local
    gathered = gather_values(padded[None])
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])
