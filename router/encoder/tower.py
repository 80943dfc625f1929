"""An exported tower in numpy: rows of features, checked, to vectors of length one, or under inner
product of any length.

``shards.core.encoder_files`` reads the files and says what is in them; the encoders of queries and
of items share what is here. Input row: embeddings | means of bags | numbers | the history's part.
Under projection identity the parts are added up instead, and scaled likewise. Tied towers are
``shards.core.exact_tower``. What each kind of feature accepts is in ``router.encoder.inputs``.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np

from shardline.router.encoder.history_rows import NewItems
from shardline.router.encoder.inputs import History, Input, Refused, inputs_of
from shardline.shards.core.encoder_files import Weights
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.exact_tower import ExactTower
from shardline.shards.core.schema import FloatArray

NORM_EPSILON = np.float32(1e-5)  # torch.nn.LayerNorm's default, which training uses

MAX_SHOWN = 100  # characters of an unknown feature's name in an error

# How an error names a value: its row, its feature ("" for the whole row), where inside the value
FieldOf: TypeAlias = Callable[[int, str, str], str]


class ExportedTower:
    """Immutable once loaded, so threads may share it."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.dim: int = config["dim"]
        self.is_unit = config.get("metric", "cosine") == "cosine"
        self.is_summed = config.get("projection", "linear") == "identity"
        self.inputs: list[Input] = inputs_of(config["features"], weights, summed=self.is_summed)
        self.names = frozenset(feature.info.name for feature in self.inputs)
        self._projection: _Projection | ExactTower | None
        if config.get("tied", False):
            self._projection = ExactTower(None if self.is_summed else weights, unit=self.is_unit)
        else:
            self._projection = None if self.is_summed else _Projection(weights, unit=self.is_unit)

    @property
    def features(self) -> list[dict[str, str]]:
        """name, kind and value of every feature of a row, in plain words."""
        return [asdict(feature.info) for feature in self.inputs]

    def parts(
        self, rows: Sequence[dict[str, Any]], field_of: FieldOf, new_items: NewItems | None = None
    ) -> list[FloatArray]:
        """Of each input (n, its width) float32, n > 0. new_items: what a history may name besides.

        Raises:
            InvalidInput: a feature that is missing, unknown, of the wrong type or not finite.
        """
        for row, features in enumerate(rows):
            self._check_names(row, features, field_of)
        return [self._part(feature, rows, field_of, new_items) for feature in self.inputs]

    def vectors(self, parts: list[FloatArray], field_of: FieldOf) -> FloatArray:
        """(n, dim) float32, of unit length under cosine. Raises InvalidInput: not finite."""
        with np.errstate(all="ignore"):  # what overflows is refused just below
            if self._projection is None:
                vectors = self.input_rows(parts)
                vectors = _unit(vectors) if self.is_unit else vectors
            else:
                vectors = self._projection(self.input_rows(parts))
        finite = np.isfinite(vectors)
        if not finite.all():
            row = int(np.flatnonzero(~finite.all(axis=1))[0])
            raise InvalidInput(
                "values too large", field=field_of(row, "", ""), expected="a finite vector"
            )
        return vectors

    def input_rows(self, parts: list[FloatArray]) -> FloatArray:
        """(n, width) float32: the parts side by side, or added up."""
        if self.is_summed:
            total: FloatArray = sum(parts[1:], start=parts[0])
            return total
        return np.concatenate(parts, axis=1)

    def _part(
        self,
        feature: Input,
        rows: Sequence[dict[str, Any]],
        field_of: FieldOf,
        new_items: NewItems | None,
    ) -> FloatArray:
        name = feature.info.name
        values = [row[name] for row in rows]
        try:
            if new_items is not None and isinstance(feature, History):
                return feature.rows(values, new_items)
            return feature.rows(values)
        except Refused as refused:
            raise InvalidInput(
                "wrong value",
                field=field_of(refused.row, name, refused.where),
                expected=feature.info.value,
                got=refused.got,
            ) from None

    def _check_names(self, row: int, features: Any, field_of: FieldOf) -> None:
        if not isinstance(features, dict):
            raise InvalidInput(
                "not an object",
                field=field_of(row, "", ""),
                expected="an object of features",
                got=type(features).__name__,
            )
        if features.keys() == self.names:
            return
        expected = ", ".join(sorted(self.names)) or "no feature"
        unknown = [name for name in features if name not in self.names]
        if unknown:
            raise InvalidInput(
                "unknown feature",
                field=field_of(row, str(unknown[0])[:MAX_SHOWN], ""),
                expected=f"one of {expected}",
            )
        missing = next(name for name in sorted(self.names) if name not in features)
        raise InvalidInput(
            "missing feature",
            field=field_of(row, missing, ""),
            expected=f"all of {expected}",
            hint="null stands for a value that is not known",
        )


class _Projection:
    """relu(LayerNorm(linear)) per hidden layer, plus a linear path; with ``unit`` of length one.

    A query alone is a dozen small products, whose calls cost more than their arithmetic: what can
    be done to the weights once is done to them here.
    """

    def __init__(self, weights: Weights, *, unit: bool) -> None:
        self._is_unit = unit

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
        return _unit(out) if self._is_unit else out


def _centred(weights: FloatArray) -> FloatArray:
    mean = weights.mean(axis=-1, keepdims=True, dtype=np.float64)
    return np.asarray(weights - mean, dtype=np.float32)


def _unit(rows: FloatArray) -> FloatArray:
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    unit: FloatArray = rows / np.maximum(norms, np.float32(1e-12))
    return unit
