"""What is asked: the queries of a run, the requests made of them, and what the answers should be.

Every request of a run is a new query unless the step says otherwise (Zipf), because a router may
cache answers; where there are more requests than queries they start over, and ``repeats`` says so.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardline.bench.load.http_bytes import EMPTY, message_of, results_of, search_request
from shardline.bench.load.scenarios import Ask, Step
from shardline.shards.core.schema import FloatArray, IdArray

SAMPLED_QUERIES = 500  # whose answers are compared with the exact ones
CLOSED_SPAN = 2  # of a closed loop every second answer is kept until enough are
MESSAGE_BYTES = 64 << 20  # of all distinct requests: they are held by the clients


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


def make_workload(
    step: Step,
    queries: Queries,
    *,
    requests: int,
    first_counted: int,
    first_query: int = 0,
    address: tuple[str, int],
    headers: tuple[tuple[str, str], ...],
    rng: np.random.Generator,
) -> Workload:
    """``requests`` requests of the step; answers are compared from number first_counted on, and
    single queries taken from ``first_query`` on: those before were asked by earlier steps."""
    if step.ask is Ask.EMPTY:
        return Workload(
            messages=(message_of(EMPTY, address),),
            rows=(np.empty(0, dtype=np.int64),),
            ks=(0,),
            order=np.zeros(requests, dtype=np.int64),
            kept=np.zeros(requests, dtype=np.bool_),
        )
    distinct = min(requests, step.distinct or requests, _most_messages(step, queries))
    pool = len(queries.vectors)
    if step.batch == 1:
        rows = [np.array([(first_query + n) % pool]) for n in range(distinct)]
    else:
        rows = [rng.integers(pool, size=step.batch) for _ in range(distinct)]
    shares = np.array([share for _, share in step.ks])
    drawn = rng.choice(len(step.ks), size=distinct, p=shares / shares.sum())
    ks = [step.ks[place][0] for place in drawn.tolist()]
    messages = [
        message_of(search_request(_content(step.ask, queries, row, k), headers), address)
        for row, k in zip(rows, ks, strict=True)
    ]
    return Workload(
        messages=tuple(messages),
        rows=tuple(rows),
        ks=tuple(ks),
        order=draw_order(requests, distinct, step.zipf, rng),
        kept=sample(requests, first_counted, max(SAMPLED_QUERIES // step.batch, 1), step.rate),
    )


def draw_order(
    requests: int, distinct: int, zipf: float | None, rng: np.random.Generator
) -> IdArray:
    """(requests,) int64 below ``distinct``: one after the other, or message r with a share of
    (r + 1)^-zipf."""
    if zipf is None:
        return np.arange(requests, dtype=np.int64) % distinct
    weights = np.arange(1, distinct + 1, dtype=np.float64) ** -zipf
    return rng.choice(distinct, size=requests, p=weights / weights.sum()).astype(np.int64)


def sample(requests: int, first: int, most: int, rate: float | None) -> NDArray[np.bool_]:
    """(requests,) bool: at most ``most`` of those from ``first`` on, evenly spread; of a closed
    loop (rate None), which sends an unknown part of them, from its beginning."""
    kept = np.zeros(requests, dtype=np.bool_)
    last = requests if rate is not None else min(requests, first + CLOSED_SPAN * most)
    count = min(most, last - first)
    if count > 0:
        kept[np.linspace(first, last - 1, count).astype(np.int64)] = True
    return kept


def answers_of(bodies: dict[int, bytes], workload: Workload) -> list[tuple[IdArray, IdArray]]:
    """(query rows (n,), ids (n, k)) of each answer that was kept, in the order asked."""
    found = []
    for number, body in sorted(bodies.items()):
        ids, _ = results_of(body)
        found.append((workload.rows[int(workload.order[number])], ids))
    return found


def _content(ask: Ask, queries: Queries, rows: IdArray, k: int) -> dict[str, Any]:
    if ask is Ask.FEATURES:
        assert queries.features is not None
        return {"features": [queries.features[row] for row in rows.tolist()], "k": k}
    return {"vectors": queries.vectors[rows], "k": k}


def _most_messages(step: Step, queries: Queries) -> int:
    size = step.batch * queries.vectors.shape[1] * 4
    most = max(MESSAGE_BYTES // int(size), 1)
    return min(most, len(queries.vectors)) if step.batch == 1 else most
