"""The recorder: what is drained is what was recorded, once; and the table says it all."""

import random
from collections import Counter
from typing import Any

import pytest

from shardline.shards.core.metrics import (
    CACHE_HITS,
    IN_FLIGHT,
    MAX_WAITING,
    METRICS,
    REJECTED,
    REQUEST_MS,
    SAMPLES_LOST,
    Kind,
    Metric,
    Recorder,
    Sample,
)
from shardline.shards.process import ray_metrics as module


def test_counts_come_once_and_add_up_whenever_they_are_drained() -> None:
    rng = random.Random(1)
    recorder, expected, drained = Recorder(), Counter(), Counter()
    for _ in range(500):
        code = rng.choice(["overloaded", "invalid_input"])
        by = rng.randint(1, 3)
        recorder.count(REJECTED, code, by=by)
        expected[code] += by
        if rng.random() < 0.1:
            drained.update({s.labels[0]: s.value for s in recorder.drain()})
    drained.update({s.labels[0]: s.value for s in recorder.drain()})
    assert drained == expected
    assert list(recorder.drain()) == []


def test_a_total_counted_elsewhere_yields_its_growth() -> None:
    recorder = Recorder()
    recorder.total(CACHE_HITS, 5)
    assert list(recorder.drain()) == [Sample(CACHE_HITS, 5, ())]
    recorder.total(CACHE_HITS, 5)
    assert list(recorder.drain()) == []
    recorder.total(CACHE_HITS, 7)
    assert list(recorder.drain()) == [Sample(CACHE_HITS, 2, ())]


def test_observed_values_keep_their_order_and_gauges_come_each_time() -> None:
    recorder = Recorder()
    recorder.observe(REQUEST_MS, 1.5, "vectors")
    recorder.observe(REQUEST_MS, 0.5, "features")
    recorder.set(IN_FLIGHT, 3)
    recorder.set(IN_FLIGHT, 4)
    gauge = Sample(IN_FLIGHT, 4, ())
    assert list(recorder.drain()) == [
        Sample(REQUEST_MS, 1.5, ("vectors",)),
        Sample(REQUEST_MS, 0.5, ("features",)),
        gauge,
    ]
    assert list(recorder.drain()) == [gauge]


def test_what_nobody_exports_is_bounded_and_its_loss_is_counted() -> None:
    recorder = Recorder()
    for number in range(MAX_WAITING + 3):
        recorder.observe(REQUEST_MS, number, "vectors")
    samples = list(recorder.drain())
    assert samples[0] == Sample(SAMPLES_LOST, 3, ())
    assert [samples[1].value, samples[-1].value] == [3, MAX_WAITING + 2]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_described(metric) -> None:
    assert metric.name.startswith("shardline_")
    assert metric.help.endswith(".")
    assert metric.unit
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_names_are_unique() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


class Target:
    """A metric of Ray, which takes values or not."""

    def __init__(self, name: str, *args: object) -> None:
        self.name, self.refuses = name, False
        self.taken: list[float] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        if self.refuses:
            raise RuntimeError("gone")
        self.taken.append(value)

    observe = set = inc


def test_what_ray_does_not_take_is_counted_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(module.ray_metrics, name, type(name, (Target,), {}))
    monkeypatch.setattr(module, "EXPORT_S", 3600.0)  # here, not in its thread
    recorder = Recorder()
    exporter = module.RayExporter(recorder)
    try:
        targets: dict[Metric, Any] = dict(exporter._targets)
        for value in (1, 2, 3):
            recorder.observe(REQUEST_MS, value, "search")
        targets[REQUEST_MS].refuses = True
        for _ in range(2):
            with pytest.raises(RuntimeError, match="gone"):
                exporter._export()
        targets[REQUEST_MS].refuses = False
        exporter._export()
        exporter._export()
    finally:
        exporter.stop()
    assert targets[REQUEST_MS].taken == [3], "the rest has waited"
    assert targets[SAMPLES_LOST].taken == [1, 1]
