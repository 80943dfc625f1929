"""Exports recorded metrics to Ray, which serves them to Prometheus on each node.

Used only by the modules at the edge: the shard actor and the Serve replica.
"""

import logging
import threading
import time
from collections.abc import Callable

from ray.util import metrics as ray_metrics

from shardline.shards.core.metrics import METRICS, SAMPLES_LOST, Kind, Metric, Recorder, Sample

logger = logging.getLogger(__name__)

EXPORT_S = 1.0
PORTION = 32  # samples between two pauses, 0.3 ms: the thread holds the GIL for that long
PAUSE_S = 0.001


class RayExporter:
    """A thread that drains a recorder once a second, until ``stop``."""

    def __init__(self, recorder: Recorder, refresh: Callable[[], None] = lambda: None) -> None:
        """``refresh`` is called before each drain, to set gauges and totals counted elsewhere."""
        self._recorder = recorder
        self._refresh = refresh
        self._targets = {metric: _target(metric) for metric in METRICS}
        self._lost = 0  # samples that were drained, and not taken
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(EXPORT_S):
            try:
                self._export()
            except Exception:  # whatever Ray raises, the export is tried again after a second
                logger.exception("metrics were not exported")

    def _export(self) -> None:
        """Raises whatever Ray raises: what it did not take is counted as lost, the rest waits."""
        self._refresh()
        if self._lost:
            self._hand_over(Sample(SAMPLES_LOST, self._lost, ()))
            self._lost = 0
        for number, sample in enumerate(self._recorder.drain(), start=1):
            try:
                self._hand_over(sample)
            except Exception:
                self._lost += 1  # not by the recorder: another thread adds to its counts
                raise
            if number % PORTION == 0:
                time.sleep(PAUSE_S)

    def _hand_over(self, sample: Sample) -> None:
        target = self._targets[sample.metric]
        tags = dict(zip(sample.metric.labels, sample.labels, strict=True))
        if isinstance(target, ray_metrics.Counter):
            target.inc(sample.value, tags)
        elif isinstance(target, ray_metrics.Gauge):
            target.set(sample.value, tags)
        else:
            target.observe(sample.value, tags)


def _target(
    metric: Metric,
) -> ray_metrics.Counter | ray_metrics.Gauge | ray_metrics.Histogram:
    text = f"{metric.help} Unit: {metric.unit}."
    if metric.kind is Kind.COUNTER:
        return ray_metrics.Counter(metric.name, text, metric.labels)
    if metric.kind is Kind.GAUGE:
        return ray_metrics.Gauge(metric.name, text, metric.labels)
    return ray_metrics.Histogram(metric.name, text, list(metric.buckets), metric.labels)
