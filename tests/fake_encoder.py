"""A query encoder without weights: it says what the router's protocol says, and nothing more.

And an item encoder that is a real one, of weights whose results are known without it.
"""

import numpy as np

from shardline.router.encoder.item_encoder import ItemEncoder
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.errors import InvalidInput


class FakeEncoder:
    """One numeric feature ``slope``: the vector is (1, slope, 0, ...), exact in float32."""

    features = [{"name": "slope", "kind": "number"}]  # noqa: RUF012  plain data of the fake

    def __init__(self, dim: int, model_version: str = "m1") -> None:
        self.dim = dim
        self.model_version = model_version

    def encode(self, rows):
        vectors = np.zeros((len(rows), self.dim), dtype=np.float32)
        for row, features in enumerate(rows):
            slope = features.get("slope")
            if not isinstance(slope, int | float) or isinstance(slope, bool):
                raise InvalidInput(
                    "missing or of the wrong type",
                    field=f"features[{row}].slope",
                    expected="a number",
                    got=type(slope).__name__,
                )
            vectors[row, :2] = 1, slope
        return vectors


CATEGORIES = {"film": [1.0, 0.0], "song": [0.0, 1.0]}
ITEM_FEATURES = {"category": "film", "size": 2, "released": None, "tags": ["x"]}


def item_encoder_parts(dim: int, model_version: str = "m1") -> tuple[dict, dict]:
    """Configuration and weights: the vector is category (2) | tag (1) | size | 1 where released is
    null, 0 at its newest | zeros, scaled to length one. Attributes: title too, which is no
    feature, and year, an integer, which is one of no tower."""
    column = {"kind": "categorical", "value_type": "string", "dim": 2}
    scaled = {"kind": "numeric", "log": False, "vector": False, "mean": [0.0], "deviation": [1.0]}
    released = {"column": "released", "missing": True, "newest": 1.5e9, "cycles": []}
    tags = {"kind": "multi_valued", "value_type": "string", "dim": 1, "max_length": 3}
    width = 2 + 1 + 1 + 2
    config = {
        "model_version": model_version,
        "dim": dim,
        "projection": "linear",
        "features": [
            column | {"column": "category", "values": list(CATEGORIES)},
            tags | {"column": "tags", "values": ["x", "y"]},
            scaled | {"column": "size", "missing": False, "newest": None, "cycles": []},
            scaled | released,
        ],
        "attributes": {
            "category": "string",
            "title": "string",
            "size": "int64",
            "released": "timestamp[us]",
            "tags": "list<element: string>",
            "year": "int64",
        },
    }
    skip = np.zeros((dim, width), np.float32)
    skip[range(4), range(4)] = 1
    skip[4, 5] = 1
    weights = {
        "embedding.0": np.array([[0, 0], *CATEGORIES.values()], np.float32),
        "embedding.1": np.array([[0], [1], [3]], np.float32),
        "output.weight": np.zeros((dim, width), np.float32),
        "output.bias": np.zeros(dim, np.float32),
        "skip.weight": skip,
    }
    return config, weights


def small_item_encoder(dim: int, model_version: str = "m1") -> ItemEncoder:
    return ItemEncoder(*item_encoder_parts(dim, model_version))


def item_vector(dim: int, *numbers: float) -> list[float]:
    """``numbers`` and zeros, scaled to length one."""
    vector = np.zeros(dim, np.float32)
    vector[: len(numbers)] = numbers
    return (vector / np.linalg.norm(vector)).tolist()


def history_encoder(dim: int, known: np.ndarray, pooling: str = "mean") -> QueryEncoder:
    """Of users who bring a history alone: the mean of past rows of ``small_item_encoder``'s width.

    known (n, 6): the rows of items 0 to n - 1.
    """
    width = known.shape[1] + 2
    history = {"kind": "history", "column": "history", "max_length": 4, "pooling": pooling}
    skip = np.zeros((dim, width), np.float32)
    skip[range(6), range(6)] = 1
    config = {"model_version": "m1", "dim": dim, "projection": "linear", "features": [history]}
    weights = {
        "history.item_ids": np.arange(len(known)),
        "history.rows": known.astype(np.float32),
        "output.weight": np.zeros((dim, width), np.float32),
        "output.bias": np.zeros(dim, np.float32),
        "skip.weight": skip,
    }
    return QueryEncoder(config, weights)
