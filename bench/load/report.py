"""A run's report for people: the steps with floor and bare index beside them, the processes."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

STEP_HEADER = (
    "step",
    "asked/s",
    "queries/s",
    "p50 ms",
    "p90",
    "p99",
    "p99.9",
    "max",
    "recall",
    "coverage min / mean",
    "429",
    "failed",
)
PROCESS_HEADER = ("process", "pid", "cores", "MiB", "most MiB")
NONE = "-"
LEAST_CORES = 0.005  # processes below this and LEAST_MIB are left out of the table, not the JSON
LEAST_MIB = 64.0


def title_of(report: dict[str, Any]) -> str:
    """What was measured, on what."""
    setup = report["setup"]
    params = "".join(f"{name} {set_to}, " for name, set_to in setup["params"].items() if set_to)
    share = report["cache_hit_share"]
    cache = "result cache off"
    if report["status_after"]["cache"] is not None:
        found = "an unknown share" if share is None else f"{share:.1%}"
        cache = f"{found} of the searches answered from the result cache"
    return (
        f"{report['scenario']}: {setup['rows']:,} x {setup['dim']}, {setup['shards']} shards, "
        f"{setup['index']}, {params}k = {setup['k']}, {setup['cores']} cores, "
        f"{setup['arrivals']} arrivals; queries: {setup['queries']}; {cache}"
    )


def step_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows for STEP_HEADER: every step, floors among them, then the bare index."""
    rows = [_figures_row(_label(step), step["figures"], step["recall"]) for step in report["steps"]]
    for bare in report["bare"]:
        label = f"bare index, {bare['batch']} at a time, threads: {bare['threads']}"
        times = (_ms(bare["p50_ms"]), NONE, _ms(bare["p99_ms"]))
        rows.append((label, NONE, f"{bare['qps']:,.0f}", *times, *[NONE] * 6))
    return rows


def process_rows(step: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows for PROCESS_HEADER of one step, busiest first."""
    return [
        (
            each["role"],
            str(each["pid"]),
            f"{each['cores']:.2f}",
            f"{each['memory_mib']:.0f}",
            f"{each['memory_max_mib']:.0f}",
        )
        for each in step["processes"]
        if each["cores"] >= LEAST_CORES or each["memory_max_mib"] >= LEAST_MIB
    ]


def remarks(report: dict[str, Any]) -> list[str]:
    """Everything that a reader of the table must know besides: knee, clients, faults, errors."""
    lines = []
    if report["scenario"] == "sweep":
        knee = report["knee"]
        lines.append(f"knee: {knee:.0f} requests/s" if knee else "no rate was held, so no knee")
    if report["scenario"] == "capacity" and all(s["tool"] != "wrk" for s in report["steps"]):
        lines.append("wrk is not installed: our own client took CPU that the endpoint could use")
    for step in report["steps"]:
        label, found = step["step"]["label"], step["figures"]
        client = step["client"]
        if client is not None and client["bottleneck"]:
            lines.append(f"{label}: CLIENT-BOUND: {client['bottleneck']}")
        if step["repeats"] > 1:
            lines.append(f"{label}: each query was asked {step['repeats']:g} times on average")
        if found["failures"]:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in found["failures"].items())
            lines.append(f"{label}: failed: {kinds}")
        if found["partial"]:
            lines.append(f"{label}: {found['partial']} partial answers of {found['answered']}")
        if step["writes"] is not None:
            lines += _write_lines(label, step["writes"])
        lines += [_recovery_line(each) for each in step["recoveries"]]
        lines += [_surge_line(step, *surge) for surge in step["step"]["surges"]]
    return lines


def _write_lines(label: str, found: dict[str, Any]) -> list[str]:
    """What was written, what of it was missed, and what an attempt ended with."""
    looks = ", ".join(f"after {look['after']} {look['items']}" for look in found["looks"])
    lines = [
        f"{label}: {found['acknowledged_rows']} rows acknowledged, writes p50 "
        f"{found['acknowledged_p50_ms']:.2f} ms; items asked for: {looks}; "
        f"lost: {found['lost']}; deleted and there again: {found['returned']}"
    ]
    failed = found["refused"] | found["unknown"]
    if failed:
        kinds = ", ".join(f"{count} x {code}" for code, count in failed.items())
        lines.append(f"{label}: writes repeated after: {kinds}")
    return lines + [f"{label}: WRITES: {text}" for text in found["violations"]]


def client_line(step: dict[str, Any]) -> str:
    """How the load generator kept up."""
    client = step["client"]
    if client is None:
        return f"client: {step['tool']}"
    return (
        f"client: {client['processes']} processes, at most {client['connections']} connections, "
        f"late by {client['lag_p50_ms']:.2f} ms at p50 and {client['lag_p99_ms']:.2f} at p99, "
        f"{client['cpu_share_max']:.0%} of a core"
    )


def _label(step: dict[str, Any]) -> str:
    label: str = step["step"]["label"]
    return f"{label} (wrk)" if step["tool"] == "wrk" else label


def _figures_row(label: str, found: dict[str, Any], recall: float | None) -> tuple[str, ...]:
    coverage = NONE
    if found["coverage_min"] is not None:
        coverage = f"{found['coverage_min']:.3f} / {found['coverage_mean']:.4f}"
    names: Sequence[str] = ("p50_ms", "p90_ms", "p99_ms", "p99_9_ms", "max_ms")
    return (
        label,
        f"{found['offered_rate']:,.1f}",
        f"{found['qps']:,.1f}",
        *(_ms(found[name]) for name in names),
        NONE if recall is None else f"{recall:.4f}",
        coverage,
        str(found["rejected"]),
        str(found["failed"]),
    )


def _recovery_line(each: dict[str, Any]) -> str:
    head = f"at {each['at_s']:.1f} s {each['label']}"
    if each["first_harm_s"] is None:
        return f"{head}: no request was harmed after it"
    return (
        f"{head}: {each['harmed']} requests harmed, {each['failed']} of them failed, the first "
        f"{each['first_harm_s']:.3f} s after it, the last {each['last_harm_s']:.3f} s"
    )


def _surge_line(step: dict[str, Any], start: float, stop: float, factor: float) -> str:
    """Answers/s before, during and after a surge, in whole bins."""
    seconds = step["step"]["seconds"]
    edges = (0.0, start * seconds, stop * seconds, seconds)
    rates = []
    for begin, end in pairwise(edges):
        inside = [
            b["completed"] for b in step["timeline"] if begin <= b["at_s"] and b["at_s"] < end
        ]
        rates.append(f"{mean(inside):.0f}" if inside else NONE)
    before, during, after = rates
    return f"answers/s: {before} before, {during} at {factor:g} times the rate, {after} after"


def _ms(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"
