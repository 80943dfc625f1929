"""What a halving found, for people and programs: the Pareto front, the chosen section, the error.

A point is on the front if no other is better in recall, time and bytes per vector at once.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import yaml

from shardline.cluster.tuner.corpus_sample import CorpusSample
from shardline.cluster.tuner.halving import Bounds, Found, misses
from shardline.cluster.tuner.outcome import Outcome, Point
from shardline.shards.core.errors import InvalidInput
from shardline.shards.index.spec import MEASURED_K, IndexSpec

LEAST_SHOWN = 0.5  # recall: what finds less than half is no use
OVERLAP_MARGIN = 0.005  # a build measures with fewer queries, and must choose the same parameters
HEADER = (
    "index",
    "search",
    "recall",
    "p50 ms",
    "p99 ms",
    "bytes per vector",
    "build s",
    "measured over rows",
)
BUILD_FIELDS = ("nlist", "m", "hnsw_m", "ef_construction", "rerank", "pca")

Entry = tuple[Outcome, Point]


def front(found: Found) -> list[Entry]:
    """The Pareto front, the highest recall first. Of what was measured over part of the rows only
    the chosen point counts, whose time is known best.

    What was chosen is always there: it was timed anew, beside other finalists only, and a point
    that was timed once may seem to be better.
    """
    entries = [
        (outcome, point)
        for outcome in found.outcomes
        for point in (outcome.points if outcome.is_last else (outcome.chosen,))
        if point.recall >= LEAST_SHOWN or _is_chosen(found, outcome, point)
    ]
    entries.sort(key=lambda entry: (-entry[1].recall, *_costs(entry)))
    return [
        each
        for each in entries
        if _is_chosen(found, *each) or not any(_beats(other, each) for other in entries)
    ]


def table_rows(entries: Sequence[Entry], found: Found, shard_rows: int) -> list[tuple[str, ...]]:
    """Rows for HEADER; a star is before what was chosen, ~ before what was extrapolated."""
    rows: list[tuple[str, ...]] = []
    for outcome, point in entries:
        is_chosen = _is_chosen(found, outcome, point)
        about = "" if outcome.growth == 1.0 else "~"
        rows.append(
            (
                ("* " if is_chosen else "") + outcome.configuration.name,
                _knobs(point),
                f"{point.recall:.3f}",
                f"{about}{point.latency.p50_ms:.3f}",
                f"{about}{point.latency.p99_ms:.3f}",
                f"{outcome.configuration.bytes_per_vector:.0f}",
                f"{outcome.build_seconds:.1f}",
                f"{outcome.rows:,} of {shard_rows:,}",
            )
        )
    return rows


def section(outcome: Outcome, bounds: Bounds, *, by_interactions: bool, gpu: bool) -> str:
    """The ``index:`` section of a configuration file that builds this.

    by_interactions: the target is on held-out items; a build then chooses its search parameters by
    the overlap with the exact neighbours that goes with it. gpu: there is one, which is not for
    this index.
    """
    spec = outcome.configuration.spec
    chosen: dict[str, Any] = {"kind": str(spec.kind)}
    for name in BUILD_FIELDS:
        value = getattr(spec, name)
        if value is not None:
            chosen[name] = value if isinstance(value, int) else str(value)
    target = bounds.target_recall
    if by_interactions:
        least = math.floor((outcome.chosen.overlap - OVERLAP_MARGIN) * 1000) / 1000
        target = min(max(least, 0.001), 1.0)
    chosen["target_recall"] = target
    if gpu:
        chosen["device"] = "cpu"
    IndexSpec(**chosen)  # what is written can be read
    return yaml.safe_dump({"index": chosen}, sort_keys=False)


def failure(found: Found, bounds: Bounds) -> InvalidInput:
    """That nothing meets the bounds: what comes nearest, and which bounds it misses."""
    nearest = found.nearest
    missed = misses(nearest, bounds) or [f"it was tried over {nearest.rows:,} rows only"]
    return InvalidInput(
        "no configuration meets the bounds",
        expected=describe_bounds(bounds),
        got=f"nearest is {nearest.configuration.name}, {_knobs(nearest.chosen)}: "
        + " and ".join(missed),
        hint="loosen that bound" + (", or give more time" if found.is_cut_short else ""),
    )


def describe_bounds(bounds: Bounds) -> str:
    parts = [f"recall@{MEASURED_K} >= {bounds.target_recall:g}"]
    if bounds.max_p99_ms is not None:
        parts.append(f"p99 <= {bounds.max_p99_ms:g} ms")
    if bounds.max_bytes_per_vector is not None:
        parts.append(f"<= {bounds.max_bytes_per_vector:g} bytes per vector")
    return ", ".join(parts)


def as_json(sample: CorpusSample, bounds: Bounds, found: Found, seconds: float) -> dict[str, Any]:
    """All figures: the set-up, every configuration's points, the front, and what was chosen."""
    return {
        "setup": {
            "rows": sample.rows,
            "dim": sample.dim,
            "metric": str(sample.metric),
            "shards": sample.shards,
            "shard_rows": sample.shard_rows,
            "sample_rows": len(sample.vectors),
            "queries": len(sample.queries),
            "query_source": sample.query_source,
            "held_out": None if sample.held_out is None else len(sample.held_out.items),
            "k": MEASURED_K,
        },
        "bounds": asdict(bounds),
        "seconds": round(seconds, 2),
        "untried": found.untried,
        "is_cut_short": found.is_cut_short,
        "chosen": None if found.chosen is None else found.chosen.configuration.name,
        "configurations": [_outcome(outcome) for outcome in found.outcomes],
        "front": [
            {"name": outcome.configuration.name} | _point(point) for outcome, point in front(found)
        ],
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.configuration.name,
        "kind": str(outcome.configuration.spec.kind),
        "factory": outcome.configuration.index.factory,
        "rows": outcome.rows,
        "is_last": outcome.is_last,
        "growth": round(outcome.growth, 3),
        "bytes_per_vector": round(outcome.configuration.bytes_per_vector, 1),
        "build_seconds": round(outcome.build_seconds, 2),
        "seconds": round(outcome.seconds, 2),
        "chosen": _point(outcome.chosen),
        "points": [_point(point) for point in outcome.points],
    }


def _point(point: Point) -> dict[str, Any]:
    return {
        "params": {name: value for name, value in asdict(point.params).items() if value},
        "recall": round(point.recall, 4),
        "error": round(point.error, 4),
        "overlap": round(point.overlap, 4),
        "p50_ms": round(point.latency.p50_ms, 4),
        "p99_ms": round(point.latency.p99_ms, 4),
    }


def _knobs(point: Point) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(point.params).items() if value)


def _is_chosen(found: Found, outcome: Outcome, point: Point) -> bool:
    return outcome is found.chosen and point == outcome.chosen


def _costs(entry: Entry) -> tuple[float, float]:
    outcome, point = entry
    return point.latency.p50_ms, outcome.configuration.bytes_per_vector


def _beats(one: Entry, other: Entry) -> bool:
    """Whether it is as good in everything, and better in something."""
    mine, theirs = (-one[1].recall, *_costs(one)), (-other[1].recall, *_costs(other))
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))
