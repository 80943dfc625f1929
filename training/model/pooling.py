"""The past items of each query, pooled into one row: mean, sum over root, attention with recency.

The users of each item (``audience``) are pooled the same way; read "user" for "item" then.

A popular item is in the histories of many queries of a batch, so its row is made once and the
histories name it by its place. Sums then read rows where they lie, and their gradient is the same
sum with queries and items exchanged: no array as long as all histories together is ever made.

Attention is that of a single learned query over keys made from the rows (the pooling of Lin et
al. 2017, "A structured self-attentive sentence embedding", with one hop), plus a learned bias per
age. An item's part of the score depends on the item alone, so serving looks it up.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardline.training.config.tower_config import AudienceFeature, HistoryFeature

KEY_WIDTH = 32  # of the keys that the query is compared with


class HistoryPooling(nn.Module):
    """(n, width) rows, (sum of lengths,) places among them, (b,) lengths -> (b, width).

    Places are those of the past items, oldest first. Zeros where a length is 0. Attention starts
    as the mean: its weights and biases are zero.
    """

    def __init__(self, feature: HistoryFeature | AudienceFeature | None, width: int) -> None:
        super().__init__()
        self.by_root = feature is not None and feature.pooling == "sqrtn"
        self.attends = feature is not None and feature.pooling == "attention"
        if feature is not None and self.attends:
            self.key = nn.Linear(width, KEY_WIDTH)
            self.query = nn.Parameter(torch.zeros(KEY_WIDTH))
            self.recency = nn.Parameter(torch.zeros(feature.max_length))  # by age, newest first

    def forward(self, rows: Tensor, places: Tensor, lengths: Tensor) -> Tensor:
        if not self.attends:
            share = lengths.clamp(min=1).to(rows.dtype)
            scale = share.rsqrt() if self.by_root else share.reciprocal()
            return sums_of_rows(rows, places, lengths) * scale[:, None]
        owners = torch.repeat_interleave(lengths)
        ages = lengths.cumsum(0)[owners] - 1 - torch.arange(len(places), device=rows.device)
        scores = self.item_scores(rows)[places] + self.recency[ages]
        # the largest score of each query only keeps the exponentials in range
        largest = torch.segment_reduce(scores.detach(), "max", lengths=lengths, initial=0.0)
        weights = (scores - largest[owners]).exp()
        totals = weights.new_zeros(len(lengths)).index_add(0, owners, weights)
        weighted = rows[places] * (weights / totals[owners])[:, None]
        return rows.new_zeros(len(lengths), rows.shape[1]).index_add(0, owners, weighted)

    def item_scores(self, rows: Tensor) -> Tensor:
        """(n,) float32: what an item adds to its score in any history."""
        return torch.tanh(self.key(rows)).float() @ self.query


def sums_of_rows(rows: Tensor, places: Tensor, lengths: Tensor) -> Tensor:
    """(b, width) of (n, width) rows: the sum of the rows of each of b lists of places, end to end.

    lengths (b,) of the lists; an empty one sums to 0.
    """
    return _sums_of_rows(rows, places, lengths)


class _SumsOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(places, lengths)
        ctx.num_rows = len(rows)
        starts = lengths.cumsum(0) - lengths
        return functional.embedding_bag(places, rows, starts, mode="sum")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        places, lengths = ctx.saved_tensors
        owners = torch.repeat_interleave(lengths, output_size=len(places))
        by_row = torch.argsort(places, stable=True)
        counts = torch.bincount(places, minlength=ctx.num_rows)
        starts = counts.cumsum(0) - counts
        gradient = gradients[0].contiguous()
        return functional.embedding_bag(owners[by_row], gradient, starts, mode="sum"), None, None


_sums_of_rows: Callable[[Tensor, Tensor, Tensor], Tensor] = _SumsOfRows.apply  # untyped
