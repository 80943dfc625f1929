"""HTTP bodies in msgpack as a stranger would write and read them, without our codec."""

from typing import Any

import msgpack
import numpy as np


def packed(array: Any, dtype: str) -> dict[str, Any]:
    """An array as it travels."""
    array = np.asarray(array, dtype=dtype)
    return {"dtype": dtype, "shape": list(array.shape), "data": array.tobytes()}


def unpacked(body: bytes) -> Any:
    """The content of a body, arrays as numpy's."""
    return msgpack.unpackb(body, object_hook=_array)


def _array(content: dict[str, Any]) -> Any:
    if content.keys() != {"dtype", "shape", "data"}:
        return content
    return np.frombuffer(content["data"], content["dtype"]).reshape(content["shape"])
