"""Tuning: what is tried, what goes out when, what is reported."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import yaml

from shardline.bench.vectors import manifold
from shardline.cluster.tuner.configurations import (
    Configuration,
    configurations,
    nearest_divisor,
    within_bytes,
)
from shardline.cluster.tuner.halving import WIDTHS, Bounds, excess, halve, misses
from shardline.cluster.tuner.outcome import Outcome, Point, Rung
from shardline.cluster.tuner.timing import Latency
from shardline.cluster.tuner.trial import Trial
from shardline.cluster.tuner.tuning_report import failure, front, section, table_rows
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Metric
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexKind, IndexSpec
from tests.engine import build_main
from tests.tuner_samples import DIM


@pytest.mark.parametrize(("rows", "dim"), [(1_000_000, 128), (60_000, 784), (2000, 12), (1500, 7)])
def test_every_configuration_can_be_built_and_has_its_own_name(rows: int, dim: int) -> None:
    found = configurations(rows=rows, dim=dim, metric=Metric.COSINE)
    assert len({each.name for each in found}) == len(found)
    assert {each.spec.kind for each in found} == {
        *("flat", "ivf", "hnsw", "pq", "ivfpq", "ivfpq-fs", "sq8")
    }
    for each in found:
        assert each.index == resolve(each.spec, rows=rows, dim=dim, metric=Metric.COSINE)
        assert each.index.device == "cpu"
        is_scaled = each.index.nlist not in (None, _own_lists(rows, dim))
        is_large = each.spec.rerank == "fp32" or each.spec.ef_construction == 200
        assert each.variations == is_scaled + is_large
    assert any(each.spec.pca for each in found) == (dim == 784)


def _own_lists(rows: int, dim: int) -> int | None:
    return resolve(IndexSpec(kind="ivf"), rows=rows, dim=dim, metric=Metric.COSINE).nlist


@pytest.mark.parametrize("dim", [1, 2, 7, 12, 64, 97, 100, 128, 784])
@pytest.mark.parametrize("share", [1 / 2, 1 / 4, 1 / 8])
def test_the_nearest_divisor_against_all_divisors(dim: int, share: float) -> None:
    chosen = nearest_divisor(dim, share)
    assert dim % chosen == 0
    far = {each: abs(np.log(each / max(dim * share, 1))) for each in range(1, dim + 1)}
    assert far[chosen] <= min(far[each] for each in far if dim % each == 0) + 1e-9


def test_bytes_are_those_of_the_built_index() -> None:
    vectors = manifold(2000, DIM, 6, seed=1)
    for each in configurations(rows=2000, dim=DIM, metric=Metric.COSINE):
        fields = each.spec.model_dump(exclude_none=True, exclude_defaults=True)
        main = build_main(vectors, **fields)
        if each.spec.kind is IndexKind.HNSW:  # its links are drawn at random
            assert main.bytes_per_vector == pytest.approx(each.bytes_per_vector, rel=0.05)
        else:
            assert main.bytes_per_vector == each.bytes_per_vector, each.name


def test_a_bound_on_bytes_needs_no_build_and_names_the_smallest() -> None:
    tried = configurations(rows=100_000, dim=128, metric=Metric.COSINE)
    assert within_bytes(tried, None) == tried
    fitting = within_bytes(tried, 120)
    assert fitting == [each for each in tried if each.bytes_per_vector <= 120]
    assert 0 < len(fitting) < len(tried)
    least = min(each.bytes_per_vector for each in tried)
    with pytest.raises(InvalidInput, match=rf"max-bytes-per-vector: .*expected >= {least:.0f}, "):
        within_bytes(tried, least - 1)


def test_kinds_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"--kind: no index of these kinds .*got pq"):
        configurations(rows=200, dim=8, metric=Metric.L2, kinds=[IndexKind.PQ])


class FakeTrials:
    """Configurations with known recall, times and seconds."""

    def __init__(self, truth: dict[str, tuple[float, float]], rungs: list[Rung]) -> None:
        self.truth, self.rungs = truth, rungs
        self.at_last: dict[str, tuple[float, float]] = {}  # what is otherwise over all rows
        self.ran: list[tuple[str, int]] = []
        self.now = 0.0

    def run(self, configuration: Configuration, rung: Rung, target: float) -> Trial:
        self.ran.append((configuration.name, rung.number))
        self.now += rung.rows / 1000
        recall, p50 = self.truth.get(configuration.name, (0.99, 50.0))
        if rung.is_last:
            recall, p50 = self.at_last.get(configuration.name, (recall, p50))
        point = Point(
            params=SearchParams(),
            recall=recall,
            error=0.0,
            overlap=recall,
            latency=Latency(p50_ms=p50, p99_ms=2 * p50),
        )
        outcome = Outcome(
            configuration=configuration,
            rows=rung.rows,
            is_last=rung.is_last,
            points=(point,),
            chosen=point,
            growth=1.0,
            build_seconds=1.0,
            seconds=rung.rows / 1000,
        )
        return Trial(outcome, None)  # type: ignore[arg-type]  # nothing is asked

    def compare(self, trials: Sequence[Trial]) -> list[Outcome]:
        return [trial.outcome for trial in trials]


TRIED = configurations(rows=160_000, dim=32, metric=Metric.COSINE)
NAMES = [each.name for each in TRIED]
RUNGS = [
    Rung(number=number, rows=rows, asked=100, counted=100, is_last=number == 2)
    for number, rows in enumerate((2500, 10_000, 40_000))
]


def halved(truth: dict[str, tuple[float, float]], bounds: Bounds, **options: object):
    fake = FakeTrials(truth, RUNGS)
    return halve(TRIED, fake, bounds, clock=lambda: fake.now, **options), fake


def by_rung(fake: FakeTrials) -> list[list[str]]:
    return [[name for name, number in fake.ran if number == rung.number] for rung in RUNGS]


def test_the_best_survives_and_few_are_built_over_all_rows() -> None:
    best = next(each for each in TRIED if each.spec.kind == "ivfpq" and not each.variations)
    found, fake = halved({best.name: (0.985, 0.1)}, Bounds(target_recall=0.98))
    assert found.chosen is not None and found.chosen.configuration is best
    assert found.chosen.rows == RUNGS[-1].rows
    first, second, last = by_rung(fake)
    own = [each.name for each in TRIED if not each.variations]
    assert first[: len(own)] == own and len(first) < len(TRIED)
    assert (second, last) == ([best.name], [best.name]), "all others are 500 times as slow"
    assert found.untried == 0 and not found.is_cut_short


def test_a_rung_ends_with_enough_or_with_one_that_is_estimated_far_above() -> None:
    plain = {"ivfpq-fs": "fp16", "ivfpq": "none", "pq": "none"}
    own = [e for e in TRIED if not e.variations and e.spec.rerank == plain.get(e.spec.kind)]
    truth = {each.name: (0.99, 1 + 0.1 * place) for place, each in enumerate(own)}
    found, fake = halved(truth, Bounds(target_recall=0.98))
    assert found.chosen is not None and found.chosen.configuration is own[0]
    _, second, last = by_rung(fake)
    assert second == [each.name for each in own[: WIDTHS[0][0]]]
    assert last == [each.name for each in own[:3]], "the fourth is 1.3 times as slow"


def test_an_estimate_that_was_too_good_costs_a_trial_and_not_the_result() -> None:
    """A graph, say, that is fast over few rows, and over all of them misses the target."""
    graph = next(each for each in TRIED if each.spec.kind == "hnsw")
    right = next(each for each in TRIED if each.spec.kind == "ivf" and not each.variations)
    graphs = [each.name for each in TRIED if each.spec.kind == "hnsw"]
    fake = FakeTrials(dict.fromkeys(graphs, (0.999, 0.01)) | {right.name: (0.99, 0.2)}, RUNGS)
    fake.at_last = dict.fromkeys(graphs, (0.9, 8.0))
    found = halve(TRIED, fake, Bounds(target_recall=0.98), clock=lambda: fake.now)
    assert found.chosen is not None and found.chosen.configuration is right
    assert by_rung(fake)[2] == [graph.name, right.name], "one graph is enough to know"


def test_a_rung_goes_on_until_something_is_within_the_bounds() -> None:
    """However many fast ones have just missed the target over all rows."""
    flat = next(each for each in TRIED if each.spec.kind == "flat")
    fake = FakeTrials(dict.fromkeys(NAMES, (0.99, 1.0)) | {flat.name: (1.0, 80.0)}, RUNGS)
    fake.at_last = dict.fromkeys(NAMES, (0.975, 1.0)) | {flat.name: (1.0, 80.0)}
    found = halve(TRIED, fake, Bounds(target_recall=0.98), clock=lambda: fake.now)
    assert found.chosen is not None and found.chosen.configuration is flat
    assert len(by_rung(fake)[2]) > WIDTHS[1][1]


def test_only_what_was_timed_in_the_same_rounds_is_chosen() -> None:
    class Retimed(FakeTrials):
        def compare(self, trials: Sequence[Trial]) -> list[Outcome]:
            return [trial.outcome.scaled(2.0) for trial in trials]

    first, second, third = (each for each in TRIED if each.spec.kind == "ivf")
    truth = {first.name: (0.99, 1.0), second.name: (0.99, 1.1), third.name: (0.99, 1.15)}
    fake = Retimed(truth, RUNGS)
    found = halve(TRIED, fake, Bounds(target_recall=0.98), clock=lambda: fake.now)
    assert (third.name, 2) in fake.ran, "it is in the last rung"
    assert found.chosen is not None and found.chosen.configuration is first
    assert found.chosen.chosen.latency.p50_ms == 2.0


def test_variations_are_tried_where_the_kind_is_fast() -> None:
    best = next(each for each in TRIED if each.spec.kind == "ivf" and each.variations)
    own = next(each for each in TRIED if each.family == best.family and not each.variations)
    truth = {best.name: (0.99, 0.1), own.name: (0.99, 0.2)}
    others = [
        next(e.family for e in TRIED if e.spec.kind == kind) for kind in ("ivfpq-fs", "ivfpq")
    ]
    found, fake = halved(truth, Bounds(target_recall=0.98))
    assert found.chosen is not None and found.chosen.configuration is best
    varied = {name for name, _ in fake.ran} & {each.name for each in TRIED if each.variations}
    assert varied == {
        each.name for each in TRIED if each.variations == 1 and each.family in (own.family, *others)
    }


def test_what_misses_a_bound_at_any_depth_goes_out_first() -> None:
    fast, right, big, *_ = (each for each in TRIED if not each.variations)
    truth = {fast.name: (0.9, 0.01), right.name: (0.981, 1.0), big.name: (0.99, 3.0)}
    found, fake = halved(truth, Bounds(target_recall=0.98, max_p99_ms=2.5))
    assert found.chosen is not None and found.chosen.configuration is right
    assert (fast.name, 1) not in fake.ran and (big.name, 1) not in fake.ran


def test_what_nearly_reaches_the_target_over_few_rows_goes_on() -> None:
    """Rough training costs recall, and a standard error is not nothing."""
    near, far, *_ = (each for each in TRIED if each.spec.kind == "ivfpq" and not each.variations)
    truth = {near.name: (0.971, 0.1), far.name: (0.969, 0.1)}
    _, fake = halved(truth, Bounds(target_recall=0.98))
    assert (near.name, 1) in fake.ran and (far.name, 1) not in fake.ran


def test_larger_copies_go_on_only_if_they_gain_something() -> None:
    plain, copies = (
        next(e for e in TRIED if e.spec.kind == "ivfpq" and e.spec.rerank == rerank)
        for rerank in ("none", "fp16")
    )
    bounds = Bounds(target_recall=0.98)
    alike = {plain.name: (0.985, 1.0), copies.name: (0.999, 1.0)}
    faster = {plain.name: (0.985, 1.0), copies.name: (0.999, 0.8)}
    better = {plain.name: (0.975, 1.0), copies.name: (0.985, 1.0)}
    for truth, goes_on in ((alike, False), (faster, True), (better, True)):
        _, fake = halved(truth, bounds)
        assert ((copies.name, 1) in fake.ran) == goes_on


def test_of_equal_times_the_smaller_index_is_chosen() -> None:
    pair = [each for each in TRIED if (each.spec.kind, each.spec.m) == ("ivfpq", 16)]
    small, large = (
        next(each for each in pair if not each.variations and each.spec.rerank == rerank)
        for rerank in ("none", "fp16")
    )
    assert small.bytes_per_vector < large.bytes_per_vector
    truth = {small.name: (0.99, 1.01), large.name: (0.99, 1.0)}
    found, _ = halved(truth, Bounds(target_recall=0.98))
    assert found.chosen is not None and found.chosen.configuration is small


def test_when_nothing_meets_the_bounds_the_nearest_and_what_it_misses_are_named() -> None:
    near = next(each for each in TRIED if each.spec.kind == "hnsw")
    truth = dict.fromkeys(NAMES, (0.5, 1.0)) | {near.name: (0.96, 4.0)}
    bounds = Bounds(target_recall=0.98, max_p99_ms=5)
    found, _ = halved(truth, bounds)
    assert found.chosen is None
    assert found.nearest.configuration is near and found.nearest.is_last
    error = failure(found, bounds)
    assert "recall@100 >= 0.98, p99 <= 5 ms" in str(error)
    assert f"nearest is {near.name}" in str(error)
    assert "recall 0.960 is below 0.98 and p99 8.00 ms is above 5" in str(error)


def test_the_time_limit_begins_nothing_that_would_end_too_late() -> None:
    best = next(each for each in TRIED if not each.variations)
    truth = {best.name: (0.99, 0.1)}
    _, whole = halved(truth, Bounds(target_recall=0.98))
    first = len(by_rung(whole)[0]) * RUNGS[0].rows / 1000
    found, fake = halved(truth, Bounds(target_recall=0.98), time_limit_s=first + 15.0)
    assert found.is_cut_short and fake.now <= first + 15.0 < whole.now
    assert found.chosen is not None and found.chosen.rows == RUNGS[1].rows
    fake = FakeTrials(truth, RUNGS)
    fake.at_last = {best.name: (0.9, 0.1)}
    limit = first + 60.0  # for a single one over all rows
    found = halve(
        TRIED, fake, Bounds(target_recall=0.98), clock=lambda: fake.now, time_limit_s=limit
    )
    assert found.is_cut_short and by_rung(fake)[2] == [best.name]
    assert found.chosen is not None and found.chosen.rows == RUNGS[0].rows, "the best of the others"
    found, fake = halved(truth, Bounds(target_recall=0.98), time_limit_s=3.0)
    assert found.is_cut_short and found.untried > 0
    with pytest.raises(InvalidInput, match="--time-limit-s: too short for a single trial"):
        halve(
            TRIED,
            fake,
            Bounds(target_recall=0.98),
            clock=itertools.count(0, 9).__next__,
            time_limit_s=1,
        )


def test_excess_is_one_at_the_bounds() -> None:
    found, _ = halved({NAMES[0]: (0.98, 1.0)}, Bounds(target_recall=0.98))
    (outcome,) = (o for o in found.outcomes if o.configuration.name == NAMES[0])
    bounds = Bounds(
        target_recall=0.98,
        max_p99_ms=2.0,
        max_bytes_per_vector=outcome.configuration.bytes_per_vector,
    )
    assert excess(outcome, bounds) == pytest.approx(1)
    assert misses(outcome, bounds) == []
    assert excess(outcome, replace(bounds, max_p99_ms=1.0)) == pytest.approx(2)
    assert excess(outcome, replace(bounds, target_recall=0.99)) == pytest.approx(2)


def test_the_front_against_all_pairs() -> None:
    rng = np.random.default_rng(3)
    truth = {name: (float(rng.uniform(0.6, 1)), float(rng.uniform(0.1, 2))) for name in NAMES}
    found, _ = halved(truth, Bounds(target_recall=0.7))
    entries = [(o, o.chosen) for o in found.outcomes]

    def figures(entry: tuple[Outcome, Point]) -> tuple[float, float, float]:
        outcome, point = entry
        return -point.recall, point.latency.p50_ms, outcome.configuration.bytes_per_vector

    expected = {
        outcome.configuration.name
        for outcome, point in entries
        if not any(
            figures(other) != figures((outcome, point))
            and all(a <= b for a, b in zip(figures(other), figures((outcome, point)), strict=True))
            for other in entries
        )
    }
    shown = front(found)
    assert {outcome.configuration.name for outcome, _ in shown} == expected
    recalls = [point.recall for _, point in shown]
    assert recalls == sorted(recalls, reverse=True)


def test_the_choice_is_shown_though_another_point_seems_better() -> None:
    found, _ = halved({NAMES[0]: (0.98, 1.0), NAMES[1]: (0.99, 1.2)}, Bounds(target_recall=0.97))
    chosen = found.chosen
    assert chosen is not None
    other = next(o for o in found.outcomes if o is not chosen)
    better = replace(chosen.chosen, recall=1.0, latency=chosen.chosen.latency.scaled(0.5))
    smaller = replace(chosen, points=(better,), chosen=better)
    outcomes = (chosen, *(smaller if o is other else o for o in found.outcomes if o is not chosen))
    shown = front(replace(found, outcomes=outcomes))
    assert (chosen, chosen.chosen) in shown and (smaller, better) in shown
    stars = [row for row in table_rows(shown, found, 1000) if row[0].startswith("* ")]
    assert [row[0] for row in stars] == [f"* {chosen.configuration.name}"]


def test_the_section_is_what_was_measured() -> None:
    found, _ = halved({NAMES[0]: (0.99, 0.1)}, Bounds(target_recall=0.98))
    assert found.chosen is not None
    bounds = Bounds(target_recall=0.98)
    text = section(found.chosen, bounds, by_interactions=False, gpu=False)
    spec = IndexSpec(**yaml.safe_load(text)["index"])
    own = found.chosen.configuration.spec
    assert spec == own.model_copy(update={"device": "auto", "target_recall": 0.98})
    text = section(found.chosen, bounds, by_interactions=True, gpu=True)
    fields = yaml.safe_load(text)["index"]
    assert (fields["target_recall"], fields["device"]) == (0.985, "cpu")
