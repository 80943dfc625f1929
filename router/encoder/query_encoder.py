"""Query features to a query vector, in numpy: the query tower as training exported it.

``shards.core.encoder_files`` reads the files and says what is in them.

Input row: embeddings | means of bags | numbers | pooled rows of the past items, share of the
history filled, 1 if it is empty. Under projection identity the parts are added up instead, and
scaled to length one. What each kind of feature accepts is in ``router.encoder.inputs``.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from shardline.router.encoder.inputs import Input, Refused, inputs_of
from shardline.shards.core.encoder_files import Weights, read_encoder
from shardline.shards.core.errors import CorruptFile, InvalidInput
from shardline.shards.core.schema import FloatArray

NORM_EPSILON = np.float32(1e-5)  # torch.nn.LayerNorm's default, which training uses


class QueryEncoder:
    """Immutable once loaded, so threads may share it."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.model_version: str = config["model_version"]
        self.dim: int = config["dim"]
        summed = config.get("projection", "linear") == "identity"
        self._inputs = inputs_of(config["features"], weights, summed=summed)
        self._tower = None if summed else _Tower(weights)
        self._names = frozenset(feature.info.name for feature in self._inputs)

    @property
    def features(self) -> list[dict[str, str]]:
        """name, kind and value of every feature a query must bring, in plain words."""
        return [asdict(feature.info) for feature in self._inputs]

    @classmethod
    def load(cls, folder: Path, checksum: str | None = None) -> "QueryEncoder":
        """checksum and errors as ``read_encoder``.

        Raises:
            CorruptFile: besides, what is read is not what a query tower is made of.
        """
        config, weights = read_encoder(folder, checksum)
        try:
            return cls(config, weights)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CorruptFile(f"{folder}: not a query encoder", got=repr(error)) from error

    def encode(self, queries: Sequence[dict[str, Any]]) -> FloatArray:
        """(n, dim) float32 of unit length, one row per query, in order.

        Raises:
            InvalidInput: no queries; a feature that is missing, unknown, of the wrong type or not
                finite. The field of the error is ``features[i].name``.
        """
        if not queries:
            raise InvalidInput("empty batch", field="features", expected="at least one query")
        for row, query in enumerate(queries):
            self._check_names(row, query)
        parts = [self._column(feature, queries) for feature in self._inputs]
        with np.errstate(all="ignore"):  # what overflows is refused just below
            if self._tower is None:
                vectors = _unit(sum(parts[1:], start=parts[0]))
            else:
                vectors = self._tower(np.concatenate(parts, axis=1))
        finite = np.isfinite(vectors)
        if not finite.all():
            row = int(np.flatnonzero(~finite.all(axis=1))[0])
            raise InvalidInput(
                "values too large", field=f"features[{row}]", expected="a finite query vector"
            )
        return vectors

    def _column(self, feature: Input, queries: Sequence[dict[str, Any]]) -> FloatArray:
        name = feature.info.name
        try:
            return feature.rows([query[name] for query in queries])
        except Refused as refused:
            raise InvalidInput(
                "wrong value",
                field=f"features[{refused.row}].{name}{refused.where}",
                expected=feature.info.value,
                got=refused.got,
            ) from None

    def _check_names(self, row: int, query: Any) -> None:
        if not isinstance(query, dict):
            raise InvalidInput(
                "not an object", field=f"features[{row}]", expected="an object of features",
                got=type(query).__name__,
            )  # fmt: skip
        if query.keys() == self._names:
            return
        expected = ", ".join(sorted(self._names))
        unknown = [name for name in query if name not in self._names]
        if unknown:
            raise InvalidInput(
                "unknown feature", field=f"features[{row}].{unknown[0]}",
                expected=f"one of {expected}",
            )  # fmt: skip
        missing = next(name for name in sorted(self._names) if name not in query)
        raise InvalidInput(
            "missing feature", field=f"features[{row}].{missing}", expected=f"all of {expected}"
        )


class _Tower:
    """relu(LayerNorm(linear)) per hidden layer, plus a linear path, scaled to length one.

    A query alone is a dozen small products, whose calls cost more than their arithmetic: what can
    be done to the weights once is done to them here.
    """

    def __init__(self, weights: Weights) -> None:
        # transposed, so that a single query is a row times a matrix
        def matrix(name: str) -> FloatArray:
            return np.ascontiguousarray(weights[name].T)

        num_hidden = sum(name.startswith("norm.") for name in weights) // 2
        self._hidden = [
            (
                # centred over the outputs: LayerNorm's mean is then zero by itself
                _centred(matrix(f"hidden.{i}.weight")),
                _centred(weights[f"hidden.{i}.bias"]),
                weights[f"norm.{i}.weight"],
                weights[f"norm.{i}.bias"],
            )
            for i in range(num_hidden)
        ]
        self._output, self._output_bias = matrix("output.weight"), weights["output.bias"]
        self._skip = matrix("skip.weight")

    def __call__(self, rows: FloatArray) -> FloatArray:
        deep = rows
        for weight, bias, scale, shift in self._hidden:
            deep = deep @ weight
            deep += bias
            variance = np.einsum("ij,ij->i", deep, deep)[:, None] / np.float32(deep.shape[1])
            deep /= np.sqrt(variance + NORM_EPSILON)
            deep *= scale
            deep += shift
            np.maximum(deep, 0, out=deep)
        out = deep @ self._output
        out += self._output_bias
        out += rows @ self._skip
        return _unit(out)


def _centred(weights: FloatArray) -> FloatArray:
    mean = weights.mean(axis=-1, keepdims=True, dtype=np.float64)
    return np.asarray(weights - mean, dtype=np.float32)


def _unit(rows: FloatArray) -> FloatArray:
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    unit: FloatArray = rows / np.maximum(norms, np.float32(1e-12))
    return unit
