"""A run that was cut off, and one that stopped early: what the command line says and does."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shardline.cluster.cli import cli
from shardline.cluster.commands import model
from shardline.shards.core.errors import ConfigError, DataError, InvalidInput
from shardline.shards.storage.embedding_set import open_embedding_set
from shardline.training.data.tables import Dataset
from shardline.training.loop.launch import train
from shardline.training.loop.runlog import read_log
from shardline.training.model.checkpoint import latest_state
from tests.tiny import declared_run, tiny_config, tiny_dataset

CONFIG = tiny_config(epochs=3, validation={"k": 10, "patience": 9})


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    """A data set and a run on it that was interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("cut")
    dataset = tiny_dataset(folder / "tiny")

    def interrupt(event: dict) -> None:
        if event.get("epoch") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, dataset.path, folder / "run", on_event=interrupt)
    return dataset, folder / "run"


def run_command(store: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--store", str(store), *arguments])


@pytest.mark.parametrize("command", ["evaluate", "export", "mine"])
def test_a_run_that_has_not_ended_is_refused(
    cut: tuple[Dataset, Path], tmp_path: Path, command: str
) -> None:
    dataset, run = cut
    more = ["--out", str(tmp_path / "hard")] if command == "mine" else []
    found = run_command(tmp_path, command, "--data", str(dataset.path), "--run", str(run), *more)
    assert isinstance(found.exception, DataError)
    words = str(found.exception)
    assert "training has not ended; expected 3 epochs, or an early stop; got 1 epochs, 10" in words
    assert "`shardline train` command with --resume" in words
    assert "--unfinished takes the best" in words
    assert list(tmp_path.iterdir()) == []


def test_its_best_checkpoint_so_far_says_what_it_is(
    cut: tuple[Dataset, Path], tmp_path: Path
) -> None:
    dataset, run = cut
    options = ["--data", str(dataset.path), "--run", str(run), "--unfinished"]
    measured = run_command(tmp_path, "evaluate", *options, "--k", "5", "--json")
    assert measured.exit_code == 0, measured.output
    report = json.loads(measured.stdout)
    assert report["about"]["model"] == "unfinished"
    assert 0 < report["model"]["recall@5"] < 1

    exported = run_command(tmp_path, "export", *options)
    assert exported.exit_code == 0, exported.output
    (folder,) = (tmp_path / "embeddings").iterdir()
    version = open_embedding_set(folder).model_version
    assert folder.name == version
    assert version.endswith("-unfinished")
    built = run_command(tmp_path, "build", "--in-process")
    assert built.exit_code == 0, built.output
    assert f"model {version}" in built.output

    mined = run_command(tmp_path, "mine", *options, "--out", str(tmp_path / "hard"), "--json")
    assert mined.exit_code == 0, mined.output
    assert json.loads(mined.stdout)["model_version"] == version


@pytest.mark.parametrize("option", ["--budget", "--through-cluster"])
def test_what_does_not_ask_a_run_takes_no_unfinished_one(
    cut: tuple[Dataset, Path], tmp_path: Path, option: str
) -> None:
    dataset, _ = cut
    found = run_command(tmp_path, "evaluate", "--data", str(dataset.path), "--unfinished", option)
    assert isinstance(found.exception, InvalidInput)
    assert "--unfinished is for a run" in str(found.exception)


def test_a_run_in_the_way_is_refused_before_ray_starts(
    cut: tuple[Dataset, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ray(*arguments: object, **settings: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(model, "ray_for", no_ray)
    dataset, run = cut
    options = ["--data", str(dataset.path), "--run", str(run), "--workers", "2"]
    found = run_command(tmp_path, "train", *options)
    assert isinstance(found.exception, ConfigError), found.exception
    assert "--resume goes on with it, --run names another folder" in str(found.exception)


def test_an_interrupted_training_says_how_to_go_on(
    cut: tuple[Dataset, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "train_with_progress", interrupted)
    dataset, run = cut
    found = run_command(
        tmp_path, "train", "--data", str(dataset.path), "--run", str(run), "--resume"
    )
    assert found.exit_code != 0
    assert "not finished; repeat its `shardline train` command with --resume" in found.output


def test_an_interrupt_before_the_first_checkpoint_and_one_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    dataset = tiny_dataset(tmp_path / "tiny")
    declared_run(tmp_path / "begun", CONFIG, dataset)
    train(CONFIG, dataset.path, tmp_path / "ended")
    monkeypatch.setattr(model, "train_with_progress", interrupted)
    options = ["train", "--data", str(dataset.path), "--resume", "--run"]
    begun = run_command(tmp_path, *options, str(tmp_path / "begun"))
    assert begun.exit_code != 0
    assert "no checkpoint yet; repeat its `shardline train` command with --resume" in begun.output
    assert "from its first step" in begun.output
    assert "newest" not in begun.output
    ended = run_command(tmp_path, *options, str(tmp_path / "ended"))
    assert ended.exit_code != 0
    assert "--resume" not in ended.output


def test_an_early_stop_is_announced_and_logged(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "tiny").path
    config = tmp_path / "config.yaml"
    # a rate that spoils the model: the first validation stays the best
    spoilt = tiny_config(
        epochs=9,
        validation={"k": 10, "patience": 2},
        optimiser={"learning_rate": 1.0, "schedule": "constant"},
    )
    settings = spoilt.model_dump(mode="json")
    config.write_text(json.dumps({"training": settings, "store": str(tmp_path / "store")}))
    found = CliRunner().invoke(cli, ["-c", str(config), "train", "--data", str(data)])
    assert found.exit_code == 0, found.output
    run = tmp_path / "store" / "runs" / "tiny"
    state = latest_state(run)
    assert state is not None and state.best_value is not None and state.epoch < 9
    assert state.epoch == (state.best_epoch or 0) + 2
    assert (
        f"stopped early after epoch {state.epoch} of 9: recall@10 has not risen in 2 validations "
        f"since epoch {state.best_epoch} ({state.best_value:.4f})"
    ) in found.output
    assert f"{state.epoch} of 9 epochs" in found.output
    assert f"epoch {state.best_epoch} is kept" in found.output
    last = read_log(run / "log.jsonl")[-1]
    assert (last["event"], last["early"], last["metric"]) == ("end", True, "recall@10")
    assert (last["epoch"], last["kept_epoch"], last["best"]) == (
        state.epoch,
        state.best_epoch,
        state.best_value,
    )


def test_a_run_that_is_named_may_meet_other_data(cut: tuple[Dataset, Path], tmp_path: Path) -> None:
    """As ``export`` takes it: new items into an old model. What the store's default run is not."""
    _, run = cut
    other = tiny_dataset(tmp_path / "other", seed=1)
    options = ["--data", str(other.path), "--k", "10", "--unfinished"]
    found = run_command(tmp_path, "evaluate", *options, "--run", str(run), "--json")
    assert json.loads(found.stdout)["about"]["model"] == "unfinished, trained on other data"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "other").symlink_to(run)
    found = run_command(tmp_path, "evaluate", *options)
    assert isinstance(found.exception, DataError)
    assert "the run was started with another dataset" in str(found.exception)
