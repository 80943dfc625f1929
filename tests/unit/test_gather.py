"""One step on W ranks against one process, in real process groups over gloo."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from shardline.training import gather
from shardline.training.features.prepared import TrainingData
from shardline.training.gather import gather_ragged, gather_rows, gather_values
from shardline.training.loss import tiles
from shardline.training.model import encoding
from shardline.training.model.checkpoint import Run, open_run, start_run
from shardline.training.model.encoding import encode_items, encode_items_sharded
from shardline.training.model.towers import build_model
from tests.gradients import (
    OTHERS,
    SETTINGS,
    assert_same_gradients,
    declare_runs,
    losses_and_gradients,
)


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    declare_runs(folder)
    return folder


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
    [
        *(("plain", 1), ("audience", 1)),
        *((name, world) for name in [*SETTINGS, *OTHERS] for world in (2, 3)),
    ],
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
        assert_same_gradients(load_file(tmp_path / f"rank-{rank}.safetensors"), expected)


@pytest.mark.parametrize("name", ["infonce-cached", "bsl-cached", "audience-attention-cached"])
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
