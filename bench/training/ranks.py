"""Runs a function on several gloo ranks of this machine, without Ray, and times steps."""

import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Milliseconds per step. best and median are wall time, cpu is of this rank's process alone.

    On a machine with busy neighbours best and cpu say more than the median.
    """

    best_ms: float
    median_ms: float
    cpu_ms: float


def on_ranks(work: Callable[..., Any], world: int, *given: Any, threads: int = 1) -> Any:
    """What ``work(*given)`` returns on rank 0 of ``world``, in processes of ``threads`` threads."""
    multiprocessing.set_forkserver_preload([work.__module__])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        start: Callable[..., object] = start_processes  # torch gives it no types
        start(
            _one_rank, (world, out, threads, work, given), nprocs=world, start_method="forkserver"
        )
        return pickle.loads((out / "result").read_bytes())


def time_steps(step: Callable[[int], None], *, warm_up: int, steps: int) -> StepTimes:
    """Times ``step(number)``; all ranks must call it together."""
    for number in range(warm_up):
        step(number)
    walls, cpu = [], time.process_time()
    for number in range(warm_up, warm_up + steps):
        started = time.perf_counter()
        step(number)
        walls.append(1000 * (time.perf_counter() - started))
    spent = 1000 * (time.process_time() - cpu) / steps
    return StepTimes(best_ms=min(walls), median_ms=sorted(walls)[steps // 2], cpu_ms=spent)


def _one_rank(
    rank: int, world: int, out: Path, threads: int, work: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{out}/group", rank=rank, world_size=world
        )
    result = work(*given)
    if rank == 0:
        (out / "result").write_bytes(pickle.dumps(result))
    if world > 1:
        dist.destroy_process_group()
