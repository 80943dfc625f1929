"""One rank's training loop: steps, validation, early stop, checkpoints.

Runs the same in this process and under any launcher that has set up ``torch.distributed``. The
learning rate and every random draw are functions of the step, so resuming needs no random state.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shards.schema import FloatArray
from training import gather
from training.batches import Sampler, TrainingData, check_batch
from training.checkpoint import TrainState, latest_state, open_run, restore, save_checkpoint
from training.config import OptimiserConfig, TrainingConfig
from training.encoding import encode_items, encode_queries
from training.features import Block
from training.losses import LossTerms
from training.metrics import rank_exact, score_lists
from training.queries import sample_users
from training.step import batch_loss, log_frequencies
from training.towers import TwoTower, build_model

logger = logging.getLogger(__name__)

CACHE, LOG = "cache", "log.jsonl"  # inside the run folder
LOG_STEPS = 10  # steps between two log lines; each costs one small all-reduce
BETAS = (0.9, 0.98)  # a shorter second moment than AdamW's default suits runs of 1000 steps

Event = dict[str, Any]


def train_rank(
    run_folder: Path, device: torch.device, on_event: Callable[[Event], None] | None = None
) -> TrainState:
    """Trains from the newest checkpoint, or the start, to the end; all ranks return the same.

    ``run_folder`` holds a declared run and the prepared data. Rank 0 writes checkpoints and the
    log, and gives every log line to ``on_event`` too.

    Raises:
        ConfigError: the batch is larger than the train split, or does not split over the ranks.
    """
    run = open_run(run_folder)
    config, data = run.config, TrainingData.open(run_folder / CACHE)
    sampler = Sampler(
        data=data,
        batch_size=config.batch_size,
        rank=gather.rank(),
        world=gather.world_size(),
        seed=config.seed,
        unknown_rate=config.unknown_rate,
        history_length=run.space.history.max_length if run.space.history else 0,
    )
    check_batch(sampler.batch_size, sampler.world, len(data.train.items))
    model = build_model(config, run.space).to(device)
    optimiser = build_optimiser(model, config.optimiser)
    state = latest_state(run_folder) or TrainState()
    if state.epoch:
        restore(run_folder, state.epoch, model, optimiser)
    log = _Log(run_folder / LOG, on_event, config.batch_size) if sampler.rank == 0 else None
    # wrapped once: each wrapper would reduce the gradients again
    wrapped = DistributedDataParallel(model) if sampler.world > 1 else model
    trainer = Trainer(config, model, wrapped, optimiser, sampler, log)
    while state.epoch < config.epochs and state.stale < config.validation.patience:
        state = trainer.epoch(state)
        if log is not None:
            save_checkpoint(run_folder, model, optimiser, state)
    if gather.world_size() > 1:
        dist.barrier()  # nobody leaves before the last checkpoint is complete
    return state


@dataclass(slots=True)
class Trainer:
    """A model in training. ``epoch`` is one pass over the data, and validation where it is due."""

    config: TrainingConfig
    model: TwoTower
    wrapped: nn.Module  # the model, under DistributedDataParallel where there are several ranks
    optimiser: torch.optim.Optimizer
    sampler: Sampler
    log: "_Log | None"

    def epoch(self, state: TrainState) -> TrainState:
        config, steps = self.config, self.sampler.steps_per_epoch
        device = self.model.log_temperature.device
        log_q = log_frequencies(self.sampler.data, device) if config.loss.logq else None
        self.model.train()
        step = state.step
        if self.log is not None:
            self.log.start(step)
        for batch in self.sampler.epoch(state.epoch):
            rate = learning_rate(config.optimiser, step, steps * config.epochs)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            generator = torch.Generator(device).manual_seed(_step_seed(config.seed, step))
            terms = batch_loss(self.wrapped, config, batch, log_q, generator)
            self.optimiser.zero_grad()
            terms.loss.backward()  # type: ignore[no-untyped-call]
            self.optimiser.step()
            self.model.clamp_temperature()
            step += 1
            if step % LOG_STEPS == 0 or step == state.step + steps:
                self._log_step(terms, step, state.epoch + 1, rate)
        state = replace(state, epoch=state.epoch + 1, step=step)
        due = state.epoch % config.validation.every_epochs == 0 or state.epoch == config.epochs
        if due and len(self.sampler.data.val.items):
            state = self._validate(state)
        return state

    def _validate(self, state: TrainState) -> TrainState:
        started = time.perf_counter()
        recall = validation_recall(self.model, self.sampler, self.config)
        if self.log is not None:
            seconds = time.perf_counter() - started
            name = f"recall@{self.config.validation.k}"
            self.log.write("validation", epoch=state.epoch, seconds=seconds, **{name: recall})
        if state.best_value is None or recall > state.best_value:
            return replace(state, best_epoch=state.epoch, best_value=recall, stale=0)
        return replace(state, stale=state.stale + 1)

    def _log_step(self, terms: LossTerms, step: int, epoch: int, rate: float) -> None:
        values = torch.stack([terms.loss.detach(), terms.accuracy, terms.masked])
        if gather.world_size() > 1:
            dist.all_reduce(values)
        loss, accuracy, masked = (values / gather.world_size()).tolist()
        if self.log is not None:
            self.log.step(
                step,
                epoch=epoch,
                total_steps=self.sampler.steps_per_epoch * self.config.epochs,
                loss=loss,
                in_batch_accuracy=accuracy,
                masked_share=masked,
                temperature=self.model.temperature().item(),
                learning_rate=rate,
            )


def validation_recall(model: TwoTower, sampler: Sampler, config: TrainingConfig) -> float:
    """Recall@k on the val split over the whole corpus, train items left out of the ranking.

    The users are the same each time; every rank embeds its share of the items and ranks its share
    of the users.
    """
    data, settings = sampler.data, config.validation
    users = np.flatnonzero(data.val.lengths)
    rng = np.random.default_rng([config.seed, settings.max_users])
    users = sample_users(users, settings.max_users, rng)[sampler.rank :: sampler.world]
    model.eval()
    train = data.train.take(users)
    queries = encode_queries(model, data.users.take(users), train, data.items)
    vectors = all_item_vectors(model, data.items)  # a rank without users takes part in it too
    total = torch.zeros(2, dtype=torch.float64)
    if len(users):
        k = min(settings.k, len(data.items))
        _, ranked = rank_exact(queries, vectors, k=k, exclude=train)
        recall = score_lists(ranked, data.val.take(users), (k,)).values[f"recall@{k}"]
        total = torch.tensor([recall.sum(), len(recall)], dtype=torch.float64)
    total = total.to(model.log_temperature.device)
    if gather.world_size() > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


def all_item_vectors(model: TwoTower, items: Block) -> FloatArray:
    """(items, dim) float32 on every rank, of which each has embedded every W-th; a collective."""
    world = gather.world_size()
    share = -(-len(items) // world)
    # the shares are of one length: the last ones go on with the first items, cut off below
    rows = np.arange(gather.rank(), share * world, world) % len(items)
    local = torch.from_numpy(encode_items(model, items.take(rows)))
    gathered = gather.gather_values(local.to(model.log_temperature.device)).cpu()
    in_order = gathered.reshape(world, share, model.dim).transpose(0, 1)
    vectors: FloatArray = in_order.reshape(-1, model.dim)[: len(items)].numpy()
    return vectors


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW; biases, norms and the temperature do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS)


def learning_rate(config: OptimiserConfig, step: int, total_steps: int) -> float:
    """Linear from 0 over the warm-up, then half a cosine down to 0 at the end."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _step_seed(seed: int, step: int) -> int:
    """Dropout differs by rank; the batches do not need to."""
    entropy = np.random.SeedSequence([seed, step, gather.rank()])
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)


def trim_log(path: Path, epoch: int) -> None:
    """Cuts off what was logged after ``epoch``, and a half line: a resumed run writes it again."""
    if not path.exists():
        return
    kept = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["epoch"] > epoch:
            break
        kept += len(line)
    os.truncate(path, kept)


class _Log:
    """One JSON object a line, appended, so that a resumed run goes on in the same file."""

    def __init__(
        self, path: Path, on_event: Callable[[Event], None] | None, batch_size: int
    ) -> None:
        self._path = path
        self._on_event = on_event
        self._batch_size = batch_size
        self._last = (0, time.perf_counter())

    def start(self, step: int) -> None:
        """Starts the clock of examples/s at ``step``: what came since the last one is not training.

        That is validation, and writing a checkpoint.
        """
        self._last = (step, time.perf_counter())

    def write(self, kind: str, **values: Any) -> None:
        event = {"event": kind, "time": time.time(), **values}
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")
        if self._on_event is not None:
            self._on_event(event)

    def step(self, step: int, **values: Any) -> None:
        (before, at), now = self._last, time.perf_counter()
        self._last = (step, now)
        speed = (step - before) * self._batch_size / (now - at)
        self.write("step", step=step, examples_per_s=speed, **values)
