"""What is asked: the queries of a run, the requests made of them, and what the answers should be.

Every request is a new query unless the step says otherwise (Zipf), because a router may cache
answers; where there are more requests than queries they start over, and ``repeats`` says so.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardline.bench.load.http_bytes import message_of
from shardline.bench.load.openloop import Request
from shardline.bench.load.scenarios import Ask, Step
from shardline.bench.vectors import recall_at_k
from shardline.router.http.codec import decode_answer, encode_query
from shardline.router.http.media import Media
from shardline.router.query import SearchQuery
from shardline.shards.core.schema import FloatArray, IdArray

SAMPLED_QUERIES = 500  # whose answers are compared with the exact ones
MESSAGE_BYTES = 64 << 20  # of all distinct requests: they are held by the clients
HEADERS = (("Content-Type", Media.MSGPACK.value), ("Accept", Media.MSGPACK.value))
SEARCH_PATH = "/v1/search"


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """vectors (n, dim) float32; features: the same n queries as the encoder takes them, or None.

    source says in words where they are from.
    """

    vectors: FloatArray
    features: tuple[dict[str, Any], ...] | None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Whole HTTP requests; rows[i] are the queries in message i, ks[i] its k.

    order (n,) says which message each request sends; kept (n,) bool which answers are compared.
    """

    messages: tuple[bytes, ...]
    rows: tuple[IdArray, ...]
    ks: tuple[int, ...]
    order: IdArray
    kept: NDArray[np.bool_]

    @property
    def repeats(self) -> float:
        """Requests for each distinct one."""
        return round(len(self.order) / max(len(np.unique(self.order)), 1), 2)


def make_workload(
    step: Step,
    queries: Queries,
    *,
    requests: int,
    first_counted: int,
    address: tuple[str, int],
    headers: tuple[tuple[str, str], ...],
    rng: np.random.Generator,
) -> Workload:
    """``requests`` requests of the step; answers are compared from number first_counted on."""
    distinct = min(requests, step.distinct or requests, _most_messages(step, queries))
    pool = len(queries.vectors)
    if step.batch == 1:
        rows = [np.array([number % pool]) for number in range(distinct)]
    else:
        rows = [rng.integers(pool, size=step.batch) for _ in range(distinct)]
    shares = np.array([share for _, share in step.ks])
    drawn = rng.choice(len(step.ks), size=distinct, p=shares / shares.sum())
    ks = [step.ks[place][0] for place in drawn.tolist()]
    messages = [
        message_of(
            Request("POST", SEARCH_PATH, _body(step.ask, queries, row, k), (*HEADERS, *headers)),
            address,
        )
        for row, k in zip(rows, ks, strict=True)
    ]
    return Workload(
        messages=tuple(messages),
        rows=tuple(rows),
        ks=tuple(ks),
        order=draw_order(requests, distinct, step.zipf, rng),
        kept=sample(requests, first_counted, max(SAMPLED_QUERIES // step.batch, 1)),
    )


def draw_order(
    requests: int, distinct: int, zipf: float | None, rng: np.random.Generator
) -> IdArray:
    """(requests,) int64 below ``distinct``: in turn, or message r with a share of (r + 1)^-zipf."""
    if zipf is None:
        return np.arange(requests, dtype=np.int64) % distinct
    weights = np.arange(1, distinct + 1, dtype=np.float64) ** -zipf
    return rng.choice(distinct, size=requests, p=weights / weights.sum()).astype(np.int64)


def sample(requests: int, first: int, most: int) -> NDArray[np.bool_]:
    """(requests,) bool: at most ``most`` of those from ``first`` on, evenly spread."""
    kept = np.zeros(requests, dtype=np.bool_)
    count = min(most, requests - first)
    if count > 0:
        kept[np.linspace(first, requests - 1, count).astype(np.int64)] = True
    return kept


def recall_of(bodies: dict[int, bytes], workload: Workload, exact: IdArray) -> float | None:
    """Mean share of the exact top k in the answers received; None when none of them was kept.

    bodies: request number -> msgpack answer; exact (n, most k) for every query of the pool that
    was asked, in the order of ``asked_rows``.
    """
    place = {row: at for at, row in enumerate(asked_rows(workload).tolist())}
    hits, wanted = 0.0, 0
    for number, body in sorted(bodies.items()):
        message = int(workload.order[number])
        k = workload.ks[message]
        best = exact[[place[row] for row in workload.rows[message].tolist()], :k]
        hits += recall_at_k(decode_answer(body).ids, best) * best.size
        wanted += best.size
    return round(hits / wanted, 4) if wanted else None


def asked_rows(workload: Workload) -> IdArray:
    """The distinct query rows whose answers are compared, ascending."""
    messages = np.unique(workload.order[workload.kept])
    if not messages.size:
        return np.empty(0, dtype=np.int64)
    return np.unique(np.concatenate([workload.rows[message] for message in messages]))


def _body(ask: Ask, queries: Queries, rows: IdArray, k: int) -> bytes:
    if ask is Ask.FEATURES:
        assert queries.features is not None
        features = [queries.features[row] for row in rows.tolist()]
        return encode_query(SearchQuery(features=features, k=k))
    return encode_query(SearchQuery(vectors=queries.vectors[rows], k=k))


def _most_messages(step: Step, queries: Queries) -> int:
    size = step.batch * queries.vectors.shape[1] * 4
    most = max(MESSAGE_BYTES // int(size), 1)
    return min(most, len(queries.vectors)) if step.batch == 1 else most
