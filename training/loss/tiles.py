"""Losses over logits that are never held whole: tiles of rows, gradients made on the spot.

A tile is some rows with all their columns, so each row's sum is complete inside it and needs no
running maximum. The loss is linear in its rows' losses, with weights known beforehand; so while a
tile is there its gradient is multiplied out too, and backward only scales it. That is the memory of
recomputing in backward (a tile, and gradients as large as the vectors) at three quarters of its
matrix products. Logits, sums and gradients are float32 whatever the towers ran in, float64 where
the vectors are.

Columns of a tile are the C shared ones, then K of each row's own. A masked logit is -inf.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shardline.training.loss.joins import Join

MIB = 1 << 20
MIN_ROWS = 16  # of a tile, below which the products are no longer matrix products
CPU_ROWS = 512  # more gain nothing, and a tile of a few thousand columns leaves the cache

# (logits (r, n), labels (r, 1), scale) -> losses (r,) and whether the label is best (r,) bool;
# the logits, -inf where masked but never at the label, become scale * their gradients
TileLoss = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What surrounds the dot products of b rows with C shared and K own columns.

    labels (b,) int64, a place among the C + K columns. correction (C,) and own_correction (b, K)
    are subtracted from the logits, from the label's too if ``correct_label``. masks: joins of rows
    and shared columns whose pairs are masked; own_masked (b, K) bool. The label never is. weights
    (b,): what the rows' losses are multiplied by; None for 1.
    """

    labels: Tensor
    correction: Tensor
    own_correction: Tensor
    correct_label: bool
    masks: tuple[Join, ...]
    own_masked: Tensor
    loss: TileLoss
    tile_mib: int
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Sums:
    """() float64 over all rows: what the logged means are made of. Logits without correction."""

    positives: Tensor
    negatives: Tensor
    masked: Tensor
    right: Tensor


def tiled_loss(queries: Tensor, columns: Tensor, own: Tensor, frame: Frame) -> tuple[Tensor, Sums]:
    """() mean loss of the rows, with gradient, and sums without.

    queries (b, d) divided by the temperature, columns (C, d), own (b, K, d); C or K may be 0.
    """
    loss, *sums = _tiled(queries, columns, own, frame)
    return loss, Sums(*sums)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, columns: Tensor, own: Tensor, frame: Frame
    ) -> tuple[Tensor, ...]:
        ctx.types = [part.dtype for part in (queries, columns, own)]
        kind = torch.promote_types(queries.dtype, torch.float32)
        with torch.autocast(queries.device.type, enabled=False):
            tiles = _Tiles(queries.to(kind), columns.to(kind), own.to(kind), frame)
            tiles.run()
        ctx.save_for_backward(tiles.query_gradient, tiles.column_gradient, tiles.own_gradient)
        sums = tuple(tiles.sums)
        ctx.mark_non_differentiable(*sums)
        return (tiles.loss.to(kind), *sums)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            (saved * gradients[0]).to(kind)
            for saved, kind in zip(ctx.saved_tensors, ctx.types, strict=True)
        ]
        return (*scaled, None)


_tiled: Callable[[Tensor, Tensor, Tensor, Frame], tuple[Tensor, ...]] = _Tiled.apply  # untyped


class _Tiles:
    """The passes over all tiles, and what they add up."""

    def __init__(self, queries: Tensor, columns: Tensor, own: Tensor, frame: Frame) -> None:
        self.queries, self.columns, self.own, self.frame = queries, columns, own, frame
        self.query_gradient = torch.empty_like(queries)
        self.column_gradient = torch.zeros_like(columns)
        self.own_gradient = torch.empty_like(own)
        self.loss = queries.new_zeros((), dtype=torch.float64)
        self.sums = [queries.new_zeros((), dtype=torch.float64) for _ in range(4)]
        self._minus = -frame.correction.to(queries.dtype)
        self._own_correction = frame.own_correction.to(queries.dtype)
        # the logged mean of all logits needs this alone, and no pass over the logits
        self._sum_of_columns = columns.sum(dim=0)

    def run(self) -> None:
        rows, width = len(self.queries), len(self.columns) + self.own.shape[1]
        budget = self.frame.tile_mib * MIB // (self.queries.element_size() * max(1, width))
        size = min(rows, max(MIN_ROWS, budget))
        if not self.queries.is_cuda:
            size = min(size, CPU_ROWS)
        # all tiles use one buffer, so the logits take the memory of the largest alone
        buffer = self.queries.new_empty(size, width)
        for start in range(0, rows, size):
            stop = min(rows, start + size)
            self._tile(buffer[: stop - start], start, stop)

    def _tile(self, logits: Tensor, start: int, stop: int) -> None:
        labels = self.frame.labels[start:stop, None]
        self._fill(logits, start, stop)
        self._mask(logits, labels, start, stop)
        losses, right = self.frame.loss(logits, labels, 1 / len(self.queries))
        if self.frame.weights is not None:  # a row's gradient is linear in its loss
            weights = self.frame.weights[start:stop].to(losses.dtype)
            losses = losses * weights
            logits.mul_(weights[:, None])
        self.loss += losses.sum(dtype=torch.float64) / len(self.queries)
        self.sums[3].add_(right.sum())
        self._multiply_out(logits, start, stop)

    def _fill(self, logits: Tensor, start: int, stop: int) -> None:
        """The products, corrected."""
        shared, queries = len(self.columns), self.queries[start:stop]
        # with the correction as the product's bias, which saves a pass over the tile
        torch.addmm(self._minus, queries, self.columns.T, out=logits[:, :shared])
        if self.own.shape[1]:
            ours = torch.bmm(self.own[start:stop], queries[:, :, None])[:, :, 0]
            torch.sub(ours, self._own_correction[start:stop], out=logits[:, shared:])

    def _mask(self, logits: Tensor, labels: Tensor, start: int, stop: int) -> None:
        """Masks all but the label, and adds to the sums."""
        positives, negatives, masked, _ = self.sums
        shared, queries = len(self.columns), self.queries[start:stop]
        label = logits.gather(1, labels)
        raw_label = label + self._correction_at(labels, start, stop)
        total = (queries @ self._sum_of_columns).sum(dtype=torch.float64) - raw_label.sum()
        for join in self.frame.masks:
            rows, columns = join.pairs(start, stop)
            values = logits[rows, columns]
            # a column that an earlier join masked is counted already; the label never is masked
            fresh = (columns != labels[rows, 0]) & (values > -torch.inf)
            masked += fresh.sum()
            total -= (values - self._minus[columns])[fresh].sum()
            # the label too, where it is among the pairs: it is put back below
            logits.index_put_((rows, columns), logits.new_tensor(-torch.inf))
        if self.own.shape[1]:
            ours, mask = logits[:, shared:], self.frame.own_masked[start:stop]
            raw = ours + self._own_correction[start:stop]
            masked += mask.sum()
            total += raw[~mask].sum()
            ours.masked_fill_(mask, -torch.inf)
        logits.scatter_(1, labels, label if self.frame.correct_label else raw_label)
        positives += raw_label.sum()
        negatives += total

    def _correction_at(self, labels: Tensor, start: int, stop: int) -> Tensor:
        """(r, 1) of the labels (r, 1)."""
        shared = len(self.columns)
        # clamped, because ``where`` reads both sides: the place outside its side is not used
        if not self.own.shape[1]:
            return -self._minus[labels]
        ours = self._own_correction[start:stop].gather(1, (labels - shared).clamp(min=0))
        if not shared:
            return ours
        return torch.where(labels < shared, -self._minus[labels.clamp(max=shared - 1)], ours)

    def _multiply_out(self, gradient: Tensor, start: int, stop: int) -> None:
        """From the gradient of the logits to those of the vectors."""
        shared, queries = len(self.columns), self.queries[start:stop]
        ours = gradient[:, shared:]
        gradient = gradient[:, :shared]
        # a row lies in one tile, so its gradient is complete; those of columns add up over tiles
        torch.mm(gradient, self.columns, out=self.query_gradient[start:stop])
        self.column_gradient.addmm_(gradient.T, queries)
        if self.own.shape[1]:
            self.query_gradient[start:stop] += torch.bmm(ours[:, None], self.own[start:stop])[:, 0]
            torch.mul(ours[:, :, None], queries[:, None], out=self.own_gradient[start:stop])


def softmax(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Minus the log of the label's share: logsumexp - label."""
    label = logits.gather(1, labels)
    best = logits.amax(dim=1, keepdim=True)
    logits.sub_(best).exp_()  # exp(-inf) is 0: masked columns have no part in sum or gradient
    total = logits.sum(dim=1, keepdim=True)
    logits.mul_(scale / total)
    # d/dz of logsumexp(z) - z_label: the shares, less one at the label
    logits.scatter_add_(1, labels, logits.new_full(labels.shape, -scale))
    return (total.log() - (label - best))[:, 0], (label == best)[:, 0]


def softmax_of_hardest(
    logits: Tensor, labels: Tensor, scale: float, *, hardest: int, weight: float
) -> tuple[Tensor, Tensor]:
    """weight * softmax over the label and its ``hardest`` highest negatives + (1 - weight) * all.

    hardest = 1 and weight = 1 is the batch-hard strategy: one negative per row.
    """
    label = logits.gather(1, labels)
    logits.scatter_(1, labels, -torch.inf)
    values, places = logits.topk(min(hardest, logits.shape[1]), dim=1)
    few = torch.cat([label, values], dim=1)
    losses, right = softmax(few, torch.zeros_like(labels), scale * weight)
    if weight == 1:
        logits.zero_()
    else:
        logits.scatter_(1, labels, label)
        all_losses, _ = softmax(logits, labels, scale * (1 - weight))
        losses = weight * losses + (1 - weight) * all_losses
    # added, because where a row has fewer negatives the places are those of masked columns
    logits.scatter_add_(1, torch.cat([labels, places], dim=1), few)
    return losses, right


def log_sum_of_negatives(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """logsumexp of all but the label; 0 for a row without negatives."""
    label = logits.gather(1, labels)
    logits.scatter_(1, labels, -torch.inf)
    best = logits.amax(dim=1, keepdim=True)
    alone = best == -torch.inf
    logits.sub_(best.masked_fill(alone, 0.0)).exp_()
    total = logits.sum(dim=1, keepdim=True).masked_fill(alone, 1.0)
    logits.mul_(scale / total)
    losses = (total.log() + best).masked_fill(alone, 0.0)
    return losses[:, 0], (label >= best)[:, 0]


def sigmoid(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Sum over columns of -log sigmoid(+-logit), + at the label (Zhai et al., SigLIP, 2023)."""
    label = logits.gather(1, labels)
    best = logits.amax(dim=1, keepdim=True)
    # -log sigmoid(-x) = softplus(x), and at the label -log sigmoid(x) = softplus(x) - x
    losses = functional.softplus(logits).sum(dim=1, keepdim=True) - label
    logits.sigmoid_().mul_(scale)
    logits.scatter_add_(1, labels, logits.new_full(labels.shape, -scale))
    return losses[:, 0], (label == best)[:, 0]
