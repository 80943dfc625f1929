"""The brackets of a search, within its minutes; then the fit of the best.

Trials are judged by recall on the validation split; no row of test is used. A trial is a training
run of its own that stops at each rung and goes on from its checkpoint: trained to its end it is the
run that ``train`` makes of its configuration. They train one at a time in this process, or some at
once under Ray Tune (``side_by_side``), which decides nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from shardline.shards.core.files import MANIFEST_NAME
from shardline.training.config.training_config import TrainingConfig
from shardline.training.loop.launch import TrainResult, train
from shardline.training.loop.runlog import Event, OnEvent
from shardline.training.search.choices import SearchSpace, describe
from shardline.training.search.findings import effects, final_config
from shardline.training.search.ladder import plan, rungs, survivors
from shardline.training.search.proposals import first_candidates, next_candidates
from shardline.training.search.search_state import (
    SEARCH,
    Bracket,
    SearchState,
    Trial,
    drop_files,
    save_state,
    set_aside,
    trial_folder,
)
from shardline.training.search.trial_training import Trained, TrialJob, train_trial

LEAST_RECALL = -1.0  # of a trial that cannot be trained
FIT_SHARE = 0.4  # of the time, at most, is kept for the last fit
SHORT_SHARE = 0.04  # of the time: an epoch that takes less is followed by one that is measured
AGAIN_SHARE = 0.1  # of the time: an epoch that takes more is not measured again
FEWEST_EPOCHS = 3  # of a trial: trials that end earlier say nothing of longer ones

Say = Callable[[str], None]
OnTrained = Callable[[TrialJob, Trained], None]
OnStageEvent = Callable[[str, Event], None]  # ("trial 3" or "fit", a line of its log)


class Together(Protocol):
    """Trains trials side by side: ``side_by_side``."""

    @property
    def at_once(self) -> int:
        """Trials that train at the same time."""

    def train(self, jobs: Sequence[TrialJob], search_folder: Path, on_trained: OnTrained) -> None:
        """Trains all of them, at least one; ``on_trained`` hears of each as it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """fitted: the run on train and validation that was made with ``config``, epochs of it."""

    state: SearchState
    config: TrainingConfig
    fitted: TrainResult


@dataclass(kw_only=True)
class SearchLoop:
    """A search on its way: its state, and where its trials lie. ``to_the_end`` is all of it.

    together: trains several trials at once; None: one at a time, in this process.
    """

    state: SearchState
    data_folder: Path
    run_folder: Path
    num_items: int
    refit_factor: float  # examples of the last fit by those of a trial
    say: Say
    on_event: OnStageEvent | None
    clock: Callable[[], float]
    together: Together | None = None

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

    @property
    def _at_once(self) -> int:
        return 1 if self.together is None else self.together.at_once

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
        """Trains the base for an epoch; where the time is too short for its epochs, takes fewer.

        A short first epoch says little of others, so the second is measured then. So it is before
        all models get fewer epochs: other work on the machine only adds to what an epoch takes.
        """
        state = self.state
        if state.measured:
            return
        state.trials = state.trials or [Trial(number=0, changes={})]
        base = state.trials[0]
        self._advance([(base, 1)])
        if state.ladder[0] == 1 and base.value is not None:
            base.values[1] = base.value
        first = base.seconds
        share = first / (state.minutes * 60)
        is_short = share < SHORT_SHARE
        measures_again = is_short or (share < AGAIN_SHARE and self._is_too_long(base))
        if base.epochs == 1 and not base.ended and measures_again:
            self._advance([(base, 2)])
            second = base.seconds - first
            base.seconds = 2 * (second if is_short else min(first, second))
        if self._is_too_long(base):
            self._shorten(base)
        state.measured = True
        self._save()

    def _is_too_long(self, base: Trial) -> bool:
        return self.state.epochs > self._most_epochs(base)

    def _most_epochs(self, base: Trial) -> int:
        """Epochs of a last fit that leaves trials their share of the time."""
        return int(FIT_SHARE * self.state.minutes * 60 / self._fit_s(base, 1))

    def _shorten(self, base: Trial) -> None:
        state, epoch_s = self.state, self._own_s(base)
        asked, fit_s, most = state.epochs, self._fit_s(base, 1), self._most_epochs(base)
        left = state.minutes * 60 - state.spent_s - (self.clock() - self._at)
        # less the base's first epoch, which is trained again
        trials = self._at_once * ((left - most * fit_s) / epoch_s - 1)
        if most >= FEWEST_EPOCHS and plan(trials, rungs(most, state.least_rung), first=True):
            state.epochs, what = most, f"models get {most} epochs"
        else:  # trials would say nothing: all the time for the fit
            state.epochs, state.stage = max(1, min(asked, int(left / fit_s))), "fit"
            what = f"nothing is searched, the default is fitted with {state.epochs} epochs"
        self.say(
            f"warning: an epoch takes {epoch_s:.1f} s, so {what}, of {asked}; for a search with "
            f"{asked} give it {asked * fit_s / FIT_SHARE / 60:.0f} minutes or more"
        )
        self.space = self._space()
        if state.stage == "search":
            set_aside(trial_folder(self.run_folder, base))  # its learning rate was that of more
            state.trials = [base := Trial(number=0, changes={})]
            self._save()
            self._advance([(base, 1)])

    # brackets -----------------------------------------------------------------------------------

    def _next_bracket(self) -> bool:
        """Plans another bracket and its trials; False where there is no time or nothing to try."""
        state = self.state
        affordable = self._at_once * self._left_s() / self._own_s(self._base)
        planned = plan(affordable, state.ladder, first=not state.brackets)
        if planned is None:
            return False
        size, ladder = planned
        if ladder[0] * self._own_s(self._base) > self._left_s():
            return False  # however many train at once, the first rung takes its time
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
            alive = self._reach(alive, epochs)
            recalls = {each: self._recall(self.state.trials[each], epochs) for each in alive}
            going = sorted({*survivors(recalls), *({0} & set(alive))})  # the base in any case
            for each in set(alive).difference(going):
                drop_files(trial_folder(self.run_folder, self.state.trials[each]))
            alive = [each for each in going if not self.state.trials[each].refused]

    def _reach(self, numbers: Sequence[int], rung: int) -> list[int]:
        """Trains trials to a rung; those that have reached it. One that there is no time for, of
        more epochs than others say, does not stop those."""
        reached, due, busy_s = [], [], 0.0
        for number in numbers:
            trial = self.state.trials[number]
            if rung not in trial.values and not trial.refused:
                until = self._until(trial, rung)
                own_s = (0 if trial.ended else until - trial.epochs) * self._own_s(trial)
                if max(own_s, (busy_s + own_s) / self._at_once) > self._left_s():
                    continue
                due.append((trial, until))
                if self.together is None:  # the next one's time is what this one leaves
                    self._advance(due, rung)
                    due = []
                else:
                    busy_s += own_s
            reached.append(number)
        self._advance(due, rung)
        return reached

    def _recall(self, trial: Trial, rung: int) -> float:
        return LEAST_RECALL if trial.refused else trial.values[rung]

    def _until(self, trial: Trial, rung: int) -> int:
        """The epochs to train to for a rung: the last rung is the trial's own end."""
        config = self.space.config(trial.changes)
        assert config is not None, "a trial has a configuration"
        is_last = rung == self.state.ladder[-1]
        return config.epochs if is_last else min(rung, config.epochs)

    def _advance(self, due: Sequence[tuple[Trial, int]], rung: int | None = None) -> None:
        """Trains trials up to so many epochs each, from their checkpoints if they have any; what
        they reach is their value at ``rung``, where one is given."""

        def has_reached(trial: Trial) -> None:
            if rung is not None and trial.value is not None and not trial.refused:
                trial.values[rung] = trial.value
            self._save()

        jobs = []
        for trial, until in due:
            if trial.ended or trial.epochs >= until:
                has_reached(trial)
            else:
                jobs.append(self._job(trial, until))

        def take(job: TrialJob, trained: Trained) -> None:
            trial = self.state.trials[job.number]
            trial.seconds += trained.seconds
            trial.refused, trial.ended = trained.refused, trained.ended
            if trained.refused is None:
                trial.epochs, trial.value = trained.epochs, trained.value
                trial.best_epoch = trained.best_epoch
            has_reached(trial)
            self._tell(trial, job.config)

        if self.together is None:
            for job in jobs:
                take(job, self._trained_here(job))
        elif jobs:
            self.together.train(jobs, self.run_folder / SEARCH, take)

    def _job(self, trial: Trial, until: int) -> TrialJob:
        config = self.space.config(trial.changes)
        assert config is not None, "a trial has a configuration"
        folder = trial_folder(self.run_folder, trial)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return TrialJob(
            number=trial.number,
            config=config,
            data_folder=self.data_folder,
            folder=folder,
            until=until,
            may_be_refused=bool(trial.changes),
        )

    def _trained_here(self, job: TrialJob) -> Trained:
        """In this process, with its log shown; the time until now counts at each validation, so
        that of a killed search does."""
        trial, counted = self.state.trials[job.number], self.clock()
        report = self._named(f"trial {trial.number}")

        def on_event(event: Event) -> None:
            nonlocal counted
            if event["event"] == "start" and not self._base.epochs:
                counted = self.clock()  # a first start loads libraries, which no other one does
            if event["event"] == "validation":
                now = self.clock()
                trial.seconds, counted = trial.seconds + now - counted, now
                self._save()
            if report is not None:
                report(event)

        trained = train_trial(job, on_event)
        return replace(trained, seconds=self.clock() - counted)

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
