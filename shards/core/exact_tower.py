"""A tower whose vectors depend on their row alone, bit for bit: what tied towers are served by.

score(a, b) = score(b, a) holds exactly only where a person has one vector, whether asked for or
found. A matrix product rounds by its shape, so a row is not computed alone as it is in a batch.
Here rows are computed one at a time, in float64, and rounded once: export and router use this very
code, and other machines differ only where a float64 rounding error moves a value across the edge
of a float32 one, about once in 10^8 values. Input rows: embeddings | means of bags | numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import FloatArray

NORM_EPSILON = 1e-5  # torch.nn.LayerNorm's default, which training uses


class ExactTower:
    """(n, width) float32 input rows -> (n, dim) float32, with ``unit`` of unit length or zeros.

    The towers of ``router.encoder.tower``. None as weights under projection identity, where the
    input row is the vector.
    """

    def __init__(self, weights: Mapping[str, NDArray[Any]] | None, *, unit: bool = True) -> None:
        self._unit = unit
        self._layers: list[tuple[NDArray[np.float64], ...]] = []
        self._output: tuple[NDArray[np.float64], ...] | None = None
        if weights is None:
            return
        number = sum(name.startswith("norm.") for name in weights) // 2
        names = ("hidden.{}.weight", "hidden.{}.bias", "norm.{}.weight", "norm.{}.bias")
        self._layers = [
            tuple(weights[name.format(i)].astype(np.float64) for name in names)
            for i in range(number)
        ]
        output = ("output.weight", "output.bias", "skip.weight")
        self._output = tuple(weights[name].astype(np.float64) for name in output)

    def __call__(self, rows: FloatArray) -> FloatArray:
        vectors = [self._vector(row.astype(np.float64)) for row in rows]
        return np.array(vectors, dtype=np.float32)

    def _vector(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        out = row
        if self._output is not None:
            deep = row
            for weight, bias, scale, shift in self._layers:
                deep = weight @ deep + bias
                deep -= deep.mean()
                deep = deep / np.sqrt(np.mean(deep * deep) + NORM_EPSILON) * scale + shift
                deep = np.maximum(deep, 0.0)
            weight, bias, skip = self._output
            out = weight @ deep + bias + skip @ row
        if not self._unit:
            return out
        length = np.sqrt(np.sum(out * out))
        return out / length if length > 0 else out


def mean_row(table: FloatArray, places: Sequence[int]) -> FloatArray:
    """(dim,) the mean of the table's rows at the places; of row 0, the unknown, where none are."""
    mean: FloatArray = table[list(places) or [0]].mean(axis=0)
    return mean
