"""``plan``: shards, hosts, memory, latency and cost for a load, from measured costs; on paper."""

import json
import math
from pathlib import Path
from typing import Any

import click

from shardline.cluster.commands.bench_options import AT_LEAST_ONE, json_option
from shardline.cluster.planner.card_plan import AskedCards, card_lines, card_plan, cards_as_json
from shardline.cluster.planner.measured_costs import KIND_COSTS
from shardline.cluster.planner.plan_text import as_json, lines_of
from shardline.cluster.planner.sizing import MOST_SHARDS, Asked, depth_of, missed
from shardline.cluster.planner.sizing import plan as planned
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import MAX_NPROBE, MAX_RERANK_FACTOR
from shardline.shards.core.schema import MAX_K, Metric
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import MEASURED_K, IndexKind, IndexSpec

MOST_ROWS, MOST_DIM = 10**12, 65_536
KINDS = (IndexKind.AUTO, *KIND_COSTS)
GIB = 1 << 30


class Rows(click.ParamType[int]):
    """A whole number of rows, also as 1e9."""

    name = "rows"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        try:
            number = float(str(value).replace("_", ""))
        except ValueError:
            self.fail(f"{value!r} is no number; 1e9 or 1000000000 are", param, ctx)
        if not math.isfinite(number) or number != int(number) or not 1 <= number <= MOST_ROWS:
            self.fail(f"{value} is not a whole number from 1 to {MOST_ROWS:g}", param, ctx)
        return int(number)


class Amount(click.ParamType[float]):
    """A finite number above 0."""

    name = "number"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            number = float(str(value))
        except ValueError:
            self.fail(f"{value!r} is no number", param, ctx)
        if not math.isfinite(number) or number <= 0:
            self.fail(f"{value} is not a finite number above 0", param, ctx)
        return number


@click.command()
@click.option("--rows", required=True, type=Rows(), help="Vectors to serve, e.g. 1e9.")
@click.option("--dim", required=True, type=click.IntRange(1, MOST_DIM), help="Their dimension.")
@click.option("--qps", required=True, type=Amount(), help="Queries per second, one per request.")
@click.option("--p99-ms", required=True, type=Amount(), help="Bound on the latency over HTTP.")
@click.option(
    "-k",
    "--k",
    default=MEASURED_K,
    show_default=True,
    type=click.IntRange(1, MAX_K),
    help="Results.",
)
@click.option(
    "--recall",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Lists searched are those that reach this recall@100 on vectors without clusters.  "
    "[default: .98]",
)
@click.option(
    "--nprobe", type=click.IntRange(1, MAX_NPROBE), help="Instead: lists searched per query."
)
@click.option(
    "--rerank-factor",
    type=click.IntRange(1, MAX_RERANK_FACTOR),
    help="Candidates re-ranked, as a multiple of k.  [default: 4]",
)
@click.option(
    "--metric",
    default=Metric.COSINE.value,
    show_default=True,
    type=click.Choice([metric.value for metric in Metric]),
)
@click.option(
    "--kind",
    default=IndexKind.AUTO.value,
    show_default=True,
    type=click.Choice([kind.value for kind in KINDS]),
    help="Kind of index; auto: as a build chooses.",
)
@click.option("--nlist", type=click.IntRange(1, 1 << 20), help="Lists.  [default: chosen]")
@click.option("--shards", type=click.IntRange(1, MOST_SHARDS), help="[default: chosen]")
@click.option("--replicas", type=click.IntRange(1, 64), help="Of each shard.  [default: chosen]")
@click.option(
    "--host-memory", "host_gib", default=128.0, show_default=True, type=Amount(), help="[GiB]"
)
@click.option("--host-cores", default=16, show_default=True, type=AT_LEAST_ONE)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    type=click.Choice(["cpu", "gpu"]),
    help="gpu: by memory and bandwidth of a card alone, nothing of which has been measured.",
)
@click.option(
    "--card-memory", "card_gb", default=141.0, show_default=True, type=Amount(), help="[GB] gpu."
)
@click.option(
    "--card-bandwidth",
    "card_gbs",
    default=4300.0,
    show_default=True,
    type=Amount(),
    help="[GB/s] gpu.",
)
@json_option
def plan(
    rows: int,
    dim: int,
    qps: float,
    p99_ms: float,
    k: int,
    recall: float | None,
    nprobe: int | None,
    rerank_factor: int | None,
    metric: str,
    kind: str,
    nlist: int | None,
    shards: int | None,
    replicas: int | None,
    host_gib: float,
    host_cores: int,
    device: str,
    card_gb: float,
    card_gbs: float,
    json_path: Path | None,
) -> None:
    """Shards, hosts, memory, latency and cost for a load that there is not yet.

    Nothing is built or asked: a plan adds up costs that were measured on this project's own
    machine, and simulates how a query waits for its slowest shard. docs/SCALE.md has the method and
    what is extrapolated. Give --nprobe as `shardline build` or `shardline tune` found it for your
    vectors: how many lists a recall needs depends on them most.
    """
    if recall is not None and nprobe is not None:
        raise InvalidInput("--recall and --nprobe exclude each other", field="--recall")
    if shards is not None and shards > rows:
        raise InvalidInput(
            "more shards than rows", field="--shards", expected=f"<= {rows}", got=str(shards)
        )
    asked = Asked(
        rows=rows,
        dim=dim,
        qps=qps,
        p99_ms=p99_ms,
        k=k,
        metric=Metric(metric),
        kind=IndexKind(kind),
        recall=recall,
        nprobe=nprobe,
        rerank_factor=rerank_factor,
        nlist=nlist,
        shards=shards,
        replicas=replicas,
        host_bytes=int(host_gib * GIB),
        host_cores=host_cores,
    )
    failure = None
    if device == "gpu":
        report, lines = _on_cards(asked, card_gb * 1e9, card_gbs * 1e9)
    else:
        found = planned(asked)
        report, lines = as_json(found), list(lines_of(found))
        failure = missed(found)
    for line in lines:
        click.echo(line)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    if failure is not None:
        raise failure


def _on_cards(
    asked: Asked, card_bytes: float, card_bytes_per_s: float
) -> tuple[dict[str, Any], list[str]]:
    spec = IndexSpec(kind=asked.kind, nlist=asked.nlist)
    index = resolve(spec, rows=asked.rows, dim=asked.dim, metric=asked.metric, gpu=True)
    on_cards = AskedCards(
        rows=asked.rows,
        dim=asked.dim,
        qps=asked.qps,
        p99_ms=asked.p99_ms,
        metric=asked.metric,
        index=index,
        depth=depth_of(asked, index),
        card_bytes=card_bytes,
        card_bytes_per_s=card_bytes_per_s,
    )
    found = card_plan(on_cards)
    return cards_as_json(on_cards, found), list(card_lines(on_cards, found))
