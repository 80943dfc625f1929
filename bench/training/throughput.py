"""Training throughput: examples/s of the loop's own step, with one rank and two, and its floor.

The floor of a step is what its arithmetic and its memory traffic cost at the speeds that this
machine shows in the same run: a product of matrices as large as the towers' for flops, a copy for
bytes. Counted are the towers' and the loss's products, forward and backward (three times forward),
the input rows of items and histories (read, and their gradient written and added), the two
exponentials' worth of logits, and the optimiser's 28 bytes per dense parameter. Not counted:
everything that a perfect program could fuse away. Share of the floor is floor / measured.

    python -m shardline.bench.training.throughput --data FOLDER [--json FILE]
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from shardline.bench.training.ranks import StepTimes, on_ranks, time_steps
from shardline.training import gather
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import open_dataset
from shardline.training.features.fitted import fit
from shardline.training.features.infer import infer_config
from shardline.training.features.prepared import prepare
from shardline.training.loop.batches import Sampler
from shardline.training.loop.row_adam import tables
from shardline.training.loop.trainer import build_trainer
from shardline.training.model.checkpoint import CACHE, Run, open_data, open_run, start_run
from shardline.training.model.towers import TwoTower, build_model

BATCH = 2048
WARM_UP, STEPS = 3, 20
WORLDS = ((1, 1), (1, 2), (2, 1))  # ranks, threads per rank
DENSE_BYTES = 28  # a parameter and step of AdamW: four float32 read, three written
GATHERED_BYTES = 3  # times an input row: read, its gradient written, and added to the table's
PRODUCT, COPY_BYTES, REPEATS = 512, 1 << 26, 40  # many, to catch one that nobody disturbs


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What one rank of this setup gets, both ranks measuring at once."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One rank's share of a step."""

    machine: Machine
    times: StepTimes
    sampling_ms: float  # of it, drawing the batch and reading its rows
    flops: float
    bytes: float
    received: int  # bytes from other ranks, without the dense gradients

    @property
    def floor_ms(self) -> float:
        machine = self.machine
        return 1000 * (self.flops / machine.flops_per_s + self.bytes / machine.bytes_per_s)


def measure(run_folder: str) -> Measured:
    folder = Path(run_folder)
    run = open_run(folder)
    data = open_data(folder)
    sampler = Sampler(
        data=data,
        batch_size=run.config.batch_size,
        rank=gather.rank(),
        world=gather.world_size(),
        seed=run.config.seed,
        unknown_rate=run.config.unknown_rate,
        history_length=run.space.history.max_length if run.space.history else 0,
        loss=run.config.loss,
    )
    machine = measure_machine()
    trainer = build_trainer(folder, run.config, build_model(run.config, run.space), sampler)
    batches = sampler.epoch(0)
    sampled, lookups = 0.0, 0.0

    def step(number: int) -> None:
        nonlocal sampled, lookups
        started = time.perf_counter()
        batch = next(batches)
        sampled += time.perf_counter() - started
        lookups += len(batch.items) + len(batch.history)
        trainer.step(batch, number + 1, measure=False)

    before = gather.TRAFFIC.received
    times = time_steps(step, warm_up=WARM_UP, steps=STEPS)
    done = WARM_UP + STEPS
    local = BATCH // gather.world_size()
    flops, moved = step_costs(trainer.model, local, lookups / done, trainer.optimiser.sparse)
    return Measured(
        machine=machine,
        times=times,
        sampling_ms=1000 * sampled / done,
        flops=flops,
        bytes=moved,
        received=(gather.TRAFFIC.received - before) // done,
    )


def step_costs(
    model: TwoTower, rows: int, lookups: float, sparse: list[str]
) -> tuple[float, float]:
    """Flops and bytes of one rank's step of ``rows`` examples that reads ``lookups`` item rows."""
    weights = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)
    )
    logits = rows * BATCH
    flops = 3 * 2 * (rows * weights + logits * model.dim)
    dense = sum(p.numel() for name, p in model.named_parameters() if name not in sparse)
    moved: float = dense * DENSE_BYTES + 2 * 4 * logits
    moved += GATHERED_BYTES * 4 * lookups * model.item_rows.width
    moved += sum(4 * rows * table.embedding_dim * 7 for name, table in tables(model).items()
                 if name in sparse)  # fmt: skip
    return flops, moved


def measure_machine() -> Machine:
    """Products and copies at the speed this rank gets; a collective in that all do it at once."""
    left, right = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.zeros_like(source)

    def product(number: int) -> None:
        torch.mm(left, right)

    def copy(number: int) -> None:
        target.copy_(source)

    flops = 2 * PRODUCT**3 / time_steps(product, warm_up=2, steps=REPEATS).best_ms * 1000
    moved = 2 * COPY_BYTES / time_steps(copy, warm_up=2, steps=REPEATS).best_ms * 1000
    return Machine(flops_per_s=flops, bytes_per_s=moved)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Data set folder.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="File to write.")
def main(data: Path, report: Path | None) -> None:
    """Prints examples/s beside the floor."""
    dataset = open_dataset(data)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        config = infer_config(TrainingConfig(batch_size=BATCH), dataset)
        folder = Path(temporary)
        space = fit(config, dataset)
        prepare(dataset, space, folder / CACHE)
        start_run(folder, Run(config=config, space=space), {})
        click.echo(f"{dataset.name}, global batch {BATCH}, torch {torch.__version__}")
        click.echo(
            "ranks x threads  examples/s  best ms  median ms  cpu ms  sampling ms  floor ms  "
            "of floor  GFLOP/s  GB/s  KB received"
        )
        for world, threads in WORLDS:
            found = on_ranks(measure, world, str(folder), threads=threads)
            best = found.times.best_ms
            click.echo(
                f"{f'{world} x {threads}':<16} {1000 * BATCH / best:<11,.0f} {best:<8.1f} "
                f"{found.times.median_ms:<10.1f} {found.times.cpu_ms:<7.1f} "
                f"{found.sampling_ms:<12.1f} {found.floor_ms:<9.1f} {found.floor_ms / best:<9.0%} "
                f"{found.machine.flops_per_s / 1e9:<8.1f} {found.machine.bytes_per_s / 1e9:<5.1f} "
                f"{found.received / 1e3:.0f}"
            )
            lines.append({"ranks": world, "threads": threads, "floor_ms": found.floor_ms}
                         | asdict(found))  # fmt: skip
    if report is not None:
        report.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
