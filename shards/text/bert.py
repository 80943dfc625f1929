"""BERT's layers in numpy: numbers of pieces to states (Devlin et al. 2018, arXiv 1810.04805).

Dropout is left out, as when a model is used. ``training.features.torch_bert`` is the same in torch.
"""

import math

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.encoder_files import Weights
from shardline.shards.core.errors import CorruptFile
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.text.model_folder import TextModel

LAYER = "encoder.layer.{}."
LINEARS = ("attention.output.dense", "intermediate.dense", "output.dense")
NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
PARTS = ("word", "position", "token_type")
TABLES = tuple(f"embeddings.{part}_embeddings.weight" for part in PARTS)
# erf to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26); numpy has none
ERF_T = 0.3275911
ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
MASKED = np.float32(-1e9)  # added to the score of padding; its share is 0 then


class Bert:
    """Immutable once made, so threads may share it."""

    def __init__(self, model: TextModel, weights: Weights) -> None:
        """Raises CorruptFile: a tensor is missing, or its shape does not fit."""
        self._model = model
        try:
            self._words, self._positions, types = (weights[name] for name in TABLES)
            self._type = types[0]
            self._norm = _norm(weights, "embeddings.LayerNorm")
            self._layers = [
                _Layer(model, weights, LAYER.format(number)) for number in range(model.layers)
            ]
        except (KeyError, ValueError, IndexError) as error:
            raise CorruptFile(f"{model.folder}: not a BERT", got=repr(error)) from error
        if self._words.shape[1:] != (model.width,):
            raise CorruptFile(
                f"{model.folder}: tables of another width",
                expected=str(model.width),
                got=str(self._words.shape[1:]),
            )

    @property
    def rows(self) -> int:
        """Of the table of pieces."""
        return len(self._words)

    def __call__(self, numbers: IdArray, mask: NDArray[np.bool_]) -> FloatArray:
        """(n, t, width) float32 of the last layer; numbers (n, t), mask (n, t) False in padding."""
        length = numbers.shape[1]
        states = self._words[numbers] + self._positions[:length] + self._type
        states = _normed(states, self._norm, self._model.epsilon)
        hidden = np.where(mask, np.float32(0), MASKED)[:, None, None, :]
        for layer in self._layers:
            states = layer(states, hidden)
        return states


class _Layer:
    """Attention and a feed-forward part, each added to what came in, then normalised."""

    def __init__(self, model: TextModel, weights: Weights, prefix: str) -> None:
        self._heads, self._epsilon = model.heads, model.epsilon
        parts = [f"{prefix}attention.self.{name}" for name in ("query", "key", "value")]
        # one product instead of three
        joined = np.concatenate([weights[f"{part}.weight"] for part in parts])
        self._project = np.ascontiguousarray(joined.T)
        self._project_bias = np.concatenate([weights[f"{part}.bias"] for part in parts])
        self._linears = [
            (np.ascontiguousarray(weights[f"{name}.weight"].T), weights[f"{name}.bias"])
            for name in (f"{prefix}{each}" for each in LINEARS)
        ]
        self._norms = [_norm(weights, f"{prefix}{each}") for each in NORMS]

    def __call__(self, states: FloatArray, hidden: FloatArray) -> FloatArray:
        after_attention, widen, narrow = self._linears
        mixed = _linear(self._attention(states, hidden), after_attention)
        states = _normed(mixed + states, self._norms[0], self._epsilon)
        inner = _linear(gelu(_linear(states, widen)), narrow)
        return _normed(inner + states, self._norms[1], self._epsilon)

    def _attention(self, states: FloatArray, hidden: FloatArray) -> FloatArray:
        count, length, width = states.shape
        projected = _linear(states, (self._project, self._project_bias))
        shape = count, length, 3, self._heads, width // self._heads
        query, key, value = projected.reshape(shape).transpose(2, 0, 3, 1, 4)
        scores = query @ key.swapaxes(2, 3) / np.float32(math.sqrt(width // self._heads)) + hidden
        scores = np.exp(scores - scores.max(axis=3, keepdims=True))
        shares = scores / scores.sum(axis=3, keepdims=True)
        mixed: FloatArray = (shares @ value).swapaxes(1, 2).reshape(count, length, width)
        return mixed


def gelu(x: FloatArray) -> FloatArray:
    """x times the normal distribution's share below x (Hendrycks and Gimpel 2016)."""
    scaled = np.abs(x) * np.float32(math.sqrt(0.5))
    t = 1 / (1 + np.float32(ERF_T) * scaled)
    polynomial = np.full_like(t, ERF[0])
    for factor in ERF[1:]:
        polynomial = polynomial * t + np.float32(factor)
    erf = 1 - polynomial * t * np.exp(-scaled * scaled)
    result: FloatArray = np.float32(0.5) * x * (1 + np.copysign(erf, x))
    return result


def _linear(x: FloatArray, weights: tuple[FloatArray, FloatArray]) -> FloatArray:
    matrix, bias = weights
    # as one matrix of all pieces: numpy multiplies a stack of matrices one by one
    flat = x.reshape(-1, x.shape[-1]) @ matrix + bias
    product: FloatArray = flat.reshape(*x.shape[:-1], -1)
    return product


def _norm(weights: Weights, name: str) -> tuple[FloatArray, FloatArray]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _normed(x: FloatArray, norm: tuple[FloatArray, FloatArray], epsilon: float) -> FloatArray:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    result: FloatArray = centred / np.sqrt(variance + np.float32(epsilon)) * norm[0] + norm[1]
    return result
