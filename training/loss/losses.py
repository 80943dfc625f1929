"""The loss of one step: each local query against its item and the negatives of the whole step.

``training.loss.loss_columns`` says which columns there are. Those that would be false negatives are
left out: copies of the row's item, items its user has in train, items of other rows of its user.
The label never is. ``training.loss.tiles`` does the sums.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shardline.training import gather
from shardline.training.config.loss_config import LossConfig
from shardline.training.loss.joins import Join, is_pair
from shardline.training.loss.loss_columns import Ids, Pool, Vectors, gathered_positives
from shardline.training.loss.memory_bank import LossState
from shardline.training.loss.tiles import (
    Frame,
    Sums,
    TileLoss,
    log_sum_of_negatives,
    sigmoid,
    softmax,
    softmax_of_hardest,
    tiled_loss,
)


@dataclass(frozen=True, slots=True)
class LossTerms:
    """loss: () float32 with gradient, weighted mean over local rows; the others () float32, to be
    logged.

    accuracy and masked are shares of rows and of all columns. Mean logits are before correction,
    those of negatives without the masked ones.
    """

    loss: Tensor
    accuracy: Tensor
    masked: Tensor
    positive_logit: Tensor
    negative_logit: Tensor


def step_loss(
    config: LossConfig, vectors: Vectors, ids: Ids, state: LossState, num_items: int
) -> LossTerms:
    """The loss of this rank's rows; a collective of all ranks, which also brings ``state`` forward.

    With the gradients of all ranks averaged it is the loss of the whole step's rows.
    """
    positives = gathered_positives(vectors, ids)
    state.shares.see(positives.items)
    pool = Pool(config, state, num_items, len(positives.items))
    shared, own = pool.shared(vectors, ids, positives), pool.own(vectors, ids)
    rows, first = len(ids.items), len(shared.items)
    labels = torch.arange(rows, device=ids.items.device) + gather.rank() * rows
    frame = Frame(
        labels=labels if config.in_batch else torch.full_like(labels, first),
        correction=shared.correction,
        own_correction=own.correction,
        correct_label=config.logq != "expected_count" or config.kind == "sigmoid",
        masks=false_negatives(config, ids, shared.items, shared.users, num_items),
        own_masked=_own_masked(config, ids, own.items),
        loss=_tile_loss(config),
        tile_mib=config.tile_mib,
        weights=ids.weights,
    )
    scaled = vectors.queries / vectors.temperature
    loss, sums = tiled_loss(scaled, shared.vectors, own.vectors, frame)
    if config.kind == "bsl":
        ours = pool.correction(state.shares.of(ids.items)) if config.logq == "standard" else 0.0
        logits = (scaled.float() * vectors.items.float()).sum(dim=1) - ours
        loss = config.bsl_negative_weight * loss - _mean_of_users(logits, ids.users, ids.weights)
    if config.symmetric:
        loss = torch.lerp(loss, _item_to_user(config, vectors, ids, labels), config.symmetric)
    if state.memory is not None:
        shares = state.shares.of(positives.items)
        state.memory.keep(positives.vectors, positives.items, positives.users, shares)
    return _terms(loss, sums, rows, columns=first + own.items.shape[1])


def false_negatives(
    config: LossConfig, ids: Ids, column_items: Tensor, column_users: Tensor, num_items: int
) -> tuple[Join, ...]:
    """The columns (C,) to leave out of each local row's sum; the label may be among them."""
    joins = []
    if config.mask_duplicates:
        joins.append(Join.equal(ids.items, column_items))
    if config.mask_same_user:
        joins.append(Join.equal(ids.users, column_users))
    if config.mask_known_positives:
        rows, items = _other_known(ids)
        # a long history meets few columns: the rest of it would be looked up in vain by every tile
        there = torch.zeros(num_items, dtype=torch.bool, device=column_items.device)
        there[column_items] = True
        met = there[items]
        rows, items = rows[met], items[met]
        columns = torch.arange(len(column_items), device=column_items.device)
        joins.append(Join.of(len(ids.items), rows, items, columns, column_items))
    return tuple(joins)


def _other_known(ids: Ids) -> tuple[Tensor, Tensor]:
    # without mask_duplicates the row's own item stays a negative wherever else it stands
    other = ids.known_items != ids.items[ids.known_rows]
    return ids.known_rows[other], ids.known_items[other]


def _own_masked(config: LossConfig, ids: Ids, items: Tensor) -> Tensor:
    """(b, K) bool of the rows' own columns: empty slots and false negatives, never the label."""
    masked = items < 0
    if config.mask_duplicates:
        masked |= items == ids.items[:, None]
    if config.mask_known_positives:
        rows = torch.arange(len(items), device=items.device)[:, None].expand_as(items)
        found = is_pair(rows.flatten(), items.flatten().clamp(min=0), *_other_known(ids))
        masked |= found.view_as(items)
    if not config.in_batch:
        masked[:, 0] = False
    return masked


def _tile_loss(config: LossConfig) -> TileLoss:
    if config.kind == "sigmoid":
        return sigmoid
    if config.kind == "bsl":
        return log_sum_of_negatives
    if config.batch_hard and config.batch_hard_weight:
        return partial(
            softmax_of_hardest, hardest=config.batch_hard, weight=config.batch_hard_weight
        )
    return softmax


def _mean_of_users(logits: Tensor, users: Tensor, weights: Tensor | None) -> Tensor:
    """() mean over local rows of log mean exp of all the step's positives of the row's user.

    weights (b,): what the rows are multiplied by, if anything.

    The positive side of the bilateral softmax loss (Wu et al., 2024): among a user's positives
    those the model believes count most, so one that is noise pulls less.
    """
    everyone, rows = gather.gather_values(users), len(users)
    logits = gather.gather_rows(logits)
    _, groups, counts = torch.unique(everyone, return_inverse=True, return_counts=True)
    best = torch.full_like(logits[: len(counts)], -torch.inf)
    best = best.scatter_reduce(0, groups, logits.detach(), "amax")
    total = torch.zeros_like(best).index_add(0, groups, (logits - best[groups]).exp())
    means = (total / counts).log() + best
    ours = means[groups[gather.rank() * rows :][:rows]]
    return torch.mean(ours if weights is None else ours * weights)


def _item_to_user(config: LossConfig, vectors: Vectors, ids: Ids, labels: Tensor) -> Tensor:
    """() softmax of each local item over the queries of all ranks; no correction.

    Left out are other rows of the label's user, and rows whose user has the item in train.
    """
    queries, users = gather.gather_rows(vectors.queries), gather.gather_values(ids.users)
    masks = []
    if config.mask_duplicates:
        masks.append(Join.equal(ids.users, users))
        masks.append(Join.equal(ids.items, gather.gather_values(ids.items)))
    if config.mask_known_positives:
        offset = gather.rank() * len(ids.items)
        columns = gather.gather_ragged(ids.known_rows + offset)
        items = gather.gather_ragged(ids.known_items)
        rows = torch.arange(len(ids.items), device=ids.items.device)
        masks.append(Join.of(len(rows), rows, ids.items, columns, items))
    nothing = torch.zeros((len(labels), 0), device=labels.device)
    frame = Frame(
        labels=labels,
        correction=torch.zeros(len(users), device=labels.device),
        own_correction=nothing,
        correct_label=True,
        masks=tuple(masks),
        own_masked=nothing.bool(),
        loss=softmax,
        tile_mib=config.tile_mib,
        weights=ids.weights,
    )
    scaled = vectors.items / vectors.temperature
    own = scaled.new_zeros(len(labels), 0, scaled.shape[1])
    loss, _ = tiled_loss(scaled, queries, own, frame)
    return loss


def _terms(loss: Tensor, sums: Sums, rows: int, columns: int) -> LossTerms:
    negatives = (rows * (columns - 1) - sums.masked).clamp(min=1)
    return LossTerms(
        loss,
        accuracy=(sums.right / rows).float(),
        masked=(sums.masked / (rows * columns)).float(),
        positive_logit=(sums.positives / rows).float(),
        negative_logit=(sums.negatives / negatives).float(),
    )
