"""Pooled histories against loops, with places that repeat, and their gradients."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shardline.training.config.tower_config import HistoryFeature
from shardline.training.model.pooling import HistoryPooling, sums_of_rows


def in_order(rows: Tensor) -> Tensor:
    return torch.arange(len(rows))


def pooling(length: int, width: int = 3) -> HistoryPooling:
    pool = HistoryPooling(HistoryFeature(max_length=length, pooling="attention"), width)
    generator = torch.Generator().manual_seed(0)
    for parameter in pool.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return pool


def test_attention_against_loops() -> None:
    pool, lengths = pooling(5), torch.tensor([3, 0, 5, 1, 0])
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    found = pool(rows, in_order(rows), lengths).detach().numpy()
    start = 0
    for query, length in enumerate(lengths.tolist()):
        mine, expected = rows[start : start + length].numpy(), np.zeros(3)
        weight, bias = pool.key.weight.detach().numpy(), pool.key.bias.detach().numpy()
        scores = [
            float(np.tanh(weight @ row + bias) @ pool.query.detach().numpy())
            + pool.recency[length - 1 - place].item()
            for place, row in enumerate(mine)
        ]
        weights = np.exp(scores)
        for row, share in zip(mine, weights / weights.sum(), strict=True):
            expected += share * row
        np.testing.assert_allclose(found[query], expected, atol=1e-5)
        start += length


def test_attention_starts_as_the_mean_and_can_leave_it() -> None:
    fresh = HistoryPooling(HistoryFeature(max_length=5, pooling="attention"), 3)
    mean = HistoryPooling(HistoryFeature(max_length=5), 3)
    assert sum(p.numel() for p in mean.parameters()) == 0
    rows, lengths = torch.randn(4, 3), torch.tensor([1, 3])
    places = in_order(rows)
    found, expected = fresh(rows, places, lengths).detach(), mean(rows, places, lengths)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    fresh(rows, places, lengths).square().sum().backward()
    assert fresh.query.grad is not None and fresh.query.grad.abs().sum() > 0
    assert fresh.recency.grad is not None and fresh.recency.grad.abs().sum() > 0


def test_sqrtn_divides_by_the_root_of_the_length() -> None:
    pool = HistoryPooling(HistoryFeature(max_length=5, pooling="sqrtn"), 3)
    rows, lengths = torch.randn(5, 3), torch.tensor([4, 0, 1])
    expected = torch.stack([rows[:4].sum(0) / 2, torch.zeros(3), rows[4]])
    np.testing.assert_allclose(pool(rows, in_order(rows), lengths), expected, atol=1e-6)


def test_attention_of_large_scores_is_finite() -> None:
    pool = pooling(4)
    pool.recency.data = torch.tensor([300.0, 0, 0, -300])
    rows = torch.randn(4, 3)
    found = pool(rows, in_order(rows), torch.tensor([4]))
    np.testing.assert_allclose(found[0].detach(), rows[3], atol=1e-5)  # the newest alone
    nothing = torch.zeros(0, 3)
    assert pool(nothing, in_order(nothing), torch.tensor([0, 0])).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("pooling_kind", ["mean", "sqrtn", "attention"])
def test_places_that_repeat_are_rows_that_repeat(pooling_kind: str) -> None:
    feature = HistoryFeature.model_validate({"max_length": 6, "pooling": pooling_kind})
    pool = HistoryPooling(feature, 3)
    generator = torch.Generator().manual_seed(2)
    for parameter in pool.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    rows, lengths = torch.randn(4, 3, generator=generator), torch.tensor([0, 6, 1, 3, 0])
    places = torch.tensor([3, 0, 0, 2, 3, 0, 2, 2, 2, 0])  # row 1 is in no history
    spread = rows[places]
    found, expected = pool(rows, places, lengths), pool(spread, in_order(spread), lengths)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attends", [False, True])
def test_gradients_against_finite_differences(attends: bool) -> None:
    """Places that repeat, a row in no history, histories without items."""
    pool = pooling(5).double() if attends else HistoryPooling(HistoryFeature(max_length=5), 3)
    if attends:
        pool.item_scores = lambda r: torch.tanh(pool.key(r)) @ pool.query  # type: ignore[method-assign]
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    places, lengths = torch.tensor([1, 3, 1, 1, 0]), torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda r: pool(r, places, lengths), (rows,))


def test_sums_against_loops() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, 50)
    places = rng.integers(0, 30, lengths.sum())
    rows = rng.normal(size=(30, 4))
    weights = rng.normal(size=(50, 4))
    leaf = torch.from_numpy(rows).requires_grad_()
    found = sums_of_rows(leaf, torch.from_numpy(places), torch.from_numpy(lengths))
    found.backward(torch.from_numpy(weights))
    assert leaf.grad is not None
    sums, gradient, start = np.zeros((50, 4)), np.zeros((30, 4)), 0
    for query, length in enumerate(lengths):
        for place in places[start : start + length]:
            sums[query] += rows[place]
            gradient[place] += weights[query]
        start += length
    np.testing.assert_allclose(found.detach(), sums, atol=1e-12)
    np.testing.assert_allclose(leaf.grad, gradient, atol=1e-12)


@pytest.mark.parametrize("pooled", ["mean", "sqrtn"])
def test_a_batch_without_any_history_pools_to_zeros_and_gives_no_gradient(pooled: str) -> None:
    pool = HistoryPooling(HistoryFeature(max_length=5, pooling=pooled), 3)
    rows = torch.zeros(0, 3, requires_grad=True)
    found = pool(rows, torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    np.testing.assert_array_equal(found.detach().numpy(), np.zeros((2, 3)))
    found.sum().backward()
    assert rows.grad is not None
    assert rows.grad.shape == (0, 3)
