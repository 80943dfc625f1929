"""Schedules, and figures from records made by hand."""

import numpy as np
import pytest

from shardline.bench.load.load_client import Records
from shardline.bench.load.schedule import Arrivals, offsets
from shardline.bench.load.stats import figures, percentile, recovery, timeline
from shardline.bench.load.wrk import figures_of
from shardline.shards.core.errors import InvalidInput


def times(arrivals: Arrivals, **options: object) -> np.ndarray:
    values = {"rate": 100.0, "warm_up_s": 1.0, "seconds": 20.0} | options
    return offsets(arrivals, rng=np.random.default_rng(3), **values)


def test_constant_arrivals_are_evenly_spaced() -> None:
    found = times(Arrivals.CONSTANT, seconds=2.0)
    np.testing.assert_allclose(found, np.arange(300) / 100)


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    found = times(Arrivals.POISSON, seconds=200.0)
    assert len(found) / 201 == pytest.approx(100, rel=0.03)
    gaps = np.diff(found)
    assert (gaps >= 0).all()
    # exponential gaps: as much deviation as mean, and a share of 1/e above the mean
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert (gaps > gaps.mean()).mean() == pytest.approx(np.exp(-1), abs=0.02)
    np.testing.assert_array_equal(found, times(Arrivals.POISSON, seconds=200.0))


def test_a_surge_multiplies_the_rate_of_its_part_alone() -> None:
    found = times(Arrivals.CONSTANT, seconds=8.0, surges=((0.25, 0.75, 3.0),))
    counts, _ = np.histogram(found, bins=[0, 1, 3, 5, 7, 9])
    np.testing.assert_allclose(counts, [100, 200, 600, 600, 200], atol=2)


@pytest.mark.parametrize(
    ("field", "value"), [("rate", 0.0), ("rate", float("nan")), ("seconds", -1.0)]
)
def test_rates_and_durations_must_be_positive(field: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=field):
        times(Arrivals.CONSTANT, **{field: value})


def test_a_schedule_without_a_counted_request_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no request"):
        times(Arrivals.POISSON, rate=0.001, seconds=0.5)


def records(intended: list[float], **arrays: list[float]) -> Records:
    """Sent in time; latency, status and coverage as given, else 10 ms, 200, 1."""
    made = Records.empty(np.array(intended))
    made.sent_s[:] = made.intended_s
    latency = np.array(arrays.get("latency", [0.01] * len(intended)))
    made.done_s[:] = made.intended_s + latency
    made.status[:] = arrays.get("status", [200] * len(intended))
    made.coverage[:] = arrays.get("coverage", [1.0] * len(intended))
    return made


def test_the_warm_up_is_left_out_and_goodput_counts_answers_within_the_time() -> None:
    made = records([0.5, 1.0, 1.5, 2.0, 2.5], latency=[9.0, 0.1, 0.2, 0.3, 0.6])
    found = figures(made, warm_up_s=1.0, seconds=2.0, batch=8)
    assert (found.sent, found.answered) == (4, 4)
    assert found.offered_rate == 2.0
    assert found.goodput == 1.5, "the last answer came 0.1 s too late, the warm-up's much later"
    assert found.qps == 12.0
    assert found.p50_ms == pytest.approx(250)
    assert found.max_ms == pytest.approx(600)
    assert found.p90_ms is None, "of four samples none lies beyond p90"


def test_failures_by_kind_and_coverage() -> None:
    made = records([1.0] * 6, status=[200, 429, 503, 0, 0, 200], coverage=[0.5, *[np.nan] * 4, 1.0])
    made.done_s[3:5] = np.nan
    made.errors = {1: "HTTP 429 overloaded", 2: "HTTP 503 x", 3: "timeout", 4: "timeout"}
    found = figures(made, warm_up_s=0, seconds=2, batch=1)
    assert (found.answered, found.rejected, found.failed) == (2, 1, 3)
    assert found.failures == {"timeout": 2, "HTTP 503 x": 1}
    assert (found.coverage_min, found.coverage_mean, found.partial) == (0.5, 0.75, 1)


def test_percentiles_are_of_all_samples_and_need_one_beyond_them() -> None:
    samples = np.random.default_rng(0).exponential(10, 1000)
    assert percentile(samples, 99.0) == pytest.approx(np.percentile(samples, 99), abs=1e-3)
    assert percentile(samples, 99.9) is not None
    assert percentile(samples[:999], 99.9) is None
    assert percentile(samples[:2], 50.0) is not None
    assert percentile(samples[:0], 50.0) is None


def test_the_timeline_files_requests_under_their_intended_time() -> None:
    made = records(
        [0.5, 1.1, 1.9, 3.5],
        latency=[0.01, 5.0, 0.02, np.nan],
        status=[200, 200, 200, 0],
        coverage=[1, 0.5, 1, np.nan],
    )
    made.errors = {3: "timeout"}
    bins = timeline(made, warm_up_s=1.0)
    assert [each.at_s for each in bins] == [0.0, 1.0, 2.0]
    assert [each.sent for each in bins] == [2, 0, 1]
    assert [each.failed for each in bins] == [0, 0, 1]
    assert (bins[0].max_ms, bins[0].coverage_min) == (5000.0, 0.5)
    assert bins[1].p50_ms is None and bins[2].p50_ms is None
    assert timeline(made, warm_up_s=9.0) == []


def test_recovery_spans_the_first_to_the_last_request_that_was_harmed() -> None:
    made = records(
        [1.0, 1.9, 2.1, 2.5, 3.0, 4.0],
        latency=[0.01, 0.3, 0.01, 0.01, 0.01, 0.01],
        status=[503, 200, 200, 429, 503, 200],
        coverage=[np.nan, 0.5, 0.5, np.nan, np.nan, 1],
    )
    found = recovery(made, warm_up_s=1.0, at_s=1.0, label="killed")
    assert (found.harmed, found.failed) == (4, 1), "the 503 before the fault is not its doing"
    assert found.first_harm_s == 0, "asked before the fault, answered without the shard after it"
    assert found.last_harm_s == 1.0
    untouched = recovery(made, warm_up_s=1.0, at_s=2.5, label="again")
    assert (untouched.harmed, untouched.first_harm_s) == (0, None)


def test_what_wrk_prints_becomes_figures() -> None:
    found = figures_of([1010, 2.0, 0, 1, 0, 2, 10, 1.5, 2.5, 9.0, 20.0, 30.0])
    assert (found.answered, found.failed, found.goodput) == (1000, 13, 500.0)
    assert found.failures == {"wrk: read": 1, "wrk: timeout": 2, "wrk: status": 10}
    assert (found.p50_ms, found.p99_9_ms, found.max_ms) == (1.5, 20.0, 30.0)
