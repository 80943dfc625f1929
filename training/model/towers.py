"""The two towers: input rows, an MLP with a linear path around it, a vector of length one; with
``training.metric`` dot, of any length.

    item:  embeddings | means of bags | numbers | pooled id vectors of its users | share of audience
    query: the same of its own columns | pooled input rows of the past items | share of history

The past items go through the item tower's own embeddings, so both towers share them; of an item in
a history its users do not count. An item's users go by the query tower's table of user ids: each
tower reads one hop of the interactions, and nothing of the other one's rows. LayerNorm,
never BatchNorm: batch statistics would tell a row which column is its positive. The linear path
carries bilinear structure (attribute . interest) straight to the output. Under projection
``identity`` the parts are added up instead, and there is nothing after them. Tied towers are the
item tower alone, which encodes queries too.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from shardline.shards.core.schema import IdArray
from shardline.training.config.loss_config import LossConfig
from shardline.training.config.tower_config import EmbeddedFeature, TowerConfig
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.csr import Csr
from shardline.training.features.audience import Audience
from shardline.training.features.fitted import Block, Columns, FeatureSpace
from shardline.training.model.pooling import HistoryPooling

SWEEP = 16  # values a row up to which marking them all is cheaper than sorting the rows
EXTRAS = 2  # of a history or an audience: share of max_length that is filled, whether there is none


@dataclass(frozen=True, slots=True)
class Inputs:
    """Input rows on the device: categorical (n, C) int64, numeric (n, F) float32.

    bags: of each bag column the embedding rows of m bags, end to end, and where each begins and the
    last one ends (m + 1,). places (n,): the bag of each input row; None where bag i is row i's.
    audience: of items whose tower has one.
    """

    categorical: Tensor
    numeric: Tensor
    bags: tuple[tuple[Tensor, Tensor], ...] = ()
    places: Tensor | None = None
    audience: "AudienceInputs | None" = None

    @classmethod
    def of(cls, block: Block, device: torch.device) -> "Inputs":
        def on_device(bag: Csr) -> tuple[Tensor, Tensor]:
            return torch.from_numpy(bag.items).to(device), torch.from_numpy(bag.indptr).to(device)

        bags, places = block.bags, None
        if bags and block.sources is not None:
            # a history names an item many times, and averaging its text once is far cheaper
            first, inverse = distinct(block.sources)
            bags, places = block.take(first).bags, torch.from_numpy(inverse).to(device)
        return cls(
            torch.from_numpy(block.categorical).to(device),
            torch.from_numpy(block.numeric).to(device),
            tuple(on_device(bag) for bag in bags),
            places,
            None if block.audience is None else AudienceInputs.of(block.audience, device),
        )


@dataclass(frozen=True, slots=True)
class AudienceInputs:
    """users (m,) int64: embedding rows of the different users of n items. places (sum of lengths,)
    int64: which of them each user of an item is, oldest first, item after item. lengths (n,).
    """

    users: Tensor
    places: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, audience: Audience, device: torch.device) -> "AudienceInputs":
        lists = audience.lists
        if lists.lengths.max(initial=0) > audience.longest:
            lists = lists.take(np.arange(len(lists.lengths)), audience.longest)
        first, places = distinct(lists.items)
        arrays = (lists.items[first], places, lists.lengths)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


@dataclass(frozen=True, slots=True)
class QueryInputs:
    """b queries: their own columns, and their past items.

    history: input rows of the different items among them all. history_places (sum of lengths,)
    int64: which of these each past item is, oldest first, query after query. history_lengths (b,).
    """

    columns: Inputs
    history: Inputs
    history_places: Tensor
    history_lengths: Tensor

    @classmethod
    def of(
        cls, users: Block, history: Block, lengths: IdArray, device: torch.device
    ) -> "QueryInputs":
        """history: the past items' rows end to end, of one table if they know their sources."""
        places = np.arange(len(history))
        if history.sources is not None and len(history):
            first, places = distinct(history.sources)
            history = history.take(first)
        return cls(
            Inputs.of(users, device),
            Inputs.of(history, device),
            torch.from_numpy(places).to(device),
            torch.from_numpy(lengths).to(device),
        )


class InputRows(nn.Module):
    """Embeds the columns of one tower: (n, width), side by side with the numbers, or added up."""

    def __init__(self, columns: Columns, config: TowerConfig, dim: int) -> None:
        super().__init__()
        embedded = (f for f in config.features or () if isinstance(f, EmbeddedFeature))
        norms = {feature.column: feature.init_norm for feature in embedded}
        self.embeddings = nn.ModuleList(
            _initialised(nn.Embedding(vocabulary.rows, vocabulary.dim), norms[vocabulary.column])
            for vocabulary in columns.vocabularies
        )
        self.bags = nn.ModuleList(
            _initialised(
                nn.EmbeddingBag(bag.rows, bag.dim, mode="mean", include_last_offset=True),
                norms[bag.column],
            )
            for bag in columns.bags
        )
        self.summed = config.projection == "identity"
        self.width = dim if self.summed else columns.width

    def forward(self, inputs: Inputs) -> Tensor:
        parts: list[Tensor] = [
            embedding(inputs.categorical[:, place])
            for place, embedding in enumerate(self.embeddings)
        ]
        for bag, rows in zip(self.bags, inputs.bags, strict=True):
            means = bag(*rows)
            parts.append(means if inputs.places is None else means[inputs.places])
        if not self.summed:
            return torch.cat([*parts, inputs.numeric], dim=1)
        if not parts:
            return inputs.numeric.new_zeros(len(inputs.numeric), self.width)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


class Tower(nn.Module):
    """(n, width) -> (n, dim) float32, of length one if ``unit``."""

    def __init__(self, width: int, config: TowerConfig, dim: int, *, unit: bool) -> None:
        super().__init__()
        self.unit = unit
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
        return _vectors(self.output(deep) + self.skip(rows), unit=self.unit)


class IdentityTower(nn.Module):
    """(n, dim) -> (n, dim) float32, of length one if ``unit``: the input rows are the output."""

    def __init__(self, *, unit: bool) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        return _vectors(rows, unit=self.unit)


class TwoTower(nn.Module):
    """Both towers, the input rows they share, and the temperature.

    Tied, there is no ``query_rows`` and no ``query_tower``.
    """

    def __init__(self, config: TrainingConfig, space: FeatureSpace) -> None:
        super().__init__()
        towers = config.towers
        self.dim = config.dim
        self.loss_config: LossConfig = config.loss
        self.history_length = space.history.max_length if space.history else 0
        self.item_rows = InputRows(space.item, towers.item, config.dim)
        self.tied = towers.tied
        if not self.tied:
            self.query_rows = InputRows(space.query, towers.query, config.dim)
        self.history = HistoryPooling(space.history, self.item_rows.width)
        pooled = self.item_rows.width + EXTRAS if space.history else 0
        self.audience_length = space.audience.max_length if space.audience else 0
        self._user_ids = space.user_ids if space.audience else -1  # among the query's embeddings
        user_width = space.query.vocabularies[self._user_ids].dim if space.audience else 0
        self.audience = HistoryPooling(space.audience, user_width)
        audience_width = user_width + EXTRAS if space.audience else 0
        self.unit = unit = config.metric == "cosine"
        item_width = self.item_rows.width + audience_width
        self.item_tower = _tower(item_width, towers.item, config.dim, unit=unit)
        if not self.tied:
            width = self.query_rows.width + pooled
            self.query_tower = _tower(width, towers.query, config.dim, unit=unit)
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
        rows: Tensor = self.item_rows(items)
        if self.audience_length:
            part = self.audience_rows(items)
            rows = rows + part if self.item_rows.summed else torch.cat([rows, part], dim=1)
        embedded: Tensor = self.item_tower(rows, generator)
        return embedded

    def audience_rows(self, items: Inputs) -> Tensor:
        """(n, width of a user's vector) pooled users of each item; unless inputs are summed, two
        numbers more: share of the longest audience that is filled, 1 where there is none.
        """
        given = items.audience
        assert given is not None, "the items of a tower with an audience have one"
        pooled: Tensor = self.audience(
            self.query_rows.embeddings[self._user_ids](given.users), given.places, given.lengths
        )
        if self.item_rows.summed:
            return pooled
        return torch.cat([pooled, _extras(given.lengths, self.audience_length)], dim=1)

    def encode_queries(
        self, queries: QueryInputs, generator: torch.Generator | None = None
    ) -> Tensor:
        if self.tied:
            return self.encode_items(queries.columns, generator)
        rows = self.query_rows(queries.columns)
        if self.history_length:
            lengths = queries.history_lengths
            items = self.item_rows(queries.history)
            pooled = self.history(items, queries.history_places, lengths)
            if self.query_rows.summed:
                rows = rows + pooled
            else:
                rows = torch.cat([rows, pooled, _extras(lengths, self.history_length)], dim=1)
        embedded: Tensor = self.query_tower(rows, generator)
        return embedded

    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Puts the parameter itself back in range: a clamp in the graph would end its gradient."""
        low, high = self.loss_config.min_temperature, self.loss_config.max_temperature
        self.log_temperature.clamp_(math.log(low), math.log(high))


def build_model(config: TrainingConfig, space: FeatureSpace) -> TwoTower:
    """Fresh weights that depend on the seed alone; torch's own random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return TwoTower(config, space)


def distinct(rows: IdArray) -> tuple[IdArray, IdArray]:
    """Where each value >= 0 of ``rows`` stands, by ascending value, and which of them each row is.

    As numpy.unique's return_index and return_inverse, but any of equal ones may stand for them.
    """
    size = rows.max(initial=-1) + 1
    if size > SWEEP * len(rows):
        _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
        return first, inverse
    where = np.full(size, -1)
    where[rows] = np.arange(len(rows))
    found = where >= 0
    return where[found], (np.cumsum(found) - 1)[rows]


def _tower(width: int, config: TowerConfig, dim: int, *, unit: bool) -> Tower | IdentityTower:
    if config.projection == "identity":
        return IdentityTower(unit=unit)
    return Tower(width, config, dim, unit=unit)


def _extras(lengths: Tensor, longest: int) -> Tensor:
    """(n, EXTRAS) float32 of (n,) lengths: the share of ``longest``, and 1 where it is 0."""
    return torch.stack([lengths / longest, (lengths == 0).float()], dim=1)


def _initialised(table: nn.Embedding | nn.EmbeddingBag, norm: float) -> nn.Module:
    """Rows of about length ``norm``."""
    nn.init.normal_(table.weight, std=norm * table.embedding_dim**-0.5)
    return table


def _vectors(rows: Tensor, *, unit: bool) -> Tensor:
    rows = rows.float()  # bfloat16 would leave lengths 0.4 % off
    return functional.normalize(rows, dim=1) if unit else rows


def _dropout_scale(values: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(values.shape, generator=generator, device=values.device) >= rate
    return kept / (1 - rate)
