"""``tune``: the index for a corpus, found by measurement: its Pareto front, its section."""

import json
import time
from pathlib import Path

import click
import numpy as np

from shardline.cluster.cli import Settings
from shardline.cluster.commands.bench_options import (
    AT_LEAST_ONE,
    POSITIVE,
    in_a_folder,
    json_option,
    plot_option,
)
from shardline.cluster.console import StageProgress, print_table
from shardline.cluster.serving.ray_session import cores
from shardline.cluster.store import Store
from shardline.cluster.tuner.configurations import KINDS, configurations, within_bytes
from shardline.cluster.tuner.corpus_sample import (
    MOST_ROWS,
    CorpusSample,
    HeldOut,
    draw,
    read_held_out,
)
from shardline.cluster.tuner.halving import Bounds, Found, halve
from shardline.cluster.tuner.trial import Trials
from shardline.cluster.tuner.tuning_report import (
    HEADER,
    as_json,
    describe_bounds,
    failure,
    front,
    section,
    table_rows,
)
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.errors import InvalidInput, NotFound
from shardline.shards.core.files import MANIFEST_NAME
from shardline.shards.index.cards import gpu_count
from shardline.shards.index.spec import IndexKind
from shardline.shards.storage.embedding_set import EmbeddingSet, open_embedding_set

MOST_USERS = 500  # whose held-out items are looked for; the same ones at every call


@click.command()
@click.option(
    "--embeddings",
    metavar="VERSION|FOLDER",
    help="An embedding set: its model version in the store, or its folder.  "
    "[default: the store's newest]",
)
@click.option(
    "--interactions",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Held-out interactions, as Parquet or Arrow: a query vector and `item_id`, one or a list. "
    "Repeatable.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder of the data set whose users' held-out items recall is measured on.",
)
@click.option(
    "--split",
    type=click.Choice(["val", "test"]),
    default="val",
    show_default=True,
    help="Split of --data that was held out.",
)
@click.option(
    "--target-recall",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Share of what exact search finds: of its 100 neighbours, or of held-out items.  "
    "[default: index.target_recall]",
)
@click.option("--max-p99-ms", type=POSITIVE, help="Of a query and shard, on one thread.")
@click.option("--max-bytes-per-vector", type=POSITIVE, help="Of an index, as a build reports it.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice([kind.value for kind in KINDS]),
    help="Only this kind. Repeatable.",
)
@click.option("--shards", type=AT_LEAST_ONE, help="Shards of the build.  [default: cluster.shards]")
@click.option(
    "--sample-rows",
    type=click.IntRange(min=1000),
    default=MOST_ROWS,
    show_default=True,
    help="Rows measured at most; times are extrapolated to those of a shard.",
)
@click.option("--time-limit-s", type=POSITIVE, help="Begin nothing that would end later than this.")
@click.option("--seed", default=0, show_default=True, help="Of the sample and of all training.")
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=in_a_folder,
    help="Write the chosen section to this YAML file.",
)
@json_option
@plot_option
@click.pass_obj
def tune(
    settings: Settings,
    embeddings: str | None,
    interactions: tuple[Path, ...],
    data: Path | None,
    split: str,
    target_recall: float | None,
    max_p99_ms: float | None,
    max_bytes_per_vector: float | None,
    kinds: tuple[str, ...],
    shards: int | None,
    sample_rows: int,
    time_limit_s: float | None,
    seed: int,
    out: Path | None,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Find the fastest index within bounds on recall, latency and memory.

    Kinds and their build parameters are tried over a sample: many over few rows, few over as many
    as a shard has. What `shardline build` chooses by itself, nprobe and the like, is measured for
    each as a build does. Prints the Pareto front and the `index:` section to build with.

    Recall is the share of the exact 100 neighbours of sample queries; with --data or --interactions
    it is recall@100 of the held-out items by that of exact search, so 1 is what the model can do.
    """
    started = time.monotonic()
    bounds = Bounds(
        target_recall=settings.config.index.target_recall
        if target_recall is None
        else target_recall,
        max_p99_ms=max_p99_ms,
        max_bytes_per_vector=max_bytes_per_vector,
    )
    if interactions and data is not None:
        raise InvalidInput("--interactions and --data exclude each other")
    corpus = _opened(settings.store, embeddings)
    tried = configurations(
        rows=corpus.rows,
        dim=corpus.dim,
        metric=corpus.metric,
        kinds=[IndexKind(kind) for kind in kinds],
    )
    fitting = within_bytes(tried, max_bytes_per_vector)
    with StageProgress() as progress:
        progress.note(f"tuning for {corpus.folder}: {len(fitting)} configurations that fit")
        sample = draw(
            corpus,
            shards=shards or settings.config.cluster.shards,
            most_rows=sample_rows,
            held_out=_held_out(corpus, list(interactions), data, split, seed),
            seed=seed,
            progress=progress,
        )
        found = halve(
            fitting,
            Trials(sample, threads=cores(), seed=seed),
            bounds,
            clock=time.monotonic,
            time_limit_s=time_limit_s,
            progress=progress,
            note=progress.note,
        )
    report = as_json(sample, bounds, found, time.monotonic() - started)
    _show(sample, bounds, found)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    if plot_path is not None:
        from shardline.bench.plots import plot_tuning

        plot_tuning(report, plot_path)
    if found.chosen is None:
        raise failure(found, bounds)
    by_interactions = sample.held_out is not None
    text = section(found.chosen, bounds, by_interactions=by_interactions, gpu=gpu_count() > 0)
    click.echo(text, nl=False)
    if out is not None:
        out.write_text(
            f"# shardline tune: {corpus.model_version}, {describe_bounds(bounds)}\n{text}"
        )


def _opened(store: Store, embeddings: str | None) -> EmbeddingSet:
    if embeddings is None:
        folder = store.newest_embeddings()
    else:
        in_store = store.embeddings / embeddings
        folder = in_store if (in_store / MANIFEST_NAME).is_file() else Path(embeddings)
    if not (folder / MANIFEST_NAME).is_file():
        raise NotFound(
            f"--embeddings {embeddings}: no finished embedding set",
            expected=f"a model version in {store.embeddings}, or a folder",
            hint="`shardline export` writes one; without --embeddings the newest is taken",
        )
    return open_embedding_set(folder, version=store.version_of(folder))


def _held_out(
    corpus: EmbeddingSet, interactions: list[Path], data: Path | None, split: str, seed: int
) -> HeldOut | None:
    """At most MOST_USERS queries and what they took; None where neither was asked for."""
    if data is not None:
        return _held_out_of(corpus, data, split)
    if not interactions:
        return None
    every = read_held_out(interactions, dim=corpus.dim, metric=corpus.metric)
    if len(every.queries) <= MOST_USERS:
        return every
    chosen = np.sort(np.random.default_rng(seed).choice(len(every.queries), MOST_USERS, False))
    inside = np.isin(every.owners, chosen)
    return HeldOut(
        queries=every.queries[chosen],
        owners=np.searchsorted(chosen, every.owners[inside]),
        items=every.items[inside],
    )


def _held_out_of(corpus: EmbeddingSet, data: Path, split: str) -> HeldOut:
    """The users of a data set, encoded as a router does, and their items in the split."""
    from shardline.training.data.tables import open_dataset
    from shardline.training.evaluation.user_queries import (
        KNOWN_BEFORE,
        evaluation_task,
        query_features,
    )

    if corpus.encoder_folder is None:
        raise InvalidInput(
            "this embedding set has no query encoder, so users cannot be encoded",
            field="--data",
            hint="give query vectors and their held-out items with --interactions",
        )
    encoder = QueryEncoder.load(corpus.encoder_folder)
    dataset = open_dataset(data)
    task = evaluation_task(dataset, split, max_users=MOST_USERS)
    kinds = {feature["name"]: feature["kind"] for feature in encoder.features}
    features = query_features(dataset, kinds, task.users, KNOWN_BEFORE[split])
    taken = task.relevant.take(task.users)
    return HeldOut(
        queries=encoder.encode(features), owners=taken.owners, items=dataset.item_ids[taken.items]
    )


def _show(sample: CorpusSample, bounds: Bounds, found: Found) -> None:
    measure = "recall: share of the exact 100 neighbours"
    if sample.held_out is not None:
        measure = "recall: recall@100 of held-out items by that of exact search"
    title = (
        f"Pareto front for {sample.rows:,} rows x {sample.dim}, {sample.metric}, "
        f"{sample.shards} shards; bounds: {describe_bounds(bounds)}; {measure}; "
        f"{len(sample.queries)} {sample.query_source}; times of a query and shard on one thread"
    )
    rows = table_rows(front(found), found, sample.shard_rows)
    print_table(title, HEADER, rows)
    if found.is_cut_short:
        click.echo(f"the time did not suffice for everything; not tried: {found.untried}")
