"""Figures of a run from its records: latencies, what was refused, what failed, second by second.

All samples are kept and percentiles taken from them, which is exact. An HDR histogram saves
memory by rounding; a minute at a thousand requests/s is half a megabyte of float64.

A percentile p is given only where at least one sample lies beyond it: of 500 samples there is no
p99.9, and ``max_ms`` says what it might have been.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardline.bench.load.load_client import OK, Records
from shardline.shards.core.errors import Unavailable

REJECTED = 429
PERCENTILES = {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "p99_9_ms": 99.9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of the measured time, warm-up left out. Rates are per second; qps counts queries, so a
    request of 64 is 64. Latencies are of answered requests alone, from their intended send time."""

    sent: int
    answered: int
    rejected: int
    failed: int
    failures: dict[str, int]
    offered_rate: float
    goodput: float
    qps: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    p99_9_ms: float | None
    max_ms: float | None
    coverage_min: float | None
    coverage_mean: float | None
    partial: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Second:
    """One bin of the timeline, from at_s on; requests are filed under their intended time, except
    that ``completed`` counts the answers that came in this bin, whenever they were asked for."""

    at_s: float
    sent: int
    answered: int
    completed: int
    rejected: int
    failed: int
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    coverage_min: float | None
    coverage_mean: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What a fault at ``at_s`` cost; seconds after it. None: nothing of the kind was seen.

    harmed: requests that failed, were refused, or saw fewer rows than all.
    """

    at_s: float
    label: str
    harmed: int
    failed: int
    first_harm_s: float | None
    last_harm_s: float | None


def latencies_ms(records: Records) -> NDArray[np.float64]:
    """(n,) float64; NaN for every request that was not answered with 200."""
    times: NDArray[np.float64] = (records.done_s - records.intended_s) * 1e3
    times[records.status != OK] = np.nan
    return times


def figures(records: Records, *, warm_up_s: float, seconds: float, batch: int) -> Figures:
    """Of the requests meant to leave from warm_up_s on, for ``seconds``.

    Goodput counts answers that arrived within that time, whenever they were asked for: beyond the
    knee the two differ, and only the first is what the server holds.
    """
    counted = (records.intended_s >= warm_up_s) & ~_unsent(records)
    times, seen = _seen(records, counted)
    seen |= {name: percentile(times, q) for name, q in PERCENTILES.items()}
    done = records.done_s[records.status == OK]
    within = ((done >= warm_up_s) & (done < warm_up_s + seconds)).sum()
    failures = _failures(records, counted)
    return Figures(
        **seen,
        failures=failures,
        offered_rate=round(float(counted.sum() / seconds), 3),
        goodput=round(float(within / seconds), 3),
        qps=round(float(within / seconds * batch), 3),
        partial=int((records.coverage[counted] < 1).sum()),
    )


def _seen(
    records: Records, counted: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Latencies (answered,) in ms of the requests ``counted``, and the fields that figures and
    bins of a timeline share."""
    times = latencies_ms(records)[counted]
    times = times[~np.isnan(times)]
    coverage = records.coverage[counted & ~np.isnan(records.coverage)]
    return times, {
        "sent": int(counted.sum()),
        "answered": times.size,
        "rejected": int((counted & (records.status == REJECTED)).sum()),
        "failed": int((counted & _failed_mask(records)).sum()),
        "max_ms": _rounded(times.max()) if times.size else None,
        "coverage_min": _rounded(coverage.min(), 6) if coverage.size else None,
        "coverage_mean": _rounded(coverage.mean(), 6) if coverage.size else None,
    }


def percentile(times: NDArray[np.float64], q: float) -> float | None:
    """Milliseconds; None where no sample lies beyond it."""
    if times.size * (100 - q) < 100 - 1e-9:
        return None
    return _rounded(np.percentile(times, q))


def refuse_unanswered(found: Figures, what: str) -> None:
    """Raises Unavailable, with the failures counted, when there is nothing to take figures from."""
    if not found.answered:
        refused = {f"HTTP {REJECTED}": found.rejected} if found.rejected else {}
        kinds = sorted(f"{count} x {kind}" for kind, count in (found.failures | refused).items())
        raise Unavailable(f"{what}: no request was answered", got=", ".join(kinds))


def p50_p99(samples_ms: Sequence[float]) -> dict[str, float]:
    """Milliseconds, ready for JSON."""
    p50, p99 = np.percentile(samples_ms, [50, 99])
    return {"p50": _rounded(p50), "p99": _rounded(p99)}


def timeline(records: Records, *, warm_up_s: float, bin_s: float = 1.0) -> list[Second]:
    """Bins of ``bin_s`` from the end of the warm-up on; an empty one has no latencies."""
    since = records.intended_s - warm_up_s
    counted = (since >= 0) & ~_unsent(records)
    if not counted.any():
        return []
    place = np.floor(since / bin_s).astype(np.int64)
    done = (records.done_s[records.status == OK] - warm_up_s) / bin_s
    bins = []
    for number in range(int(place[counted].max()) + 1):
        times, seen = _seen(records, counted & (place == number))
        bins.append(
            Second(
                **seen,
                at_s=round(number * bin_s, 3),
                completed=int(((done >= number) & (done < number + 1)).sum()),
                p50_ms=_rounded(np.percentile(times, 50)) if times.size else None,
                p99_ms=_rounded(np.percentile(times, 99)) if times.size else None,
            )
        )
    return bins


def recovery(records: Records, *, warm_up_s: float, at_s: float, label: str) -> Recovery:
    """After a fault at ``at_s`` from the end of the warm-up."""
    since = records.intended_s - warm_up_s - at_s
    counted = ~_unsent(records)
    ends = np.where(np.isnan(records.done_s), since, records.done_s - warm_up_s - at_s)
    # asked before the fault and answered after it counts: it may be the first one harmed
    after = counted & (ends >= 0)
    failed = after & _failed_mask(records)
    refused = after & (records.status == REJECTED)
    harmed = failed | refused | (after & (records.coverage < 1))
    moments = np.maximum(since[harmed], 0)
    return Recovery(
        at_s=round(at_s, 3),
        label=label,
        harmed=int(harmed.sum()),
        failed=int(failed.sum()),
        first_harm_s=_rounded(moments.min()) if moments.size else None,
        last_harm_s=_rounded(moments.max()) if moments.size else None,
    )


def _unsent(records: Records) -> NDArray[np.bool_]:
    """Requests of a closed loop that its time did not suffice for; in an open loop none."""
    unsent: NDArray[np.bool_] = np.isnan(records.sent_s)
    unsent[list(records.errors)] = False
    return unsent


def _failed_mask(records: Records) -> NDArray[np.bool_]:
    """No HTTP answer, or one that is neither 200 nor 429."""
    status = records.status
    failed: NDArray[np.bool_] = ~_unsent(records) & (status != OK) & (status != REJECTED)
    return failed


def _failures(records: Records, counted: NDArray[np.bool_]) -> dict[str, int]:
    """How many of each kind, the commonest first."""
    numbers = np.flatnonzero(counted & _failed_mask(records))
    kinds = Counter(
        records.errors.get(number) or f"HTTP {records.status[number]}"
        for number in numbers.tolist()
    )
    return dict(kinds.most_common())


def _rounded(value: Any, digits: int = 3) -> float:
    return round(float(value), digits)
