"""Several ranks: one killed within an epoch, another number of them, a batch left over."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from shardline.shards.core.errors import ConfigError, CorruptFile
from shardline.training.loop.run_rank import train_rank
from shardline.training.loop.runlog import read_log
from shardline.training.loop.train_step import Step
from shardline.training.model.checkpoint import TrainState as State
from shardline.training.model.checkpoint import (
    latest_state,
    load_parts,
    open_run,
    place_run,
    save_checkpoint,
)
from tests.tiny import declared_run, tiny_config, tiny_dataset

CPU = torch.device("cpu")


def start(folder: Path, **changes: Any) -> Path:
    """A run of 3 epochs of 10 steps, a checkpoint every 4, half of the tables sparse."""
    settings: dict[str, Any] = {
        "epochs": 3,
        "optimiser": {"warmup_steps": 5, "learning_rate": 0.01, "embedding_gradients": "sparse"},
        "loss": {"hard_negatives": 2, "uniform_negatives": 6, "memory_size": 48},
        "mining": {"every_epochs": 1, "per_user": 4, "range_max": 20},
        "validation": {"k": 10, "patience": 9},
        "checkpoint_every_steps": 4,
        "log_every_steps": 1,
    }
    config = tiny_config(**(settings | changes))
    dataset = tiny_dataset(folder.parent / f"{folder.name}-data")
    return declared_run(folder, config, dataset)


def one_rank(rank: int, world: int, run: Path, group: Path, dies_at: int | None) -> None:
    """dies_at: the step before which the last rank is killed, once the checkpoint of the step
    before, which the first rank writes, is there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=world)
    honest, done = Step.run, iter(range(1, 1000))

    def until_killed(self: Step, *given: Any) -> Any:
        if next(done) == dies_at:
            while (state := latest_state(run)) is None or state.step < dies_at - 1:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        if rank == world - 1:
            patch.setattr(Step, "run", until_killed)
        train_rank(run, CPU)
    dist.destroy_process_group()


def run_ranks(run: Path, world: int, *, dies_at: int | None = None) -> None:
    multiprocessing.set_forkserver_preload([__name__])
    group = run / f"group-{world}-{dies_at}"
    mp.start_processes(
        one_rank, (world, run, group, dies_at), nprocs=world, start_method="forkserver"
    )


def newest(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    folder = max((run / "checkpoints").iterdir())
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


def assert_equal(left: Path, right: Path, tolerance: float = 0.0) -> None:
    first, second = newest(left), newest(right)
    assert first.keys() == second.keys() >= {"model", "optimiser", "loss", "mined"}
    for part, tensors in first.items():
        assert tensors.keys() == second[part].keys()
        for name, value in tensors.items():
            if tolerance and value.is_floating_point():
                torch.testing.assert_close(
                    value, second[part][name], rtol=tolerance, atol=tolerance
                )
            else:
                assert torch.equal(value, second[part][name]), f"{part}: {name}"


def test_a_rank_killed_within_an_epoch_and_resumed_is_as_if_nothing_was(tmp_path: Path) -> None:
    whole, killed = start(tmp_path / "whole"), start(tmp_path / "killed")
    run_ranks(whole, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path))  # torch leaves a file of a rank's error
        with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
            run_ranks(killed, 2, dies_at=17)
    state = latest_state(killed)
    assert state is not None
    assert (state.epoch, state.step) == (1, 16)
    run_ranks(killed, 2)
    assert_equal(whole, killed)
    steps = read_log(killed / "log.jsonl")
    assert [line["step"] for line in steps if line["event"] == "step"] == list(range(1, 31))
    assert [line["step"] for line in steps if line["event"] == "start"] == [0, 16]
    gathered = [line["gathered_bytes"] for line in steps if line["event"] == "step"]
    assert min(gathered) > 24 * 16
    assert max(gathered) < 2 * min(gathered), "what mining gathers is in none of them"


def test_more_ranks_may_resume_and_differ_by_rounding_only(tmp_path: Path) -> None:
    plain = {"loss": {"hard_negatives": 0}, "mining": {"every_epochs": 0}, "epochs": 1}
    whole, cut = start(tmp_path / "whole", **plain), start(tmp_path / "cut", **plain)
    train_rank(whole, CPU)

    def interrupt(event: dict) -> None:
        if event["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_rank(cut, CPU, interrupt)
    run_ranks(cut, 3)
    lines = read_log(cut / "log.jsonl")
    starts = [line for line in lines if line["event"] == "start"]
    assert [(line["step"], line["world_before"], line["world"]) for line in starts] == [
        (0, 1, 1),
        (4, 1, 3),
    ]
    expected, found = newest(whole)["model"], newest(cut)["model"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_examples_that_fill_no_batch_are_left_out_on_every_rank(tmp_path: Path) -> None:
    """240 examples, 33 a batch: 7 steps on each of three ranks, and nobody waits for an eighth."""
    run = start(tmp_path / "run", batch_size=33, epochs=1, loss={}, mining={"every_epochs": 0})
    run_ranks(run, 3)
    state = latest_state(run)
    assert state is not None
    assert (state.epoch, state.step, state.world) == (1, 7, 3)


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from shardline.shards.core.errors import Unavailable
from shardline.training.model.checkpoint import TrainState, save_checkpoint

def save(step, numbers):
    state = TrainState(epoch=1, step=step)
    save_checkpoint(Path(sys.argv[1]), state, {"model": {"x": torch.zeros(numbers)}})

save(1, 10)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    save(2, 1 << 20)
except Unavailable as error:
    print(error)
"""


def test_a_file_that_does_not_fit_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True, text=True, timeout=250, check=True,
    )  # fmt: skip
    assert "checkpoint of step 2 could not be written" in done.stdout
    assert "that of step 1 is complete" in done.stdout
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]
    state = latest_state(tmp_path)
    assert state is not None
    assert state.step == 1


def test_what_a_killed_writer_left_is_removed_when_the_run_resumes(tmp_path: Path) -> None:
    plain = {"loss": {}, "mining": {"every_epochs": 0}, "epochs": 1}
    run = start(tmp_path / "run", **plain)
    save_checkpoint(run, State(), {})
    left = run / "checkpoints" / ".00000004.abc.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    train_rank(run, CPU)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000010"]


def test_a_run_with_a_setting_that_is_refused_by_now_says_so(tmp_path: Path) -> None:
    config = tiny_config(epochs=1)
    folder = declared_run(tmp_path / "run", config, tiny_dataset(tmp_path / "data"))
    loss = config.loss.model_copy(update={"kind": "sigmoid", "hard_weight": 2.0})  # not validated
    place_run(folder, config.model_copy(update={"loss": loss}))
    with pytest.raises(ConfigError, match="refused by now") as caught:
        open_run(folder)
    assert caught.value.field == "loss"


def test_a_checkpoint_in_the_folder_of_another_step_is_refused(tmp_path: Path) -> None:
    """Exchanged with the best one, which is kept as well: a run would resume from another step."""
    for step in (10, 20):
        state = State(step=step, epoch=1, best_step=10)
        save_checkpoint(tmp_path, state, {"model": {"x": torch.full((3,), float(step))}})
    root = tmp_path / "checkpoints"
    assert latest_state(tmp_path) == State(step=20, epoch=1, best_step=10)
    (root / "00000010").rename(root / "aside")
    (root / "00000020").rename(root / "00000010")
    (root / "aside").rename(root / "00000020")
    with pytest.raises(
        CorruptFile, match=r"another checkpoint.s .* of step 20; got that of step 10"
    ):
        latest_state(tmp_path)
    for step in (10, 20):
        with pytest.raises(CorruptFile, match="another checkpoint's folder"):
            load_parts(tmp_path, step)
