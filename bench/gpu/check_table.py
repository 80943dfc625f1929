"""The table of a check: timings with their floors, memory, checks that failed, what did not run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardline.bench.gpu.floors import GIB
from shardline.bench.gpu.part_outcome import Outcome, Status

FAKE_LINE = "FAKE: nothing of this was measured on a card. Sizes are tiny, times are a CPU's."
TIMINGS = (
    *("part", "what", "rows", "batch", "p50 ms", "p99 ms", "per second", "recall"),
    *("floor ms", "times floor", "bound by"),
)
MEMORY = ("part", "what", "planned GiB", "worst GiB", "used GiB")


def report(setup: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[str]:
    """Lines to print; a run without a card says so in the first."""
    lines = [FAKE_LINE] if setup["fake"] else []
    lines.append(", ".join(f"{name} {value}" for name, value in setup.items()))
    lines += [
        f"copy {notes['copy_gb_per_s']} GB/s (read and written), matrix products bf16 "
        f"{notes['bf16_tflop_per_s']}, fp16 {notes['fp16_tflop_per_s']}, fp32 "
        f"{notes['fp32_tflop_per_s']} TFLOP/s"
        for notes in (dict(outcome.notes) for outcome in outcomes)
        if "copy_gb_per_s" in notes
    ]
    lines += ["", *aligned([TIMINGS, *_timings(outcomes)])]
    lines += ["", *aligned([MEMORY, *_memory(outcomes)])]
    checks = [(outcome.part, check) for outcome in outcomes for check in outcome.checks]
    wrong = [(part, check) for part, check in checks if not check.passed]
    lines += ["", f"checks: {len(checks) - len(wrong)} of {len(checks)} as expected"]
    lines += [
        f"  {part}: {check.name}: expected {check.expected}, got {check.got}"
        for part, check in wrong
    ]
    left_out = [outcome for outcome in outcomes if outcome.status is not Status.RAN]
    lines += [f"{outcome.status}: {outcome.part}: {outcome.reason}" for outcome in left_out]
    return lines


def _timings(outcomes: Iterable[Outcome]) -> list[tuple[str, ...]]:
    return [
        (
            outcome.part,
            each.what,
            f"{each.rows:,}",
            f"{each.batch}",
            f"{each.p50_ms:.3f}",
            "" if each.p99_ms is None else f"{each.p99_ms:.3f}",
            f"{each.qps:,.0f}",
            "" if each.recall is None else f"{each.recall:.4f}",
            f"{each.floor_ms:.3f}",
            f"{each.times_floor:.2f}",
            each.bound_by,
        )
        for outcome in outcomes
        for each in outcome.timings
    ]


def _memory(outcomes: Iterable[Outcome]) -> list[tuple[str, ...]]:
    return [
        (
            outcome.part,
            each.what,
            f"{each.planned / GIB:.3f}",
            f"{each.worst / GIB:.3f}",
            f"{each.used / GIB:.3f}",
        )
        for outcome in outcomes
        for each in outcome.memory
    ]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of equal columns."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
