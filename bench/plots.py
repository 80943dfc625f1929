"""Figures of reports as PNG files: latency against rate, a timeline, kinds of index side by side.

Drawn without pyplot: no global state, no display.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 120
LINES = (("p50_ms", "p50"), ("p90_ms", "p90"), ("p99_ms", "p99"), ("p99_9_ms", "p99.9"))
BIN_S = 0.5  # of a timeline of all requests
NO_VALUE = float("nan")
Line = tuple[Sequence[float], Sequence[float], str]  # x, y, label
BINS = "steps-post"  # a bin's value holds from its beginning to the next one's


def plot_load(report: dict[str, Any], path: Path) -> None:
    """A timeline where something was done in mid-run; else latency against rate, or batch size."""
    timed = [step for step in report["steps"] if step["marks"] or step["step"]["surges"]]
    figure = Figure(figsize=(9, 7 if timed else 5), layout="constrained")
    if timed:
        _timeline(figure, timed[-1])
    elif len(_searches(report)) > 1:
        _curve(figure, report)
    else:
        _timeline(figure, report["steps"][-1])
    setup = report["setup"]
    figure.suptitle(
        f"{report['scenario']}: {setup['rows']:,} x {setup['dim']}, {setup['shards']} shards, "
        f"{setup['index']}, k = {setup['k']}, {setup['cores']} cores"
    )
    save(figure, path)


def plot_pareto(kinds: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Queries/s, singly, against recall: every setting of every kind, and the frontier."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    everything = []
    for kind in kinds:
        points = sorted((p["recall"], 1e3 / p["ms_per_query"]) for p in kind["points"])
        everything += points
        axes.plot(*zip(*points, strict=True), marker="o", label=kind["kind"])
    front = frontier(everything)
    axes.plot(*zip(*front, strict=True), color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"recall@{kinds[0]['k']}", ylabel="queries/s, one at a time", yscale="log")
    axes.legend(title="dotted: the best of all")
    figure.suptitle(title)
    save(figure, path)


def plot_tuning(report: dict[str, Any], path: Path) -> None:
    """Time of a query and shard against recall: what `shardline tune` measured over most rows as
    lines, what it left out earlier as crosses; the front, the target, and a star for the choice."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for each in report["configurations"]:
        points = each["points"] if each["is_last"] else [each["chosen"]]
        where = sorted((point["recall"], point["p50_ms"]) for point in points)
        marker = "o" if each["is_last"] else "x"
        label = each["name"] if each["is_last"] else None
        axes.plot(*zip(*where, strict=True), marker=marker, label=label, linewidth=1)
        if each["name"] == report["chosen"]:
            best = each["chosen"]
            axes.plot(best["recall"], best["p50_ms"], marker="*", markersize=18, color="red")
    ends = frontier([(each["recall"], 1 / each["p50_ms"]) for each in report["front"]])
    speeds = np.array([speed for _, speed in ends])
    label = "the front" if ends else None
    axes.plot([recall for recall, _ in ends], 1 / speeds, "k:", label=label)
    axes.axvline(report["bounds"]["target_recall"], color="grey", linestyle="--")
    axes.set(xlabel="recall", ylabel="ms per query and shard", yscale="log", xlim=(0.5, 1.005))
    if ends:
        axes.legend(title="over most rows; x: left out earlier", fontsize="small")
    setup = report["setup"]
    figure.suptitle(f"{setup['rows']:,} rows x {setup['dim']}, {setup['shards']} shards")
    save(figure, path)


def plot_changes(
    seen: Sequence[tuple[float, float, int]],
    changes: Sequence[tuple[str, float, float]],
    title: str,
    path: Path,
    *,
    writes: Line | None = None,
) -> None:
    """Latency, and answers per second by generation, over time.

    seen: of each request when it was to be sent (s), what it took (ms), the generation that
    answered, 0 for none. changes: what, from, to (s): shaded. writes: rows per second.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    at, took, generations = (np.array(column) for column in zip(*seen, strict=True))
    edges = np.arange(0, at.max() + BIN_S, BIN_S)
    where = np.digitize(at, edges) - 1
    for percent in (50, 99):
        values = [np.percentile(took[where == each], percent) for each in np.unique(where)]
        top.step(edges[np.unique(where)], values, where="post", label=f"p{percent}")
    for generation in sorted(set(generations.tolist()) - {0}):
        counts = np.bincount(where[generations == generation], minlength=len(edges)) / BIN_S
        bottom.step(edges, counts, where="post", label=f"generation {generation}")
    if writes is not None:
        *line, label = writes
        bottom.step(*line, where="post", label=label, linestyle=":", color="black")
    for axes in (top, bottom):
        for _, start, stop in changes:
            axes.axvspan(start, stop, alpha=0.12, color="black")
    top.legend(loc="upper right")
    bottom.legend(loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1.0), fontsize="small")
    for what, start, _ in changes:
        top.annotate(what, (start, top.get_ylim()[1]), va="top", fontsize=8)
    top.set(ylabel="ms, from the intended time", yscale="log")
    bottom.set(ylabel="answers/s" if writes is None else "answers/s, rows/s", xlabel="s")
    figure.suptitle(title)
    save(figure, path)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (recall, speed) that no other point beats in both, recall ascending."""
    best: list[tuple[float, float]] = []
    for recall, speed in sorted(points, reverse=True):
        if not best or speed > best[-1][1]:
            best.append((recall, speed))
    return best[::-1]


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG."""
    figure.savefig(path, dpi=DPI, format="png")


def _searches(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps without the floors; the first step is one."""
    return [step for step in report["steps"] if step["step"]["ask"] != "empty"]


def _curve(figure: Figure, report: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    searches = _searches(report)
    chosen = [step for step in searches if step["step"]["rate"] is not None] or searches
    by_batch = len({step["step"]["batch"] for step in chosen}) > 1
    where = [
        float(s["step"]["batch"] if by_batch else s["figures"]["offered_rate"]) for s in chosen
    ]
    order = sorted(range(len(chosen)), key=where.__getitem__)
    for name, label in LINES:
        values = [_number(chosen[place]["figures"][name]) for place in order]
        axes.plot([where[place] for place in order], values, marker="o", label=label)
    floor, bare = report["steps"][0]["figures"]["p50_ms"], report["bare"][0]["p50_ms"]
    if floor is not None:
        axes.axhline(floor, color="grey", linestyle="--", label="empty request, p50")
    axes.axhline(bare, color="grey", linestyle=":", label="bare index, p50")
    if report["knee"]:
        axes.axvline(report["knee"], color="red", linewidth=1, label="knee")
    axes.set(
        xlabel="queries per request" if by_batch else "requests/s, offered",
        ylabel="ms from the intended send time",
        yscale="log",
    )
    if by_batch:
        axes.set_xscale("log", base=2)
    axes.legend()


def _timeline(figure: Figure, step: dict[str, Any]) -> None:
    latency, rates, rows = figure.subplots(3, 1, sharex=True)
    bins = step["timeline"]
    at = [each["at_s"] for each in bins]
    for name, label in (("p50_ms", "p50"), ("p99_ms", "p99"), ("max_ms", "max")):
        latency.plot(at, [_number(each[name]) for each in bins], label=label, drawstyle=BINS)
    latency.set(ylabel="ms", yscale="log")
    for name, label in (("completed", "answered"), ("rejected", "429"), ("failed", "failed")):
        rates.plot(at, [each[name] for each in bins], label=label, drawstyle=BINS)
    sent = [each["sent"] for each in bins]
    rates.plot(at, sent, color="grey", linestyle=":", label="asked", drawstyle=BINS)
    written = step.get("writes")
    if written is not None:
        label = f"rows written; {written['lost']} lost"
        rates.plot(*written["timeline"], color="black", linestyle="--", label=label, drawstyle=BINS)
    rates.set(ylabel="requests/s")
    for name, label in (("coverage_mean", "mean"), ("coverage_min", "least")):
        rows.plot(at, [_number(each[name]) for each in bins], label=label, drawstyle=BINS)
    rows.set(ylabel="coverage", xlabel="seconds", ylim=(-0.05, 1.05))
    for axes in (latency, rates, rows):
        _mark(axes, step["marks"], labelled=axes is latency)
        axes.legend(loc="upper right", fontsize="small")


def _mark(axes: Axes, marks: Sequence[dict[str, Any]], *, labelled: bool) -> None:
    for mark in marks:
        axes.axvline(mark["at_s"], color="red", linewidth=1)
        if labelled:
            axes.annotate(
                mark["label"],
                (mark["at_s"], 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, -12),
                textcoords="offset points",
                color="red",
                fontsize="small",
            )


def _number(value: float | None) -> float:
    return NO_VALUE if value is None else value
