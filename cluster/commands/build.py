"""``build``: from an embedding set, vectors made elsewhere or live rows to the next generation."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

from shardline.cluster.build import (
    BuildPlan,
    CheckedPlan,
    build_checked,
    check_plan,
    run_here,
    run_on_ray,
)
from shardline.cluster.catalogue_cut import NO_CUT_HELP, assumption_of, catalogue_cut
from shardline.cluster.cli import Settings
from shardline.cluster.config import ShardlineConfig
from shardline.cluster.console import StageProgress
from shardline.cluster.corpus_from_live import live_corpus, live_corpus_bytes
from shardline.cluster.preflight.build_space import build_bytes
from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.machine import before_ray, check_store
from shardline.cluster.serving.going_live import cluster_there, made_live
from shardline.cluster.serving.ray_session import cores, ray_for
from shardline.cluster.spread import SAMPLE_QUERIES
from shardline.cluster.store import Store
from shardline.shards.core.encoder_files import QUERY_ENCODER_FOLDER, write_text_tower
from shardline.shards.core.errors import DataError, InvalidInput, NotFound
from shardline.shards.core.files import MANIFEST_NAME
from shardline.shards.core.partition import Partition, Partitioning
from shardline.shards.core.schema import Metric
from shardline.shards.index.cards import gpu_count, why_no_card
from shardline.shards.index.spec import Device
from shardline.shards.storage.embedding_set import embedding_writer
from shardline.shards.storage.foreign_vectors import read_foreign, read_foreign_queries
from shardline.shards.storage.generation import GenerationManifest, read_generation
from shardline.shards.storage.table_parts import open_parts
from shardline.shards.text.model_folder import TextModel, describe_model, find_model

READER_VERSION = 2  # of vectors made elsewhere: the same files may become another set


@click.command()
@click.option(
    "--embeddings",
    type=click.Path(path_type=Path),
    help="Folder of an embedding set.  [default: the store's newest]",
)
@click.option(
    "--vectors",
    multiple=True,
    help="Parquet or Arrow file, folder of them or URL: ids and vectors of items. Repeatable.",
)
@click.option(
    "--queries",
    multiple=True,
    help="Files like --vectors, without ids: queries to choose search parameters with. Repeatable.",
)
@click.option("--id-column", help="The id column of --vectors, if not id, idx or item_id.")
@click.option("--vector-column", help="Its vector column, if not emb, embedding or vector.")
@click.option(
    "--metric",
    type=click.Choice([metric.value for metric in Metric]),
    default=Metric.COSINE.value,
    show_default=True,
    help="How the vectors of --vectors are compared.",
)
@click.option(
    "--text-encoder",
    help="The model that made --vectors of the items' texts, as `data embed-text --model` names "
    "it: queries by text are then answered without a query tower (docs/TEXT.md).",
)
@click.option(
    "--from-live",
    is_flag=True,
    help="Build from the live generation's rows as they are now, written and deleted items "
    "counted; a cluster may serve and take writes meanwhile.",
)
@click.option(
    "--partitioning",
    type=click.Choice([each.value for each in Partitioning]),
    help="Ranges of item ids, or of hashed ids (for ids clustered by topic or time).  "
    "[default: range; with --from-live as now]",
)
@click.option(
    "--same-shards",
    is_flag=True,
    help="Cut it into the shards of the live generation, not into shards of equal size: what "
    "`publish --one-shard-at-a-time` needs.",
)
@click.option("--no-cut", is_flag=True, help=NO_CUT_HELP)
@click.option("--in-process", is_flag=True, help="Build shards one after the other, without Ray.")
@click.option(
    "--no-publish",
    is_flag=True,
    help="Leave the live generation as it is, as is done while a cluster serves the store.",
)
@click.pass_obj
def build(
    settings: Settings,
    embeddings: Path | None,
    vectors: tuple[str, ...],
    queries: tuple[str, ...],
    id_column: str | None,
    vector_column: str | None,
    metric: str,
    text_encoder: str | None,
    from_live: bool,
    partitioning: str | None,
    same_shards: bool,
    no_cut: bool,
    in_process: bool,
    no_publish: bool,
) -> None:
    """Turn an embedding set into index shards, and make them the live generation.

    A cluster that serves this store goes on with the one it has until `shardline publish`; and so
    does the store, if the live generation has writes that the new one lacks.
    """
    if (embeddings is not None) + bool(vectors) + from_live > 1:
        raise InvalidInput("--embeddings, --vectors and --from-live exclude each other")
    if queries and not vectors:
        raise InvalidInput("--queries goes with --vectors: exported sets hold queries of their own")
    if text_encoder is not None and not vectors:
        raise InvalidInput("--text-encoder goes with --vectors: exported sets have encoders")
    # before any vector is read
    text_model = None if text_encoder is None else describe_model(find_model(text_encoder))
    if same_shards and partitioning is not None:
        raise InvalidInput("--same-shards and --partitioning exclude each other")
    if no_cut and from_live:
        raise InvalidInput("--no-cut: rows of --from-live have what was written, exactly")
    config, store = settings.config, settings.store
    enforce([check_store(store)])
    with StageProgress() as progress:
        if vectors:
            embeddings = import_vectors(
                store,
                vectors,
                queries=queries,
                metric=Metric(metric),
                id_column=id_column,
                vector_column=vector_column,
                no_cut=no_cut,
                text_model=text_model,
                progress=progress,
            )
        with _corpus(store, embeddings, progress, from_live=from_live) as corpus:
            plan = plan_of(config, Partitioning(partitioning or corpus.partitioning))
            if same_shards:
                plan = as_live(plan, store)
            checked = check_plan(corpus.folder, plan, corpus.version)
            if no_cut:
                checked = replace(checked, corpus=replace(checked.corpus, cut=None))
            manifest = _built(settings, checked, progress, in_process=in_process)
        go_live = cluster_there if no_publish else made_live
        reason = go_live(config, manifest.generation, verbose=settings.verbose)
    click.echo(describe(manifest))
    if reason is not None:
        click.echo(reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Corpus:
    """The embedding set in ``folder``, which must be of model ``version`` unless that is None.

    partitioning: what it gets unless another is asked for.
    """

    folder: Path
    version: str | None
    partitioning: str = Partitioning.RANGE.value


@contextmanager
def _corpus(
    store: Store, embeddings: Path | None, progress: StageProgress, *, from_live: bool
) -> Iterator[_Corpus]:
    """What to build from, for as long as the block runs."""
    if from_live:
        number = store.current()
        folder = store.generation(number)
        manifest = read_generation(folder)
        enforce([check_store(store, live_corpus_bytes(folder, manifest))])
        progress.note(f"building from the live rows of generation {number}")
        if not manifest.index.keeps_vectors:
            progress.note(
                f"warning: {manifest.index.factory} keeps approximations of vectors, and these are "
                "what is built from; an exported embedding set has the vectors themselves"
            )
        with live_corpus(store, number, progress) as rows:
            yield _Corpus(folder=rows, version=None, partitioning=manifest.partitioning)
        return
    embeddings = embeddings or store.newest_embeddings()
    progress.note(f"building from {embeddings}")
    if not (embeddings / MANIFEST_NAME).is_file():
        raise NotFound(
            f"--embeddings {embeddings}: "
            + ("not a finished embedding set" if embeddings.is_dir() else "no such folder"),
            hint="`shardline export` writes one; without --embeddings the newest is taken",
        )
    yield _Corpus(folder=embeddings, version=store.version_of(embeddings))


def _built(
    settings: Settings, checked: CheckedPlan, progress: StageProgress, *, in_process: bool
) -> GenerationManifest:
    """Builds here or on Ray, once the machine is found fit for it."""
    config, store = settings.config, settings.store
    needed = build_bytes(checked.corpus, checked.index, checked.plan.num_shards)
    checks = [check_store(store, needed)]
    if not in_process and config.cluster.address == "local":
        checks += before_ray(None)
    for warning in enforce(checks):
        progress.note(f"warning: {warning}")
    if in_process:
        return build_checked(store, checked, run_jobs=run_here, progress=progress)
    address, verbose = config.cluster.address, settings.verbose
    with ray_for(address, num_cpus=cores(), verbose=verbose, in_flight=None):
        return build_checked(store, checked, run_jobs=run_on_ray, progress=progress)


def plan_of(config: ShardlineConfig, partitioning: Partitioning = Partitioning.RANGE) -> BuildPlan:
    """The build that a configuration asks for on this machine.

    Raises:
        ConfigError: it asks for a GPU, and none can be used here.
    """
    if config.index.device_kind is Device.CUDA:
        trouble = why_no_card(config.index.card)
        if trouble is not None:
            raise trouble
    return BuildPlan(
        spec=config.index,
        num_shards=config.cluster.shards,
        partitioning=partitioning,
        threads=config.cluster.threads_per_shard,
        gpu=gpu_count() > 0,
    )


def as_live(plan: BuildPlan, store: Store) -> BuildPlan:
    """With the shards of the live generation.

    Raises:
        NotFound: none is live. CorruptFile: of its manifest.
    """
    manifest = read_generation(store.generation(store.current()))
    partitioning = Partitioning(manifest.partitioning)
    cut = Partition(partitioning, np.array(manifest.boundaries, np.uint64))
    return replace(plan, num_shards=cut.num_shards, partitioning=partitioning, cut=cut)


def import_vectors(
    store: Store,
    sources: tuple[str, ...],
    *,
    queries: tuple[str, ...] = (),
    metric: Metric,
    id_column: str | None,
    vector_column: str | None,
    no_cut: bool = False,
    text_model: TextModel | None = None,
    progress: StageProgress,
) -> Path:
    """Copies foreign vectors into an embedding set, named after their contents; its folder.

    text_model: what made them of texts, and is to make the vectors of queries.

    Raises:
        As ``read_foreign``. InvalidInput: text_model makes vectors of another width.
    """
    # before the first look: what is written later may be missing
    cut = None if no_cut else catalogue_cut(store)
    if (assumption := assumption_of(cut)) is not None:
        progress.note(assumption)
    given = {"--vectors": sources, "--queries": queries}
    parts = {option: open_parts(paths, option=option) for option, paths in given.items()}
    contents = [
        (option, part.location.sha256(), {n: v.as_py() for n, v in part.folder_values.items()})
        for option in given
        for part in parts[option]
    ]
    declared: tuple[Any, ...] = (READER_VERSION, str(metric), id_column, vector_column, contents)
    if text_model is not None:
        declared += (text_model.id,)
    digest = hashlib.sha256(repr(declared).encode())
    version = f"vectors-{digest.hexdigest()[:12]}"
    target = store.embeddings / version
    if target.exists():
        return target
    batches = read_foreign(sources, metric=metric, id_column=id_column, vector_column=vector_column)
    first = next(batches, None)
    if first is None:
        raise DataError("no rows", field=", ".join(sources), expected="at least one vector")
    dim = first.vectors.shape[1]
    if text_model is not None and text_model.width != dim:
        raise InvalidInput(
            "the text encoder did not make these vectors",
            field="--text-encoder",
            expected=f"a model of {dim} dimensions",
            got=f"{text_model.name} of {text_model.width}",
        )
    with embedding_writer(
        target,
        model_version=version,
        dim=dim,
        metric=metric,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        cut=cut,
    ) as writer:
        if text_model is not None:
            write_text_tower(
                writer.folder / QUERY_ENCODER_FOLDER,
                version=version,
                encoder=text_model.id,
                dim=dim,
                metric=metric,
            )
        rows = 0
        for batch in (first, *batches):
            writer.append(batch.item_ids, batch.vectors, batch.attributes)
            rows += len(batch.item_ids)
            progress("import", rows, rows)
        if queries:
            asked = read_foreign_queries(
                queries, dim=writer.dim, metric=metric, vector_column=vector_column
            )
            writer.queries(asked)
    return target


def describe(manifest: GenerationManifest) -> str:
    """What was built, what a search does by default and how well, a line each."""
    quality = manifest.quality
    name, chosen, fixed = f"recall@{quality['k']}", quality["chosen"], quality["fixed_default"]
    lines = [
        f"generation {manifest.generation}: {manifest.rows:,} rows in "
        f"{len(manifest.shards)} shards, model {manifest.model_version}",
        f"index: {manifest.index.factory} ({manifest.index.reason})",
        f"search: {_point(chosen, name)}, chosen for a target of {quality['target_recall']:g}",
        f"measured with {quality['queries']} {quality['query_source']}"
        + ("" if quality["query_source"] == SAMPLE_QUERIES else "; users' queries may be harder"),
        f"size and time: {quality['bytes_per_vector']:.0f} bytes per vector, built in "
        f"{quality['build_seconds']:.1f} s, {quality['rows_per_second']:,} rows/s",
    ]
    if chosen["params"] != fixed["params"]:
        lines.insert(3, f"without measuring: {_point(fixed, name)}")
    if quality["advice"]:
        lines.append(
            f"warning: {name} {chosen['recall']:.3f} is below index.target_recall "
            f"{quality['target_recall']:g}: {quality['advice']}"
        )
    return "\n".join(lines)


def _point(point: dict[str, Any], name: str) -> str:
    knobs = ", ".join(f"{knob} {value}" for knob, value in point["params"].items())
    return (
        f"{knobs or 'no parameters'}: {name} {point['recall']:.3f}, "
        f"{point['ms_per_query']:.2f} ms per query on one thread"
    )
