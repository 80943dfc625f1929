"""InfoNCE and its masks against loops over every row and column."""

import math

import numpy as np
import pytest
import torch

from training.config import LossConfig
from training.losses import false_negatives, info_nce


def slow_masks(
    config: LossConfig, row_items: list[int], columns: list[int], offset: int, known: set
) -> set[tuple[int, int]]:
    masked = set()
    for row, own in enumerate(row_items):
        for column, item in enumerate(columns):
            if column == row + offset:
                continue
            if config.mask_duplicates and item == own:
                masked.add((row, column))
            if config.mask_known_positives and item != own and (row, item) in known:
                masked.add((row, column))
    return masked


@pytest.mark.parametrize("duplicates", [True, False])
@pytest.mark.parametrize("positives", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_masks_against_loops(duplicates: bool, positives: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = LossConfig(mask_duplicates=duplicates, mask_known_positives=positives)
    columns = rng.integers(0, 12, 20)
    offset = 5  # rank 1 of 4
    row_items = columns[offset : offset + 5]
    known = {(row, int(item)) for row, item in enumerate(row_items)}
    known |= {(int(rng.integers(5)), int(rng.integers(12))) for _ in range(10)}
    rows, items = (torch.tensor(part) for part in zip(*sorted(known), strict=True))
    found = false_negatives(
        config,
        torch.from_numpy(row_items),
        torch.from_numpy(columns),
        torch.arange(5) + offset,
        rows,
        items,
    )
    pairs = list(zip(found[0].tolist(), found[1].tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    expected = slow_masks(config, row_items.tolist(), columns.tolist(), offset, known)
    assert set(pairs) == expected


def slow_loss(q, v, labels, tau, log_q, masked) -> tuple[float, float]:
    losses, right = [], 0
    for row in range(len(q)):
        logits = {
            column: float(q[row] @ v[column]) / tau - (log_q[column] if log_q is not None else 0)
            for column in range(len(v))
            if (row, column) not in masked
        }
        losses.append(math.log(sum(map(math.exp, logits.values()))) - logits[labels[row]])
        right += max(logits, key=lambda column: logits[column]) == labels[row]
    return sum(losses) / len(q), right / len(q)


@pytest.mark.parametrize("with_log_q", [True, False])
def test_info_nce_against_loops(with_log_q: bool) -> None:
    rng = np.random.default_rng(1)
    q, v = rng.standard_normal((4, 6)), rng.standard_normal((9, 6))
    labels = np.array([2, 3, 4, 5])
    log_q = np.log(rng.random(9)) if with_log_q else None
    masked = {(0, 0), (0, 8), (2, 5), (3, 1)}
    rows, columns = (torch.tensor(part) for part in zip(*sorted(masked), strict=True))
    terms = info_nce(
        torch.tensor(q, dtype=torch.float32),
        torch.tensor(v, dtype=torch.float32),
        torch.from_numpy(labels),
        torch.tensor(0.7),
        log_q=None if log_q is None else torch.tensor(log_q, dtype=torch.float32),
        masked=(rows, columns),
    )
    loss, accuracy = slow_loss(q, v, labels, 0.7, log_q, masked)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-5)
    assert terms.accuracy.item() == pytest.approx(accuracy)
    assert terms.masked.item() == pytest.approx(4 / 36)
    assert terms.loss.dtype == torch.float32


def test_loss_is_float32_for_half_precision_towers() -> None:
    halves = torch.eye(4, dtype=torch.bfloat16)
    nothing = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    terms = info_nce(halves, halves, torch.arange(4), torch.tensor(0.5), log_q=None, masked=nothing)
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-2)), rel=1e-5)


def test_every_term_is_on_the_device_of_the_towers() -> None:
    """They are stacked for one all-reduce; meta stands for a GPU."""
    rows = torch.empty(4, 6, device="meta")
    nothing = torch.empty(0, dtype=torch.int64, device="meta")
    labels, temperature = torch.arange(4, device="meta"), torch.tensor(0.5, device="meta")
    terms = info_nce(rows, rows, labels, temperature, log_q=None, masked=(nothing, nothing))
    devices = {value.device.type for value in (terms.loss, terms.accuracy, terms.masked)}
    assert devices == {"meta"}


def test_log_q_makes_in_batch_gradients_those_of_the_full_softmax() -> None:
    """Items drawn by popularity, corrected, point where a softmax over all items points."""
    rng = np.random.default_rng(2)
    popularity = np.array([0.5, 0.3, 0.15, 0.05])
    scores = torch.tensor([0.2, -0.1, 0.4, 0.0], requires_grad=True)
    full = torch.autograd.grad(torch.logsumexp(scores, 0), scores)[0]
    drawn = torch.from_numpy(rng.choice(4, 40_000, p=popularity))
    log_q = torch.tensor(popularity, dtype=torch.float32).log()
    corrected = torch.logsumexp(scores[drawn] - log_q[drawn], 0)
    sampled = torch.autograd.grad(corrected, scores)[0]
    assert torch.allclose(sampled, full, atol=0.02)
