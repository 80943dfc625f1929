"""Texts to vectors: tokenizer, transformer, pooling."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.encoder_files import Weights
from shardline.shards.core.errors import CorruptFile
from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.text.bert import Bert
from shardline.shards.text.model_folder import (
    TextModel,
    describe_model,
    find_model,
    read_tokenizer,
    read_weights,
)
from shardline.shards.text.word_piece import WordPiece

TEXTS_AT_ONCE = 32  # of similar length, so that little is padding
# With padding: a long text beside 31 short ones would cost as much as 32 long ones, and the tables
# of attention would leave the caches.
TOKENS_AT_ONCE = 2048
FRAME = 2  # tokens around those of a text's words

# numbers (n, t) int64 and mask (n, t), False in padding, to states (n, t, width) float32
Layers: TypeAlias = Callable[[IdArray, NDArray[np.bool_]], FloatArray]


class Unreadable(Exception):
    """The text at ``place`` has ``tokens`` tokens: more than the model reads, or none of a word."""

    def __init__(self, place: int, tokens: int) -> None:
        super().__init__(place, tokens)
        self.place, self.tokens = place, tokens


class TextEncoder:
    """Immutable once loaded, so threads may share it."""

    def __init__(self, model: TextModel, tokenizer: WordPiece, layers: Layers) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._layers = layers

    @classmethod
    def load(cls, name: str, make: Callable[[TextModel, Weights], Layers] = Bert) -> "TextEncoder":
        """The model that is called so, as ``find_model``; make: what computes its layers.

        Raises:
            NotFound, ConfigError, CorruptFile: as ``find_model``, ``describe_model``, ``Bert``.
        """
        model = describe_model(find_model(name))
        tokenizer = WordPiece(read_tokenizer(model), str(model.folder))
        weights = read_weights(model)
        rows = len(weights.get("embeddings.word_embeddings.weight", ()))
        if tokenizer.rows > rows:
            raise CorruptFile(
                f"{model.folder}: tokenizer and weights do not fit",
                expected=f"embeddings of {tokenizer.rows} pieces",
                got=str(rows),
            )
        return cls(model, tokenizer, make(model, weights))

    def encode(
        self, texts: Sequence[str], *, cut: bool = False, progress: Progress | None = None
    ) -> FloatArray:
        """(n, width) float32, in order. cut: whatever they are, of texts that are too long what the
        model reads.

        Progress stage: ``texts``.

        Raises:
            Unreadable: the first such text, unless ``cut``.
        """
        longest = self.model.max_tokens
        lists = [self._tokenizer.numbers(text) for text in texts]
        for place, numbers in enumerate(lists):
            if not cut and not FRAME < len(numbers) <= longest:
                raise Unreadable(place, len(numbers))
            if len(numbers) > longest:
                lists[place] = [*numbers[: longest - 1], numbers[-1]]
        vectors = np.empty((len(texts), self.model.width), np.float32)
        order = sorted(range(len(texts)), key=lambda place: len(lists[place]))
        start = 0
        while start < len(order):
            end = start + 1
            most = min(start + TEXTS_AT_ONCE, len(order))
            while end < most and (end + 1 - start) * len(lists[order[end]]) <= TOKENS_AT_ONCE:
                end += 1
            places = order[start:end]
            vectors[places] = self._pooled([lists[place] for place in places])
            if progress is not None:
                progress("texts", end, len(texts))
            start = end
        return vectors

    def _pooled(self, lists: list[list[int]]) -> FloatArray:
        lengths = np.array([len(numbers) for numbers in lists])
        mask = np.arange(lengths.max()) < lengths[:, None]
        numbers = np.zeros(mask.shape, np.int64)
        numbers[mask] = np.concatenate(lists)
        states = self._layers(numbers, mask)
        if self.model.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = np.where(mask[:, :, None], states, 0).sum(axis=1)
            pooled = pooled / lengths[:, None].astype(np.float32)
        if self.model.is_unit:
            pooled = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        vectors: FloatArray = pooled
        return vectors
