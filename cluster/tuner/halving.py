"""Successive halving: many configurations over few rows, few configurations over all of them.

The first rung tries all that differ much, and then what differs in one thing from the fastest of
each of the three fastest kinds. Each further rung has STEP times the rows. It takes what is left in
the order of the times estimated so far, and ends when it has enough within the bounds, or when the
next one is estimated far above the best it has measured. So an estimate that was too good costs a
trial, not the result. After Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and
Hyperparameter Optimization", 2016.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shardline.cluster.tuner.configurations import Configuration
from shardline.cluster.tuner.corpus_sample import Progress
from shardline.cluster.tuner.outcome import Outcome, Rung
from shardline.cluster.tuner.trial import Trial
from shardline.shards.core.errors import InvalidInput
from shardline.shards.index.spec import IndexKind

# Of the rungs after the first, the last one last: how many within the bounds are enough, how many
# are tried at most if any of them is, and up to which multiple of the best time.
WIDTHS = ((6, 9, 2.5), (3, 6, 1.2))
VARIED = 3  # kinds whose fastest one is varied
FAR = 4.0  # excess: where one misses a bound by so much, others of its kind are not tried as well
FINALISTS = 2  # of the last rung, timed anew in the same rounds
ALIKE = 1.03  # of times that differ by less, the smaller index is taken
# How far a configuration may seem to be from the bounds before the last rung, where recall is
# credited with so many standard errors: rough training costs recall, and times are extrapolated.
LENIENCE, ERRORS = 1.5, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a configuration must reach; None: no bound. p99 is of a query and shard."""

    target_recall: float
    max_p99_ms: float | None = None
    max_bytes_per_vector: float | None = None


class Runner(Protocol):
    """What runs trials: ``trial.Trials``, or a fake beside the tests."""

    rungs: list[Rung]

    def run(self, configuration: Configuration, rung: Rung, target: float) -> Trial: ...

    def compare(self, trials: Sequence[Trial]) -> list[Outcome]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the halving found. ``outcomes``: of each configuration, over the most rows it was
    tried with, the fastest within the bounds first. chosen: that one; None where none is.

    untried: how many the time did not suffice for at all.
    """

    outcomes: tuple[Outcome, ...]
    chosen: Outcome | None
    untried: int
    is_cut_short: bool

    @property
    def nearest(self) -> Outcome:
        return self.outcomes[0]


def halve(
    tried: Sequence[Configuration],
    runner: Runner,
    bounds: Bounds,
    *,
    clock: Callable[[], float],
    time_limit_s: float | None = None,
    progress: Progress = lambda stage, done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> Found:
    """Runs all rungs, or as many trials as the time suffices for.

    Raises:
        InvalidInput: it did not suffice for one.
    """
    steps = _Steps(runner, bounds, clock, time_limit_s, progress, note)
    first, *further = runner.rungs
    # over so few rows that there is one rung, everything is tried
    own = [each for each in tried if not each.variations or not further]
    steps.run(own, first)
    if further:
        steps.run(_variations(steps.ranked(), tried), first)
    widths = WIDTHS[len(WIDTHS) - len(further) :]
    for rung, width in zip(further, widths, strict=True):
        steps.run([each.configuration for each in steps.ranked()], rung, width)
    if not steps.latest:
        raise InvalidInput(
            "too short for a single trial",
            field="--time-limit-s",
            expected="more seconds, or fewer rows (--sample-rows)",
            got=f"{time_limit_s:g}" if time_limit_s is not None else None,
        )
    finalists = steps.compare()
    untried = sum(each.name not in steps.latest for each in own)
    return _found(list(steps.latest.values()), bounds, finalists, untried, steps.is_cut_short)


class _Steps:
    """What was found so far, and the indexes of the last rung that are asked once more.

    latest: of each configuration, by name, over the most rows that it was tried with.
    """

    def __init__(
        self,
        runner: Runner,
        bounds: Bounds,
        clock: Callable[[], float],
        time_limit_s: float | None,
        progress: Progress,
        note: Callable[[str], None],
    ) -> None:
        self.latest: dict[str, Outcome] = {}
        self.is_cut_short = False
        self._finalists: list[Trial] = []
        self._runner, self._bounds, self._progress, self._note = runner, bounds, progress, note
        self._clock, self._stop = clock, None
        if time_limit_s is not None:
            self._stop = clock() + time_limit_s

    def run(
        self,
        queue: Sequence[Configuration],
        rung: Rung,
        width: tuple[int, int, float] | None = None,
    ) -> None:
        """Runs trials in this order: all, or as many as the width asks for and the time allows."""
        stage = f"{rung.rows:,} rows ({rung.number + 1} of {len(self._runner.rungs)})"
        tried: list[Outcome] = []
        for number, configuration in enumerate(queue):
            self._progress(stage, number, len(queue))
            if width is not None and self._is_beyond(configuration, tried, width):
                continue
            if self._is_too_late(configuration, rung):
                self.is_cut_short = True
                continue
            trial = self._runner.run(configuration, rung, self._bounds.target_recall)
            tried.append(trial.outcome)
            self.latest[configuration.name] = trial.outcome
            self._note(_line(trial.outcome))
            if rung.is_last and self._is_able(trial.outcome):
                self._finalists = sorted([*self._finalists, trial], key=_trial_ms)[:FINALISTS]
        self._progress(stage, len(queue), len(queue))

    def ranked(self) -> list[Outcome]:
        """What may go on: over more rows first, then the fastest. The nearest where none may."""
        outcomes = list(self.latest.values())
        able = [each for each in outcomes if self._is_able(each)]
        if not able:
            return sorted(outcomes, key=lambda each: excess(each, self._bounds))[:1]
        target = self._bounds.target_recall
        lean = [each for each in able if not any(_is_leaner(one, each, target) for one in able)]
        return sorted(lean, key=lambda each: (-each.rows, _ms(each)))

    def compare(self) -> set[str]:
        """Times the finalists anew, in the same rounds; their names."""
        if self._finalists:
            for outcome in self._runner.compare(self._finalists):
                self.latest[outcome.configuration.name] = outcome
        return {trial.outcome.configuration.name for trial in self._finalists}

    def _is_able(self, outcome: Outcome) -> bool:
        if outcome.is_last:
            return not misses(outcome, self._bounds)
        return excess(outcome, self._bounds, errors=ERRORS) <= LENIENCE

    def _is_beyond(
        self,
        configuration: Configuration,
        tried: Sequence[Outcome],
        width: tuple[int, int, float],
    ) -> bool:
        """Whether a rung has no need of it any more."""
        enough, most, multiple = width
        able = [_ms(each) for each in tried if self._is_able(each)]
        if len(able) >= enough or (able and len(tried) >= most):
            return True
        far = [each for each in tried if excess(each, self._bounds) > FAR]
        if configuration.spec.kind in {each.configuration.spec.kind for each in far}:
            return True
        return bool(able) and _ms(self.latest[configuration.name]) > multiple * min(able)

    def _is_too_late(self, configuration: Configuration, rung: Rung) -> bool:
        """By the time of its kind over fewer rows; nothing is known of the first ones."""
        if self._stop is None:
            return False
        same = [o for o in self.latest.values() if o.configuration.family == configuration.family]
        seconds = max((each.seconds * rung.rows / each.rows for each in same), default=0.0)
        return self._clock() + seconds > self._stop


def excess(outcome: Outcome, bounds: Bounds, *, errors: float = 0) -> float:
    """How far it is from the bounds: 1 or less is within all of them, 2 misses one by its double.

    errors: standard errors that recall is credited with.
    """
    allowed = max(1 - bounds.target_recall, 1e-6)
    best = max(min(point.recall + errors * point.error, 1.0) for point in outcome.points)
    found = [(1 - best) / allowed]
    if bounds.max_p99_ms is not None:
        found.append(outcome.chosen.latency.p99_ms / bounds.max_p99_ms)
    if bounds.max_bytes_per_vector is not None:
        found.append(outcome.configuration.bytes_per_vector / bounds.max_bytes_per_vector)
    return max(found)


def misses(outcome: Outcome, bounds: Bounds) -> list[str]:
    """The bounds that it does not meet, in words."""
    found = []
    if outcome.chosen.recall < bounds.target_recall:
        found.append(f"recall {outcome.chosen.recall:.3f} is below {bounds.target_recall:g}")
    p99 = outcome.chosen.latency.p99_ms
    if bounds.max_p99_ms is not None and p99 > bounds.max_p99_ms:
        found.append(f"p99 {p99:.2f} ms is above {bounds.max_p99_ms:g}")
    size, most = outcome.configuration.bytes_per_vector, bounds.max_bytes_per_vector
    if most is not None and size > most:
        found.append(f"{size:.0f} bytes per vector are above {most:g}")
    return found


def _found(
    outcomes: list[Outcome],
    bounds: Bounds,
    finalists: set[str],
    untried: int,
    is_cut_short: bool,
) -> Found:
    most = max(outcome.rows for outcome in outcomes)
    able = [o for o in outcomes if not misses(o, bounds)]
    # only what was measured over the most rows is chosen, if there was time for that
    reached = max((o.rows for o in able), default=most) if is_cut_short else most
    able = [o for o in able if o.rows == reached]
    # and of that what has been timed in the same rounds, unless none of it stayed within the bounds
    able = [o for o in able if o.configuration.name in finalists] or able
    chosen = None
    if able:
        fastest = min(outcome.chosen.latency.p50_ms for outcome in able)
        alike = [o for o in able if o.chosen.latency.p50_ms <= fastest * ALIKE]
        chosen = min(
            alike, key=lambda o: (o.configuration.bytes_per_vector, o.chosen.latency.p50_ms)
        )

    def order(outcome: Outcome) -> tuple[bool, bool, float, float]:
        far = max(1.0, excess(outcome, bounds))
        return outcome is not chosen, outcome.rows < most, far, outcome.chosen.latency.p50_ms

    return Found(
        outcomes=tuple(sorted(outcomes, key=order)),
        chosen=chosen,
        untried=untried,
        is_cut_short=is_cut_short,
    )


def _variations(ranked: Sequence[Outcome], tried: Sequence[Configuration]) -> list[Configuration]:
    """Those that differ in one thing from the fastest of a kind, for the fastest kinds."""
    fastest: dict[IndexKind, tuple[object, ...]] = {}
    for outcome in ranked:
        fastest.setdefault(outcome.configuration.spec.kind, outcome.configuration.family)
    varied = list(fastest.values())[:VARIED]
    return [each for each in tried if each.variations == 1 and each.family in varied]


def _is_leaner(one: Outcome, other: Outcome, target: float) -> bool:
    """Whether it is the same index but for smaller copies of the vectors, and as good."""
    mine, theirs = one.configuration, other.configuration
    same = mine.spec.model_copy(update={"rerank": theirs.spec.rerank}) == theirs.spec
    is_smaller = mine.bytes_per_vector < theirs.bytes_per_vector
    is_found = one.chosen.recall >= min(other.chosen.recall, target)
    is_fast = one.rows == other.rows and _ms(one) <= ALIKE * _ms(other)
    return same and is_smaller and is_found and is_fast


def _ms(outcome: Outcome) -> float:
    return outcome.chosen.latency.p50_ms


def _trial_ms(trial: Trial) -> float:
    return _ms(trial.outcome)


def _line(outcome: Outcome) -> str:
    chosen = outcome.chosen
    return (
        f"  {outcome.configuration.name}: recall {chosen.recall:.3f}, p50 "
        f"{chosen.latency.p50_ms:.2f} ms, {outcome.configuration.bytes_per_vector:.0f} bytes"
        f" per vector; {outcome.seconds:.1f} s"
    )
