"""Query features to a query vector, in numpy: the query tower as training exported it.

    encoder.json           model_version, dim, features in input order, checksum of the weights
    weights.safetensors    embedding.<i>, hidden.<i>.*, norm.<i>.*, output.*, skip.weight, and for
                           the history its item_ids (n,) int64 ascending and rows (n, p) float32

Input row: embeddings | numbers | mean of the past items' rows, share of the history filled, 1 if
it is empty. A missing or unknown feature, or a value of the wrong type, is refused; a category
that training has not seen, or null, is the unknown category; past items that the model does not
know are skipped. A new kind of feature needs its ``_Input`` here, beside ``training.features``.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from shards.errors import CorruptFile, InvalidInput, NewerFormat, NotFound
from shards.files import sha256_of
from shards.schema import FloatArray, IdArray

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "encoder.json", "weights.safetensors"
NORM_EPSILON = np.float32(1e-5)  # torch.nn.LayerNorm's default, which training uses

Weights = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureInfo:
    """What a query must bring: ``value`` says it in words, for errors and API documents."""

    name: str
    kind: str  # id | categorical | numeric | history
    value: str


class _Input(Protocol):
    """One feature: its part of the input row."""

    @property
    def info(self) -> FeatureInfo: ...

    def rows(self, values: list[Any]) -> FloatArray:
        """(n, width) float32; raises _Refused at the first value of the wrong kind."""


class _Refused(Exception):
    """A value that does not fit, at ``row`` of the batch; ``where`` points into the value."""

    def __init__(self, row: int, got: str, where: str = "") -> None:
        self.row, self.got, self.where = row, got, where


class QueryEncoder:
    """Immutable once loaded, so threads may share it."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.model_version: str = config["model_version"]
        self.dim: int = config["dim"]
        self._inputs = _inputs(config["features"], weights)
        self._tower = _Tower(weights)
        self._names = frozenset(feature.info.name for feature in self._inputs)

    @property
    def features(self) -> list[dict[str, str]]:
        """name, kind and value of every feature a query must bring, in plain words."""
        return [asdict(feature.info) for feature in self._inputs]

    @classmethod
    def load(cls, folder: Path) -> "QueryEncoder":
        """Raises NotFound, CorruptFile (checksum, not JSON) or NewerFormat, naming the file."""
        path = folder / CONFIG
        if not path.is_file():
            raise NotFound(f"{path}: no query encoder here")
        try:
            config = json.loads(path.read_bytes())
            version, checksum = config["format_version"], config["weights_sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(f"{path}: not a query encoder", got=str(error)) from error
        if version > FORMAT_VERSION:
            raise NewerFormat(
                f"{path}: format is newer than this program",
                expected=f"format_version <= {FORMAT_VERSION}",
                got=str(version),
            )
        weights = folder / WEIGHTS
        if not weights.is_file() or sha256_of(weights) != checksum:
            raise CorruptFile(f"{weights}: missing or altered", hint="export the model again")
        return cls(config, load_file(weights))

    def encode(self, queries: Sequence[dict[str, Any]]) -> FloatArray:
        """(n, dim) float32 of unit length, one row a query, in order.

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
            vectors = self._tower(np.concatenate(parts, axis=1))
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            raise InvalidInput(
                "values too large", field=f"features[{row}]", expected="a finite query vector"
            )
        return vectors

    def _column(self, feature: _Input, queries: Sequence[dict[str, Any]]) -> FloatArray:
        name = feature.info.name
        try:
            return feature.rows([query[name] for query in queries])
        except _Refused as refused:
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


class _Category:
    """A value's row of an embedding table; row 0 where the value is null or new."""

    def __init__(self, config: dict[str, Any], table: FloatArray) -> None:
        self._type = {"int": int, "string": str, "bool": bool}[config["value_type"]]
        self._places = {value: place for place, value in enumerate(config["values"], start=1)}
        self._table = table
        self.info = FeatureInfo(
            name=config["column"], kind=config["kind"], value=f"{config['value_type']} or null"
        )

    def rows(self, values: list[Any]) -> FloatArray:
        for row, value in enumerate(values):
            if value is not None and type(value) is not self._type:  # a bool is no int
                raise _Refused(row, type(value).__name__)
        return self._table[[self._places.get(value, 0) for value in values]]


class _Number:
    """A number, or a vector of a fixed number of them, standardised as in training."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._vector: bool = config["vector"]
        self._log: bool = config["log"]
        self._mean = np.asarray(config["mean"], dtype=np.float64)
        self._deviation = np.asarray(config["deviation"], dtype=np.float64)
        what = f"list of {len(self._mean)} finite numbers" if self._vector else "finite number"
        self.info = FeatureInfo(
            name=config["column"], kind="numeric", value=f"{what} >= 0" if self._log else what
        )

    def rows(self, values: list[Any]) -> FloatArray:
        width = len(self._mean)
        numbers = np.empty((len(values), width))
        for row, value in enumerate(values):
            if self._vector and (not isinstance(value, list | tuple) or len(value) != width):
                got = f"{len(value)} values" if isinstance(value, list | tuple) else _kind(value)
                raise _Refused(row, got)
            for place, item in enumerate(value if self._vector else (value,)):
                numbers[row, place] = self._checked(item, row, place)
        numbers = np.log1p(numbers) if self._log else numbers
        with np.errstate(over="ignore"):
            return ((numbers - self._mean) / self._deviation).astype(np.float32)

    def _checked(self, value: Any, row: int, place: int) -> float:
        where = f"[{place}]" if self._vector else ""
        if type(value) is not float and type(value) is not int:
            raise _Refused(row, _kind(value), where)
        try:
            number = float(value)
        except OverflowError:
            raise _Refused(row, "an integer too large", where) from None
        if not math.isfinite(number) or (self._log and number < 0):
            raise _Refused(row, str(number), where)
        return number


class _History:
    """Past items, oldest first; the newest ``max_length`` known ones, averaged."""

    def __init__(self, config: dict[str, Any], item_ids: IdArray, rows: FloatArray) -> None:
        self._ids, self._rows = item_ids, rows
        self._max_length: int = config["max_length"]
        self.info = FeatureInfo(
            name=config["column"], kind="history", value="list of item ids, oldest first"
        )

    def rows(self, values: list[Any]) -> FloatArray:
        width = self._rows.shape[1]
        out = np.zeros((len(values), width + 2), dtype=np.float32)
        for row, value in enumerate(values):
            known = self._known(row, value)[-self._max_length :]
            if len(known):
                out[row, :width] = self._rows[known].mean(axis=0)
            out[row, width] = len(known) / self._max_length
            out[row, width + 1] = len(known) == 0
        return out

    def _known(self, row: int, value: Any) -> IdArray:
        if not isinstance(value, list | tuple):
            raise _Refused(row, _kind(value))
        for place, item in enumerate(value):
            if type(item) is not int:
                raise _Refused(row, _kind(item), f"[{place}]")
        try:
            ids = np.asarray(value, dtype=np.int64)
        except OverflowError:
            raise _Refused(row, "an integer too large") from None
        places = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        known: IdArray = places[self._ids[places] == ids]
        return known


class _Tower:
    """relu(LayerNorm(linear)) per hidden layer, plus a linear path, scaled to length one."""

    def __init__(self, weights: Weights) -> None:
        # transposed once, so that a single query is a row times a matrix
        def matrix(name: str) -> FloatArray:
            return np.ascontiguousarray(weights[name].T)

        num_hidden = sum(name.startswith("norm.") for name in weights) // 2
        self._hidden = [
            (
                matrix(f"hidden.{i}.weight"),
                weights[f"hidden.{i}.bias"],
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
            deep = deep @ weight + bias
            deep = deep - deep.mean(axis=1, keepdims=True)
            variance = np.einsum("ij,ij->i", deep, deep)[:, None] / np.float32(deep.shape[1])
            deep = np.maximum(deep / np.sqrt(variance + NORM_EPSILON) * scale + shift, 0)
        out = deep @ self._output + self._output_bias + rows @ self._skip
        norms = np.sqrt(np.einsum("ij,ij->i", out, out))[:, None]
        unit: FloatArray = out / np.maximum(norms, np.float32(1e-12))
        return unit


def _inputs(configs: list[dict[str, Any]], weights: Weights) -> list[_Input]:
    inputs: list[_Input] = []
    for config in configs:
        if config["kind"] == "history":
            ids, rows = weights["history.item_ids"], weights["history.rows"]
            inputs.append(_History(config, ids, rows))
        elif config["kind"] == "numeric":
            inputs.append(_Number(config))
        else:
            inputs.append(_Category(config, weights[f"embedding.{len(inputs)}"]))
    return inputs


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
