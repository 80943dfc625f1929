"""One step on W ranks against one process, in real process groups over gloo."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from shardline.training import gather
from shardline.training.data.csr import Csr
from shardline.training.features.fitted import fit
from shardline.training.features.prepared import TrainingData, prepare
from shardline.training.gather import gather_ragged, gather_rows, gather_values
from shardline.training.loop.batches import Sampler
from shardline.training.loop.train_step import Step
from shardline.training.loss import tiles
from shardline.training.model import encoding
from shardline.training.model.checkpoint import Run, open_run, start_run
from shardline.training.model.encoding import encode_items, encode_items_sharded
from shardline.training.model.towers import build_model
from tests.tiny import NUM_ITEMS, NUM_USERS, tiny_config, tiny_dataset

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
    "sigmoid": {"loss": NEGATIVES | {"kind": "sigmoid", "hard_weight": 1.0}},
}


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    dataset = tiny_dataset(folder / "data")
    for name, settings in SETTINGS.items():
        config = tiny_config(unknown_rate=0.2, **settings)
        space = fit(config, dataset)
        prepare(dataset, space, folder / name / "cache")
        start_run(folder / name, Run(config=config, space=space), {})
    return folder


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
    assert len(gradients) == len(list(model.parameters()))
    vectors = encode_items_sharded(
        model.eval(), data.items.take(np.arange(59))
    )  # shares are uneven
    state = {f"state.{name}": value.float() for name, value in step.state.state_dict().items()}
    others = {"logged": values / world, "items": torch.from_numpy(vectors)}
    return gradients | others | state


def one_rank(rank: int, world: int, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    tiles.CPU_ROWS = 5  # several tiles, the last one short
    encoding.SHARED_ROWS = 8  # several blocks, more on some ranks than on others
    dist.init_process_group("gloo", init_method=f"file://{out}/group", rank=rank, world_size=world)
    save_file(losses_and_gradients(folder, rank, world), out / f"rank-{rank}.safetensors")
    ragged = torch.arange(2 * rank).reshape(rank, 2) + 100 * rank
    expected = torch.cat([torch.arange(2 * r).reshape(r, 2) + 100 * r for r in range(world)])
    assert torch.equal(gather_ragged(ragged), expected)
    assert gather_ragged(ragged[:0]).shape == (0, 2)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "world"),
    [("plain", 1), *((name, world) for name in SETTINGS for world in (2, 3))],
)
def test_ranks_together_give_the_full_batch_gradient(
    run_folders: Path, tmp_path: Path, name: str, world: int
) -> None:
    expected = losses_and_gradients(run_folders / name, 0, 1)
    multiprocessing.set_forkserver_preload([__name__])  # torch is imported once, not W times
    mp.start_processes(
        one_rank, (world, run_folders / name, tmp_path), nprocs=world, start_method="forkserver"
    )
    for rank in range(world):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        assert found.keys() == expected.keys()
        assert expected["log_temperature"].abs() > 1e-3
        for key, value in expected.items():
            scale = value.abs().max().item()
            difference = (found[key] - value).abs().max().item()
            assert difference <= 1e-5 * scale, f"{key} on rank {rank}: {difference} of {scale}"


@pytest.mark.parametrize("name", ["infonce-cached", "bsl-cached"])
def test_cached_gradients_equal_those_of_one_pass(
    run_folders: Path, tmp_path: Path, name: str
) -> None:
    whole = tmp_path / "whole"
    run = open_run(run_folders / name)
    config = run.config.model_copy(update={"micro_batch": None})
    start_run(whole, Run(config=config, space=run.space), {})
    (whole / "cache").symlink_to(run_folders / name / "cache")
    expected = losses_and_gradients(whole, 0, 1)
    found = losses_and_gradients(run_folders / name, 0, 1)
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 1e-5 * value.abs().max(), key


def test_backward_leaves_the_incoming_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 2, whose peer has the same gradient."""
    monkeypatch.setattr(gather, "world_size", lambda: 2)
    monkeypatch.setattr(gather, "rank", lambda: 1)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    incoming = torch.arange(8.0).reshape(4, 2)
    assert gather._Gather.backward(None, incoming).tolist() == [[8, 10], [12, 14]]
    assert incoming.flatten().tolist() == list(range(8))


def test_item_vectors_of_one_process(run_folders: Path) -> None:
    run, data = open_run(run_folders / "plain"), TrainingData.open(run_folders / "plain/cache")
    model = build_model(run.config, run.space).eval()
    expected = encode_items(model, data.items)
    np.testing.assert_array_equal(encode_items_sharded(model, data.items), expected)


def test_one_process_gathers_itself() -> None:
    local = torch.tensor(np.arange(6.0).reshape(3, 2))
    assert gather_rows(local) is local
    assert gather_values(local) is local
    assert gather_ragged(local) is local
