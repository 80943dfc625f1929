"""The past items of each query, pooled into one row: mean, sum over root, attention with recency.

Attention is that of a single learned query over keys made from the rows (the pooling of Lin et
al. 2017, "A structured self-attentive sentence embedding", with one hop), plus a learned bias per
age. An item's part of the score depends on the item alone, so serving looks it up.
"""

import torch
from torch import Tensor, nn

from training.config import HistoryFeature

KEY_WIDTH = 32  # of the keys that the query is compared with


class HistoryPooling(nn.Module):
    """(sum of lengths, width) rows, oldest first, and (b,) lengths -> (b, width).

    Zeros where a length is 0. Attention starts as the mean: its weights and biases are zero.
    """

    def __init__(self, feature: HistoryFeature | None, width: int) -> None:
        super().__init__()
        self.by_root = feature is not None and feature.pooling == "sqrtn"
        self.attends = feature is not None and feature.pooling == "attention"
        if feature is not None and self.attends:
            self.key = nn.Linear(width, KEY_WIDTH)
            self.query = nn.Parameter(torch.zeros(KEY_WIDTH))
            self.recency = nn.Parameter(torch.zeros(feature.max_length))  # by age, newest first

    def forward(self, rows: Tensor, lengths: Tensor) -> Tensor:
        if not self.attends:
            mean = torch.segment_reduce(rows, "mean", lengths=lengths, initial=0.0)
            return mean * lengths.sqrt()[:, None] if self.by_root else mean
        owners = torch.repeat_interleave(lengths)
        ages = lengths.cumsum(0)[owners] - 1 - torch.arange(len(rows), device=rows.device)
        scores = self.item_scores(rows) + self.recency[ages]
        # the largest score of each query only keeps the exponentials in range
        largest = torch.segment_reduce(scores.detach(), "max", lengths=lengths, initial=0.0)
        weights = (scores - largest[owners]).exp()
        totals = weights.new_zeros(len(lengths)).index_add(0, owners, weights)
        weighted = rows * (weights / totals[owners])[:, None]
        return rows.new_zeros(len(lengths), rows.shape[1]).index_add(0, owners, weighted)

    def item_scores(self, rows: Tensor) -> Tensor:
        """(n,) float32: what an item adds to its score in any history."""
        return torch.tanh(self.key(rows)).float() @ self.query
