"""Starts a training run: in this process for one worker, under Ray Train for several.

Several need a caller that is connected to Ray (``training.loop.ray_ranks``).
Everything a rank needs lies in the run folder, which all nodes must be able to read and write;
what a rank does is ``training.loop.run_rank.train_rank``.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch
from safetensors.torch import save_file

from shardline.shards.core.errors import ConfigError, Unavailable
from shardline.shards.core.files import MANIFEST_NAME, atomic_path
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.csr import Csr
from shardline.training.data.tables import Dataset, open_dataset
from shardline.training.features.fitted import fit
from shardline.training.features.infer import infer_config
from shardline.training.features.prepared import example_weights, prepare, train_lists
from shardline.training.loop.batches import check_batch
from shardline.training.loop.ray_ranks import train_under_ray
from shardline.training.loop.run_rank import HARD, given_lists, train_rank
from shardline.training.loop.runlog import LOG, OnEvent, followed
from shardline.training.loop.svd_start import check_svd_start, write_svd_start
from shardline.training.loop.trainer import lists_to_tensors
from shardline.training.loss.negatives import check_hard
from shardline.training.mining.hard_negatives import check_per_user, load_hard
from shardline.training.model.checkpoint import (
    CACHE,
    Run,
    check_resumable,
    latest_state,
    open_data,
    open_run,
    place_run,
    start_run,
)
from shardline.training.model.warm_start import (
    WARM,
    WarmStart,
    carried_space,
    carried_weights,
    check_architecture,
    check_same_start,
    check_validation,
    ended_state,
    open_warm_start,
    with_features_of,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """best_value is the validation recall of best_epoch; both None without a val split.

    epochs were trained of max_epochs: fewer where validation stopped it early.
    """

    run_folder: Path
    epochs: int
    max_epochs: int
    steps: int
    best_epoch: int | None
    best_value: float | None


def train(
    config: TrainingConfig,
    data_folder: Path,
    run_folder: Path,
    *,
    on_event: OnEvent | None = None,
    resume: bool = False,
    hard: Path | None = None,
    warm: Path | None = None,
    until_epoch: int | None = None,
) -> TrainResult:
    """Trains ``config.num_workers`` ranks to the end; the run folder keeps the best checkpoint.

    on_event gets every line of the log (``training.loop.runlog``): "start", "step" (step,
    total_steps, loss, in_batch_accuracy, examples_per_s, ...), "validation" (epoch, recall@k).
    resume: go on from the newest checkpoint of the same configuration and data; how many ranks
    there are, and how often they write, may be another one. hard: table of mined negatives to start
    with; a resumed run goes on with the lists that it has, and takes no table but that of its
    start. warm: folder of an ended run whose best weights this one starts from; what
    ``training.model.warm_start`` says of it. A resumed run needs it no more. until_epoch: stop
    after this epoch, for a later resume; of one worker.

    Raises:
        ConfigError, DataError: settings or data that do not fit, are not the ones resumed, or ask
            for something that would have no effect in this run.
        Unavailable: several workers without a Ray connection or GPUs, a disk that is full, or
            ranks died more often than max_failures.
    """
    assert until_epoch is None or config.num_workers == 1, "ranks under Ray train to the end"
    run_folder = run_folder.resolve()  # ranks under Ray have another working directory
    check_folders(data_folder, run_folder, resume=resume, warm=warm)
    older = None if warm is None else open_warm_start(warm)
    config = _with_architecture(config, run_folder, older, resume=resume)
    use_gpu = _use_gpu(config)
    config = _declare(config, data_folder, run_folder, resume=resume, hard=hard, warm=older)
    if config.num_workers == 1:
        device = torch.device("cuda" if use_gpu else "cpu")
        train_rank(run_folder, device, on_event, until_epoch=until_epoch)
    else:
        with followed(run_folder / LOG, on_event):
            train_under_ray(config, use_gpu, run_folder)
    state = latest_state(run_folder)
    assert state is not None, "a finished run has a checkpoint"
    return TrainResult(
        run_folder=run_folder,
        epochs=state.epoch,
        max_epochs=config.epochs,
        steps=state.step,
        best_epoch=state.best_epoch,
        best_value=state.best_value,
    )


def check_folders(
    data_folder: Path, run_folder: Path, *, resume: bool, warm: Path | None = None
) -> None:
    """What ``train`` refuses at a glance; for callers that start a cluster first.

    Raises:
        NotFound: no dataset there, or no run to resume or to start from. ConfigError: a run is in
            the way. DataError: the training of the run to start from has not ended.
    """
    open_dataset(data_folder, verify=False)
    if resume:
        open_run(run_folder)
    elif (run_folder / MANIFEST_NAME).exists():
        raise ConfigError(
            f"{run_folder}: holds a run already",
            hint="--resume goes on with it, --run names another folder, also to what follows",
        )
    if warm is not None:
        ended_state(warm)


def _with_architecture(
    config: TrainingConfig, run_folder: Path, warm: WarmStart | None, *, resume: bool
) -> TrainingConfig:
    """``config`` with the features of the run to start from; refuses another architecture."""
    if resume:
        declared = open_run(run_folder)
        if warm is not None:
            check_same_start(run_folder, declared, warm)
        return with_features_of(config, declared.config) if declared.origin else config
    if warm is None:
        return config
    config = with_features_of(config, warm.run.config)
    check_architecture(config, warm.run.config, warm.folder)
    return config


def _declare(
    config: TrainingConfig,
    data_folder: Path,
    run_folder: Path,
    *,
    resume: bool,
    hard: Path | None,
    warm: WarmStart | None,
) -> TrainingConfig:
    """Puts the run into its folder, or checks that it is the one to resume; its configuration.

    The tables of the dataset are in memory until this returns, and not while the run trains.
    """
    dataset = open_dataset(data_folder, keep=True)
    config = infer_config(config, dataset)
    if resume:
        check_resumable(run_folder, config, dataset.identity)
        if hard is not None:
            _check_same_hard(config, dataset, run_folder, hard)
        place_run(run_folder, config)
    else:
        _start(config, dataset, run_folder, hard, warm)
    return config


def _start(
    config: TrainingConfig,
    dataset: Dataset,
    run_folder: Path,
    table: Path | None,
    warm: WarmStart | None,
) -> None:
    # before anything is written: a declared run keeps its batch size
    examples = len(train_lists(dataset, config.fitted_splits).items)
    check_batch(config.batch_size, config.num_workers, examples)
    _check_memory(config, examples // config.batch_size * config.epochs)
    if config.loss.weight_exponent:
        example_weights(dataset.weights(*config.fitted_splits), config.loss.weight_exponent)
    if warm is None:
        check_svd_start(config)
    else:
        check_validation(config, warm, dataset.identity)
    hard = _hard_lists(config, dataset, table)
    space = fit(config, dataset)
    if warm is not None:
        space = carried_space(space, warm.run.space, warm.folder)
    shutil.rmtree(run_folder / CACHE, ignore_errors=True)  # of a start that did not get to its end
    prepare(dataset, space, run_folder / CACHE, config.fitted_splits, tied=config.towers.tied)
    if warm is None:
        write_svd_start(config, dataset, space, run_folder / CACHE)
    if hard is not None:
        with atomic_path(run_folder / CACHE / HARD) as temporary:
            save_file(lists_to_tensors(hard), temporary)
    origin = None
    if warm is not None:
        weights, growth = carried_weights(config, space, warm)
        origin = warm.origin(growth)
        with atomic_path(run_folder / CACHE / WARM) as temporary:
            save_file(weights, temporary)
    start_run(run_folder, Run(config=config, space=space, origin=origin), dataset.identity)


def _check_memory(config: TrainingConfig, total_steps: int) -> None:
    loss = config.loss
    if loss.memory_size and loss.memory_warmup_steps >= total_steps:
        raise ConfigError(
            "the run ends before the memory of past vectors is used",
            field="loss.memory_warmup_steps",
            expected=f"< {total_steps}, the steps of the run",
            got=str(loss.memory_warmup_steps),
            hint="or --set training.loss.memory_size=0",
        )


def _hard_lists(config: TrainingConfig, dataset: Dataset, table: Path | None) -> Csr | None:
    """The table's lists, once it is clear that mined negatives will be used, and there are any."""
    every, per_row = config.mining.every_epochs, config.loss.hard_negatives
    if (table is not None or every) and not per_row:
        raise ConfigError(
            "mined negatives would not be used",
            field="loss.hard_negatives",
            expected=">= 1",
            got="0",
            hint="--set training.loss.hard_negatives=1, or leave out --hard and --mine-every",
        )
    if every:
        check_per_user(per_row, config.mining.per_user, "mining")
    if table is None:
        if not every:  # else the ranks mine before their first step
            check_hard(config.loss, None, dataset.rows["users"])
        return None
    lists = load_hard(table, dataset, fit_splits=config.fit_splits, per_row=per_row)
    if not len(lists.items):
        raise ConfigError(f"{table}: there is no negative in it", field="hard", hint="mine another")
    return lists


def _check_same_hard(
    config: TrainingConfig, dataset: Dataset, run_folder: Path, table: Path
) -> None:
    per_row = config.loss.hard_negatives
    lists = load_hard(table, dataset, fit_splits=config.fit_splits, per_row=per_row)
    open_data(run_folder)  # for its checksums, which are of the lists too
    before = given_lists(run_folder)
    if (
        before is None
        or not np.array_equal(before.indptr, lists.indptr)
        or not np.array_equal(before.items, lists.items)
    ):
        raise ConfigError(
            f"{table}: the run was not started with these mined lists",
            field="hard",
            hint="leave out --hard to go on as it was started; --run names another folder",
        )


def _use_gpu(config: TrainingConfig) -> bool:
    if config.num_workers > 1 and not ray.is_initialized():
        raise Unavailable(
            "several workers train under Ray",
            field="num_workers",
            expected="a connection to a Ray cluster, or num_workers 1",
        )
    if config.num_workers > 1:
        _check_cpus(config.num_workers, int(ray.cluster_resources().get("CPU", 0)))
    if config.device == "cpu":
        return False
    if config.num_workers == 1:
        found = torch.cuda.device_count()
    else:
        found = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "cuda" and found < config.num_workers:
        raise Unavailable(
            "not enough GPUs",
            field="device",
            expected=f"{config.num_workers}, one per worker",
            got=str(found),
            hint="--set training.device=cpu, or fewer --workers",
        )
    return found >= config.num_workers


def _check_cpus(num_workers: int, found: int) -> None:
    """Ray would wait for more hosts without end."""
    if found < num_workers:
        raise Unavailable(
            "not enough CPUs in the Ray cluster",
            field="num_workers",
            expected=f"{num_workers}, one per worker",
            got=str(found),
            hint="fewer --workers, or more hosts",
        )
