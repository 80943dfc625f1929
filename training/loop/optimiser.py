"""The optimiser of a run: AdamW, its schedule, clipping, and embedding tables apart.

Everything it does at a step follows from the step's number and its own moments, so a checkpoint
is those moments and nothing else.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardline.training.config.training_config import OptimiserConfig
from shardline.training.loop.row_adam import RowAdam, average_rows, tables

BETA1 = 0.9  # of Adam's first moment
# From so many rows per lookup of a step on, lazy updates are the faster ones: measured on two cores
# of an EPYC with tables of 10,000 to 1,000,000 rows of 64 and 2048 lookups per step. Below two,
# sorting the rows costs more than it saves.
SPARSE_ROWS = 4


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimiser step did. norm: of the averaged gradient before clipping, () float32."""

    rate: float
    norm: Tensor | None  # where it was asked for, or clipped by


class Optimiser:
    """Dense AdamW over most parameters, lazy AdamW over the tables named ``sparse``.

    Biases, norms and the temperature do not decay.
    """

    def __init__(
        self, model: nn.Module, config: OptimiserConfig, *, sparse: list[str], total_steps: int
    ) -> None:
        self._config = config
        self._total_steps = total_steps
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names = {parameter: name for name, parameter in trained.items()}
        betas = (BETA1, config.beta2)
        self._rows = {name: RowAdam.of(trained[name], betas) for name in sparse}
        table_names = tables(model).keys()
        dense = {name: p for name, p in trained.items() if name not in self._rows}
        self._tables = [p for name, p in dense.items() if name in table_names]
        others = [p for name, p in dense.items() if name not in table_names]
        decay = 0.0 if config.embedding_decay == "l2" else embedding_decay(config)
        groups = [
            {"params": self._tables, "weight_decay": decay},
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        # one pass over the memory instead of one per operation: four times faster on a CPU
        self._adam = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)

    @property
    def sparse(self) -> list[str]:
        """Names of the tables with lazy updates."""
        return list(self._rows)

    def zero_grad(self) -> None:
        for parameter in self._names:
            parameter.grad = None

    def step(self, step: int, *, measure: bool) -> Update:
        """The update number ``step``, from 0, by the gradients of every rank; a collective.

        measure: whether the norm is wanted even where nothing is clipped.
        """
        config = self._config
        rate = learning_rate(config, step, self._total_steps)
        table_rate = rate * (config.embedding_learning_rate or config.learning_rate)
        table_rate /= config.learning_rate
        rows = {name: average_rows(table.weight) for name, table in self._rows.items()}
        norm = None
        if measure or config.clip_norm is not None:
            norm = self._norm_and_clip([gradient.values() for gradient in rows.values()])
        decay, l2 = embedding_decay(config), config.embedding_decay == "l2"
        for name, gradient in rows.items():
            self._rows[name].step(gradient, step + 1, table_rate, decay, l2=l2)
        if l2 and decay:
            for parameter in self._tables:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=decay)
        for place, group in enumerate(self._adam.param_groups):
            group["lr"] = rate if place else table_rate
        self._adam.step()
        return Update(rate, norm)

    def state_dict(self) -> dict[str, Tensor]:
        """Adam's moments and counts as ``<parameter>/<name>``."""
        tensors = {
            f"{name}/{key}": value
            for parameter, name in self._names.items()
            for key, value in self._adam.state.get(parameter, {}).items()
        }
        for name, table in self._rows.items():
            tensors[f"{name}/exp_avg"] = table.exp_avg
            tensors[f"{name}/exp_avg_sq"] = table.exp_avg_sq
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what ``state_dict`` of an optimiser of the same model and settings gave."""
        for parameter, name in self._names.items():
            state = {
                key.removeprefix(f"{name}/"): value
                for key, value in tensors.items()
                if key.startswith(f"{name}/")
            }
            if name in self._rows:
                self._rows[name].exp_avg.copy_(state["exp_avg"])
                self._rows[name].exp_avg_sq.copy_(state["exp_avg_sq"])
            elif state:
                self._adam.state[parameter] = {
                    key: value.to(parameter.device) for key, value in state.items()
                }

    def _norm_and_clip(self, rows: list[Tensor]) -> Tensor:
        """The norm of all gradients together; scales them in place where it is over the limit."""
        gradients = [p.grad for group in self._adam.param_groups for p in group["params"]]
        found = [gradient for gradient in gradients if gradient is not None] + rows
        norm = torch.nn.utils.get_total_norm(found)
        limit = self._config.clip_norm
        if limit is not None:
            torch._foreach_mul_(found, (limit / norm).clamp(max=1.0))
        return norm


def embedding_decay(config: OptimiserConfig) -> float:
    own = config.embedding_weight_decay
    return config.weight_decay if own is None else own


def learning_rate(config: OptimiserConfig, step: int, total_steps: int) -> float:
    """Linear from 0 over the warm-up, then as ``schedule`` says: half a cosine to 0, or level."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def choose_sparse(
    model: nn.Module, config: OptimiserConfig, lookups: Mapping[str, float]
) -> list[str]:
    """Names of the tables that shall give sparse gradients; sets them to do so.

    lookups: rows that a step of all ranks together reads, by the name of the table, so that a run
    may be resumed with other ranks. Before DistributedDataParallel wraps the model.
    """
    chosen = []
    for name, table in tables(model).items():
        large = table.num_embeddings >= SPARSE_ROWS * lookups[name]
        mode = config.embedding_gradients
        if mode == "sparse" or (mode == "auto" and large):
            table.sparse = True
            chosen.append(name)
    return chosen
