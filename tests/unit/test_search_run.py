"""A search from its first trial to the last fit: what it decides, and that a killed one goes on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner

from shardline.cluster.cli import cli
from shardline.cluster.config import load_config
from shardline.shards.core.errors import ConfigError, CorruptFile, DataError
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import Dataset
from shardline.training.loop.launch import train
from shardline.training.model.checkpoint import latest_state, load_best, load_parts, open_run
from shardline.training.search import trial_training
from shardline.training.search.ladder import survivors
from shardline.training.search.search_loop import OnTrained
from shardline.training.search.search_report import (
    best_yaml,
    standard_error,
    summary_line,
    trials_table,
    worth_table,
)
from shardline.training.search.search_run import SearchResult, least_rung, search
from shardline.training.search.search_state import SearchState, load_state, state_path
from shardline.training.search.trial_training import TrialJob, train_trial
from tests.tiny import ITEM_IDS, NUM_USERS, tiny_config, tiny_dataset


class EpochClock:
    """Time as trials take it: ten seconds per epoch, nothing else takes any."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.now = 0.0
        self.epochs = 0
        self.kill_at = kill_at
        self.stages: list[str] = []

    def __call__(self) -> float:
        return self.now

    def on_event(self, stage: str, event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] % 10 == 0:
            self.epochs += 1
            if self.epochs == self.kill_at:
                raise KeyboardInterrupt
            self.now += 10.0
            self.stages.append(stage)


def searched(
    data: Path, run: Path, *, minutes: float = 4.0, clock: EpochClock | None = None, **changes: Any
) -> SearchResult:
    clock = clock or EpochClock()
    config = tiny_config(**{"epochs": 3, "log_every_steps": 10, **changes})
    return search(config, data, run, minutes=minutes, clock=clock, on_event=clock.on_event)


@dataclass(frozen=True, kw_only=True)
class TwoAtOnce:
    """As if two trained at the same time, ten seconds per epoch; the longest first ones end last.
    rungs: the numbers of the trials of each call."""

    clock: EpochClock
    at_once: int = 2
    rungs: list[list[int]] = field(default_factory=list)

    def train(self, jobs: Sequence[TrialJob], search_folder: Path, on_trained: OnTrained) -> None:
        self.rungs.append([job.number for job in jobs])
        began = {job.number: trained_epochs(job.folder) for job in jobs}
        for job in reversed(jobs):
            trained = train_trial(job)
            seconds = 10.0 * (trained.epochs - began[job.number])
            self.clock.now += seconds / min(self.at_once, len(jobs))
            on_trained(job, replace(trained, seconds=seconds))


def trained_epochs(run: Path) -> int:
    state = latest_state(run) if run.exists() else None
    return 0 if state is None else state.epoch


def decisions(state: SearchState) -> dict[str, Any]:
    """All that a search has decided and measured, without time."""
    return state.model_dump(exclude={"spent_s", "minutes", "dataset"})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_best(run)[1].state_dict())


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("search") / "data")


@pytest.fixture(scope="module")
def stages() -> list[str]:
    """What each epoch of ``found`` was of."""
    return []


@pytest.fixture(scope="module")
def found(
    data: Dataset, stages: list[str], tmp_path_factory: pytest.TempPathFactory
) -> SearchResult:
    clock = EpochClock()
    result = searched(data.path, tmp_path_factory.mktemp("found") / "run", clock=clock)
    stages.extend(clock.stages)
    return result


def test_a_search_tries_the_default_first_and_fits_the_best(
    data: Dataset, found: SearchResult
) -> None:
    state = found.state
    assert state.stage == "done"
    assert state.trials[0].changes == {} and state.brackets[0].trials[0] == 0
    best = state.best()
    assert best.value == max(t.value for t in state.trials if t.value is not None)
    run = open_run(found.fitted.run_folder)
    assert run.config.fit_splits == "train+val"
    assert run.config.epochs == found.config.epochs
    assert load_state(found.fitted.run_folder) == state
    for bracket in state.brackets:
        alive = set(bracket.trials)
        for before, after in zip(bracket.rungs, bracket.rungs[1:], strict=False):
            values = {n: state.trials[n].values for n in alive}
            going = survivors({n: at[before] for n, at in values.items() if before in at})
            assert {n for n in bracket.trials if after in state.trials[n].values} <= {0, *going}
            alive = {0, *going} & alive


def test_the_time_is_kept_and_the_last_fit_counts(data: Dataset, tmp_path: Path) -> None:
    clock = EpochClock()
    result = searched(data.path, tmp_path / "run", minutes=2.0, clock=clock)
    assert 90 <= clock.now <= 120
    assert clock.stages[-result.config.epochs :] == ["fit"] * result.config.epochs
    assert result.state.brackets


def test_a_time_that_is_too_short_for_the_epochs_gives_fewer(data: Dataset, tmp_path: Path) -> None:
    said: list[str] = []
    clock = EpochClock()
    result = search(
        tiny_config(epochs=40, log_every_steps=10),
        data.path,
        tmp_path / "run",
        minutes=4,
        clock=clock,
        on_event=clock.on_event,
        say=said.append,
    )
    assert result.state.epochs == 8  # .4 of 240 s, at 10 s x 7/6
    assert result.state.brackets and open_run(tmp_path / "run").config.epochs <= 8
    assert any("models get 8 epochs, of 40" in line for line in said)
    assert clock.now <= 240


def test_the_base_goes_as_far_as_any_other_of_its_bracket(found: SearchResult) -> None:
    bracket = found.state.brackets[0]
    reached = [
        r for r in bracket.rungs if any(r in found.state.trials[n].values for n in bracket.trials)
    ]
    assert set(reached) <= set(found.state.trials[0].values)


def test_the_first_comparison_comes_when_the_warm_up_is_over_twice() -> None:
    config = tiny_config(optimiser={"warmup_steps": 50}, batch_size=100)
    assert [least_rung(config, examples) for examples in (99, 1000, 10_000, 11_000)] == [
        100,
        10,
        1,
        1,
    ]


def test_where_there_is_no_time_for_a_search_all_of_it_is_for_the_fit(
    data: Dataset, tmp_path: Path
) -> None:
    clock = EpochClock()
    result = searched(data.path, tmp_path / "run", minutes=1, epochs=40, clock=clock)
    assert len(result.state.trials) == 1 and not result.state.brackets
    # 60 s less the first epoch's 10, at 10 s x 7/6, as train and validation are larger
    assert result.config.epochs == open_run(tmp_path / "run").config.epochs == 4
    assert clock.now <= 60
    assert "the default is the best" in summary_line(result.state, result.config)


def test_a_short_first_epoch_is_followed_by_one_that_is_measured(
    data: Dataset, tmp_path: Path
) -> None:
    class Slow(EpochClock):
        def on_event(self, stage: str, event: dict[str, Any]) -> None:
            super().on_event(stage, event)
            if event["event"] == "step" and self.epochs == 1:
                self.now += 4.0  # longer than others

    clock = Slow()
    result = searched(data.path, tmp_path / "run", minutes=6, clock=clock)
    base = result.state.trials[0]
    assert base.seconds == 10.0 * base.epochs
    assert base.epochs == 3 and result.state.epochs == 3


def test_a_first_epoch_that_other_work_slowed_does_not_cost_every_model_epochs(
    data: Dataset, tmp_path: Path
) -> None:
    class Disturbed(EpochClock):
        def on_event(self, stage: str, event: dict[str, Any]) -> None:
            super().on_event(stage, event)
            if event["event"] == "step" and self.epochs == 1:
                self.now += 15.0

    result = searched(data.path, tmp_path / "run", minutes=6, epochs=12, clock=Disturbed())
    assert result.state.epochs == 12  # .4 of 360 s hold 12 epochs of 10 s x 7/6, and 4 of 25 s
    assert result.state.trials[0].seconds == 10.0 * result.state.trials[0].epochs


@pytest.mark.parametrize("kill_at", [1, 2, 8, 14])
def test_a_killed_search_decides_what_it_would_have(
    data: Dataset, found: SearchResult, tmp_path: Path, kill_at: int
) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        searched(data.path, run, clock=EpochClock(kill_at))
    result = searched(data.path, run)
    assert decisions(result.state) | {"trials": None} == decisions(found.state) | {"trials": None}
    for ours, theirs in zip(result.state.trials, found.state.trials, strict=True):
        assert ours.model_dump(exclude={"seconds"}) == theirs.model_dump(exclude={"seconds"})
    assert same(weights(run), weights(found.fitted.run_folder))


def test_a_search_killed_in_its_last_fit_goes_on_with_it(
    data: Dataset, found: SearchResult, stages: list[str], tmp_path: Path
) -> None:
    fits = stages.count("fit")
    killed = EpochClock(kill_at=len(stages) - fits + 2)
    with pytest.raises(KeyboardInterrupt):
        searched(data.path, tmp_path / "run", clock=killed)
    assert load_state(tmp_path / "run").stage == "fit"
    again = EpochClock()
    searched(data.path, tmp_path / "run", clock=again)
    assert set(again.stages) == {"fit"} and len(again.stages) == fits - 1
    assert same(weights(tmp_path / "run"), weights(found.fitted.run_folder))


def test_no_row_of_test_counts(data: Dataset, found: SearchResult, tmp_path: Path) -> None:
    table = data.interactions()
    split = np.array(table["split"].cast(pa.string()).to_pylist())
    items = table["item_id"].to_numpy().copy()
    items[split == "test"] = np.random.default_rng(5).choice(ITEM_IDS, (split == "test").sum())
    kept = (split != "test") | (np.arange(len(split)) % 3 > 0)  # some rows are not there at all
    table = table.set_column(1, "item_id", pa.array(items)).filter(pa.array(kept))
    other = write_dataset(tmp_path / "other", data.users(), data.items(), table, name="tiny")
    assert other.identity != data.identity
    result = searched(other.path, tmp_path / "run")
    assert decisions(result.state) == decisions(found.state)
    assert same(weights(tmp_path / "run"), weights(found.fitted.run_folder))


def test_no_split_but_train_and_validation_is_asked_for(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    for name in ("positives", "counts"):
        original = getattr(Dataset, name)

        def spied(self: Dataset, *splits: str, _original: Any = original) -> Any:
            asked.update(splits)
            return _original(self, *splits)

        monkeypatch.setattr(Dataset, name, spied)
    searched(data.path, tmp_path / "run", minutes=2)
    assert asked == {"train", "val"}


def test_a_run_that_stops_between_epochs_is_the_run_that_does_not(
    data: Dataset, tmp_path: Path
) -> None:
    config = tiny_config(epochs=3)
    train(config, data.path, tmp_path / "whole")
    for epoch in (1, 2, 3):
        train(config, data.path, tmp_path / "cut", resume=epoch > 1, until_epoch=epoch)
        state = latest_state(tmp_path / "cut")
        assert state is not None and state.epoch == epoch
        assert state.has_ended(config) == (epoch == 3)
    whole, cut = latest_state(tmp_path / "whole"), latest_state(tmp_path / "cut")
    assert whole is not None and whole == cut
    left, right = (load_parts(tmp_path / name, whole.step) for name in ("whole", "cut"))
    assert all(same(left[part], right[part]) for part in left)


def test_a_candidate_that_cannot_be_trained_is_out_and_the_base_is_an_error(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[TrainingConfig] = []

    def refusing(config: TrainingConfig, *args: Any, **options: Any) -> Any:
        if config.loss.kind == "bsl":
            broken.append(config)
            raise ConfigError("no number any more", field="optimiser.learning_rate")
        return train(config, *args, **options)

    monkeypatch.setattr(trial_training, "train", refusing)
    result = searched(data.path, tmp_path / "run")
    refused = [trial for trial in result.state.trials if trial.refused]
    assert broken and refused
    assert all("loss" in trial.changes for trial in refused)
    assert result.state.best().number not in {trial.number for trial in refused}
    assert "no number any more" in str(trials_table(result.state).rows)
    with pytest.raises(ConfigError, match="no number any more"):
        searched(data.path, tmp_path / "base", loss={"kind": "bsl"})


def test_the_report_has_every_trial_and_every_choice(data: Dataset, found: SearchResult) -> None:
    state = found.state
    table = trials_table(state)
    assert len(table.rows) == sum(trial.epochs > 0 for trial in state.trials)
    recalls = [float(row[3]) for row in table.rows]
    assert recalls == sorted(recalls, reverse=True)
    assert table.rows[0][1].startswith("* ")
    tried = {choice for t in state.trials if t.values for choice in t.changes.items()}
    assert {row[0] for row in worth_table(state).rows} == {f"{s} {label}" for s, label in tried}
    assert f"{state.best().value:.4f}" in summary_line(state, found.config)
    assert state.val_users == NUM_USERS
    assert standard_error(0.5, 100) == 0.05


def test_the_written_configuration_makes_the_model_of_the_search(
    data: Dataset, found: SearchResult, tmp_path: Path
) -> None:
    path = tmp_path / "best.yaml"
    path.write_text(best_yaml(found.state, found.config))
    config = load_config(path, ["training.fit_splits=train+val"]).training
    train(config, data.path, tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(found.fitted.run_folder))


def test_another_configuration_or_an_ended_search_does_not_go_on(
    data: Dataset, found: SearchResult, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="the search has ended"):
        searched(data.path, found.fitted.run_folder)
    with pytest.raises(KeyboardInterrupt):
        searched(data.path, tmp_path / "run", clock=EpochClock(kill_at=8))
    before = state_path(tmp_path / "run").read_bytes()
    with pytest.raises(ConfigError, match=r"another configuration.*dim: 8, was 16"):
        searched(data.path, tmp_path / "run", dim=8)
    other = tiny_dataset(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="another dataset"):
        searched(other.path, tmp_path / "run")
    assert state_path(tmp_path / "run").read_bytes() == before
    state_path(tmp_path / "run").write_text('{"version": 1}')
    with pytest.raises(CorruptFile, match="not the state of a search"):
        searched(data.path, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "minutes", "message"),
    [
        ({"num_workers": 2}, 5, "num_workers: trials train in one process; expected 1; got 2"),
        ({"fit_splits": "train+val"}, 5, "fit_splits.*expected train"),
        ({}, 0, "--minutes: out of range"),
        ({}, float("nan"), "--minutes: out of range"),
    ],
)
def test_what_a_search_refuses_before_it_reads_data(
    tmp_path: Path, changes: dict[str, Any], minutes: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        searched(tmp_path / "none", tmp_path / "run", minutes=minutes, **changes)
    assert not (tmp_path / "run").exists()


def test_data_without_a_validation_split_is_refused(data: Dataset, tmp_path: Path) -> None:
    table = data.interactions()
    split = pa.array(["train" if s == "val" else s for s in table["split"].to_pylist()])
    table = table.set_column(3, "split", split.dictionary_encode())
    other = write_dataset(tmp_path / "other", data.users(), data.items(), table, name="tiny")
    with pytest.raises(DataError, match=r"expected rows of val.*--val-users"):
        searched(other.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_last_rung_is_a_trials_own_end(found: SearchResult) -> None:
    last = found.state.ladder[-1]
    ended = [trial for trial in found.state.trials if last in trial.values]
    assert ended and all(trial.ended for trial in ended)


def test_the_command_searches_and_prints_what_it_found(data: Dataset, tmp_path: Path) -> None:
    settings = ["training.batch_size=24", "training.epochs=2", "training.validation.k=10"]
    common = [part for each in settings for part in ("--set", each)]
    run = tmp_path / "run"
    command = [*common, "train", "--data", str(data.path), "--run", str(run)]
    done = CliRunner().invoke(cli, [*command, "--tune", "--minutes", "0.05"])
    assert done.exit_code == 0, done.output
    assert "What each choice was worth" in done.output and "Tried:" in done.output
    assert (run / "search" / "search.png").read_bytes().startswith(b"\x89PNG")
    again = load_config(run / "search" / "best.yaml").training
    assert again.model_copy(update={"fit_splits": "train+val"}) == open_run(run).config
    for options, message in [
        (["--tune"], "the search has ended"),
        (["--tune", "--resume"], "leave out --resume"),
        (["--tune", "--hard", "x"], "leave out --hard"),
        (["--tune", "--from", "x"], "leave out --from"),
        (["--tune", "--plot"], "leave out --plot"),
        (["--minutes", "3"], "options of --tune"),
        (["--tune", "--all"], "leave out --all"),
        (["--tune", "--workers", "2"], "one process"),
    ]:
        refused = CliRunner().invoke(cli, [*command, *options])
        assert refused.exit_code != 0
        assert message in f"{refused.output} {refused.exception}"


def test_trials_side_by_side_are_decided_as_one_after_the_other(
    data: Dataset, found: SearchResult, tmp_path: Path
) -> None:
    """With twice the trials in the same time: those of the first rung train together."""
    clock = EpochClock()
    together = TwoAtOnce(clock=clock)
    result = search(
        tiny_config(epochs=3, log_every_steps=10),
        data.path,
        tmp_path / "run",
        minutes=4.0,
        clock=clock,
        on_event=clock.on_event,
        together=together,
    )
    assert set(clock.stages) == {"fit"}, "no trial trained in this process"
    assert clock.now <= 240
    first, alone = result.state.brackets[0], found.state.brackets[0]
    assert len(result.state.trials) > len(found.state.trials)
    assert together.rungs[0] == [0], "the base is measured first"
    assert len(together.rungs[1]) == len(first.trials) - 1
    for number in set(first.trials) & set(alone.trials):
        changes = found.state.trials[number].changes
        same_trial = next(t for t in result.state.trials if t.changes == changes)
        common = same_trial.values.keys() & found.state.trials[number].values.keys()
        assert common and all(
            same_trial.values[rung] == found.state.trials[number].values[rung] for rung in common
        )


def test_no_bracket_is_planned_that_trains_nothing(data: Dataset, tmp_path: Path) -> None:
    """Many at once make many epochs affordable, but none in less time than it takes."""
    clock = EpochClock()
    result = search(
        tiny_config(epochs=3, log_every_steps=10),
        data.path,
        tmp_path / "run",
        minutes=2.0,
        clock=clock,
        on_event=clock.on_event,
        together=TwoAtOnce(clock=clock, at_once=16),
    )
    for bracket in result.state.brackets:
        assert any(result.state.trials[number].epochs for number in bracket.trials)
