"""A query encoder without weights: it says what the router's protocol says, and nothing more."""

import numpy as np

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
