"""The tiled loss against whole logits: time, memory above the vectors, and the losses' values.

Whole is what one would write first: a matrix product, masked in place, ``cross_entropy``, autograd.
Its floor in memory is two matrices of logits, which 65,536 rows put at 32 GiB; tiled it is a tile
and the vectors' gradients. Both do the same three matrix products, forward and backward. Every
measurement is a process of its own, its two losses interleaved; memory is the peak
of its resident pages after the vectors were there. Each row's item comes up by Zipf's law, so
copies are masked, and 20 further items of its user are.

    python -m shardline.bench.training.tiled_loss [--threads N] [--json FILE]
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional

from shardline.bench.training.ranks import on_ranks
from shardline.training.config.loss_config import LossConfig
from shardline.training.loss.loss_columns import Ids, Vectors
from shardline.training.loss.losses import step_loss
from shardline.training.loss.memory_bank import LossState

TIMED = ((2048, 64), (2048, 128), (8192, 64), (8192, 128))  # rows, dim; both losses, to compare
LARGE = (65_536, 128)
REPEATS = 7
ITEMS, KNOWN = 40_000, 20  # items of the catalogue, known ones per row
TEMPERATURE = 0.05
WHOLE_LIMIT = 1 << 14  # rows above which whole logits would not fit into 4 GiB


@dataclass(frozen=True, slots=True)
class Case:
    """b rows: unit vectors (b, dim), and ids with pairs to mask, or none."""

    queries: Tensor
    items: Tensor
    temperature: Tensor
    ids: Ids
    config: LossConfig
    state: LossState


def make_case(rows: int, dim: int, *, masks: bool) -> Case:
    """From a fixed seed; every vector a leaf."""
    generator = torch.Generator().manual_seed(rows + dim)
    queries, items = (
        functional.normalize(torch.randn(rows, dim, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    )
    drawn = (ITEMS ** torch.rand(rows, KNOWN + 1, generator=generator)).long() - 1
    known = torch.arange(rows).repeat_interleave(KNOWN), drawn[:, 1:].flatten()
    empty = torch.zeros(rows, 0, dtype=torch.int64)
    ids = Ids(
        users=torch.arange(rows),
        items=drawn[:, 0].contiguous(),
        uniform=empty[0],
        hard=empty,
        random=empty,
        known_rows=known[0],
        known_items=known[1],
    )
    config = LossConfig(mask_duplicates=masks, mask_known_positives=masks)
    state = LossState(config, torch.bincount(drawn[:, 0], minlength=ITEMS), dim)
    temperature = torch.tensor(TEMPERATURE, requires_grad=True)
    return Case(queries, items, temperature, ids, config, state)


def tiled(case: Case) -> Tensor:
    rows, dim = case.queries.shape
    vectors = Vectors(
        queries=case.queries,
        items=case.items,
        uniform=case.items[:0],
        hard=case.items.new_zeros(rows, 0, dim),
        random=case.items.new_zeros(rows, 0, dim),
        temperature=case.temperature,
    )
    return step_loss(case.config, vectors, case.ids, case.state, ITEMS).loss


def whole(case: Case) -> Tensor:
    logits = case.queries @ case.items.T / case.temperature
    logits = logits - case.state.shares.of(case.ids.items).log()
    rows = torch.arange(len(logits))
    if case.config.mask_duplicates:
        hidden = case.ids.items[:, None] == case.ids.items
        known = torch.zeros(len(logits), ITEMS, dtype=torch.bool)
        known[case.ids.known_rows, case.ids.known_items] = True
        known[rows, case.ids.items] = False
        hidden |= known[:, case.ids.items]
        hidden[rows, rows] = False
        logits = logits.masked_fill(hidden, -torch.inf)
    return functional.cross_entropy(logits, rows)


LOSSES: dict[str, Callable[[Case], Tensor]] = {"whole": whole, "tiled": tiled}


def measure_times(rows: int, dim: int, masks: bool) -> list[tuple[float, float]]:
    """(best_ms, cpu_ms) of each loss, interleaved so that neighbours disturb both alike."""
    case = make_case(rows, dim, masks=masks)
    walls: dict[str, list[float]] = {name: [] for name in LOSSES}
    cpu = dict.fromkeys(LOSSES, 0.0)
    for repeat in range(REPEATS + 1):
        for name, loss in LOSSES.items():
            started, spent = time.perf_counter(), time.process_time()
            torch.autograd.backward(loss(case))
            if repeat:  # the first one warms up
                walls[name].append(1000 * (time.perf_counter() - started))
                cpu[name] += 1000 * (time.process_time() - spent) / REPEATS
    return [(min(walls[name]), cpu[name]) for name in LOSSES]


def measure_memory(rows: int, dim: int, masks: bool, name: str) -> tuple[float, float, float]:
    """MiB above the vectors at the peak, the seconds, and the loss, of one step."""
    case = make_case(rows, dim, masks=masks)
    torch.autograd.backward(LOSSES[name](make_case(256, dim, masks=masks)))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = _resident_kib("VmRSS"), time.perf_counter()
    loss = LOSSES[name](case)
    torch.autograd.backward(loss)
    seconds = time.perf_counter() - started
    return (_resident_kib("VmHWM") - before) / 1024, seconds, loss.item()


def compare(rows: int, dim: int, threads: int, *, masks: bool) -> list[dict[str, Any]]:
    """Whole and tiled, or tiled alone where the whole does not fit. best_ms of a step, cpu_ms per
    step on all threads, peak_mib above the vectors; value: the loss itself."""
    fits = rows <= WHOLE_LIMIT
    times = on_ranks(measure_times, 1, rows, dim, masks, threads=threads) if fits else []
    lines = []
    for place, name in enumerate(LOSSES):
        if not fits and name == "whole":
            continue
        peak, seconds, value = on_ranks(measure_memory, 1, rows, dim, masks, name, threads=threads)
        best, cpu = times[place] if fits else (1000 * seconds, float("nan"))
        line = {"rows": rows, "dim": dim, "masks": masks, "loss": name}
        lines.append(line | {"best_ms": best, "cpu_ms": cpu, "peak_mib": peak, "value": value})
    return lines


def _resident_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


@click.command()
@click.option("--threads", default=2, help="Of torch; with 1 cpu ms is work, without waiting.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="File to write.")
def main(threads: int, report: Path | None) -> None:
    """Prints the table as it grows."""
    click.echo(f"torch {torch.__version__}, {threads} threads, best of {REPEATS} steps")
    click.echo("rows    dim  masks  loss   best ms    cpu ms    MiB above vectors  of whole  loss")
    lines: list[dict[str, Any]] = []
    for rows, dim, masks in [
        *((rows, dim, masks) for rows, dim in TIMED for masks in (False, True)),
        (*LARGE, True),
    ]:
        pair = compare(rows, dim, threads, masks=masks)
        for line in pair:
            ratio = f"{line['best_ms'] / pair[0]['best_ms']:.2f}" if len(pair) > 1 else "-"
            click.echo(
                f"{rows:<7} {dim:<4} {'yes' if masks else 'no':<6} {line['loss']:<6} "
                f"{line['best_ms']:<10.1f} {line['cpu_ms']:<9.1f} {line['peak_mib']:<18.0f} "
                f"{ratio:<9} {line['value']:.6f}"
            )
        lines += pair
    if report is not None:
        report.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
