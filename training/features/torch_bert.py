"""BERT's layers in torch, for many texts and for GPUs: the twin of ``shards.text.bert``."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from shardline.shards.core.encoder_files import Weights
from shardline.shards.core.errors import ConfigError
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.text.bert import LAYER, LINEARS, NORMS, TABLES, Bert
from shardline.shards.text.model_folder import TextModel


class TorchBert:
    """As ``Bert``, on ``device``."""

    def __init__(self, model: TextModel, weights: Weights, device: str = "cpu") -> None:
        """Raises CorruptFile: as ``Bert``. ConfigError: there is no such device."""
        Bert(model, weights)  # whose checks hold here too
        self._model = model
        try:
            self._device = torch.device(device)
            self._weights = {
                name: torch.from_numpy(array).to(self._device) for name, array in weights.items()
            }
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                "no such device", field="--device", expected="cpu, cuda or cuda:<i>", got=device
            ) from error

    @torch.inference_mode()
    def __call__(self, numbers: IdArray, mask: NDArray[np.bool_]) -> FloatArray:
        """(n, t, width) float32 of the last layer; numbers (n, t), mask (n, t) False in padding."""
        words, positions, types = (self._weights[name] for name in TABLES)
        ids = torch.from_numpy(numbers).to(self._device)
        seen = torch.from_numpy(mask).to(self._device)[:, None, None, :]
        states = words[ids] + positions[: ids.shape[1]] + types[0]
        states = self._normed(states, "embeddings.LayerNorm")
        for number in range(self._model.layers):
            states = self._layer(states, seen, LAYER.format(number))
        vectors: FloatArray = states.cpu().numpy()
        return vectors

    def _layer(self, states: Tensor, seen: Tensor, prefix: str) -> Tensor:
        after_attention, widen, narrow = (prefix + name for name in LINEARS)
        shape = (*states.shape[:2], self._model.heads, -1)
        query, key, value = (
            self._linear(states, f"{prefix}attention.self.{name}").reshape(shape).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        mixed = self._linear(mixed.transpose(1, 2).flatten(2), after_attention)
        states = self._normed(mixed + states, prefix + NORMS[0])
        inner = self._linear(functional.gelu(self._linear(states, widen)), narrow)
        return self._normed(inner + states, prefix + NORMS[1])

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _normed(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return functional.layer_norm(x, (self._model.width,), weight, bias, self._model.epsilon)
