"""Messages between processes: router <-> shard over the wire, controller -> router through Ray.

Plain data only. A peer cannot hand over a shape that the receiver did not expect: what travels as
msgpack checks its arrays on construction, and the fixed layouts of searches have no other.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.schema import FloatArray, IdArray, Metric

# The largest search-time knobs, in configuration, over HTTP and in the index alike.
MAX_NPROBE = 2048  # faiss's limit on GPUs; on a CPU more would be slower than an exact scan
MAX_EF_SEARCH = 16_384
MAX_RERANK_FACTOR = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchParams:
    """Search-time knobs of the index kinds; None means the generation's own default.

    nprobe: inverted lists visited, ivf kinds; ef_search: candidate queue of hnsw;
    rerank_factor: candidates re-ranked exactly, as a multiple of k, for re-ranked kinds.
    """

    nprobe: int | None = None
    ef_search: int | None = None
    rerank_factor: int | None = None


NO_PARAMS = SearchParams()  # nearly every request shares this one


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """queries (n, dim) float32, already checked and normalised; timeout_ms is what remains."""

    queries: FloatArray
    k: int
    timeout_ms: float
    params: SearchParams = NO_PARAMS


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchReply:
    """ids (n, k) int64 and scores (n, k) float32, in answer order; rows: live rows searched."""

    ids: IdArray
    scores: FloatArray
    rows: int
    search_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequest:
    """Asks for the stored vectors of item_ids (n,) int64, those of other shards included."""

    item_ids: IdArray
    timeout_ms: float

    def __post_init__(self) -> None:
        _check(self, "item_ids", np.int64, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchReply:
    """The subset that this shard holds: item_ids (m,) int64, vectors (m, dim) float32."""

    item_ids: IdArray
    vectors: FloatArray

    def __post_init__(self) -> None:
        _check(self, "item_ids", np.int64, 1)
        _check(self, "vectors", np.float32, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """A shard's refusal; ``code`` is the code of an error class of shards.core.errors.

    field names the part of the request that is wrong, where the shard knows it.
    """

    code: str
    message: str
    field: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Server's first frame: who it is, and the nonce the client must prove itself over."""

    protocol: int
    shard: int
    generation: int
    epoch: int
    nonce: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Client's answer: HMAC over Hello, address and nonces, and its nonce for the server to prove.

    shards.wire.handshake has the details.
    """

    nonce: bytes
    mac: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Server's HMAC over the same, in its own role; requests may follow."""

    mac: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRoute:
    """Where one shard answers. address is None while no process serves it.

    epoch rises each time the shard is placed anew: a router never goes back to a lower one.
    """

    shard: int
    rows: int
    epoch: int
    address: tuple[str, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """What a router needs to answer for one generation; a higher version replaces a lower one.

    generation_dir is a path every router replica can read; the query encoder lives below it.
    """

    version: int
    generation: int
    generation_dir: str
    model_version: str
    dim: int
    metric: Metric
    index: str
    shards: tuple[ShardRoute, ...]

    @property
    def rows(self) -> int:
        return sum(route.rows for route in self.shards)


def _check(message: Any, name: str, dtype: type[np.generic], ndim: int) -> None:
    value = getattr(message, name)
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != ndim:
        got = f"{value.ndim}-d {value.dtype}" if isinstance(value, np.ndarray) else type(value)
        raise ProtocolError(
            "wrong array in a message",
            field=f"{type(message).__name__}.{name}",
            expected=f"{ndim}-d {np.dtype(dtype)}",
            got=str(got),
        )
