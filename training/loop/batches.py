"""The batches that each rank draws from the prepared data (``training.features.prepared``).

Users and items go by their row in users.parquet and items.parquet, not by id. The order of examples
and the values hidden from the model depend on (seed, epoch, step) alone: the global batch is the
same for any number of ranks, and a resumed run draws what it would have.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.errors import ConfigError
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.config.loss_config import LossConfig
from shardline.training.data.csr import Csr, places_of
from shardline.training.features.audience import Audience
from shardline.training.features.fitted import Block
from shardline.training.features.prepared import TrainingData
from shardline.training.loss.negatives import Negatives, check_hard, draw

FITTING_STEPS = 8  # per epoch, at least, of the batch that is proposed for few examples


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of a step: b examples, one positive item each.

    users, items: input rows of both towers; items are the positives, then ``negatives.encoded``.
    history: input rows of the past items of all b users, one user after the other, history_lengths
    (b,) int64 of them each. user_rows and item_rows (b,) int64: the interactions. known: (P,) pairs
    of an example, 0 to b - 1, and an item its user has in train, or of tied towers is. weights (b,)
    float32: of the examples in the loss; None where all are alike.
    """

    users: Block
    items: Block
    history: Block
    history_lengths: IdArray
    user_rows: IdArray
    item_rows: IdArray
    known_rows: IdArray
    known_items: IdArray
    negatives: Negatives
    weights: FloatArray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Which examples one rank sees at each step, and what is hidden from the model in them."""

    data: TrainingData
    batch_size: int  # global
    rank: int
    world: int
    seed: int
    unknown_rate: float
    history_length: int  # 0 without a history feature
    loss: LossConfig  # which negatives to draw
    hard: Csr | None = None  # mined item rows per user row
    hard_from: int = 0  # epochs before it, counted from 0, have no mined negatives
    weights: FloatArray | None = field(init=False, repr=False)  # of all examples in the loss

    def __post_init__(self) -> None:
        weights = self.data.row_weights(self.loss.weight_exponent)
        object.__setattr__(self, "weights", weights)
        if not self.hard_from or self.hard is not None:
            check_hard(self.loss, self.hard, len(self.data.users))

    @property
    def steps_per_epoch(self) -> int:
        """The same on every rank: gloo aborts on uneven batches, so the rest is left out."""
        return len(self.data.train.items) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from its step ``start`` on, in order."""
        if epoch < self.hard_from:
            yield from self._without_mined().epoch(epoch, start)
            return
        check_hard(self.loss, self.hard, len(self.data.users))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data.train.items))
        for step in range(start, self.steps_per_epoch):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            # [seed, epoch, 0] is the stream of [seed, epoch], which ordered the examples
            yield self.batch(rows, np.random.default_rng([self.seed, epoch, step + 1]))

    def batch(self, rows: IdArray, rng: np.random.Generator) -> Batch:
        """This rank's slice of the global batch of train interactions ``rows``."""
        data, size = self.data, len(rows) // self.world
        mine = slice(self.rank * size, (self.rank + 1) * size)
        num_user, num_item = data.users.hideable, data.items.hideable
        # drawn for the global batch and cut, so that the ranks together see what one would
        draws = rng.random((len(rows), num_user + num_item + 1), dtype=np.float32)
        hidden = draws[mine] < self.unknown_rate
        users, items = data.train_users[rows[mine]], data.train.items[rows[mine]]
        history = self._history(users, rows[mine])
        lengths = np.where(hidden[:, -1], 0, history.lengths)
        kept = np.repeat(~hidden[:, -1], history.lengths)
        known = data.known(users)
        drawn = draw(self.loss, data.train_users[rows], len(data.items), self.hard, rng)
        negatives = drawn.of_rank(self.rank, self.world)
        hidden_items = np.concatenate([hidden[:, num_user:-1], self._hidden_negatives(drawn, rng)])
        encoded = np.concatenate([items, negatives.encoded])
        blocks = data.items.alone().take(encoded)
        if data.items.audience is not None:
            audience = self._audiences(data.items.audience, users, encoded, drawn, rng)
            blocks = replace(blocks, audience=audience)
        return Batch(
            users=data.users.take(users).hide(hidden[:, :num_user]),
            items=blocks.hide(hidden_items),
            history=data.items.alone().take(history.items[kept]),
            history_lengths=lengths,
            user_rows=users,
            item_rows=items,
            known_rows=np.repeat(np.arange(size), known.lengths),
            known_items=known.items,
            negatives=negatives,
            weights=None if self.weights is None else self.weights[rows[mine]],
        )

    def _without_mined(self) -> "Sampler":
        """Rows without slots for mined items, so that none is encoded for nothing."""
        loss = self.loss.model_copy(update={"hard_negatives": 0})
        return replace(self, loss=loss, hard=None, hard_from=0)

    def _history(self, users: IdArray, rows: IdArray) -> Csr:
        """The past items of each example, the interactions ``rows`` of ``users``."""
        if self.data.keep_target:
            return self.data.train.take(users, self.history_length)
        return others(self.data.train, users, rows, self.history_length)

    def _audiences(
        self,
        audience: Audience,
        users: IdArray,
        encoded: IdArray,
        drawn: Negatives,
        rng: np.random.Generator,
    ) -> Audience:
        """Of the positives of ``users`` without them, then of the negatives without anyone."""
        if audience.keep_target:
            return audience.take(encoded)
        own = self.data.users.categorical[users, audience.user_column]
        draws = self._negative_draws(drawn, 1, rng)[:, 0]
        left = np.concatenate([own, audience.drawn(encoded[len(own) :], draws)])
        return audience.without(encoded, left)

    def _hidden_negatives(self, drawn: Negatives, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Which values of this rank's encoded negatives are hidden, at the rate of the positives.

        Were they not, a hidden value would give a positive away.
        """
        return self._negative_draws(drawn, self.data.items.hideable, rng) < self.unknown_rate

    def _negative_draws(
        self, drawn: Negatives, width: int, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """(n, width) in [0, 1) for this rank's n encoded negatives of the global ``drawn``."""
        parts = []
        for part in (drawn.uniform, drawn.hard, drawn.random):
            draws = rng.random((len(part), part[:1].size, width), dtype=np.float32)
            mine = np.split(draws, self.world)[self.rank]
            parts.append(mine.reshape(mine.shape[0] * mine.shape[1], width))
        return np.concatenate(parts)


def check_batch(batch_size: int, ranks: int, examples: int) -> None:
    """Raises ConfigError where a global batch does not split evenly, or exceeds the examples."""
    if batch_size % ranks:
        raise ConfigError(
            "the global batch does not split evenly",
            field="batch_size",
            expected=f"a multiple of {ranks} ranks",
            got=str(batch_size),
        )
    if batch_size > examples:
        raise ConfigError(
            "the global batch is larger than the train split",
            field="batch_size",
            expected=f"<= {examples}",
            got=str(batch_size),
            hint=f"--set training.batch_size={fitting_batch(examples, ranks)}",
        )


def fitting_batch(examples: int, ranks: int) -> int:
    """A global batch of which an epoch has FITTING_STEPS or more, a multiple of the ranks."""
    most = max(1, examples // FITTING_STEPS)
    return max(ranks, (1 << most.bit_length() - 1) // ranks * ranks)


def others(train: Csr, users: IdArray, rows: IdArray, newest: int) -> Csr:
    """The newest other items of each user: interaction ``rows[i]``, of users[i], is left out.

    That is what keeps the history from giving the answer away.
    """
    if newest == 0:
        return Csr(np.zeros(len(rows) + 1, np.int64), train.items[:0])
    ends = train.indptr[1:][users]
    # one more where the positive will be taken out of the window again
    starts = np.maximum(train.indptr[:-1][users], ends - newest - (rows >= ends - newest))
    window = places_of(starts, ends - starts)
    kept = window.items != rows[window.owners]
    return Csr.of(window.lengths - (rows >= starts), train.items[window.items[kept]])
