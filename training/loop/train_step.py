"""One step of one rank, forward and backward: the batch through the towers, gathered, its loss."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.config.training_config import TrainingConfig
from shardline.training.features.fitted import Block
from shardline.training.features.prepared import TrainingData
from shardline.training.loop.batches import Batch
from shardline.training.loss.loss_columns import Ids, Vectors
from shardline.training.loss.losses import LossTerms, step_loss
from shardline.training.loss.memory_bank import LossState
from shardline.training.model.towers import Inputs, QueryInputs

Encoded = tuple[Tensor, Tensor, Tensor]  # queries (b, dim), items (m, dim), temperature ()


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the towers read of a batch."""

    users: Block
    history: Block
    lengths: IdArray
    items: Block

    @classmethod
    def of(cls, batch: Batch) -> "_Inputs":
        return cls(batch.users, batch.history, batch.history_lengths, batch.items)

    def split(self, number: int) -> Iterator["_Inputs"]:
        """Parts of nearly equal size, in order."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        queries = np.array_split(np.arange(len(self.users)), number)
        items = np.array_split(np.arange(len(self.items)), number)
        for rows, item_rows in zip(queries, items, strict=True):
            history = np.arange(ends[rows[0]], ends[rows[-1] + 1])
            yield _Inputs(
                self.users.take(rows),
                self.history.take(history),
                self.lengths[rows],
                self.items.take(item_rows),
            )


class Step:
    """What a step needs besides the model. ``state`` belongs into checkpoints."""

    def __init__(self, config: TrainingConfig, data: TrainingData, device: torch.device) -> None:
        counts = torch.from_numpy(data.item_counts())
        self.state = LossState(config.loss, counts, config.dim).to(device)
        self._config = config
        self._num_items = len(data.items)
        self._device = device

    def run(self, wrapped: nn.Module, batch: Batch, generator: torch.Generator | None) -> LossTerms:
        """Adds the gradient of this rank's share of the loss to the parameters; a collective.

        wrapped: a TwoTower, or DistributedDataParallel around one, or autocast around either. The
        generator draws dropout. The loss comes back without its graph.
        """
        micro = self._config.micro_batch
        if micro is not None and micro < len(batch.items):
            return self._run_cached(wrapped, batch, generator, micro)
        terms = self._loss(self._encode(wrapped, _Inputs.of(batch), generator), batch)
        torch.autograd.backward(terms.loss)
        return _without_graph(terms)

    def _run_cached(
        self, wrapped: nn.Module, batch: Batch, generator: torch.Generator | None, micro: int
    ) -> LossTerms:
        """Gradient caching (Gao et al., RepL4NLP 2021): exact, and no graph larger than a chunk's.

        Encodes in chunks without a graph, takes the loss's gradient of the vectors, then encodes
        each chunk again, with the same dropout, and sends its vectors' gradient back. There are
        enough chunks for ``micro`` items in each, negatives among them, but none without a query.
        """
        number = min(-(-len(batch.items) // micro), len(batch.users))
        chunks = list(_Inputs.of(batch).split(number))
        draws, encoded = [], []
        for chunk in chunks:
            draws.append(None if generator is None else generator.get_state())
            with torch.no_grad():
                encoded.append(self._encode(wrapped, chunk, generator))
        queries, items, temperature = (
            leaf.requires_grad_()
            for leaf in (
                torch.cat([part[0] for part in encoded]),
                torch.cat([part[1] for part in encoded]),
                encoded[0][2].detach().clone(),
            )
        )
        terms = self._loss((queries, items, temperature), batch)
        torch.autograd.backward(terms.loss)
        sizes = [len(part[0]) for part in encoded], [len(part[1]) for part in encoded]
        gradients = zip(
            torch.split(_gradient(queries), sizes[0]),
            torch.split(_gradient(items), sizes[1]),
            strict=True,
        )
        for chunk, drawn, (query_gradient, item_gradient) in zip(
            chunks, draws, gradients, strict=True
        ):
            if generator is not None and drawn is not None:
                generator.set_state(drawn)
            is_last = chunk is chunks[-1]
            with nullcontext() if is_last else _no_sync(wrapped):
                again = self._encode(wrapped, chunk, generator)
                into = [query_gradient, item_gradient, _gradient(temperature)]
                count = 3 if is_last and again[2].requires_grad else 2
                torch.autograd.backward(again[:count], into[:count])
        return _without_graph(terms)

    def _encode(
        self, wrapped: nn.Module, inputs: "_Inputs", generator: torch.Generator | None
    ) -> Encoded:
        queries = QueryInputs.of(inputs.users, inputs.history, inputs.lengths, self._device)
        encoded: Encoded = wrapped(queries, Inputs.of(inputs.items, self._device), generator)
        return encoded

    def _loss(self, encoded: Encoded, batch: Batch) -> LossTerms:
        queries, items, temperature = encoded
        drawn = batch.negatives
        sizes = [len(queries), drawn.uniform.size, drawn.hard.size, drawn.random.size]
        positives, uniform, hard, random = torch.split(items, sizes)
        vectors = Vectors(
            queries=queries,
            items=positives,
            uniform=uniform,
            hard=hard.view(*drawn.hard.shape, items.shape[1]),
            random=random.view(*drawn.random.shape, items.shape[1]),
            temperature=temperature,
        )
        ids = Ids(
            users=self._tensor(batch.user_rows),
            items=self._tensor(batch.item_rows),
            uniform=self._tensor(drawn.uniform),
            hard=self._tensor(drawn.hard),
            random=self._tensor(drawn.random),
            known_rows=self._tensor(batch.known_rows),
            known_items=self._tensor(batch.known_items),
            weights=None if batch.weights is None else self._tensor(batch.weights),
        )
        return step_loss(self._config.loss, vectors, ids, self.state, self._num_items)

    def _tensor(self, rows: IdArray | FloatArray) -> Tensor:
        return torch.from_numpy(rows).to(self._device)


def _no_sync(wrapped: nn.Module) -> AbstractContextManager[None]:
    """Keeps DistributedDataParallel, wherever in ``wrapped`` it is, from reducing gradients."""
    for module in wrapped.modules():
        if isinstance(module, DistributedDataParallel):
            return module.no_sync()
    return nullcontext()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _without_graph(terms: LossTerms) -> LossTerms:
    return LossTerms(
        terms.loss.detach(),
        terms.accuracy,
        terms.masked,
        terms.positive_logit,
        terms.negative_logit,
    )
