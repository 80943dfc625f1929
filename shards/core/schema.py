"""Ids, scores and vectors: the rules that every part shares, and the checks of input.

Item ids are int64 and >= 0. Scores are float32 and higher is better for every metric. An empty
result slot holds ``EMPTY_ID`` and ``EMPTY_SCORE``. Answers are ordered by score descending, then
id ascending, so they never depend on which shard answered first.

faiss accepts NaN, duplicate ids and zero vectors without an error. Vectors are checked once, where
they enter: the writer of embedding sets, its reader, files of others, queries over HTTP. Whether a
vector is valid (``check_vectors``) and giving it unit length (``normalise``) are two functions.
"""

import math
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.errors import InvalidInput

FloatArray = NDArray[np.float32]
IdArray = NDArray[np.int64]

EMPTY_ID = -1
EMPTY_SCORE = np.float32(-np.inf)
ORIGINAL_ID = "original_id"  # attribute of an item whose own id was no int64 >= 0: that id
MAX_K = 2048  # the limit of faiss on GPUs; one limit everywhere keeps a query portable
MIN_NORM = 1e-12  # below this a float32 vector has no usable direction
UNIT_TOLERANCE = 4e-6  # of a squared norm: float32 rounding, up to thousands of dimensions


class Ranked(NamedTuple):
    """ids (n, k) int64 and scores (n, k) float32: a row per query, higher scores first.

    Equal scores are ordered by ascending id; empty slots are last.
    """

    ids: IdArray
    scores: FloatArray

    def rows(self, rows: slice) -> "Ranked":
        """Some of the queries; views."""
        return Ranked(self.ids[rows], self.scores[rows])


class Metric(StrEnum):
    """How two vectors are compared. ``COSINE`` is ``DOT`` over vectors of unit length."""

    COSINE = "cosine"
    DOT = "dot"
    L2 = "l2"


def check_vectors(
    values: Any, *, dim: int, metric: Metric, field: str = "vectors", first_row: int = 0
) -> FloatArray:
    """(n, dim) float32, C-contiguous and finite; non-zero when the metric is cosine.

    Float and integer input is converted; anything else is refused. The result may share memory
    with the input, which is never written to. Lengths are left as they are.

    Raises:
        InvalidInput: not a 2-d numeric array, wrong dimension, NaN or infinity, zero vector under
            cosine. The field of the error names the first offending row, counted from first_row.
    """
    vectors = _finite_vectors(values, dim, field, first_row)
    if metric is Metric.COSINE:
        with np.errstate(over="ignore"):  # squares beyond float32 are far from zero
            _refuse_zero(np.sqrt(np.vecdot(vectors, vectors)), field, first_row)
    return vectors


def query_vectors(values: Any, *, dim: int, metric: Metric, field: str = "vectors") -> FloatArray:
    """``check_vectors``, then ``normalise`` for cosine, in one pass over the norms.

    Raises as ``check_vectors``.
    """
    vectors = _finite_vectors(values, dim, field)
    return normalise(vectors, field=field) if metric is Metric.COSINE else vectors


def normalise(vectors: FloatArray, *, field: str = "vectors") -> FloatArray:
    """(n, d) float32 with rows of unit length; a new array.

    Raises:
        InvalidInput: a row is zero, so it has no direction.
    """
    # in float64 the squares of float32 neither overflow nor vanish
    scaled = vectors.astype(np.float64)
    norms = np.sqrt(np.vecdot(scaled, scaled))
    _refuse_zero(norms, field)
    scaled /= norms[:, None]
    return scaled.astype(np.float32)


def unit_vectors(vectors: FloatArray, metric: Metric) -> FloatArray:
    """(n, d) float32 as they are stored: of unit length when the metric is cosine.

    Vectors that have unit length already come back as the same array, bit for bit.

    Raises:
        InvalidInput: as ``normalise``.
    """
    if metric is not Metric.COSINE:
        return vectors
    with np.errstate(over="ignore"):
        is_unit = np.abs(np.vecdot(vectors, vectors) - 1) <= UNIT_TOLERANCE
    return vectors if is_unit.all() else normalise(vectors)


def check_ids(values: Any, *, field: str = "item_ids", unique: bool = False) -> IdArray:
    """(n,) int64, all >= 0, and all different when ``unique`` is set.

    Raises:
        InvalidInput: not a 1-d integer array, a negative id, or a duplicate.
    """
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise InvalidInput("not an array of integers", field=field, got=str(error)) from error
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind == "O" and all(_is_integer(value) for value in array.flat):
        too_large = next((v for v in array.flat if not abs(int(v)) < 1 << 63), None)
        if too_large is not None:
            raise InvalidInput("id too large", field=field, expected="int64", got=str(too_large))
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidInput(
            "not an array of integers",
            field=field,
            expected="1-d int64",
            got=f"{array.ndim}-d {array.dtype}",
        )
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise InvalidInput("id too large", field=field, expected="int64", got=str(array.max()))
    ids: IdArray = array.astype(np.int64, copy=False)
    if ids.size and ids.min() < 0:
        row = int(np.flatnonzero(ids < 0)[0])
        raise InvalidInput(
            "negative id", field=f"{field}[{row}]", expected=">= 0", got=str(ids[row])
        )
    if unique:
        _refuse_duplicates(ids, field)
    return ids


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_k(k: Any, *, limit: int = MAX_K, field: str = "k") -> int:
    """The number of results asked for, 1 <= k <= limit.

    Raises:
        InvalidInput: not an integer, or out of range.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise InvalidInput(
            "not an integer", field=field, expected=f"1 to {limit}", got=type(k).__name__
        )
    if not 1 <= k <= limit:
        raise InvalidInput("out of range", field=field, expected=f"1 to {limit}", got=str(k))
    return int(k)


def in_order(ids: IdArray, scores: FloatArray) -> Ranked:
    """Results (n, m) of any order in the order of ``Ranked``; new arrays."""
    # as unsigned, the id of an empty slot is the largest there is
    order = np.lexsort((ids.view(np.uint64), -scores), axis=1)
    return Ranked(np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1))


def _finite_vectors(values: Any, dim: int, field: str, first_row: int = 0) -> FloatArray:
    array = _as_matrix(values, field)
    if array.shape[1] != dim:
        raise InvalidInput(
            "wrong dimension", field=field, expected=str(dim), got=str(array.shape[1])
        )
    vectors: FloatArray = array
    if array.dtype != np.float32 or not array.flags.c_contiguous:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, refused below
            vectors = np.array(array, dtype=np.float32, order="C")
    # NaN or infinity anywhere makes the sum of squares one, and that is the cheapest look at all
    # values; so may an overflow, and only then is each value looked at
    if not math.isfinite(np.vdot(vectors, vectors)) and not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise InvalidInput(
            "not finite",
            field=f"{field}[{first_row + row}]",
            expected="finite float32 values",
            got="NaN or infinity",
        )
    return vectors


def _refuse_zero(norms: NDArray[Any], field: str, first_row: int = 0) -> None:
    if (norms < MIN_NORM).any():
        row = int(np.flatnonzero(norms < MIN_NORM)[0])
        raise InvalidInput(
            "zero vector",
            field=f"{field}[{first_row + row}]",
            expected="a non-zero vector, because the metric is cosine",
            got=f"norm {norms[row]:.3g}",
        )


def _as_matrix(values: Any, field: str) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:  # ragged rows
        raise InvalidInput(
            "not a matrix of numbers", field=field, expected="rows of equal length"
        ) from error
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InvalidInput(
            "not a matrix of numbers",
            field=field,
            expected="2-d float32",
            got=f"{array.ndim}-d {array.dtype}",
        )
    if array.shape[0] == 0:
        raise InvalidInput("empty batch", field=field, expected="at least one row", got="0 rows")
    return array


def _refuse_duplicates(ids: IdArray, field: str) -> None:
    ordered = np.sort(ids)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.size:
        raise InvalidInput(
            "duplicate id",
            field=field,
            expected="unique ids",
            got=f"{np.unique(repeated).size} repeated, the first is {repeated[0]}",
        )
