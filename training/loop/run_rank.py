"""One rank's run: from its newest checkpoint, or the start, epoch by epoch to the end.

Runs the same in this process and under any launcher that has set up ``torch.distributed``. All
ranks take the same number of steps: the last, incomplete batch of an epoch is left out, and as
every epoch is shuffled anew no example is left out for good.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from shardline.training import gather
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.csr import Csr
from shardline.training.features.prepared import TrainingData
from shardline.training.loop.batches import Sampler, check_batch
from shardline.training.loop.runlog import LOG, Event, RunLog, trim_log
from shardline.training.loop.svd_start import start_at_svd
from shardline.training.loop.trainer import MINED, build_trainer, lists_from_tensors, mined_lists
from shardline.training.mining.curriculum import mines_after
from shardline.training.model.checkpoint import (
    CACHE,
    TrainState,
    latest_state,
    load_parts,
    open_data,
    open_run,
    remove_unfinished,
)
from shardline.training.model.towers import TwoTower, build_model
from shardline.training.model.warm_start import load_warm

HARD = "hard.safetensors"  # inside the cache: mined lists that the run was started with


def train_rank(
    run_folder: Path,
    device: torch.device,
    on_event: Callable[[Event], None] | None = None,
    *,
    until_epoch: int | None = None,
) -> TrainState:
    """Trains from the newest checkpoint, or the start, to the end; all ranks return the same.

    until_epoch: no further than this epoch; another call goes on as if there had been no stop.

    ``run_folder`` holds a declared run and the prepared data. Rank 0 writes checkpoints and the
    log, and gives every log line to ``on_event`` too. The precision of the first step stays, also
    on a device where "auto" would mean another one.

    Raises:
        ConfigError: the batch is larger than the train split, or does not split over the ranks;
            bf16 is asked for, or was begun with, where there is none; the loss is no longer a
            number.
        CorruptFile: the prepared data or the checkpoint is not as it was written.
        Unavailable: a checkpoint or the log could not be written.
    """
    run = open_run(run_folder)
    config, data = run.config, open_data(run_folder)
    check_batch(config.batch_size, gather.world_size(), len(data.train.items))
    state = latest_state(run_folder) or TrainState(world=gather.world_size())
    parts = load_parts(run_folder, state.step) if state.step else {}
    if state.precision is not None:
        config = config.model_copy(update={"precision": state.precision})
    model = build_model(config, run.space).to(device)
    starts_warm = run.origin is not None and not parts
    if starts_warm:
        load_warm(run_folder, model)
    elif not state.step:
        start_at_svd(model, config, run.space, run_folder / CACHE)
    sampler = Sampler(
        data=data,
        batch_size=config.batch_size,
        rank=gather.rank(),
        world=gather.world_size(),
        seed=config.seed,
        unknown_rate=config.unknown_rate,
        history_length=run.space.history.max_length if run.space.history else 0,
        loss=config.loss,
        hard=_first_lists(run_folder, config, model, data, parts),
        hard_from=config.mining.start_epoch - 1,
    )
    trainer = build_trainer(run_folder, config, model, sampler)
    trainer.restore(parts)
    if sampler.rank == 0:
        remove_unfinished(run_folder)
        trim_log(run_folder / LOG, state.step)
        trainer.log = RunLog(run_folder / LOG, on_event, config.batch_size)
        trainer.log_start(state)
    if starts_warm:
        trainer.start_warm(run.origin)
    state = replace(state, world=sampler.world, precision=trainer.precision)
    while not state.has_ended(config) and (until_epoch is None or state.epoch < until_epoch):
        state = trainer.epoch(state)
        trainer.save(state)
    if trainer.log is not None and state.has_ended(config):
        trainer.log_end(state)
    if gather.world_size() > 1:
        dist.barrier()  # nobody leaves before the last checkpoint is complete
    return state


def given_lists(run_folder: Path) -> Csr | None:
    """The mined lists that the run was started with; checksums are the caller's matter."""
    given = run_folder / CACHE / HARD
    return lists_from_tensors(load_file(given)) if given.exists() else None


def _first_lists(
    run_folder: Path,
    config: TrainingConfig,
    model: TwoTower,
    data: TrainingData,
    parts: dict[str, dict[str, Tensor]],
) -> Csr | None:
    """The mined lists to start with: the checkpoint's, those given, or the initial model's own.

    None where there are none yet, because the run mines later.
    """
    if MINED in parts:
        return lists_from_tensors(parts[MINED])
    if not config.loss.hard_negatives:
        return None
    given = given_lists(run_folder)
    if given is not None:
        return given
    if mines_after(config.mining, 0, has_lists=False):
        return mined_lists(model, data, config, 0)
    return None
