"""The optimiser against torch's own, and its sparse tables over several ranks."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shardline.training.config.training_config import OptimiserConfig
from shardline.training.loop.optimiser import BETA1, Optimiser, choose_sparse, learning_rate
from shardline.training.loop.row_adam import average_rows, tables

ROWS, DIM, STEPS = 40, 6, 8
BETAS = (BETA1, OptimiserConfig().beta2)


class Small(nn.Module):
    """A table whose rows are looked up, and a dense layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Embedding(ROWS, DIM)
            self.output = nn.Linear(DIM, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.output(self.table(rows)).square().mean()


def settings(**changes: Any) -> OptimiserConfig:
    return OptimiserConfig(**({"warmup_steps": 0, "schedule": "constant"} | changes))


def build(config: OptimiserConfig) -> tuple[Small, Optimiser]:
    model = Small()
    sparse = choose_sparse(model, config, {"table.weight": 16})
    return model, Optimiser(model, config, sparse=sparse, total_steps=STEPS)


def rows_of_step(step: int, count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(ROWS // 2, (count,), generator=generator)  # half is never used


def train(model: Small, optimiser: Optimiser, steps: range, **how: Any) -> list[Tensor | None]:
    norms = []
    for step in steps:
        optimiser.zero_grad()
        model(rows_of_step(step)).backward()
        norms.append(optimiser.step(step, measure=how.get("measure", True)).norm)
    return norms


def test_sparse_tables_equal_torchs_sparse_adam() -> None:
    model, optimiser = build(settings(embedding_gradients="sparse", weight_decay=0.0))
    assert optimiser.sparse == ["table.weight"]
    train(model, optimiser, range(STEPS))

    expected = Small()
    expected.table.sparse = True
    rows = torch.optim.SparseAdam([expected.table.weight], lr=2e-3, betas=BETAS)
    dense = torch.optim.AdamW(expected.output.parameters(), lr=2e-3, betas=BETAS, weight_decay=0.0)
    for step in range(STEPS):
        expected.zero_grad()
        expected(rows_of_step(step)).backward()
        rows.step()
        dense.step()
    for name, value in model.state_dict().items():
        # SparseAdam adds its epsilon before the bias correction: seen where gradients are tiny
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=2e-6)


def test_dense_tables_equal_torchs_adamw() -> None:
    config = settings(embedding_gradients="dense", weight_decay=0.1, embedding_learning_rate=0.01)
    model, optimiser = build(config)
    assert optimiser.sparse == []
    train(model, optimiser, range(STEPS))
    expected = Small()
    other = torch.optim.AdamW(
        [
            {"params": [expected.table.weight], "lr": 0.01, "weight_decay": 0.1},
            {"params": [expected.output.weight], "lr": 2e-3, "weight_decay": 0.1},
            {"params": [expected.output.bias], "lr": 2e-3, "weight_decay": 0.0},
        ],
        betas=BETAS,
    )
    for step in range(STEPS):
        expected.zero_grad()
        expected(rows_of_step(step)).backward()
        other.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=1e-7)


def test_one_step_on_all_rows_is_the_same_dense_and_sparse() -> None:
    """Where every row is used the lazy rule has nothing to be lazy about."""
    results = []
    for gradients in ("dense", "sparse"):
        config = settings(
            embedding_gradients=gradients, weight_decay=0.3, embedding_weight_decay=0.2
        )
        model, optimiser = build(config)
        for step in range(3):
            optimiser.zero_grad()
            model(torch.arange(ROWS)).backward()
            optimiser.step(step, measure=False)
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gradients", ["dense", "sparse"])
def test_l2_decay_goes_through_the_gradient(gradients: str) -> None:
    config = settings(
        embedding_gradients=gradients, embedding_decay="l2", embedding_weight_decay=0.5
    )
    model, optimiser = build(config)
    expected = Small()
    other = torch.optim.Adam([expected.table.weight], lr=2e-3, betas=BETAS, weight_decay=0.5)
    optimiser.zero_grad()
    for small in (model, expected):
        small(torch.arange(ROWS)).backward()
    optimiser.step(0, measure=False)
    other.step()
    torch.testing.assert_close(model.table.weight, expected.table.weight, rtol=1e-5, atol=1e-7)


def test_rows_that_no_step_used_stay_as_they_were() -> None:
    config = settings(embedding_gradients="sparse", weight_decay=0.5)
    model, optimiser = build(config)
    before = model.table.weight.detach().clone()
    train(model, optimiser, range(STEPS))
    changed = (model.table.weight != before).any(dim=1)
    used = torch.cat([rows_of_step(step) for step in range(STEPS)]).unique()
    assert changed.nonzero()[:, 0].tolist() == used.tolist()


@pytest.mark.parametrize("gradients", ["dense", "sparse"])
def test_clipping_bounds_the_norm_of_all_gradients_together(gradients: str) -> None:
    free, _ = build(settings(embedding_gradients="dense"))
    free(rows_of_step(0)).backward()
    expected = torch.cat([p.grad.flatten() for p in free.parameters() if p.grad is not None]).norm()

    model, optimiser = build(settings(embedding_gradients=gradients, clip_norm=0.01))
    assert expected > 0.02
    norm = train(model, optimiser, range(1), measure=False)[0]
    assert norm is not None
    torch.testing.assert_close(norm, expected)
    other, unclipped = build(settings(embedding_gradients=gradients, clip_norm=1e6))
    assert train(other, unclipped, range(1))[0] == norm
    # after one step Adam's first moment is (1 - beta) of the gradient it was given
    moments = [
        value.flatten() for key, value in optimiser.state_dict().items() if key.endswith("exp_avg")
    ]
    torch.testing.assert_close(torch.cat(moments).norm() / (1 - BETA1), torch.tensor(0.01))


def test_nothing_is_measured_unless_asked() -> None:
    model, optimiser = build(settings())
    assert train(model, optimiser, range(1), measure=False) == [None]


@pytest.mark.parametrize("gradients", ["dense", "sparse"])
def test_state_survives(gradients: str, tmp_path: Path) -> None:
    config = settings(embedding_gradients=gradients, weight_decay=0.1)
    model, optimiser = build(config)
    train(model, optimiser, range(4))
    save_file(optimiser.state_dict(), tmp_path / "optimiser")
    again, resumed = build(config)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(load_file(tmp_path / "optimiser"))
    train(model, optimiser, range(4, STEPS))
    train(again, resumed, range(4, STEPS))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_auto_takes_sparse_for_large_tables_only() -> None:
    model = nn.ModuleDict({"large": nn.Embedding(100, 2), "small": nn.EmbeddingBag(10, 2)})
    frozen = nn.Embedding(1000, 2)
    frozen.weight.requires_grad_(False)
    model["frozen"] = frozen
    assert list(tables(model)) == ["large.weight", "small.weight"]
    lookups = {"large.weight": 25, "small.weight": 2.6}
    assert choose_sparse(model, settings(embedding_gradients="auto"), lookups) == ["large.weight"]
    assert model["large"].sparse
    assert not model["small"].sparse


def test_constant_schedule_stays_at_the_peak() -> None:
    config = OptimiserConfig(learning_rate=0.1, warmup_steps=2, schedule="constant")
    assert [learning_rate(config, step, 9) for step in (0, 1, 2, 8)] == [0.05, 0.1, 0.1, 0.1]


def one_rank(rank: int, world: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/group", rank=rank, world_size=world)
    model, _ = build(settings(embedding_gradients="sparse"))
    rows = torch.arange(5 * rank)  # the first rank uses none, so it has no gradient at all
    if rank:
        model(rows % 7).backward()
    average = average_rows(model.table.weight)
    save_file({"average": average.to_dense()}, out / f"rank-{rank}")
    dist.destroy_process_group()


def test_ranks_average_their_rows(tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(one_rank, (3, tmp_path), nprocs=3, start_method="forkserver")
    total = torch.zeros(ROWS, DIM)
    for rank in (1, 2):
        model = Small()
        model(torch.arange(5 * rank) % 7).backward()
        assert model.table.weight.grad is not None
        total += model.table.weight.grad
    found = [load_file(tmp_path / f"rank-{rank}")["average"] for rank in range(3)]
    torch.testing.assert_close(found[0], total / 3)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("gradients", ["dense", "sparse"])
def test_beta2_is_the_configured_one(gradients: str) -> None:
    """After one step the second moment is (1 - beta2) times the square of the gradient."""
    model = Small()
    config = OptimiserConfig.model_validate({"beta2": 0.75, "embedding_gradients": gradients})
    sparse = choose_sparse(model, config, {"table.weight": 4})
    optimiser = Optimiser(model, config, sparse=sparse, total_steps=10)
    model.table(torch.tensor([3, 3, 7])).sum().backward()
    optimiser.step(0, measure=False)
    expected = torch.zeros(ROWS, DIM)
    expected[3], expected[7] = 4 * 0.25, 0.25
    torch.testing.assert_close(optimiser.state_dict()["table.weight/exp_avg_sq"], expected)
