"""Embedding tables with dense and with sparse gradients: time and bytes of a training step.

One table (rows, 64), a global batch of 2048 lookups split over the ranks, popularity of items as
1/rank, and a loss that costs next to nothing: what is left is the lookup, its gradient, the
exchange between ranks and the optimiser, as the training loop does them. Dense: AdamW reads
weight, gradient and two moments and writes three of them, 28 bytes a parameter a step (the floor of
its memory traffic), and a ring all-reduce brings 2 (W - 1) / W tables to every rank. Sparse: both
go with the rows used. Dense is the baseline.

    python -m shardline.bench.training.sparse_gradients [--json FILE]
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shardline.bench.training.ranks import StepTimes, on_ranks, time_steps
from shardline.training import gather
from shardline.training.config.training_config import OptimiserConfig
from shardline.training.loop.optimiser import Optimiser, choose_sparse

Gradients = Literal["dense", "sparse"]

ROWS = (10_000, 70_000, 250_000, 1_000_000)
DIM, BATCH = 64, 2048
WORLDS = (1, 2)
WARM_UP, STEPS = 3, 15
ADAM_BYTES = 28  # a parameter and step: four float32 read, three written


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; received: bytes that come to a rank in a step."""

    rows: int
    ranks: int
    gradients: Gradients
    times: StepTimes
    received: int


class _Lookup(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, DIM)

    def forward(self, rows: Tensor) -> Tensor:
        scores: Tensor = self.table(rows).sum()
        return scores


def measure(rows: int, gradients: Gradients) -> tuple[StepTimes, int]:
    """On every rank: times, and bytes received a step."""
    world = gather.world_size()
    torch.manual_seed(0)
    model = _Lookup(rows)
    config = OptimiserConfig(embedding_gradients=gradients)
    sparse = choose_sparse(model, config, {"table.weight": BATCH})
    optimiser = Optimiser(model, config, sparse=sparse, total_steps=WARM_UP + STEPS)
    wrapped: nn.Module = model
    if world > 1 and not sparse:  # DistributedDataParallel refuses a model it has nothing to do for
        wrapped = DistributedDataParallel(model)
    rng = np.random.default_rng(gather.rank())
    popularity = np.log(rows) * rng.random((WARM_UP + STEPS, BATCH // world))
    lookups = torch.from_numpy(np.exp(popularity).astype(np.int64) - 1)

    def step(number: int) -> None:
        optimiser.zero_grad()
        wrapped(lookups[number]).backward()
        optimiser.step(number, measure=False)

    before = gather.TRAFFIC.received
    times = time_steps(step, warm_up=WARM_UP, steps=STEPS)
    received = (gather.TRAFFIC.received - before) // (WARM_UP + STEPS)
    if not sparse:
        received = 2 * (world - 1) * rows * DIM * 4 // world
    return times, received


@click.command()
@click.option("--json", "report", type=click.Path(path_type=Path), help="File to write.")
def main(report: Path | None) -> None:
    """Prints the table; one thread a rank."""
    lines = []
    click.echo(f"dim {DIM}, global batch {BATCH}, torch {torch.__version__}, one thread a rank")
    click.echo(
        "rows        ranks  gradients  best ms  median ms  cpu ms  MB received  Adam floor MB"
    )
    for rows in ROWS:
        for world in WORLDS:
            for gradients in ("dense", "sparse"):
                times, received = on_ranks(measure, world, rows, gradients)
                row = Row(
                    rows=rows, ranks=world, gradients=gradients, times=times, received=received
                )
                lines.append(row)
                click.echo(
                    f"{rows:<11,} {world:<6} {gradients:<10} {times.best_ms:<8.2f} "
                    f"{times.median_ms:<10.2f} {times.cpu_ms:<7.2f} {received / 1e6:<12.3f} "
                    f"{rows * DIM * ADAM_BYTES / 1e6 if gradients == 'dense' else 0:.1f}"
                )
    if report is not None:
        report.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
