"""Query features to a query vector, in numpy: the query tower as training exported it.

The tower is ``router.encoder.tower``. A history's part of the input row: the pooled rows of the
past items, the share of the history that is filled, 1 if it is empty; the rows alone under
projection identity.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardline.router.encoder.history_rows import NewItems
from shardline.router.encoder.inputs import History, Number
from shardline.router.encoder.tower import ExportedTower
from shardline.shards.core.encoder_files import Weights, read_encoder
from shardline.shards.core.errors import CorruptFile, InvalidInput
from shardline.shards.core.schema import FloatArray


class QueryEncoder:
    """Immutable once loaded, so threads may share it."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.model_version: str = config["model_version"]
        self._tower = ExportedTower(config, weights)
        self.dim = self._tower.dim
        self.has_history = any(isinstance(each, History) for each in self._tower.inputs)
        # of each feature that takes a text instead of its vector, the id of the text encoder
        self.text_encoders: dict[str, str] = {
            each.info.name: each.text_encoder
            for each in self._tower.inputs
            if isinstance(each, Number) and each.text_encoder is not None
        }

    @property
    def features(self) -> list[dict[str, str]]:
        """name, kind and value of every feature a query must bring, in plain words."""
        return self._tower.features

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

    def encode(
        self, queries: Sequence[dict[str, Any]], new_items: NewItems | None = None
    ) -> FloatArray:
        """(n, dim) float32, of unit length under cosine, one row per query, in order.

        new_items: past items that were written since the export.

        Raises:
            InvalidInput: no queries; a feature that is missing, unknown, of the wrong type or not
                finite. The field of the error is ``features[i].name``.
        """
        if not queries:
            raise InvalidInput("empty batch", field="features", expected="at least one query")
        parts = self._tower.parts(queries, _field, new_items)
        return self._tower.vectors(parts, _field)


def _field(row: int, name: str, where: str) -> str:
    return f"features[{row}].{name}{where}" if name else f"features[{row}]"
