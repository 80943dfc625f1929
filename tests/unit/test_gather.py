"""W ranks under DDP must give the loss and the gradients of one process with the full batch."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.tiny import tiny_config, tiny_dataset
from training import gather
from training.batches import Sampler, TrainingData, prepare
from training.checkpoint import Run, open_run, start_run
from training.encoding import encode_items
from training.features import fit
from training.gather import gather_rows, gather_values
from training.loop import all_item_vectors
from training.step import batch_loss, log_frequencies
from training.towers import build_model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    dataset = tiny_dataset(folder / "data")
    config = tiny_config(unknown_rate=0.2)
    space = fit(config, dataset)
    prepare(dataset, space, folder / "cache")
    start_run(folder, Run(config=config, space=space), {})
    return folder


def loss_and_gradients(folder: Path, rank: int, world: int) -> dict[str, Tensor]:
    """One step's loss, the gradient of every parameter, and 59 item vectors, as this rank ends up
    with them.
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
    )
    model = build_model(run.config, run.space)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    batch = next(sampler.epoch(0))
    log_q = log_frequencies(data, torch.device("cpu"))
    terms = batch_loss(wrapped, run.config, batch, log_q, None)
    terms.loss.backward()
    loss = terms.loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    vectors = all_item_vectors(model.eval(), data.items.take(np.arange(59)))  # shares are uneven
    return {"loss": loss / world, "items": torch.from_numpy(vectors)} | gradients


def one_rank(rank: int, world: int, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/group", rank=rank, world_size=world)
    save_file(loss_and_gradients(folder, rank, world), out / f"rank-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_give_the_full_batch_gradient(
    run_folder: Path, tmp_path: Path, world: int
) -> None:
    expected = loss_and_gradients(run_folder, 0, 1)
    multiprocessing.set_forkserver_preload([__name__])  # torch is imported once, not W times
    mp.start_processes(
        one_rank, (world, run_folder, tmp_path), nprocs=world, start_method="forkserver"
    )
    for rank in range(world):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        assert found.keys() == expected.keys()
        assert expected["log_temperature"].abs() > 1e-3
        for name, value in expected.items():
            scale = value.abs().max().item()
            difference = (found[name] - value).abs().max().item()
            assert difference <= 1e-5 * scale, f"{name} on rank {rank}: {difference} of {scale}"


def test_backward_leaves_the_incoming_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 2, whose peer has the same gradient."""
    monkeypatch.setattr(gather, "world_size", lambda: 2)
    monkeypatch.setattr(gather, "rank", lambda: 1)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    incoming = torch.arange(8.0).reshape(4, 2)
    assert gather._Gather.backward(None, incoming).tolist() == [[8, 10], [12, 14]]
    assert incoming.flatten().tolist() == list(range(8))


def test_item_vectors_of_one_process(run_folder: Path) -> None:
    run, data = open_run(run_folder), TrainingData.open(run_folder / "cache")
    model = build_model(run.config, run.space).eval()
    expected = encode_items(model, data.items)
    np.testing.assert_array_equal(all_item_vectors(model, data.items), expected)


def test_one_process_gathers_itself() -> None:
    local = torch.tensor(np.arange(6.0).reshape(3, 2))
    assert gather_rows(local) is local
    assert gather_values(local) is local
