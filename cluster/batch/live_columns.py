"""The columns that the answers of a live cluster bring beside the results, as a part has them."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.cluster.batch.batch_job import Wanted
from shardline.cluster.batch.result_columns import ORIGINAL_IDS, title_of
from shardline.router.client.answers import SearchAnswer
from shardline.shards.core.errors import DataError, InvalidInput
from shardline.shards.core.schema import EMPTY_ID
from shardline.shards.storage.column_types import LIBRARY_ERRORS, first_line


class AnsweredColumns:
    """The columns that answers bring, for ``result_table``: values in the order of the results."""

    def __init__(
        self, answers: Sequence[SearchAnswer], wanted: Wanted, types: dict[str, pa.DataType]
    ) -> None:
        self._answers, self._wanted, self._types = answers, wanted, types

    def of(self, item_ids: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, pa.Array]:
        """item_ids (n,) int64: of all results that are not empty."""
        found: dict[str, pa.Array] = {}
        if self._wanted.original_ids:
            values = [
                value
                for answer in self._answers
                for value in _kept(answer, answer.original_ids or [])
            ]
            found[ORIGINAL_IDS] = _array(ORIGINAL_IDS, values, self._types[ORIGINAL_IDS])
        for name in self._wanted.attributes:
            values = [
                value
                for answer in self._answers
                for value in _kept(answer, answer.attributes[name])
            ]
            found[title_of(name)] = _array(name, values, self._types[name])
        assert all(len(column) == len(item_ids) for column in found.values())
        return found


def _kept(answer: SearchAnswer, rows: list[list[Any]]) -> list[Any]:
    """Values of the results that are not empty, which are first in each row."""
    counts = (answer.ids != EMPTY_ID).sum(axis=1).tolist()
    return [value for row, count in zip(rows, counts, strict=True) for value in row[:count]]


def _array(name: str, values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values of JSON in the type that the generation's files have."""
    try:
        if pa.types.is_decimal(kind):  # floats, and texts of those that floats do not hold
            values = [None if value is None else Decimal(str(value)) for value in values]
        try:
            return pa.array(values, kind)
        except LIBRARY_ERRORS:  # times are texts in JSON
            return pa.array(values).cast(kind)
    except LIBRARY_ERRORS as error:
        raise DataError(
            "an attribute that answers over HTTP do not bring in its own type",
            field=name,
            expected=str(kind),
            got=first_line(error),
            hint="leave it out, or run the job offline, without --live",
        ) from error


def refuse_unknown(names: Sequence[str], types: dict[str, pa.DataType]) -> None:
    """Raises InvalidInput for an attribute that the generation does not have."""
    for name in names:
        if name not in types:
            raise InvalidInput(
                "no such attribute",
                field="--return",
                expected=f"one of {', '.join(types) or 'none: this generation has none'}",
                got=name,
            )
