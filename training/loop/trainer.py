"""A model in training: an epoch's steps, then its validation and mining; and its checkpoints.

The learning rate and every random draw are functions of the seed and the step, so resuming needs
no random state.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shardline.shards.core.errors import ConfigError
from shardline.training import gather
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.csr import Csr
from shardline.training.features.prepared import TrainingData
from shardline.training.loop.batches import Batch, Sampler
from shardline.training.loop.optimiser import Optimiser, Update, choose_sparse
from shardline.training.loop.row_adam import tables
from shardline.training.loop.runlog import RunLog
from shardline.training.loop.train_step import Step
from shardline.training.loop.validation import validation_recall
from shardline.training.loss.losses import LossTerms
from shardline.training.mining.candidates import starved_share
from shardline.training.mining.curriculum import mines_after, window
from shardline.training.mining.miner import mine_in_process
from shardline.training.model.checkpoint import MODEL, TrainState, save_checkpoint
from shardline.training.model.precision import Autocast, Precision, resolve
from shardline.training.model.towers import TwoTower

MINED = "mined"  # the part of a checkpoint that holds the lists in use


def build_trainer(
    run_folder: Path, config: TrainingConfig, model: TwoTower, sampler: Sampler
) -> "Trainer":
    """A trainer at its start, without a log, on the model's device.

    Raises:
        ConfigError: bf16 on a GPU without it.
    """
    device = model.log_temperature.device
    precision = resolve(config.precision, device)
    sparse = choose_sparse(model, config.optimiser, _lookups(config, model, sampler.data))
    total_steps = sampler.steps_per_epoch * config.epochs
    optimiser = Optimiser(model, config.optimiser, sparse=sparse, total_steps=total_steps)
    # wrapped once: each wrapper would reduce the gradients again
    wrapped: nn.Module = model
    dense = any(p.requires_grad and n not in sparse for n, p in model.named_parameters())
    if sampler.world > 1 and dense:  # it refuses a model that leaves it nothing to reduce
        ignore: Callable[[nn.Module, list[str]], None] = (
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        )
        ignore(model, sparse)
        wrapped = DistributedDataParallel(model)
    if precision == "bf16":
        wrapped = Autocast(wrapped)
    loss_step = Step(config, sampler.data, device)
    return Trainer(run_folder, config, model, wrapped, precision, optimiser, sampler, loss_step)


@dataclass(slots=True)
class Trainer:
    """A model in training. ``epoch`` is one pass over the data, and validation where it is due."""

    run_folder: Path
    config: TrainingConfig
    model: TwoTower
    wrapped: nn.Module  # the model as a step calls it: with autocast, and over several ranks
    precision: Precision
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
            with self.log.paused():
                save_checkpoint(self.run_folder, state, parts)

    def epoch(self, state: TrainState) -> TrainState:
        """The steps that are left of the epoch, then its validation, then mining."""
        config, steps = self.config, self.sampler.steps_per_epoch
        watch = _Watch(self.model.log_temperature.device)
        self.model.train()
        step, end = state.step, (state.epoch + 1) * steps
        if self.log is not None:
            self.log.start(step, received=gather.TRAFFIC.received)
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
        has_lists = self.sampler.hard is not None
        if state.epoch < config.epochs and mines_after(
            config.mining, state.epoch, has_lists=has_lists
        ):
            self._mine(state)
        return state

    def log_start(self, state: TrainState) -> None:
        """The line a run starts or resumes with, maybe with another number of ranks."""
        assert self.log is not None
        self.log.write(
            "start",
            epoch=state.epoch + 1,
            step=state.step,
            world=self.sampler.world,
            # the global batch does not depend on the ranks, only the order of additions does
            world_before=state.world,
            fit_splits=self.config.fit_splits,
            precision=self.precision,
            sparse_tables=self.optimiser.sparse,
            examples=len(self.sampler.data.train.items),
            steps_per_epoch=self.sampler.steps_per_epoch,
        )

    def start_warm(self, origin: Mapping[str, Any] | None) -> None:
        """Where the weights come from, and how good they are on val before the first step."""
        if self.log is not None:
            self.log.write("warm_start", epoch=1, step=0, origin=origin)
        if len(self.sampler.data.val.items):
            self._recall(epoch=0, step=0)

    def log_end(self, state: TrainState) -> None:
        """The line a run ends with: whether before its last epoch, and which epoch is kept."""
        assert self.log is not None
        self.log.write(
            "end",
            epoch=state.epoch,
            step=state.step,
            early=state.epoch < self.config.epochs,
            epochs=self.config.epochs,
            metric=f"recall@{self.config.validation.k}",
            best=state.best_value,
            validations_since_best=state.stale,
            kept_epoch=state.epoch if state.best_epoch is None else state.best_epoch,
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
        recall = self._recall(epoch=state.epoch, step=state.step)
        if state.best_value is None or recall > state.best_value:
            best = replace(state, best_epoch=state.epoch, best_step=state.step)
            return replace(best, best_value=recall, stale=0)
        return replace(state, stale=state.stale + 1)

    def _recall(self, *, epoch: int, step: int) -> float:
        started = time.perf_counter()
        recall = validation_recall(self.model, self.sampler, self.config)
        if self.log is not None:
            name = f"recall@{self.config.validation.k}"
            values = {"seconds": time.perf_counter() - started, name: recall}
            self.log.write("validation", epoch=epoch, step=step, **values)
        return recall

    def _mine(self, state: TrainState) -> None:
        started = time.perf_counter()
        lists = mined_lists(self.model, self.sampler.data, self.config, state.epoch)
        self.sampler = replace(self.sampler, hard=lists)
        mined = self.sampler.data.train.lengths > 0
        used = window(self.config.mining, state.epoch)
        if self.log is not None:
            self.log.write(
                "mining",
                epoch=state.epoch,
                step=state.step,
                seconds=time.perf_counter() - started,
                starved_share=starved_share(lists, mined, self.config.mining),
                ranks=[used.range_min, used.range_max],
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
    return mine_in_process(model, data, window(config.mining, epoch), seed)


def lists_to_tensors(lists: Csr) -> dict[str, Tensor]:
    return {"indptr": torch.from_numpy(lists.indptr), "items": torch.from_numpy(lists.items)}


def lists_from_tensors(tensors: dict[str, Tensor]) -> Csr:
    return Csr(tensors["indptr"].numpy(), tensors["items"].numpy())


def _lookups(config: TrainingConfig, model: TwoTower, data: TrainingData) -> dict[str, float]:
    """Rows that a step of all ranks reads of each table, one for a row of a one-valued column."""
    lengths, loss = data.train.lengths, config.loss
    # users come up as often as they have examples
    history = np.average(np.minimum(lengths, model.history_length), weights=lengths)
    an_example = 1 + history + loss.hard_negatives + loss.random_negatives
    items = config.batch_size * an_example + loss.uniform_negatives
    if config.towers.tied:  # its tables are read for the users too
        items += config.batch_size
    found = {
        name: items if name.startswith("item_rows.") else config.batch_size
        for name in tables(model)
    }
    audience = data.items.audience
    if audience is not None:
        # positives come up as often as they have examples, and drawn negatives all alike
        users = np.minimum(audience.lists.lengths, audience.longest)
        positives = np.average(users, weights=data.item_counts())
        negatives = config.batch_size * (loss.hard_negatives + loss.random_negatives)
        negatives += loss.uniform_negatives
        name = f"query_rows.embeddings.{audience.user_column}.weight"
        found[name] += config.batch_size * positives + negatives * users.mean()
    return found


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
                hint="lower it with --set training.optimiser.learning_rate, or set "
                f"training.optimiser.clip_norm; {kept} is as it was",
            )


def _step_seed(seed: int, step: int) -> int:
    """Dropout differs by rank; the batches do not need to."""
    entropy = np.random.SeedSequence([seed, step, gather.rank()])
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)
