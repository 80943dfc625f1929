"""The two towers: input rows, an MLP with a linear path around it, a vector of length one.

    query: embeddings | numbers | mean of the past items' input rows | share of history
    item:  embeddings | numbers

The past items go through the item tower's own embeddings, so both towers share them. LayerNorm,
never BatchNorm: batch statistics would tell a row which column is its positive. The linear path
carries bilinear structure (attribute . interest) straight to the output.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from shards.schema import IdArray
from training.config import LossConfig, TowerConfig, TrainingConfig
from training.features import Block, Columns, FeatureSpace

HISTORY_EXTRAS = 2  # share of max_length that is filled, and whether there is none


@dataclass(frozen=True, slots=True)
class Inputs:
    """Input rows on the device: categorical (n, C) int64, numeric (n, F) float32."""

    categorical: Tensor
    numeric: Tensor

    @classmethod
    def of(cls, block: Block, device: torch.device) -> "Inputs":
        return cls(
            torch.from_numpy(block.categorical).to(device),
            torch.from_numpy(block.numeric).to(device),
        )


@dataclass(frozen=True, slots=True)
class QueryInputs:
    """b queries: their own columns, and their past items' rows (sum of lengths, ...) end to end."""

    columns: Inputs
    history: Inputs
    history_lengths: Tensor  # (b,) int64

    @classmethod
    def of(
        cls, users: Block, history: Block, lengths: IdArray, device: torch.device
    ) -> "QueryInputs":
        return cls(
            Inputs.of(users, device),
            Inputs.of(history, device),
            torch.from_numpy(lengths).to(device),
        )


class InputRows(nn.Module):
    """Embeds the categorical columns of one tower and appends the numeric ones: (n, width)."""

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(
            _embedding(vocabulary.rows, vocabulary.dim) for vocabulary in columns.vocabularies
        )

    def forward(self, inputs: Inputs) -> Tensor:
        embedded = [
            embedding(inputs.categorical[:, place])
            for place, embedding in enumerate(self.embeddings)
        ]
        return torch.cat([*embedded, inputs.numeric], dim=1)


class Tower(nn.Module):
    """(n, width) -> (n, dim) of length one."""

    def __init__(self, width: int, config: TowerConfig, dim: int) -> None:
        super().__init__()
        widths = [width, *config.hidden]
        self.dropout = config.dropout
        self.hidden = nn.ModuleList(
            nn.Linear(before, after) for before, after in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(after) for after in config.hidden)
        self.output = nn.Linear(widths[-1], dim)
        self.skip = nn.Linear(width, dim, bias=False)

    def forward(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        deep = rows
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            deep = functional.relu(norm(linear(deep)))
            if generator is not None and self.dropout:
                deep = deep * _dropout_scale(deep, self.dropout, generator)
        return functional.normalize(self.output(deep) + self.skip(rows), dim=1)


class TwoTower(nn.Module):
    """Both towers, the input rows they share, and the temperature."""

    def __init__(self, config: TrainingConfig, space: FeatureSpace) -> None:
        super().__init__()
        towers = config.towers
        self.dim = config.dim
        self.loss_config: LossConfig = config.loss
        self.history_length = space.history.max_length if space.history else 0
        self.item_rows = InputRows(space.item)
        self.query_rows = InputRows(space.query)
        pooled = space.item.width + HISTORY_EXTRAS if space.history else 0
        self.item_tower = Tower(space.item.width, towers.item, config.dim)
        self.query_tower = Tower(space.query.width + pooled, towers.query, config.dim)
        self.log_temperature = nn.Parameter(
            torch.tensor(config.loss.temperature).log(),
            requires_grad=config.loss.learn_temperature,
        )

    def forward(
        self, queries: QueryInputs, items: Inputs, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(b, dim) queries, (b, dim) items, () temperature. The generator draws dropout, if any."""
        return (
            self.encode_queries(queries, generator),
            self.encode_items(items, generator),
            self.temperature(),
        )

    def encode_items(self, items: Inputs, generator: torch.Generator | None = None) -> Tensor:
        embedded: Tensor = self.item_tower(self.item_rows(items), generator)
        return embedded

    def encode_queries(
        self, queries: QueryInputs, generator: torch.Generator | None = None
    ) -> Tensor:
        rows = self.query_rows(queries.columns)
        if self.history_length:
            rows = torch.cat([rows, self._pooled(queries)], dim=1)
        embedded: Tensor = self.query_tower(rows, generator)
        return embedded

    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Puts the parameter itself back in range: a clamp in the graph would end its gradient."""
        low, high = self.loss_config.min_temperature, self.loss_config.max_temperature
        self.log_temperature.clamp_(math.log(low), math.log(high))

    def _pooled(self, queries: QueryInputs) -> Tensor:
        """(b, item width + 2): mean input row of the past items, zeros where there are none."""
        lengths = queries.history_lengths
        mean = torch.segment_reduce(
            self.item_rows(queries.history), "mean", lengths=lengths, initial=0.0
        )
        filled = (lengths / self.history_length)[:, None]
        return torch.cat([mean, filled, (lengths == 0).float()[:, None]], dim=1)


def build_model(config: TrainingConfig, space: FeatureSpace) -> TwoTower:
    """Fresh weights that depend on the seed alone; torch's own random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return TwoTower(config, space)


def _embedding(rows: int, dim: int) -> nn.Embedding:
    embedding = nn.Embedding(rows, dim)
    nn.init.normal_(embedding.weight, std=dim**-0.5)  # rows of about length one
    return embedding


def _dropout_scale(values: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(values.shape, generator=generator, device=values.device) >= rate
    return kept / (1 - rate)
