"""Successive halving: many configurations over few rows, few configurations over all of them.

A rung builds and asks what is left over STEP times the rows of the rung before. Out go those that
cannot reach the bounds at any depth, and those whose time at the target is far above the best. The
number of lists is tried where its kind has survived the first rung: the sample's first rows say
little about it. After Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and
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

# After each rung but the last: how many go on at most, and up to which multiple of the best time.
# Few rows fit into caches and make every search look alike, so the first rung is lenient.
KEPT = ((5, 3.0), (2, 1.5))
ALIKE = 1.03  # of times that differ by less, the smaller index is taken
LATENCY_SLACK = 1.5  # of a time that is extrapolated, over what it may be
ERRORS = 2.0  # standard errors by which recall may miss the target on part of the rows


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
    stop = None if time_limit_s is None else clock() + time_limit_s
    latest: dict[str, Outcome] = {}
    others = [each for each in tried if each.is_scaled] if len(runner.rungs) > 1 else []
    left = [each for each in tried if each not in others]
    is_cut_short = False
    for rung in runner.rungs:
        done: list[Outcome] = []
        trials: list[Trial] = []  # of the last rung; earlier indexes are not kept
        for number, configuration in enumerate(left):
            progress(_stage(rung, runner.rungs), number, len(left))
            if stop is not None and clock() + _seconds(configuration, rung, latest) > stop:
                is_cut_short = True
                continue
            trial = runner.run(configuration, rung, bounds.target_recall)
            done.append(trial.outcome)
            trials += [trial] if rung.is_last else []
            latest[configuration.name] = trial.outcome
            note(_line(trial.outcome))
        progress(_stage(rung, runner.rungs), len(left), len(left))
        if not done:
            break
        kept = survivors(done, bounds, rung.number)
        if rung.is_last:
            for outcome in runner.compare([t for t in trials if t.outcome in kept]):
                latest[outcome.configuration.name] = outcome
        left = [outcome.configuration for outcome in kept]
        left += _other_lists(left, others) if rung.number == 0 else []
    if not latest:
        raise InvalidInput(
            "too short for a single trial",
            field="--time-limit-s",
            expected="more seconds, or fewer rows (--sample-rows)",
            got=f"{time_limit_s:g}" if time_limit_s is not None else None,
        )
    untried = sum(each.name not in latest for each in tried if each not in others)
    return _found(list(latest.values()), bounds, untried, is_cut_short)


def excess(outcome: Outcome, bounds: Bounds, *, errors: float = 0, slack: float = 1) -> float:
    """How far it is from the bounds: 1 or less is within all of them, 2 misses one by its double.

    errors: standard errors that recall is credited with; slack: by which times may be too long.
    """
    allowed = max(1 - bounds.target_recall, 1e-6)
    best = max(min(point.recall + errors * point.error, 1.0) for point in outcome.points)
    found = [(1 - best) / allowed]
    if bounds.max_p99_ms is not None:
        found.append(outcome.chosen.latency.p99_ms / (bounds.max_p99_ms * slack))
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


def survivors(outcomes: Sequence[Outcome], bounds: Bounds, rung: int) -> list[Outcome]:
    """Those that go on after a rung, the fastest first; the nearest one where none may."""
    able = [o for o in outcomes if excess(o, bounds, errors=ERRORS, slack=LATENCY_SLACK) <= 1]
    if not able:
        return [min(outcomes, key=lambda outcome: excess(outcome, bounds))]
    most, multiple = KEPT[min(rung, len(KEPT) - 1)]
    ranked = sorted(able, key=lambda outcome: outcome.chosen.latency.p50_ms)
    limit = ranked[0].chosen.latency.p50_ms * multiple
    return [each for each in ranked[:most] if each.chosen.latency.p50_ms <= limit]


def _found(outcomes: list[Outcome], bounds: Bounds, untried: int, is_cut_short: bool) -> Found:
    most = max(outcome.rows for outcome in outcomes)
    # only what was measured over the most rows is chosen: fewer are for leaving out
    able = [o for o in outcomes if o.rows == most and not misses(o, bounds)]
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


def _other_lists(
    kept: Sequence[Configuration], others: Sequence[Configuration]
) -> list[Configuration]:
    """Other numbers of lists of the two fastest kinds that have lists."""
    families = [each.family for each in kept if each.index.nlist is not None][:2]
    return [each for each in others if each.family in families]


def _seconds(configuration: Configuration, rung: Rung, latest: dict[str, Outcome]) -> float:
    """What a trial will take, by those of this kind over fewer rows; 0 where there are none."""
    same = [o for o in latest.values() if o.configuration.family == configuration.family]
    return max((each.seconds * rung.rows / each.rows for each in same), default=0.0)


def _stage(rung: Rung, rungs: Sequence[Rung]) -> str:
    return f"{rung.rows:,} rows ({rung.number + 1} of {len(rungs)})"


def _line(outcome: Outcome) -> str:
    chosen = outcome.chosen
    return (
        f"  {outcome.configuration.name}: recall {chosen.recall:.3f}, p50 "
        f"{chosen.latency.p50_ms:.2f} ms, {outcome.configuration.bytes_per_vector:.0f} bytes"
        f" per vector; {outcome.seconds:.1f} s"
    )
