"""Ranks under Ray Train: where they lie, what each runs, and what becomes of their errors.

Expects the caller to be connected to Ray; ``training.loop.process_group`` joins the ranks.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train import get_context as get_rank_context
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from shardline.shards.core.errors import ShardlineError, Unavailable, last_line
from shardline.shards.core.files import MANIFEST_NAME
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
    trainer = build_ranks(_rank_entry, config, use_gpu, run_folder)
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


def build_ranks(
    entry: Callable[[dict[str, str]], None],
    config: TrainingConfig,
    use_gpu: bool,
    run_folder: Path,
) -> TorchTrainer:
    """``entry`` on every rank, with {"run_folder": its path}, as this configuration places them."""
    return TorchTrainer(
        entry,
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


def _rank_entry(settings: dict[str, str]) -> None:
    """What every Ray worker runs. The cores of a host are shared evenly by its ranks."""
    run_folder = Path(settings["run_folder"])
    check_shared(run_folder)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // get_rank_context().get_local_world_size()))
    train_rank(run_folder, get_device())


def check_shared(run_folder: Path) -> None:
    """Whether this host has the run folder that the run was declared in, and may write there.

    Raises:
        Unavailable: it does not; names the host.
    """
    got = None
    if not (run_folder / MANIFEST_NAME).exists():
        got = "no such run there"
    elif not os.access(run_folder, os.W_OK):
        got = "a folder that cannot be written"
    if got is not None:
        raise Unavailable(
            f"host {ray.util.get_node_ip_address()} does not share the run folder {run_folder}",
            expected="the folder of the host that training was started on",
            got=got,
            hint="--run names a folder that every host mounts at the same path",
        )


def _cause(error: TrainingFailedError) -> Exception:
    """One error for whatever the ranks reported: the first of ours, or of the system's."""
    failures = list(getattr(error, "worker_failures", {}).values())
    failures.append(getattr(error, "controller_failure", None))  # ranks that did not start
    causes = [_original(failure) for failure in failures if failure is not None]
    causes.sort(key=lambda cause: not isinstance(cause, RayActorError))  # others lost it only
    for cause in causes:
        if isinstance(cause, ShardlineError | OSError):  # a full disk, say
            return cause
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            return Unavailable(
                "the Ray cluster has no room for the ranks",
                expected=f"{cause.num_workers} CPUs, or GPUs, that nothing else reserves",
                hint="fewer --workers, or a lower cluster.cpus_per_shard of what is served there",
            )
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
