"""One step of one rank: the batch through the towers, gathered, and its loss."""

import numpy as np
import torch
from torch import Tensor, nn

from training import gather
from training.batches import Batch, TrainingData
from training.config import TrainingConfig
from training.losses import LossTerms, false_negatives, info_nce
from training.towers import Inputs, QueryInputs


def batch_loss(
    model: nn.Module,
    config: TrainingConfig,
    batch: Batch,
    log_q: Tensor | None,
    generator: torch.Generator | None,
) -> LossTerms:
    """The loss of this rank's rows against the items of all ranks; a step of every rank at once.

    model: a TwoTower, or DistributedDataParallel around one. log_q (items,) float32 or None.
    """
    device = next(model.parameters()).device
    queries = QueryInputs.of(batch.users, batch.history, batch.history_lengths, device)
    local_queries, local_items, temperature = model(
        queries, Inputs.of(batch.items, device), generator
    )
    row_items = torch.from_numpy(batch.item_rows).to(device)
    columns = gather.gather_values(row_items)
    labels = torch.arange(len(row_items), device=device) + gather.rank() * len(row_items)
    masked = false_negatives(
        config.loss,
        row_items,
        columns,
        labels,
        torch.from_numpy(batch.known_rows).to(device),
        torch.from_numpy(batch.known_items).to(device),
    )
    return info_nce(
        local_queries,
        gather.gather_rows(local_items),
        labels,
        temperature,
        log_q=None if log_q is None else log_q[columns],
        masked=masked,
    )


def log_frequencies(data: TrainingData, device: torch.device) -> Tensor:
    """(items,) float32: log of each item's share of train; items that never occur get -inf."""
    counts = data.item_counts()
    with np.errstate(divide="ignore"):
        frequencies = np.log(counts / counts.sum())
    return torch.from_numpy(frequencies.astype(np.float32)).to(device)
