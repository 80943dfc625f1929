"""Item features to an item's vector, in numpy: the item tower as training exported it.

The twin of the query encoder for items that are written by features, and of what training computes
of each catalogue item: its vector, and its row in users' histories. The id of an item is a feature
where the tower has one called ITEM_ID: an id that training knows has its own row of the table,
any other the row of the unknown. Where the tower reads an item's users, an item of the catalogue
has those that were counted when the model was exported, whatever is written of it since; any other
has none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardline.router.encoder.feature_attributes import FeatureAttributes
from shardline.router.encoder.history_rows import places_of
from shardline.router.encoder.inputs import MappedIds
from shardline.router.encoder.tower import ExportedTower, FieldOf
from shardline.shards.core.encoder_files import Weights, read_encoder
from shardline.shards.core.errors import CorruptFile, InvalidInput
from shardline.shards.core.schema import FloatArray, IdArray

ITEM_ID = "item_id"
ROWS_AT_ONCE = 1024  # input rows are some kilobytes each


class ItemEncoder:
    """Immutable once loaded, so threads may share it."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.model_version: str = config["model_version"]
        self._tower = ExportedTower(config, weights)
        self.dim = self._tower.dim
        self._lengths = _Lengths(weights) if "popularity.lengths" in weights else None
        self._audience = (
            _Audience(weights, self._tower.is_summed) if config.get("audience") else None
        )
        self._attention = _Attention(weights) if "history.query" in weights else None
        self.attributes = FeatureAttributes(config["attributes"], config["features"])
        inputs = self._tower.inputs
        self._takes_id = any(each.info.name == ITEM_ID for each in inputs)
        # where there is nothing else, nothing tells two new items apart
        is_alone = self._takes_id and len(inputs) == 1
        self._ids_alone = inputs[0] if is_alone and isinstance(inputs[0], MappedIds) else None

    @property
    def features(self) -> list[dict[str, str]]:
        """name, kind and value of every feature a written item must bring, in plain words."""
        return [each for each in self._tower.features if each["name"] != ITEM_ID]

    @property
    def names(self) -> tuple[str, ...]:
        """Of ``features``."""
        return tuple(each["name"] for each in self.features)

    @classmethod
    def load(cls, folder: Path, checksum: str | None = None) -> "ItemEncoder":
        """checksum and errors as ``read_encoder``.

        Raises:
            CorruptFile: besides, what is read is not what an item tower is made of.
        """
        config, weights = read_encoder(folder, checksum)
        try:
            return cls(config, weights)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CorruptFile(f"{folder}: not an item encoder", got=repr(error)) from error

    def encode(
        self, item_ids: IdArray, rows: Sequence[dict[str, Any]], field_of: FieldOf
    ) -> FloatArray:
        """(n, dim) float32: the vectors of item_ids (n,) with these features, in order.

        Of unit length, except for catalogue items of a model that makes popular ones longer, and
        under inner product.

        Raises:
            InvalidInput: a feature that is missing, unknown, of the wrong type or not finite; all
                of an item's features say nothing; an item that training has not seen, where the
                tower knows nothing but ids.
        """
        self._refuse_strangers(item_ids, field_of)
        vectors = np.empty((len(rows), self.dim), np.float32)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            named = _shifted(field_of, start)
            whole = self._with_ids(item_ids[part], rows[part], named)
            parts = self._tower.parts(whole, named)
            if self._audience is not None:
                parts.append(self._audience.of(item_ids[part]))
            vectors[part] = self._tower.vectors(parts, named)
        nothing = np.flatnonzero(~vectors.any(axis=1))
        if len(nothing):
            raise InvalidInput(
                "the model makes a vector of zeros of these features",
                field=field_of(int(nothing[0]), "", ""),
                expected="features that say something of the item",
            )
        if self._lengths is not None:
            vectors *= self._lengths.of(item_ids)[:, None]
        return vectors

    def history_rows(
        self, item_ids: IdArray, rows: Sequence[dict[str, Any]]
    ) -> tuple[NDArray[np.bool_], FloatArray, FloatArray | None]:
        """(n,) whether an item has a row in histories; (n, width) float32 rows; (n,) scores, None
        unless attention pools histories.

        An item of which no feature is known has none: its row would be that of any such item.

        Raises:
            InvalidInput: a feature that does not fit; n > 0.
        """
        whole = self._with_ids(item_ids, rows, _field)
        parts = self._tower.parts(whole, _field)
        has_row = np.array([any(row[name] is not None for name in self.names) for row in rows])
        inputs = self._tower.input_rows(parts)
        return has_row, inputs, None if self._attention is None else self._attention.scores(inputs)

    def _with_ids(
        self, item_ids: IdArray, rows: Sequence[dict[str, Any]], field_of: FieldOf
    ) -> Sequence[dict[str, Any]]:
        if not self._takes_id:
            return rows
        for row, features in enumerate(rows):
            if isinstance(features, dict) and ITEM_ID in features:
                raise InvalidInput(
                    "unknown feature",
                    field=field_of(row, ITEM_ID, ""),
                    expected=f"one of {', '.join(sorted(self.names))}",
                    hint="the item's own id is taken for it",
                )
        return [
            {**features, ITEM_ID: item} if isinstance(features, dict) else features
            for item, features in zip(item_ids.tolist(), rows, strict=True)
        ]

    def _refuse_strangers(self, item_ids: IdArray, field_of: FieldOf) -> None:
        if self._ids_alone is None:
            return
        strangers = np.flatnonzero(~self._ids_alone.knows(item_ids))
        if len(strangers):
            row = int(strangers[0])
            raise InvalidInput(
                "the model knows items by their ids alone, and has not seen this one",
                field=field_of(row, "", ""),
                expected="an item of its training data",
                got=f"item {item_ids[row]}",
                hint="send a vector, or train a model with features of items",
            )


class _Lengths:
    """How long the vectors of catalogue items are; mapped arrays, of which a look-up reads little.

    ``training.model.popularity`` says why.
    """

    def __init__(self, weights: Weights) -> None:
        self._ids: IdArray = weights["popularity.item_ids"]
        self._lengths: FloatArray = weights["popularity.lengths"]

    def of(self, item_ids: IdArray) -> FloatArray:
        """(n,) float32, 1 for items that the catalogue lacked."""
        places, is_known = places_of(item_ids, self._ids)
        lengths: FloatArray = np.where(is_known, self._lengths.take(places), np.float32(1))
        return lengths


class _Audience:
    """``TwoTower.audience_rows`` of ``training.model.towers``, of catalogue items; mapped arrays.

    The users of a written item are not known here: an item that the catalogue lacked has nobody.
    """

    def __init__(self, weights: Weights, summed: bool) -> None:
        self._ids: IdArray = weights["audience.item_ids"]
        self._rows: FloatArray = weights["audience.rows"]
        self._nobody = np.zeros(self._rows.shape[1], np.float32)
        if not summed:
            self._nobody[-1] = 1

    def of(self, item_ids: IdArray) -> FloatArray:
        """(n, width) float32: the last part of the input rows."""
        places, is_known = places_of(item_ids, self._ids)
        rows: FloatArray = np.where(
            is_known[:, None], self._rows.take(places, axis=0), self._nobody
        )
        return rows


class _Attention:
    """``HistoryPooling.item_scores`` of ``training.model.pooling``."""

    def __init__(self, weights: Weights) -> None:
        self._key = np.ascontiguousarray(weights["history.key.weight"].T)
        self._bias: FloatArray = weights["history.key.bias"]
        self._query: FloatArray = weights["history.query"]

    def scores(self, rows: FloatArray) -> FloatArray:
        """(n, width) -> (n,) float32."""
        scores: FloatArray = np.tanh(rows @ self._key + self._bias) @ self._query
        return scores


def _field(row: int, name: str, where: str) -> str:
    return f"items[{row}].{name}{where}"


def _shifted(field_of: FieldOf, start: int) -> FieldOf:
    return lambda row, name, where: field_of(start + row, name, where)
