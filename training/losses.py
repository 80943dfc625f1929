"""InfoNCE over local queries and the items of all ranks.

Column j of row i scores s = (q_i . v_j) / temperature - log q_j, where q_j is how often item j is
drawn as a negative; the row's own item is its label. Columns that would be false negatives are set
to -inf: copies of the row's item, and items its user has in train. The label never is.
(Yi et al., Sampling-bias-corrected neural modeling, RecSys 2019, section 3.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from training.config import LossConfig


@dataclass(frozen=True, slots=True)
class LossTerms:
    """loss: () float32 with gradient, mean over local rows; the others are plain shares of 1."""

    loss: Tensor
    accuracy: Tensor
    masked: Tensor


def info_nce(
    queries: Tensor,
    items: Tensor,
    labels: Tensor,
    temperature: Tensor,
    *,
    log_q: Tensor | None,
    masked: tuple[Tensor, Tensor],
) -> LossTerms:
    """queries (b, d), items (B, d), labels (b,) int64 columns, log_q (B,), masked (rows, columns).

    Computed in float32 whatever the towers ran in. Memory is O(b x B).
    """
    logits = queries.float() @ items.float().T / temperature
    if log_q is not None:
        logits = logits - log_q
    logits = logits.index_put(masked, logits.new_tensor(-torch.inf))
    loss = functional.cross_entropy(logits, labels)
    with torch.no_grad():
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        share = logits.new_tensor(len(masked[0]) / logits.numel())
    return LossTerms(loss, accuracy, share)


def false_negatives(
    config: LossConfig,
    row_items: Tensor,
    columns: Tensor,
    labels: Tensor,
    known_rows: Tensor,
    known_items: Tensor,
) -> tuple[Tensor, Tensor]:
    """(rows, columns) int64 of the columns to leave out of each local row's sum.

    row_items (b,) and columns (B,): items of the local rows and of all columns. known: pairs of a
    local row and an item its user has in train. Cost grows with the matches, not with b x B: each
    wanted (row, item) is looked up in the sorted columns.
    """
    rows = torch.arange(len(row_items), device=columns.device)
    wanted_rows, wanted_items = [], []
    if config.mask_duplicates:
        wanted_rows.append(rows)
        wanted_items.append(row_items)
    if config.mask_known_positives:
        # without mask_duplicates the row's own item stays a negative wherever else it stands
        other = known_items != row_items[known_rows]
        wanted_rows.append(known_rows[other])
        wanted_items.append(known_items[other])
    if not wanted_rows:
        return rows[:0], rows[:0]
    found_rows, found_columns = _matches(torch.cat(wanted_rows), torch.cat(wanted_items), columns)
    kept = found_columns != labels[found_rows]
    return found_rows[kept], found_columns[kept]


def _matches(rows: Tensor, items: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """All (row, column) with columns[column] equal to the item wanted beside the row."""
    ordered, order = torch.sort(columns, stable=True)
    first = torch.searchsorted(ordered, items)
    counts = torch.searchsorted(ordered, items, right=True) - first
    starts = torch.cumsum(counts, 0) - counts
    places = torch.arange(int(counts.sum()), device=columns.device)
    within = places - torch.repeat_interleave(starts, counts)
    sorted_places = torch.repeat_interleave(first, counts) + within
    return torch.repeat_interleave(rows, counts), order[sorted_places]
