"""A rank under Ray Train killed with -9: a clear error, or a restart, and the same model after."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from shardline.shards.core.errors import DataError, Unavailable
from shardline.training.config.training_config import TrainingConfig
from shardline.training.loop.launch import TrainResult, train
from shardline.training.loop.runlog import read_log
from shardline.training.model.checkpoint import load_best
from tests.tiny import tiny_config, tiny_dataset

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
    pytest.mark.usefixtures("private_ray"),
]


def config(max_failures: int = 0) -> TrainingConfig:
    """150 steps of two ranks, a checkpoint every 7: long enough to be killed in the middle."""
    return tiny_config(
        num_workers=2,
        epochs=15,
        validation={"k": 10, "every_epochs": 5, "patience": 9},
        checkpoint_every_steps=7,
        log_every_steps=1,
        max_failures=max_failures,
    )


def ranks() -> list[psutil.Process]:
    me = psutil.Process()
    return [p for p in me.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def killer() -> Callable[[dict], None]:
    """Kills one rank, once, when the log says that it has done a few steps."""
    killed: list[int] = []

    def on_event(event: dict) -> None:
        if not killed and event["event"] == "step" and event["step"] >= 8:
            found = ranks()
            assert len(found) == 2
            killed.append(found[-1].pid)
            found[-1].kill()

    return on_event


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").iterdir()) / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, private_ray: None) -> TrainResult:
    """A run that Ctrl-C has interrupted, and that went on to its end. Not where a rank is killed:
    what went on from elsewhere is a reference."""
    folder = tmp_path_factory.mktemp("whole")
    data = tiny_dataset(folder / "data").path
    sent: list[int] = []

    def on_event(event: dict) -> None:
        if not sent and event["event"] == "step" and event["step"] >= 30:
            sent.append(event["step"])
            os.kill(os.getpid(), signal.SIGINT)  # in this process, as a terminal would

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config(), data, folder / "run", on_event=on_event)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(DataError, match=r"training has not ended.*--resume"):
        load_best(folder / "run")
    return train(config(), data, folder / "run", resume=True)


def test_ctrl_c_is_an_interrupt_and_the_run_goes_on(whole: TrainResult) -> None:
    assert whole.steps == 150


def test_a_killed_rank_ends_the_run_or_starts_it_again(whole: TrainResult, tmp_path: Path) -> None:
    """And however a run was disturbed, its model is the same."""
    data = tiny_dataset(tmp_path / "data").path
    with pytest.raises(Unavailable, match=r"training failed.*--resume goes on"):
        train(config(), data, tmp_path / "killed", on_event=killer())
    resumed = train(config(), data, tmp_path / "killed", resume=True)
    again = train(config(max_failures=1), data, tmp_path / "again", on_event=killer())

    for result in (resumed, again):
        assert (result.steps, result.best_value) == (whole.steps, whole.best_value)
        for name, value in weights(whole.run_folder).items():
            assert torch.equal(value, weights(result.run_folder)[name]), name
        log = read_log(result.run_folder / "log.jsonl")
        starts = [event["step"] for event in log if event["event"] == "start"]
        assert starts[0] == 0 < starts[1] < 150
        assert starts[1] % 7 == 0 or starts[1] % 10 == 0
        steps = [event["step"] for event in log if event["event"] == "step"]
        assert steps == list(range(1, 151))
