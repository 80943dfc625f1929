"""Two versions of the project, or two sets of search parameters, measured side by side.

Theory: a shared machine changes its speed by half within minutes, far more than what a change of
the code costs. So both sides are up at once, over indexes built from the same vectors, and each
measurement is taken of one and of the other within seconds: A B, then B A, so that neither always
comes first. What counts is the ratio within a pair, its median over the pairs, and how far the
pairs spread; the medians of the figures themselves only say on what machine.

Both are asked over HTTP by one client, with the same search parameters in each request; each is
started by its own command line (``checkout``). The last table line is recall@k against the exact
scores: a side that answers worse is no faster.

    python -m shardline.bench.load.compare --baseline ../older --pairs 5
    python -m shardline.bench.load.compare --params nprobe=128,rerank_factor=4 --params own
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardline.bench.corpus import clustered_queries, clustered_set
from shardline.bench.load.checkout import Checkout
from shardline.bench.load.pairs import CONNECTIONS, Bench, K, Side
from shardline.bench.load.wrk import find_wrk
from shardline.cluster.commands.bench_options import AT_LEAST_ONE
from shardline.cluster.console import print_table
from shardline.cluster.serving.endpoint import Address
from shardline.cluster.serving.ray_session import cores, free_port
from shardline.cluster.store import Store
from shardline.shards.core.errors import InvalidInput, ShardlineError
from shardline.shards.storage.embedding_set import EmbeddingSet

OWN = "own"  # the generation's own search parameters
QUERIES = 4096
# of both sides before --set: result caches off, or the second pass would measure them
SETTINGS = ("cluster.shards=4", "index.kind=ivfpq-fs", "router.cache_bytes=0")
HEADER = ("", "unit", "first", "second", "second / first, speed", "least", "most")
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """seconds: of each measurement of each side; settings: configuration of both, KEY=VALUE;
    store: absolute, where vectors and indexes are kept."""

    pairs: int
    rows: int
    dim: int
    seconds: float
    settings: tuple[str, ...]
    store: Path


def parse_params(text: str) -> dict[str, int]:
    """ "nprobe=16,rerank_factor=1" or "own"; raises InvalidInput for anything else."""
    if text == OWN:
        return {}
    try:
        return {name: int(value) for name, value in (each.split("=") for each in text.split(","))}
    except ValueError as error:
        expected = f"{OWN}, or name=integer,name=integer"
        raise InvalidInput(
            "not understood", field="--params", expected=expected, got=text
        ) from error


def params_of(baseline: Path | None, texts: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """The search parameters of both sides; raises InvalidInput unless there is one difference."""
    params = [parse_params(text) for text in texts]
    if len(params) != (2 if baseline is None else 1):
        raise InvalidInput(
            "not one difference between the sides",
            field="--params",
            expected="two of them without --baseline, one with it",
            got=str(len(params)),
        )
    return params[0], params[-1]


def write_vectors(corpus: EmbeddingSet, path: Path) -> None:
    """The corpus as a Parquet file that every version's ``build --vectors`` reads; complete or
    absent."""
    temporary = path.with_suffix(".part")
    schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32()))])
    with pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
        for batch in corpus.batches():
            count, dim = batch.vectors.shape
            starts = pa.array(np.arange(0, count * dim + 1, dim, dtype=np.int32))
            vectors = pa.ListArray.from_arrays(starts, pa.array(batch.vectors.ravel()))
            writer.write_table(pa.table([pa.array(batch.item_ids), vectors], schema=schema))
    temporary.replace(path)


def measure(
    checkouts: tuple[Checkout, Checkout],
    names: Sequence[str],
    params: Sequence[dict[str, int]],
    plan: Plan,
    note: Note,
) -> dict[str, Any]:
    """The report, ready for JSON: both sides are brought up, measured, and stopped again.

    Raises:
        NotFound: a folder is no checkout. Unavailable: a build, a server or a benchmark failed.
    """
    plan.store.mkdir(parents=True, exist_ok=True)
    note(f"{plan.rows:,} x {plan.dim} vectors in {plan.store}")
    corpus = clustered_set(Store(plan.store), plan.rows, plan.dim, lambda *progress: None)
    vectors = plan.store / f"{corpus.model_version}.parquet"
    if not vectors.exists():
        write_vectors(corpus, vectors)
    with ExitStack() as stack:
        addresses = {
            checkout: stack.enter_context(_served(checkout, vectors, plan, note))
            for checkout in dict.fromkeys(checkouts)
        }
        first, second = (
            Side(name=name, checkout=checkout, address=addresses[checkout], params=chosen)
            for name, checkout, chosen in zip(names, checkouts, params, strict=True)
        )
        queries = clustered_queries(plan.rows, plan.dim, QUERIES)
        bench = Bench(sides=(first, second), queries=queries, seconds=plan.seconds, note=note)
        note("recall of both")
        recall = [bench.recall(side, corpus) for side in bench.sides]
        measures = bench.run(plan.pairs)
        note("stopping")
    return {
        "setup": asdict(plan)
        | {"store": str(plan.store), "k": K, "cores": cores(), "wrk": find_wrk() is not None},
        "sides": [
            {"name": each.name, "commit": each.checkout.commit, "params": each.params or OWN}
            for each in bench.sides
        ],
        "measures": measures,
        "recall": recall,
        "failures": bench.failures,
    }


def _served(
    checkout: Checkout, vectors: Path, plan: Plan, note: Note
) -> AbstractContextManager[Address]:
    """The checkout's server over its own index of the vectors."""
    checkout.check()
    store = plan.store / checkout.store_name(plan.rows, plan.dim, plan.settings)
    note(f"building with {checkout.folder} ({checkout.commit})")
    if not checkout.build(store, vectors, plan.settings):
        note(f"its index is there already: {store}")
    note("starting its server")
    return checkout.serving(store, plan.settings, free_port())


def print_report(report: dict[str, Any]) -> None:
    """The table, what failed, and the JSON."""
    names = ("first", "second", "ratio", "ratio_min", "ratio_max")
    rows = [
        (each["name"], each["unit"], *(f"{each[name]:,.3f}" for name in names))
        for each in report["measures"]
    ]
    setup = report["setup"]
    recalls = (f"{each:.4f}" for each in report["recall"])
    rows.append((f"recall@{K}", "", *recalls, "", "", ""))
    first, second = (
        f"{side['name']} ({side['commit']}; {side['params']})" for side in report["sides"]
    )
    tool = "wrk" if setup["wrk"] else "our own client"
    title = (
        f"first: {first}; second: {second}; {setup['rows']:,} x {setup['dim']}, k = {K}, "
        f"{setup['pairs']} pairs, {setup['cores']} cores; {CONNECTIONS} connections by {tool}"
    )
    print_table(title, HEADER, rows)
    for name, lost in report["failures"].items():
        if lost:
            click.echo(f"{name}: {lost} requests failed, were refused or partial")
    click.echo(json.dumps(report, indent=2))


@click.command()
@click.option("--baseline", type=click.Path(path_type=Path), help="Folder of the other checkout.")
@click.option(
    "--params",
    "texts",
    multiple=True,
    help=f"Search parameters, e.g. nprobe=16,rerank_factor=1, or `{OWN}`: those that the build "
    "chose. Once with --baseline, for both; twice without it.",
)
@click.option("--pairs", type=AT_LEAST_ONE, default=5, show_default=True)
@click.option("--rows", type=AT_LEAST_ONE, default=1_000_000, show_default=True)
@click.option("--dim", type=AT_LEAST_ONE, default=128, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=5.0,
    show_default=True,
    help="Of each measurement of each side.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Configuration of both sides, build and server, e.g. index.nlist=1024. Repeatable.  "
    f"[before it: {' '.join(SETTINGS)}]",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    default=Path("shardline-store/compare"),
    show_default=True,
    help="Folder of vectors and indexes; they are kept and reused.",
)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures there too.")
def main(
    baseline: Path | None,
    texts: tuple[str, ...],
    settings: tuple[str, ...],
    store: Path,
    out: Path | None,
    **sizes: Any,
) -> None:
    """This checkout beside another one, or two sets of search parameters beside each other."""
    params = params_of(baseline, texts)
    plan = Plan(store=store.resolve(), settings=(*SETTINGS, *settings), **sizes)
    ours = Checkout(Path(__file__).resolve().parents[2])
    checkouts = (ours if baseline is None else Checkout(baseline.resolve()), ours)
    names = texts if baseline is None else ("baseline", "this")
    began = time.monotonic()

    def note(line: str) -> None:
        click.echo(f"{time.monotonic() - began:6.0f} s  {line}", err=True)

    report = measure(checkouts, names, params, plan, note)
    print_report(report)
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the servers would outlive us
    try:
        main()
    except ShardlineError as error:
        sys.exit(f"error: {error}")
