"""The vector memory as a ring, its warm-up, and the loss's state in a checkpoint."""

import pytest
import torch

from shardline.training.config.loss_config import LossConfig
from shardline.training.loss.memory_bank import LossState, VectorMemory


def keep(memory: VectorMemory, first: int, count: int) -> None:
    items = torch.arange(first, first + count)
    memory.keep(items[:, None] * torch.ones(2), items, items + 100, items / 1000)


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("batch", [1, 3, 8, 13])
def test_the_newest_columns_stay(size: int, batch: int) -> None:
    memory = VectorMemory(size, 2, warmup_steps=0)
    for step in range(4):
        keep(memory, step * batch, batch)
        total = (step + 1) * batch
        assert memory.ready == min(size, total)
        vectors, items, users, shares = memory.columns()
        assert sorted(items.tolist()) == list(range(max(0, total - size), total))
        assert (vectors == items[:, None]).all()
        assert (users == items + 100).all()
        assert torch.equal(shares, items / 1000)


def test_nothing_is_used_before_the_warm_up_is_over() -> None:
    memory = VectorMemory(4, 2, warmup_steps=2)
    keep(memory, 0, 3)
    assert memory.ready == 0
    assert len(memory.columns()[0]) == 0
    keep(memory, 3, 3)
    assert memory.ready == 4


def test_kept_vectors_have_no_gradient_and_are_not_written_over_in_use() -> None:
    memory = VectorMemory(2, 2, warmup_steps=0)
    vectors = torch.ones(2, 2, requires_grad=True)
    rows = torch.arange(2)
    memory.keep(vectors * 2, rows, rows, torch.ones(2))
    used = memory.columns()[0]
    assert not used.requires_grad
    keep(memory, 7, 2)
    assert (used == 2).all()


def test_state_is_restored() -> None:
    config = LossConfig(memory_size=3, memory_warmup_steps=0, logq_source="streaming")
    counts = torch.tensor([1, 2, 3, 4])
    first, second = (LossState(config, counts, 2) for _ in range(2))
    items = torch.tensor([3, 1, 3])
    first.shares.see(items)
    assert first.memory is not None and second.memory is not None
    first.memory.keep(torch.ones(3, 2), items, items, first.shares.of(items))
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for ours, theirs in zip(first.memory.columns(), second.memory.columns(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(first.shares.of(torch.arange(4)), second.shares.of(torch.arange(4)))


def test_a_loss_without_state_has_none() -> None:
    assert len(LossState(LossConfig(), torch.tensor([1]), 2).state_dict()) == 0
