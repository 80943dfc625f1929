"""The search itself: brackets of trials within a number of minutes, then the fit of the best.

Trials are judged by recall on the validation split; no row of test is used. A trial is a training
run of its own that stops at each rung and goes on from its checkpoint: trained to its end it is the
run that ``train`` makes of its configuration. One process, one trial at a time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardline.shards.core.errors import ConfigError, DataError
from shardline.shards.core.files import MANIFEST_NAME
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import Dataset, open_dataset
from shardline.training.features.infer import infer_config
from shardline.training.loop.launch import TrainResult, train
from shardline.training.loop.runlog import Event, OnEvent
from shardline.training.model.checkpoint import latest_state
from shardline.training.search.choices import SearchSpace, describe
from shardline.training.search.ladder import plan, rungs, survivors
from shardline.training.search.proposals import first_candidates, next_candidates
from shardline.training.search.search_state import (
    SEARCH,
    Bracket,
    SearchState,
    Trial,
    check_same_search,
    drop_files,
    load_state,
    save_state,
    set_aside,
    state_path,
    trial_folder,
)
from shardline.training.search.worth import Worth, worths

LEAST_RECALL = -1.0  # of a trial that cannot be trained
FIT_SHARE = 0.5  # of the time, at most, is kept for the last fit
FEWEST_EPOCHS = 3  # of a trial: trials that end earlier say nothing of longer ones

Say = Callable[[str], None]
OnStageEvent = Callable[[str, Event], None]  # ("trial 3" or "fit", a line of its log)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """fitted: the run on train and validation that was made with ``config``, epochs of it."""

    state: SearchState
    config: TrainingConfig
    fitted: TrainResult


def search(
    config: TrainingConfig,
    data_folder: Path,
    run_folder: Path,
    *,
    minutes: float,
    sizes: bool = False,
    say: Say = lambda line: None,
    on_event: OnStageEvent | None = None,
    on_chosen: Callable[[SearchState, TrainingConfig], None] = lambda state, config: None,
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Finds settings within ``minutes``, the last fit included; the run folder gets that fit.

    config: the base, which is the first trial. Goes on with a search that the folder holds.
    on_event: what trains now, and a line of its log. on_chosen: called before the last fit, with
    its configuration. Nothing is begun that would not end in time, by the time of earlier epochs;
    the first epoch is trained in any case, and the last fit is never shortened.

    Raises:
        ConfigError: the base cannot be searched, or is not that of the folder's search; the search
            has ended. DataError: no validation split, or another dataset. As ``train``: of the
            base, whereas another candidate that cannot be trained is only out.
    """
    check_base(config, minutes)
    dataset = open_dataset(data_folder, keep=True)
    check_val(dataset)
    base = infer_config(config, dataset)
    # every rung must have been validated
    every = base.validation.model_copy(update={"every_epochs": 1})
    base = base.model_copy(update={"validation": every})
    if state_path(run_folder).exists():
        state = load_state(run_folder)
        check_same_search(run_folder, state, base, dataset.identity, sizes)
        if state.stage == "done":
            raise ConfigError(
                f"{run_folder / SEARCH}: the search has ended",
                hint="--run names another folder for another search",
            )
        say(f"goes on with the search of {len(state.trials)} trials, {state.spent_s:.0f} s so far")
        state.minutes = minutes
    elif (run_folder / MANIFEST_NAME).exists():
        raise ConfigError(
            f"{run_folder}: holds a run already",
            hint="--run names another folder, also to what follows",
        )
    else:
        state = SearchState(
            base=base.model_dump(mode="json"),
            dataset=dataset.identity,
            sizes=sizes,
            minutes=minutes,
            epochs=base.epochs,
        )
    val_share = len(dataset.positives("val").items) / len(dataset.positives("train").items)
    num_items = dataset.rows["items"]
    del dataset  # its tables are not needed while trials train
    run = _Search(
        state=state,
        data_folder=data_folder,
        run_folder=run_folder,
        num_items=num_items,
        refit_factor=1 + val_share,
        say=say,
        on_event=on_event,
        clock=clock,
    )
    return run.to_the_end(on_chosen)


def check_base(config: TrainingConfig, minutes: float) -> None:
    """What a search refuses before it reads any data. Raises ConfigError."""
    if not minutes > 0:
        raise ConfigError("out of range", field="--minutes", expected="> 0", got=f"{minutes:g}")
    if config.num_workers > 1:
        raise ConfigError(
            "trials train in one process",
            field="num_workers",
            expected="1",
            got=str(config.num_workers),
            hint="search with one worker, then train -c best.yaml with several",
        )
    if "val" in config.fitted_splits:
        raise ConfigError(
            "trials are judged on the validation split",
            field="fit_splits",
            expected="train",
            got=config.fit_splits,
            hint="leave out --all: the last fit is of train and validation anyway",
        )


def check_val(dataset: Dataset) -> None:
    """Raises DataError where there is nothing to judge trials by."""
    if not len(dataset.positives("val").items):
        raise DataError(
            f"{dataset.path}: nothing to judge trials by",
            field="split",
            expected="rows of val",
            got="none",
            hint="import the data with --val-users and --val-per-user",
        )


def final_config(state: SearchState, space: SearchSpace) -> TrainingConfig:
    """The best trial's configuration, with the epochs to train for on train alone or with val.

    Where the trial was trained to its end these are the epochs of its best validation.
    """
    best = state.best()
    config = space.config(best.changes)
    assert config is not None, "a trial has a configuration"
    epochs = best.best_epoch if best.ended and best.best_epoch else config.epochs
    return config.model_copy(update={"epochs": epochs})


def first_rung(state: SearchState) -> list[tuple[dict[str, str], float]]:
    """(changes, recall) of each trial after the epochs of the first rung."""
    epochs = rungs(state.epochs)[0]
    return [
        (trial.changes, trial.values[epochs]) for trial in state.trials if epochs in trial.values
    ]


def effects(state: SearchState) -> list[Worth]:
    """What each choice was worth after the first rung; none before the base was there."""
    judged = first_rung(state)
    return worths(judged) if any(not changes for changes, _ in judged) else []


@dataclass(kw_only=True)
class _Search:
    state: SearchState
    data_folder: Path
    run_folder: Path
    num_items: int
    refit_factor: float  # examples of the last fit by those of a trial
    say: Say
    on_event: OnStageEvent | None
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self._at = self.clock()
        self.space = self._space()

    def to_the_end(self, on_chosen: Callable[[SearchState, TrainingConfig], None]) -> SearchResult:
        state = self.state
        if state.stage == "search":
            self._measure()
            for number in range(len(state.brackets)):
                self._run_bracket(number)
            while state.stage == "search" and self._next_bracket():
                self._run_bracket(len(state.brackets) - 1)
            state.stage = "fit"
            self._save()
        config = final_config(state, self.space)
        on_chosen(state, config)
        best = state.best()
        for trial in state.trials:
            drop_files(trial_folder(self.run_folder, trial))
        self.say(
            f"fits trial {best.number} ({describe(best.changes)}) on train and validation, "
            f"{config.epochs} epochs"
        )
        fitted = train(
            config.model_copy(update={"fit_splits": "train+val"}),
            self.data_folder,
            self.run_folder,
            on_event=self._named("fit"),
            resume=(self.run_folder / MANIFEST_NAME).exists(),
        )
        state.stage = "done"
        self._save()
        return SearchResult(state=state, config=config, fitted=fitted)

    def _space(self) -> SearchSpace:
        base = self.state.base_config
        return SearchSpace(base, num_items=self.num_items, sizes=self.state.sizes)

    def _save(self) -> None:
        now = self.clock()
        self.state.spent_s += now - self._at
        self._at = now
        save_state(self.run_folder, self.state)

    # time ---------------------------------------------------------------------------------------

    def _own_s(self, trial: Trial) -> float:
        """Seconds of an epoch of this trial, its start and validation included; of one that has
        not begun, the mean of all.
        """
        trained = [trial] if trial.epochs else [each for each in self.state.trials if each.epochs]
        return sum(t.seconds for t in trained) / sum(t.epochs for t in trained)

    def _left_s(self) -> float:
        """Seconds left for trials once the fit of the best one so far has its own."""
        spent = self.state.spent_s + self.clock() - self._at
        best = self.state.best()
        epochs = final_config(self.state, self.space).epochs
        return self.state.minutes * 60 - spent - self._fit_s(best, epochs)

    def _fit_s(self, trial: Trial, epochs: int) -> float:
        return epochs * self._own_s(trial) * self.refit_factor

    def _affordable(self, changes: dict[str, str]) -> bool:
        """Whether the last fit could take that many epochs, should these changes be the best."""
        config = self.space.config(changes)
        assert config is not None, "a candidate has a configuration"
        most = max(FIT_SHARE * self.state.minutes * 60, self._fit_s(self._base, self.state.epochs))
        return self._fit_s(self._base, config.epochs) <= most

    @property
    def _base(self) -> Trial:
        return self.state.trials[0]

    def _measure(self) -> None:
        """Trains the base for an epoch; where the time is too short for its epochs, takes fewer."""
        state = self.state
        if state.trials and state.trials[0].epochs:
            return
        base = Trial(number=0, changes={})
        state.trials = [base]
        self._advance(base, 1)
        epoch_s = self._own_s(base) * self.refit_factor
        most = int(FIT_SHARE * state.minutes * 60 / epoch_s)
        if state.epochs > most:
            asked = state.epochs
            hold = asked * epoch_s / FIT_SHARE / 60
            state.epochs = most
            what = f"models get {most} epochs"
            if most < FEWEST_EPOCHS:  # such trials would say nothing: all the time for the fit
                left = state.minutes * 60 - state.spent_s - (self.clock() - self._at)
                state.epochs = max(1, min(asked, int(left / epoch_s)))
                state.stage = "fit"
                what = f"nothing is searched, the default is fitted with {state.epochs} epochs"
            self.say(
                f"warning: an epoch takes {epoch_s:.1f} s, so {what} instead of {asked}; "
                f"about {hold:.0f} minutes would hold those"
            )
            self.space = self._space()
            if state.stage == "search":
                set_aside(trial_folder(self.run_folder, base))  # its learning rate was of more
                state.trials = [base := Trial(number=0, changes={})]
                self._save()
                self._advance(base, 1)
        self._save()

    # brackets -----------------------------------------------------------------------------------

    def _next_bracket(self) -> bool:
        """Plans another bracket and its trials; False where there is no time or nothing to try."""
        state = self.state
        affordable = self._left_s() / self._own_s(self._base)
        planned = plan(affordable, rungs(state.epochs), first=not state.brackets)
        if planned is None:
            return False
        size, ladder = planned
        candidates = [changes for changes in self._candidates(size) if self._affordable(changes)]
        if not candidates:
            return False
        numbers = []
        for changes in candidates:
            if changes:
                state.trials.append(Trial(number=len(state.trials), changes=changes))
            # no changes: the base, of the first bracket, which has begun
            numbers.append(state.trials[-1].number if changes else 0)
        state.brackets.append(Bracket(trials=tuple(numbers), rungs=ladder))
        self.say(
            f"bracket {len(state.brackets)}: {len(numbers)} trials, the best third goes on after "
            f"{', '.join(map(str, ladder))} epochs"
        )
        self._save()
        return True

    def _candidates(self, size: int) -> list[dict[str, str]]:
        state, seed = self.state, self.state.base_config.seed
        if not state.brackets:
            return first_candidates(self.space, size, seed)
        return next_candidates(
            self.space,
            size,
            seed=seed,
            bracket=len(state.brackets),
            tried=[trial.changes for trial in state.trials if trial.epochs or trial.refused],
            incumbent=state.best().changes,
            found=effects(state),
        )

    def _run_bracket(self, number: int) -> None:
        """Trains a bracket's trials from rung to rung; what is there already is not done again."""
        bracket = self.state.brackets[number]
        alive = list(bracket.trials)
        for epochs in bracket.rungs:
            for each in alive:
                if not self._reach(self.state.trials[each], epochs):
                    return
            recalls = {each: self._recall(self.state.trials[each], epochs) for each in alive}
            going = survivors(recalls)
            for each in set(alive).difference(going):
                drop_files(trial_folder(self.run_folder, self.state.trials[each]))
            alive = [each for each in going if not self.state.trials[each].refused]

    def _reach(self, trial: Trial, rung: int) -> bool:
        """Trains a trial to a rung; False where the time is not enough."""
        if rung in trial.values or trial.refused:
            return True
        until = self._until(trial, rung)
        left = 0 if trial.ended else until - trial.epochs
        if left * self._own_s(trial) > self._left_s():
            return False
        self._advance(trial, until)
        if trial.value is not None and not trial.refused:
            trial.values[rung] = trial.value
        self._save()
        return True

    def _recall(self, trial: Trial, rung: int) -> float:
        return LEAST_RECALL if trial.refused else trial.values[rung]

    def _until(self, trial: Trial, rung: int) -> int:
        """The epochs to train to for a rung: the last rung is the trial's own end."""
        config = self.space.config(trial.changes)
        assert config is not None, "a trial has a configuration"
        is_last = rung == rungs(self.state.epochs)[-1]
        return config.epochs if is_last else min(rung, config.epochs)

    def _advance(self, trial: Trial, until: int) -> None:
        """Trains a trial up to ``until`` epochs, from its checkpoint if it has one."""
        config = self.space.config(trial.changes)
        assert config is not None, "a trial has a configuration"
        if trial.ended or trial.epochs >= until:
            return
        folder, counted = trial_folder(self.run_folder, trial), self.clock()
        report = self._named(f"trial {trial.number}")

        def on_event(event: Event) -> None:
            nonlocal counted
            if event["event"] == "validation":  # so that the time of a killed search counts
                now = self.clock()
                trial.seconds, counted = trial.seconds + now - counted, now
                self._save()
            if report is not None:
                report(event)

        try:
            train(
                config,
                self.data_folder,
                folder,
                on_event=on_event,
                resume=(folder / MANIFEST_NAME).exists(),
                until_epoch=until,
            )
        except ConfigError as error:  # it diverged, or has lists of negatives that are too short
            if not trial.changes:
                raise
            trial.refused, trial.ended = str(error), True
        else:
            reached = latest_state(folder)
            assert reached is not None, "a trial has a checkpoint after an epoch"
            trial.epochs, trial.value = reached.epoch, reached.best_value
            trial.best_epoch, trial.ended = reached.best_epoch, reached.has_ended(config)
        trial.seconds += self.clock() - counted
        self._tell(trial, config)

    def _named(self, stage: str) -> OnEvent | None:
        report = self.on_event
        return None if report is None else lambda event: report(stage, event)

    def _tell(self, trial: Trial, config: TrainingConfig) -> None:
        what = f"trial {trial.number}, {describe(trial.changes)}: "
        if trial.refused:
            self.say(what + f"out: {trial.refused}")
            return
        best = self.state.best()
        self.say(
            what + f"recall@{config.validation.k} {trial.value:.4f} after {trial.epochs} of "
            f"{config.epochs} epochs; best {best.value:.4f}, trial {best.number}"
        )
