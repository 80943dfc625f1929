"""Ranks under Ray Train: where they lie, what each runs, and what becomes of their errors.

Expects the caller to be connected to Ray; ``training.loop.process_group`` joins the ranks.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train import get_context as get_rank_context
from ray.train.torch import TorchTrainer, get_device

from shardline.shards.core.errors import ShardlineError, Unavailable, last_line
from shardline.training.config.training_config import TrainingConfig
from shardline.training.loop.process_group import HostTorchConfig
from shardline.training.loop.run_rank import train_rank

RAY_FOLDER = "ray"  # inside the run folder: what Ray Train itself writes


def train_under_ray(config: TrainingConfig, use_gpu: bool, run_folder: Path) -> None:
    """Runs ``train_rank`` in ``config.num_workers`` processes, to the end.

    Raises:
        ShardlineError, OSError: what a rank raised of these. Unavailable: ranks died, failed
            otherwise or found no room, more often than max_failures.
    """
    trainer = TorchTrainer(
        _rank_entry,
        train_loop_config={"run_folder": str(run_folder)},
        torch_config=HostTorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=use_gpu,
            placement_strategy=config.placement.upper(),
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=str(run_folder),
            # without a limit, ranks that find no room are tried for ever
            failure_config=FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=config.max_failures
            ),
        ),
    )
    try:
        with _interrupt_handler_kept():
            trainer.fit()
    except SystemExit as error:
        if error.code == signal.SIGTERM:  # which Ray makes an exit with its number
            raise
        # how Ray Train leaves after Ctrl-C, once it has ended the ranks: with 0, or 1 from a wait
        raise KeyboardInterrupt from error
    except TrainingFailedError as error:
        raise _cause(error) from error


def _rank_entry(settings: dict[str, str]) -> None:
    """What every Ray worker runs. The cores of a host are shared evenly by its ranks."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // get_rank_context().get_local_world_size()))
    train_rank(Path(settings["run_folder"]), get_device())


def _cause(error: TrainingFailedError) -> Exception:
    """One error for whatever the ranks reported: the first of ours, or of the system's."""
    failures = list(getattr(error, "worker_failures", {}).values())
    failures.append(getattr(error, "controller_failure", None))  # ranks that did not start
    causes = [_original(failure) for failure in failures if failure is not None]
    for cause in causes:
        if isinstance(cause, ShardlineError | OSError):  # a full disk, say
            return cause
    return Unavailable(
        "training failed",
        got=last_line(causes[0] if causes else error),
        hint="--resume goes on from its newest checkpoint",
    )


def _original(failure: Exception) -> Exception:
    """What a rank itself raised, out of the wrapping of Ray or of Ray Train."""
    cause = failure.cause if isinstance(failure, RayTaskError) else failure
    original: Exception = getattr(cause, "_base_exc", cause)
    return original


@contextmanager
def _interrupt_handler_kept() -> Iterator[None]:
    """Ray Train puts its own handler on Ctrl-C and leaves it there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
