"""Gradients of a few steps of training, by W ranks or by one process; on data of tests.tiny."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.csr import Csr
from shardline.training.features.prepared import TrainingData
from shardline.training.loop.batches import Sampler
from shardline.training.loop.svd_start import start_at_svd
from shardline.training.loop.train_step import Step
from shardline.training.model.checkpoint import open_run
from shardline.training.model.encoding import encode_items_sharded
from shardline.training.model.towers import build_model
from tests.audiences import audience_config, plain_sum_config
from tests.people import people, tied_config
from tests.tiny import (
    NUM_ITEMS,
    NUM_USERS,
    declared_run,
    tiny_config,
    tiny_dataset,
    with_weights,
)

STEPS = 3  # the later ones see what memory and streaming estimate have kept

NEGATIVES = {
    "uniform_negatives": 12,
    "random_negatives": 2,
    "hard_negatives": 3,
    "hard_share": 0.8,
    "hard_weight": 0.5,
    "mask_same_user": True,
    "memory_size": 40,
    "memory_warmup_steps": 1,
    "logq_source": "streaming",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "infonce": {
        "loss": NEGATIVES
        | {"logq": "expected_count", "symmetric": 0.3, "batch_hard": 4, "batch_hard_weight": 0.3}
    },
    "infonce-cached": {
        "loss": NEGATIVES | {"symmetric": 0.3, "hard_shared": True},
        "micro_batch": 3,
    },
    "bsl-cached": {"loss": NEGATIVES | {"kind": "bsl"}, "micro_batch": 5},
    "dot": {"metric": "dot", "loss": {"symmetric": 0.3, "uniform_negatives": 12}},
    "sigmoid": {"loss": NEGATIVES | {"kind": "sigmoid", "hard_weight": 1.0}},
    "audience": {"loss": NEGATIVES, "id_start": "svd"},
    "audience-attention-cached": {"loss": NEGATIVES, "micro_batch": 5},
    "audience-summed": {"loss": NEGATIVES | {"kind": "bsl"}, "id_start": "svd"},
}
# what of them is no change of tiny_config
CONFIGS: dict[str, Callable[..., TrainingConfig]] = {
    "audience": audience_config,
    "audience-attention-cached": partial(audience_config, "attention"),
    "audience-summed": plain_sum_config,
}
WEIGHTED: dict[str, Any] = {
    "weighted": {"loss": NEGATIVES | {"symmetric": 0.3, "weight_exponent": 0.7}},
    "weighted-bsl": {"loss": NEGATIVES | {"kind": "bsl", "weight_exponent": 1.0}, "micro_batch": 5},
}
OTHERS = ("tied", *WEIGHTED)  # on data of their own
TIED = {"loss": {"uniform_negatives": 12, "symmetric": 0.3}, "unknown_rate": 0.2}


def declare_runs(folder: Path) -> None:
    """A run folder for each of SETTINGS and OTHERS, below ``folder``."""
    dataset = tiny_dataset(folder / "data")
    for name, settings in SETTINGS.items():
        make = CONFIGS.get(name, tiny_config)
        declared_run(folder / name, make(unknown_rate=0.2, **settings), dataset)
    weighted = with_weights(dataset, folder / "weighted-data")
    for name, settings in WEIGHTED.items():
        declared_run(folder / name, tiny_config(unknown_rate=0.2, **settings), weighted)
    declared_run(folder / "tied", tied_config(**TIED), people(folder / "people"))


def mined() -> Csr:
    """Up to five items for each user; user 0 has none."""
    rng = np.random.default_rng(1)
    lists = [rng.permutation(NUM_ITEMS)[: user % 6] for user in range(NUM_USERS)]
    indptr = np.concatenate([[0], np.cumsum([len(items) for items in lists])])
    return Csr(indptr, np.concatenate(lists))


def losses_and_gradients(folder: Path, rank: int, world: int) -> dict[str, Tensor]:
    """Some steps' losses and what is logged with them, the gradient of every parameter over all of
    them, the loss's state, and 59 item vectors, as this rank ends up with them.
    """
    run = open_run(folder)
    data = TrainingData.open(folder / "cache")
    sampler = Sampler(
        data=data,
        batch_size=24,
        rank=rank,
        world=world,
        seed=5,
        unknown_rate=run.config.unknown_rate,
        history_length=4,
        loss=run.config.loss,
        hard=mined(),
    )
    model = build_model(run.config, run.space)
    start_at_svd(model, run.config, run.space, folder / "cache")
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    step = Step(run.config, data, torch.device("cpu"))
    logged = []
    for batch, _ in zip(sampler.epoch(0), range(STEPS), strict=False):
        terms = step.run(wrapped, batch, None)
        logged.append(torch.stack([terms.loss, terms.accuracy, terms.masked, terms.positive_logit]))
    values = torch.stack(logged)
    if dist.is_initialized():
        dist.all_reduce(values)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    vectors = encode_items_sharded(
        model.eval(), data.items.take(np.arange(59))
    )  # shares are uneven
    state = {f"state.{name}": value.float() for name, value in step.state.state_dict().items()}
    others = {"logged": values / world, "items": torch.from_numpy(vectors)}
    return gradients | others | state


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """But for the order of float additions."""
    assert found.keys() == expected.keys()
    if "log_temperature" in expected:
        assert expected["log_temperature"].abs() > 1e-3
    for key, value in expected.items():
        scale = value.abs().max().item()
        difference = (found[key] - value).abs().max().item()
        assert difference <= 1e-5 * scale, f"{key}: {difference} of {scale}"
