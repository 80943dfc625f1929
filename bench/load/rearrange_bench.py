"""What caps, boosts and diversity cost a router per query, once it has the pool: choosing alone

    python -m shardline.bench.load.rearrange_bench

One thread. The floor of diversity is k products of the pool's vectors with one of them; that of
caps and boosts is sorting the pool. Prints a table and JSON.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np

from shardline.router.rearrange.pool_items import Brought, PoolItems, Steps
from shardline.router.rearrange.rearrangement import Boost, Cap
from shardline.shards.core.schema import Metric

DIM = 128
SELLERS = 500
CASES = ((200, 20), (200, 100), (400, 100), (2048, 100))  # items of the pool, k
ASKED: dict[str, dict[str, Any]] = {
    "cap": {"caps": (Cap(column="seller", most=2, field="cap"),)},
    "boost": {"boosts": (Boost(column="rating", weight=0.1, field="boost"),)},
    "diversify": {"relevance": 0.7},
    "cap and diversify": {
        "caps": (Cap(column="seller", most=2, field="cap"),),
        "relevance": 0.7,
    },
}
REPEATS = 200


def main() -> None:
    """All cases, as a table and JSON."""
    rows = [measured(name, size, k) for name in ASKED for size, k in CASES]
    click.echo(f"{'asked for':20}{'pool':>6}{'k':>6}{'ms, p50':>10}{'floor, ms':>11}")
    for row in rows:
        click.echo(
            f"{row['asked']:20}{row['pool']:>6}{row['k']:>6}{row['p50_ms']:>10.3f}"
            f"{row['floor_ms']:>11.3f}"
        )
    click.echo(json.dumps({"dim": DIM, "rows": rows}, indent=2))


def measured(name: str, size: int, k: int) -> dict[str, Any]:
    """One row: median of REPEATS."""
    rng = np.random.default_rng(0)
    given = {"caps": (), "boosts": (), "relevance": None, **ASKED[name]}
    items = PoolItems(Steps(k=k, metric=Metric.COSINE, now=0.0, **given))
    vectors = rng.standard_normal((size, DIM)).astype(np.float32)
    columns = {
        "seller": [f"seller {number}" for number in rng.integers(0, SELLERS, size)],
        "rating": rng.random(size).tolist(),
    }
    ids = np.arange(size)
    items.add(ids, Brought(ids=ids, columns=columns, vectors=vectors))
    scores = np.sort(rng.random(size).astype(np.float32))[::-1].copy()
    if given["relevance"] is None:
        floor = median_ms(lambda: np.lexsort((ids, -scores)))
    else:
        floor = k * median_ms(lambda: items.vectors @ items.vectors[0])
    return {
        "asked": name,
        "pool": size,
        "k": k,
        "p50_ms": median_ms(lambda: items.choose(ids, scores)),
        "floor_ms": floor,
    }


def median_ms(work: Callable[[], Any]) -> float:
    """Of REPEATS runs, after one that is not counted."""
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e3


if __name__ == "__main__":
    main()
