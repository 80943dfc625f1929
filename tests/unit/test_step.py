"""Gradient caching with dropout, and what a step leaves behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import open_dataset
from shardline.training.features.fitted import fit
from shardline.training.features.prepared import TrainingData, prepare
from shardline.training.loop.batches import Sampler
from shardline.training.loop.train_step import Step, _Inputs
from shardline.training.model.towers import TwoTower, build_model
from tests.tiny import tiny_config, tiny_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingConfig, Path]:
    """A configuration with dropout in both towers that encodes 7 of 24 rows at a time."""
    config = tiny_config(micro_batch=7, loss={"uniform_negatives": 10})
    tower = config.towers.query.model_copy(update={"dropout": 0.4})
    item = config.towers.item.model_copy(update={"dropout": 0.4})
    towers = config.towers.model_copy(update={"query": tower, "item": item})
    folder = tmp_path_factory.mktemp("cache")
    dataset = tiny_dataset(folder / "data")
    prepare(dataset, fit(config, dataset), folder / "cache")
    return config.model_copy(update={"towers": towers}), folder


def start(cached: tuple[TrainingConfig, Path]) -> tuple[TwoTower, Step, Sampler]:
    config, folder = cached
    data = TrainingData.open(folder / "cache")
    model = build_model(config, fit(config, open_dataset(folder / "data")))
    sampler = Sampler(
        data=data,
        batch_size=24,
        rank=0,
        world=1,
        seed=1,
        unknown_rate=0.1,
        history_length=4,
        loss=config.loss,
    )
    return model, Step(config, data, CPU), sampler


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: gradient.clone() for name, gradient in found.items()}


def test_dropout_is_the_same_in_both_passes(cached: tuple[TrainingConfig, Path]) -> None:
    model, step, sampler = start(cached)
    batch = next(sampler.epoch(0))
    generator = torch.Generator().manual_seed(3)
    parts = [
        step._encode(model, part, generator) for part in _Inputs.of(batch).split(5)
    ]  # 34 items, 7 at a time
    queries, items = (torch.cat([part[place] for part in parts]) for place in (0, 1))
    expected = step._loss((queries, items, parts[0][2]), batch)
    expected.loss.backward()
    wanted = gradients(model)
    terms = step.run(model, batch, torch.Generator().manual_seed(3))
    assert terms.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    found = gradients(model)
    assert found.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_a_fixed_temperature_needs_no_gradient(cached: tuple[TrainingConfig, Path]) -> None:
    config, folder = cached
    loss = config.loss.model_copy(update={"learn_temperature": False})
    model, step, sampler = start((config.model_copy(update={"loss": loss}), folder))
    terms = step.run(model, next(sampler.epoch(0)), torch.Generator())
    assert "log_temperature" not in gradients(model)
    assert not terms.loss.requires_grad


@pytest.mark.parametrize(("micro", "most"), [(16, (4, 16)), (3, (1, 5)), (1000, (24, 106))])
def test_no_more_than_micro_batch_is_encoded_at_a_time(
    cached: tuple[TrainingConfig, Path], micro: int, most: tuple[int, int]
) -> None:
    """24 queries and 106 items; five of those are a query's own, where micro is less."""
    config, folder = cached
    loss = config.loss.model_copy(update={"random_negatives": 3})
    changes = {"loss": loss, "micro_batch": micro}
    model, step, sampler = start((config.model_copy(update=changes), folder))
    sizes: list[tuple[int, int]] = []

    def see(module: nn.Module, given: tuple[Any, ...], encoded: tuple[Tensor, ...]) -> None:
        sizes.append((len(encoded[0]), len(encoded[1])))

    model.register_forward_hook(see)
    step.run(model, next(sampler.epoch(0)), torch.Generator())
    assert (max(queries for queries, _ in sizes), max(items for _, items in sizes)) == most
