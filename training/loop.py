"""One rank's training loop: steps, validation, early stop, checkpoints, mined negatives.

Runs the same in this process and under any launcher that has set up ``torch.distributed``. The
learning rate and every random draw are functions of the seed and the step, so resuming needs no
random state. All ranks take the same number of steps: the last, incomplete batch of an epoch is
left out, and as every epoch is shuffled anew no example is left out for good.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shards.errors import ConfigError
from training import gather
from training.batches import Batch, Sampler, TrainingData, check_batch
from training.checkpoint import (
    MODEL,
    TrainState,
    latest_state,
    load_parts,
    open_run,
    remove_unfinished,
    save_checkpoint,
)
from training.config import TrainingConfig
from training.losses import LossTerms
from training.metrics import Csr
from training.miner import mine_in_process
from training.mining import starved_share
from training.optimiser import Optimiser, Update, choose_sparse
from training.precision import Autocast, autocast_type
from training.row_adam import tables
from training.runlog import LOG, Event, RunLog, trim_log
from training.step import Step
from training.towers import TwoTower, build_model
from training.validation import validation_recall

logger = logging.getLogger(__name__)

CACHE = "cache"  # inside the run folder
HARD = "hard.safetensors"  # inside the cache: mined lists that the run was started with
MINED = "mined"  # the part of a checkpoint that holds the lists in use


def train_rank(
    run_folder: Path, device: torch.device, on_event: Callable[[Event], None] | None = None
) -> TrainState:
    """Trains from the newest checkpoint, or the start, to the end; all ranks return the same.

    ``run_folder`` holds a declared run and the prepared data. Rank 0 writes checkpoints and the
    log, and gives every log line to ``on_event`` too.

    Raises:
        ConfigError: the batch is larger than the train split, or does not split over the ranks;
            bf16 is asked for where there is none; the loss is no longer a number.
        Unavailable: a checkpoint or the log could not be written.
    """
    run = open_run(run_folder)
    config, data = run.config, TrainingData.open(run_folder / CACHE)
    check_batch(config.batch_size, gather.world_size(), len(data.train.items))
    state = latest_state(run_folder) or TrainState(world=gather.world_size())
    parts = load_parts(run_folder, state.step) if state.step else {}
    model = build_model(config, run.space).to(device)
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
    )
    trainer = build_trainer(run_folder, config, model, sampler)
    trainer.restore(parts)
    if sampler.rank == 0:
        remove_unfinished(run_folder)
        trim_log(run_folder / LOG, state.step)
        trainer.log = RunLog(run_folder / LOG, on_event, config.batch_size)
        trainer.log_start(state)
    state = replace(state, world=sampler.world)
    while state.epoch < config.epochs and state.stale < config.validation.patience:
        state = trainer.epoch(state)
        trainer.save(state)
    if gather.world_size() > 1:
        dist.barrier()  # nobody leaves before the last checkpoint is complete
    return state


def build_trainer(
    run_folder: Path, config: TrainingConfig, model: TwoTower, sampler: Sampler
) -> "Trainer":
    """A trainer at its start, without a log, on the model's device."""
    device = model.log_temperature.device
    sparse = choose_sparse(model, config.optimiser, _lookups(config, model, sampler.data))
    total_steps = sampler.steps_per_epoch * config.epochs
    optimiser = Optimiser(model, config.optimiser, sparse=sparse, total_steps=total_steps)
    # wrapped once: each wrapper would reduce the gradients again
    wrapped: nn.Module = model
    dense = any(p.requires_grad and n not in sparse for n, p in model.named_parameters())
    if sampler.world > 1 and dense:  # it refuses a model that leaves it nothing to reduce
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, sparse)  # type: ignore[no-untyped-call]
        wrapped = DistributedDataParallel(model)
    precision = autocast_type(config.precision, device)
    if precision is not None:
        wrapped = Autocast(wrapped, precision)
    loss_step = Step(config, sampler.data, device)
    return Trainer(run_folder, config, model, wrapped, optimiser, sampler, loss_step)


@dataclass(slots=True)
class Trainer:
    """A model in training. ``epoch`` is one pass over the data, and validation where it is due."""

    run_folder: Path
    config: TrainingConfig
    model: TwoTower
    wrapped: nn.Module  # the model as a step calls it: with autocast, and over several ranks
    optimiser: Optimiser
    sampler: Sampler
    loss_step: Step  # forward and backward of one batch
    log: RunLog | None = None  # rank 0's

    def restore(self, parts: dict[str, dict[str, Tensor]]) -> None:
        """Takes over what ``save`` wrote; the sampler has its mined lists already."""
        for name, part in self._stateful().items():
            if name in parts:
                part.load_state_dict(parts[name])

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint, on rank 0."""
        if self.log is not None:
            parts = {name: part.state_dict() for name, part in self._stateful().items()}
            if self.sampler.hard is not None:
                parts[MINED] = lists_to_tensors(self.sampler.hard)
            save_checkpoint(self.run_folder, state, parts)

    def epoch(self, state: TrainState) -> TrainState:
        """The steps that are left of the epoch, then its validation, then mining."""
        config, steps = self.config, self.sampler.steps_per_epoch
        watch = _Watch(self.model.log_temperature.device)
        self.model.train()
        step, end = state.step, (state.epoch + 1) * steps
        if self.log is not None:
            self.log.start(step)
        for batch in self.sampler.epoch(state.epoch, step - state.epoch * steps):
            step += 1
            saved = self._is_saved(step) and step < end
            logged = step % config.log_every_steps == 0 or step == end
            terms, update = self.step(batch, step, measure=saved or logged)
            watch.see(terms, update, step)
            if saved or logged:
                watch.check(state)
            if logged:
                self._log_step(terms, update, step, state.epoch + 1)
            if saved:
                state = replace(state, step=step)
                self.save(state)
        state = replace(state, epoch=state.epoch + 1, step=step)
        due = state.epoch % config.validation.every_epochs == 0 or state.epoch == config.epochs
        if due and len(self.sampler.data.val.items):
            state = self._validate(state)
        every = config.mining.every_epochs
        if every and state.epoch % every == 0 and state.epoch < config.epochs:
            self._mine(state)
        return state

    def log_start(self, state: TrainState) -> None:
        """The line a run starts or resumes with, maybe with another number of ranks."""
        assert self.log is not None
        precision = self.wrapped.dtype if isinstance(self.wrapped, Autocast) else torch.float32
        self.log.write(
            "start",
            epoch=state.epoch + 1,
            step=state.step,
            world=self.sampler.world,
            # the global batch does not depend on the ranks, only the order of additions does
            world_before=state.world,
            fit_splits=self.config.fit_splits,
            precision=str(precision).removeprefix("torch."),
            sparse_tables=self.optimiser.sparse,
        )

    def _stateful(self) -> dict[str, Any]:
        return {MODEL: self.model, "optimiser": self.optimiser, "loss": self.loss_step.state}

    def _is_saved(self, step: int) -> bool:
        every = self.config.checkpoint_every_steps
        return every is not None and step % every == 0

    def step(self, batch: Batch, step: int, *, measure: bool) -> tuple[LossTerms, Update]:
        """Optimiser step ``step``, from 1."""
        device = self.model.log_temperature.device
        generator = torch.Generator(device).manual_seed(_step_seed(self.config.seed, step - 1))
        self.optimiser.zero_grad()
        terms = self.loss_step.run(self.wrapped, batch, generator)
        update = self.optimiser.step(step - 1, measure=measure)
        self.model.clamp_temperature()
        return terms, update

    def _validate(self, state: TrainState) -> TrainState:
        started = time.perf_counter()
        recall = validation_recall(self.model, self.sampler, self.config)
        if self.log is not None:
            name = f"recall@{self.config.validation.k}"
            values = {"seconds": time.perf_counter() - started, name: recall}
            self.log.write("validation", epoch=state.epoch, step=state.step, **values)
        if state.best_value is None or recall > state.best_value:
            best = replace(state, best_epoch=state.epoch, best_step=state.step)
            return replace(best, best_value=recall, stale=0)
        return replace(state, stale=state.stale + 1)

    def _mine(self, state: TrainState) -> None:
        started = time.perf_counter()
        lists = mined_lists(self.model, self.sampler.data, self.config, state.epoch)
        self.sampler = replace(self.sampler, hard=lists)
        mined = self.sampler.data.train.lengths > 0
        if self.log is not None:
            self.log.write(
                "mining",
                epoch=state.epoch,
                step=state.step,
                seconds=time.perf_counter() - started,
                starved_share=starved_share(lists, mined, self.config.mining),
            )

    def _log_step(self, terms: LossTerms, update: Update, step: int, epoch: int) -> None:
        values = torch.stack(
            [
                terms.loss.detach(),
                terms.accuracy,
                terms.masked,
                terms.positive_logit,
                terms.negative_logit,
            ]
        )
        if gather.world_size() > 1:
            dist.all_reduce(values)
        loss, accuracy, masked, positive, negative = (values / gather.world_size()).tolist()
        assert update.norm is not None
        if self.log is not None:
            self.log.step(
                step,
                epoch=epoch,
                total_steps=self.sampler.steps_per_epoch * self.config.epochs,
                loss=loss,
                in_batch_accuracy=accuracy,
                positive_logit=positive,
                negative_logit=negative,
                masked_share=masked,
                temperature=self.model.temperature().item(),
                gradient_norm=update.norm.item(),
                learning_rate=update.rate,
                received=gather.TRAFFIC.received,
            )


def mined_lists(model: TwoTower, data: TrainingData, config: TrainingConfig, epoch: int) -> Csr:
    """Hard negatives of every user by the model after ``epoch`` epochs; a collective."""
    seed = int(np.random.SeedSequence([config.seed, epoch]).generate_state(1)[0])
    return mine_in_process(model, data, config.mining, seed)


def _lookups(config: TrainingConfig, model: TwoTower, data: TrainingData) -> dict[str, float]:
    """Rows that a step of all ranks reads of each table, one for a row of a one-valued column."""
    lengths, loss = data.train.lengths, config.loss
    # users come up as often as they have examples
    history = np.average(np.minimum(lengths, model.history_length), weights=lengths)
    an_example = 1 + history + loss.hard_negatives + loss.random_negatives
    items = config.batch_size * an_example + loss.uniform_negatives
    return {
        name: items if name.startswith("item_rows.") else config.batch_size
        for name in tables(model)
    }


def _first_lists(
    run_folder: Path,
    config: TrainingConfig,
    model: TwoTower,
    data: TrainingData,
    parts: dict[str, dict[str, Tensor]],
) -> Csr | None:
    """The mined lists to start with: the checkpoint's, those given, or the initial model's own."""
    if MINED in parts:
        return _lists(parts[MINED])
    if not config.loss.hard_negatives:
        return None
    given = run_folder / CACHE / HARD
    if given.exists():
        return _lists(load_file(given))
    return mined_lists(model, data, config, 0) if config.mining.every_epochs else None


def _lists(tensors: dict[str, Tensor]) -> Csr:
    return Csr(tensors["indptr"].numpy(), tensors["items"].numpy())


def lists_to_tensors(lists: Csr) -> dict[str, Tensor]:
    return {"indptr": torch.from_numpy(lists.indptr), "items": torch.from_numpy(lists.items)}


class _Watch:
    """Notices the first step whose loss or gradient is no number, without waiting at every step."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), torch.inf, dtype=torch.float64, device=device)

    def see(self, terms: LossTerms, update: Update, step: int) -> None:
        finite = torch.isfinite(terms.loss.detach())
        if update.norm is not None:
            finite = finite & torch.isfinite(update.norm)
        self._first = torch.where(finite, self._first, self._first.clamp(max=step))

    def check(self, state: TrainState) -> None:
        """All ranks raise the same ConfigError, or none; ``state`` is that of the checkpoint."""
        if gather.world_size() > 1:
            dist.all_reduce(self._first, dist.ReduceOp.MIN)
        if torch.isfinite(self._first):
            kept = f"checkpoint of step {state.step}" if state.step else "no checkpoint"
            raise ConfigError(
                "the loss or its gradient is no finite number any more",
                field="optimiser.learning_rate",
                got=f"step {int(self._first)}, in epoch {state.epoch + 1}",
                hint=f"lower it, or set optimiser.clip_norm; {kept} is as it was",
            )


def _step_seed(seed: int, step: int) -> int:
    """Dropout differs by rank; the batches do not need to."""
    entropy = np.random.SeedSequence([seed, step, gather.rank()])
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)
