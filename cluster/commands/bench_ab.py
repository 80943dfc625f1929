"""``bench ab``: one query set through two arms of settings, with the differences within queries."""

import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardline.cluster.cli import Settings
from shardline.cluster.commands.address import address_of, key_file_option
from shardline.cluster.commands.bench_options import AT_LEAST_ONE, json_option
from shardline.cluster.commands.query import url_option
from shardline.cluster.console import StageProgress, print_table, print_warnings
from shardline.shards.core.errors import InvalidInput

if TYPE_CHECKING:
    from shardline.bench.ab.intervals import Estimate
    from shardline.bench.ab.replay import Comparison, SideFigures
    from shardline.router.client.sync_client import Client


@click.command(short_help="Two settings of searches on one query set.")
@click.option(
    "--queries",
    multiple=True,
    help="Files or folders of queries, as `shardline batch` takes them. Repeatable.",
)
@click.option("--features", is_flag=True, help="--queries hold features, not vectors.")
@click.option(
    "--users", type=click.Path(path_type=Path), help="Instead: the users of this data set folder."
)
@click.option(
    "--a",
    "first",
    default="{}",
    show_default=True,
    help="Settings of the first arm: fields of a search in JSON.",
)
@click.option(
    "--b", "second", required=True, help='Of the second, e.g. \'{"params": {"nprobe": 4}}\'.'
)
@click.option("-k", type=AT_LEAST_ONE, help="Results per query.  [default: the server's]")
@click.option(
    "--count", default=500, show_default=True, type=AT_LEAST_ONE, help="Queries: the first of all."
)
@click.option(
    "--exact",
    "judged",
    default=100,
    show_default=True,
    type=click.IntRange(min=0),
    help="Of them, asked exactly too, for recall; each reads every row of the index.",
)
@click.option("--seed", default=0, show_default=True, help="Of the order, and of the intervals.")
@url_option
@key_file_option
@json_option
@click.pass_obj
def ab(
    settings: Settings,
    queries: tuple[str, ...],
    features: bool,
    users: Path | None,
    first: str,
    second: str,
    k: int | None,
    count: int,
    judged: int,
    seed: int,
    url: str | None,
    key_file: Path | None,
    json_path: Path | None,
) -> None:
    """Two settings of searches on one query set, against a running cluster.

    Each query is asked with both, one right after the other, in random order. Differences are taken
    within queries, b less a, with 95 % intervals from resampled queries. What is measured is the
    latency of one query at a time; `shardline bench load` measures it under load.
    """
    import numpy as np

    from shardline.bench.ab.replay import compare, side_of
    from shardline.cluster.commands.batch_sources import Asked

    sides = side_of(first, "--a"), side_of(second, "--b")
    asked = Asked(
        queries=queries,
        features=features,
        users=users,
        items=False,
        id_column=None,
        vector_column=None,
    )
    asked.check()
    rng = np.random.default_rng(seed)
    with address_of(settings, url, key_file).client() as client, StageProgress() as progress:
        before = _cache_hits(client)
        found = compare(
            client.search,
            _queries(client, asked, count, k, progress),
            sides,
            judged=judged,
            rng=rng,
            progress=progress,
        )
        hits = _cache_hits(client) - before
    _print(found)
    if hits:
        print_warnings(
            [
                f"{hits:,} answers came from the router's cache, which takes less time than a "
                "search: serve with router.cache_bytes=0 to compare latencies"
            ]
        )
    if json_path is not None:
        report = {"a": first, "b": second, "seed": seed, "cache_hits": hits, **asdict(found)}
        json_path.write_text(json.dumps(_plain(report), indent=2) + "\n")


def _queries(
    client: "Client", asked: Any, count: int, k: int | None, progress: StageProgress
) -> list[dict[str, Any]]:
    """Fields of a search for each of the first ``count`` queries."""
    from shardline.cluster.batch.live_batch import LiveCluster
    from shardline.cluster.batch.spans import Span
    from shardline.cluster.commands.batch_sources import Encoder, open_source
    from shardline.cluster.commands.encoder_kinds import encoder_kinds

    cluster = LiveCluster.of(client.status())
    shared: dict[str, Any] = {} if k is None else {"k": k}
    with tempfile.TemporaryDirectory(prefix="shardline-ab-") as work:
        source = open_source(
            asked,
            dim=cluster.dim,
            metric=cluster.metric,
            items=_no_items,
            encoder=lambda: Encoder(kinds=encoder_kinds(client), folder=None),
            work=Path(work),
            note=progress.note,
        )
        ((_, found),) = source.read([Span(0, 0, min(count, source.rows))])
        if found.features is not None:
            return [{"features": [row], **shared} for row in found.features]
        assert found.vectors is not None
        return [{"vectors": row[None].copy(), **shared} for row in found.vectors]


def _no_items() -> Any:
    raise InvalidInput("queries are vectors, features or users here")


def _cache_hits(client: "Client") -> int:
    """Of the router that answers; 0 where it has no cache."""
    cache = client.status().get("cache")
    return 0 if cache is None else int(cache["hits"])


def _plain(value: Any) -> Any:
    """Without NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _print(found: "Comparison") -> None:
    failed = sum(found.failures.values())
    header = ["arm", "p50 ms", "p99 ms", f"recall of {found.judged:,}", "missing per query"]
    rows = [_row("a", found.a), _row("b", found.b)]
    print_table(f"{found.queries:,} queries, 95 % intervals in brackets", header, rows)
    differences = [
        ("median of the differences, ms", found.median_difference_ms),
        ("mean of the differences, ms", found.mean_difference_ms),
        ("recall", found.recall_difference),
    ]
    print_table(
        "b less a; * where zero lies outside the interval",
        ["what", "difference", "95 % interval", ""],
        [_difference(name, each) for name, each in differences],
    )
    click.echo(f"results that both arms have: {_shown(found.overlap, '.4f')}")
    if failed:
        kinds = ", ".join(f"{count:,} {code}" for code, count in found.failures.items())
        print_warnings([f"{failed:,} queries were not answered by both arms: {kinds}"])


def _row(name: str, side: "SideFigures") -> list[str]:
    return [
        name,
        _shown(side.p50_ms, ".2f"),
        _shown(side.p99_ms, ".2f"),
        _shown(side.recall, ".4f"),
        f"{side.short:.2f}",
    ]


def _difference(name: str, found: "Estimate") -> list[str]:
    if math.isnan(found.value):
        return [name, "-", "-", ""]
    interval = f"{found.low:+.4g} to {found.high:+.4g}"
    return [name, f"{found.value:+.4g}", interval, "*" if found.tells else ""]


def _shown(found: "Estimate", form: str) -> str:
    if math.isnan(found.value):
        return "-"
    ends = ["-" if math.isnan(each) else f"{each:{form}}" for each in (found.low, found.high)]
    return f"{found.value:{form}} [{', '.join(ends)}]"
