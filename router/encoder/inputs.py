"""Features, one class per kind: values to their part of a tower's input row.

Each is the twin of a class of ``training.features.columns`` or ``training.model.pooling``, in
numpy. A value of the wrong type is refused; a category that training has not seen, or null, is the
unknown, row 0 of its table; of lists and texts the unknown values are left out, and where nothing
is left they are the unknown; past items that the model does not know are skipped.
"""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardline.router.encoder.history_rows import (
    HistoryRows,
    NewItems,
    PastItems,
    StoredRows,
    places_of,
)
from shardline.shards.core.encoder_files import Weights
from shardline.shards.core.exact_tower import mean_row
from shardline.shards.core.ngrams import ngram_buckets
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.core.standardise import standardised, time_inputs

VALUE_TYPES: dict[str, type] = {"int": int, "string": str, "bool": bool}


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureInfo:
    """What a row must bring: ``value`` says it in words, for errors and API documents."""

    name: str
    kind: str  # id | categorical | multi_valued | text | numeric | history
    value: str


class Input(Protocol):
    """One feature: its part of the input row."""

    @property
    def info(self) -> FeatureInfo: ...

    def rows(self, values: list[Any]) -> FloatArray:
        """(n, width) float32; raises Refused at the first value of the wrong kind."""


class Refused(Exception):
    """A value that does not fit, at ``row`` of the batch; ``where`` points into the value."""

    def __init__(self, row: int, got: str, where: str = "") -> None:
        self.row, self.got, self.where = row, got, where


def inputs_of(configs: list[dict[str, Any]], weights: Weights, *, summed: bool) -> list[Input]:
    """One input per feature, in order. summed: the history comes without its two extra numbers."""
    inputs: list[Input] = []
    for config in configs:
        kind = config["kind"]
        if kind == "history":
            recency = weights.get("history.recency")
            inputs.append(History(config, StoredRows(weights), recency=recency, extras=not summed))
        elif kind == "numeric":
            inputs.append(Number(config))
        elif config.get("mapped"):
            inputs.append(MappedIds(config, weights["ids.values"], weights["ids.rows"]))
        else:  # the embedded ones come first, so their place is that of their table
            table = weights[f"embedding.{len(inputs)}"]
            inputs.append(EMBEDDED[kind](config, table))
    return inputs


class Category:
    """A value's row of an embedding table; row 0 where the value is null or new."""

    def __init__(self, config: dict[str, Any], table: FloatArray) -> None:
        self._type = VALUE_TYPES[config["value_type"]]
        self._places = {value: place for place, value in enumerate(config["values"], start=1)}
        self._table = table
        self.info = FeatureInfo(
            name=config["column"], kind=config["kind"], value=f"{config['value_type']} or null"
        )

    def rows(self, values: list[Any]) -> FloatArray:
        for row, value in enumerate(values):
            if value is not None and not _is_of(value, self._type):
                raise Refused(row, type(value).__name__)
        return self._table[[self._places.get(value, 0) for value in values]]


class MappedIds:
    """As a category, of integers >= 0 of which there may be as many as items: nothing is held.

    values (n,) int64, ascending; table (n + 1, width): value i has row i + 1.
    """

    def __init__(self, config: dict[str, Any], values: IdArray, table: FloatArray) -> None:
        self._values, self._table = values, table
        self.info = FeatureInfo(name=config["column"], kind=config["kind"], value="int or null")

    def knows(self, ids: IdArray) -> NDArray[np.bool_]:
        """(n,) whether each of ids (n,) has a row of its own."""
        return places_of(ids, self._values)[1]

    def rows(self, values: list[Any]) -> FloatArray:
        ids = _item_ids(0, [-1 if value is None else value for value in values])
        places, is_known = places_of(ids, self._values)
        rows: FloatArray = self._table.take(np.where(is_known, places + 1, 0), axis=0)
        return rows


class MultiValued:
    """The mean of the table rows of a list's first ``max_length`` known values."""

    def __init__(self, config: dict[str, Any], table: FloatArray) -> None:
        self._type = VALUE_TYPES[config["value_type"]]
        self._places = {value: place for place, value in enumerate(config["values"], start=1)}
        self._max_length: int = config["max_length"]
        self._table = table
        self.info = FeatureInfo(
            name=config["column"],
            kind=config["kind"],
            value=f"list of {config['value_type']}s, or null",
        )

    def rows(self, values: list[Any]) -> FloatArray:
        return np.stack([self._row(row, value) for row, value in enumerate(values)])

    def _row(self, row: int, value: Any) -> FloatArray:
        if value is not None and not isinstance(value, list | tuple):
            raise Refused(row, type(value).__name__)
        for place, element in enumerate(value or ()):
            if element is not None and not _is_of(element, self._type):  # an import drops nulls too
                raise Refused(row, _kind(element), f"[{place}]")
        places = [self._places[element] for element in value or () if element in self._places]
        return mean_row(self._table, places[: self._max_length])


class Text:
    """The mean of the table rows that a text's n-grams hash to."""

    def __init__(self, config: dict[str, Any], table: FloatArray) -> None:
        self._table = table
        self._buckets: int = config["buckets"]
        self._words, self._chars = (
            (config[name][0], config[name][1]) if config[name] else None
            for name in ("words", "chars")
        )
        self._limit: int = config["max_ngrams"]
        self.info = FeatureInfo(name=config["column"], kind="text", value="string or null")

    def rows(self, values: list[Any]) -> FloatArray:
        return np.stack([self._row(row, value) for row, value in enumerate(values)])

    def _row(self, row: int, value: Any) -> FloatArray:
        if value is not None and type(value) is not str:
            raise Refused(row, type(value).__name__)
        places = ngram_buckets(
            value or "",
            buckets=self._buckets,
            words=self._words,
            chars=self._chars,
            limit=self._limit,
        )
        return mean_row(self._table, places)


class Number:
    """A number, a time or a vector of a fixed number of numbers, standardised as in training.

    A null has the mean and, where training had some, an indicator that says so.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._vector: bool = config["vector"]
        self._log: bool = config["log"]
        self._mean = np.asarray(config["mean"], dtype=np.float64)
        self._deviation = np.asarray(config["deviation"], dtype=np.float64)
        self._missing: bool = config.get("missing", False)  # earlier encoders had no nulls
        self._newest: float | None = config.get("newest")
        self._cycles: list[str] = config.get("cycles", [])
        # the id of the encoder that made the vectors of texts; None: they are not of texts
        self.text_encoder: str | None = config.get("text_encoder")
        what = f"list of {len(self._mean)} finite numbers" if self._vector else "finite number"
        if self._newest is not None:
            what = "time as ISO 8601 text or in seconds since 1970"
        elif self._log:
            what += " >= 0"
        elif self.text_encoder is not None:
            what = f"text, or {what}"
        self.info = FeatureInfo(name=config["column"], kind="numeric", value=f"{what}, or null")

    def rows(self, values: list[Any]) -> FloatArray:
        width = len(self._mean) if self._vector else 1
        numbers = np.empty((len(values), width))
        for row, value in enumerate(values):
            if value is None:
                numbers[row] = np.nan
                continue
            if self._vector and (not isinstance(value, list | tuple) or len(value) != width):
                got = f"{len(value)} values" if isinstance(value, list | tuple) else _kind(value)
                if type(value) is str and self.text_encoder is not None:
                    got = "a text, which routers alone encode"
                raise Refused(row, got)
            for place, item in enumerate(value if self._vector else (value,)):
                numbers[row, place] = self._checked(item, row, place)
        if self._newest is not None:
            numbers = time_inputs(numbers, self._newest, self._cycles, log=self._log)
        elif self._log:
            numbers = np.log1p(numbers)
        return standardised(numbers, self._mean, self._deviation, missing=self._missing)

    def _checked(self, value: Any, row: int, place: int) -> float:
        where = f"[{place}]" if self._vector else ""
        if self._newest is not None and type(value) is str:
            return _seconds(row, value)
        if type(value) is not float and type(value) is not int:
            raise Refused(row, _kind(value), where)
        try:
            number = float(value)
        except OverflowError:
            raise Refused(row, "an integer too large", where) from None
        is_negative = self._log and self._newest is None and number < 0
        if not math.isfinite(number) or is_negative:
            raise Refused(row, str(number), where)
        return number


class History:
    """Past items, oldest first: the newest ``max_length`` known ones, pooled.

    recency (max_length,) float32, newest first, is added to the items' scores under attention.
    """

    def __init__(
        self,
        config: dict[str, Any],
        items: HistoryRows,
        *,
        recency: FloatArray | None,
        extras: bool,
    ) -> None:
        self._items = items
        self._max_length: int = config["max_length"]
        self._extras = 2 if extras else 0
        self._by_root = config.get("pooling") == "sqrtn"  # the first format had the mean alone
        self._oldest_first = None if recency is None else np.ascontiguousarray(recency[::-1])
        self.info = FeatureInfo(
            name=config["column"], kind="history", value="list of item ids, oldest first"
        )

    def rows(self, values: list[Any], new_items: NewItems | None = None) -> FloatArray:
        """new_items: those that may be named besides the ones the encoder was exported with."""
        width = self._items.width
        out = np.zeros((len(values), width + self._extras), dtype=np.float32)
        for row, value in enumerate(values):
            past = self._items.newest(_item_ids(row, value), self._max_length, new_items)
            count = len(past.rows)
            if count:
                out[row, :width] = self._weights(past) @ past.rows
            if self._extras:
                out[row, width] = count / self._max_length
                out[row, width + 1] = count == 0
        return out

    def _weights(self, past: PastItems) -> FloatArray:
        """(m,) float32; their sum is 1 unless the pooling is sqrtn."""
        count = len(past.rows)
        if past.scores is None or self._oldest_first is None:
            divisor = math.sqrt(count) if self._by_root else count
            return np.full(count, 1 / divisor, dtype=np.float32)
        scores = past.scores + self._oldest_first[-count:]
        weights = np.exp(scores - scores.max())
        share: FloatArray = weights / weights.sum()
        return share


EMBEDDED: dict[str, type[Category] | type[MultiValued] | type[Text]] = {
    "id": Category,
    "categorical": Category,
    "multi_valued": MultiValued,
    "text": Text,
}


def _is_of(value: Any, kind: type) -> bool:
    """A bool is no int, but a whole float is: frames make floats of integers that have gaps."""
    is_whole = type(value) is float and value.is_integer()
    return type(value) is kind or (kind is int and is_whole)


def _item_ids(row: int, value: Any) -> IdArray:
    if value is None:
        return np.empty(0, dtype=np.int64)
    if not isinstance(value, list | tuple):
        raise Refused(row, _kind(value))
    if not set(map(type, value)) <= {int}:  # a bool is no int
        place = next(i for i, item in enumerate(value) if type(item) is not int)
        raise Refused(row, _kind(value[place]), f"[{place}]")
    try:
        return np.asarray(value, dtype=np.int64)
    except OverflowError:
        raise Refused(row, "an integer too large") from None


def _seconds(row: int, text: str) -> float:
    """Since 1970, of an ISO 8601 date or time; one without a zone is in UTC."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise Refused(row, f"string {text[:40]!r}") from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
