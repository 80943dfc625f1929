"""The corpora benchmarks run on, as embedding sets and generations in a store of their own."""

from collections.abc import Callable
from datetime import UTC, datetime

import faiss
import numpy as np

from shardline.bench.vectors import BLOCK_ROWS, clustered_blocks
from shardline.cluster.build import BuildPlan, RunJobs, build_generation
from shardline.cluster.store import Store
from shardline.shards.core.recall import exact_scores, without_repeats
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray, Metric
from shardline.shards.index.main_index import MainIndex
from shardline.shards.storage.embedding_set import (
    EmbeddingSet,
    embedding_writer,
    open_embedding_set,
)
from shardline.shards.storage.generation import (
    INDEX_NAME,
    GenerationManifest,
    read_generation,
)

SEED = 7
ROWS_PER_CLUSTER = 250

Progress = Callable[[str, int, int], None]


def clustered_set(store: Store, rows: int, dim: int, progress: Progress) -> EmbeddingSet:
    """An embedding set of clustered unit vectors, item ids 0..rows-1; reused when it is there."""
    name = clustered_name(rows, dim)
    target = store.embeddings / name
    if target.exists():
        return open_embedding_set(target, version=name)
    with embedding_writer(
        target,
        model_version=name,
        dim=dim,
        metric=Metric.COSINE,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    ) as writer:
        at = 0
        for block in clustered_blocks(rows, dim, clusters_of(rows), SEED):
            writer.append(np.arange(at, at + len(block)), block)
            at += len(block)
            progress("vectors", at, rows)
    return open_embedding_set(target, verify=False)


def clustered_name(rows: int, dim: int) -> str:
    """The model version of such a corpus, and its folder's name."""
    return f"clustered-{rows}x{dim}-s{SEED}"


def clustered_queries(rows: int, dim: int, count: int) -> FloatArray:
    """(count, dim) further vectors of the same clusters, none of them indexed."""
    first_row = -(-rows // BLOCK_ROWS) * BLOCK_ROWS
    blocks = clustered_blocks(count, dim, clusters_of(rows), SEED, first_row=first_row)
    return np.concatenate(list(blocks))


def clusters_of(rows: int) -> int:
    return max(rows // ROWS_PER_CLUSTER, 1)


def generation_of(
    store: Store, corpus: EmbeddingSet, plan: BuildPlan, *, run_jobs: RunJobs, progress: Progress
) -> GenerationManifest:
    """A generation of this corpus and plan; an earlier one like it is reused."""
    for number in reversed(store.generation_numbers()):
        manifest = read_generation(store.generation(number))
        if (
            manifest.model_version == corpus.model_version
            and manifest.spec == plan.spec
            and len(manifest.shards) == plan.num_shards
        ):
            return manifest
    return build_generation(store, corpus.folder, plan, run_jobs=run_jobs, progress=progress)


def best_scores(
    corpus: EmbeddingSet, queries: FloatArray, k: int, *, metric: Metric = Metric.COSINE
) -> FloatArray:
    """(n, k) float32: the scores of the exact answer, higher first, found block by block. Cosine
    expects queries of unit length."""
    is_l2 = metric is Metric.L2
    best = faiss.ResultHeap(len(queries), k, keep_max=not is_l2)
    for batch in corpus.batches():
        flat = faiss.IndexFlatL2(corpus.dim) if is_l2 else faiss.IndexFlatIP(corpus.dim)
        flat.add(batch.vectors)
        _, rows = flat.search(queries, min(k, len(batch.item_ids)))
        # scored as the answers are: above a number of queries faiss takes an L2 distance from norms
        # and a product, and of near rows with long vectors hardly a digit is right
        scores = exact_scores(queries, batch.vectors, rows, metric)
        best.add_result(-scores if is_l2 else scores, batch.item_ids[rows])
    best.finalize()
    scores = -best.D if is_l2 else best.D
    return np.where(best.I == EMPTY_ID, -np.inf, scores).astype(np.float32)


def score_items(
    corpus: EmbeddingSet, queries: FloatArray, ids: IdArray, *, metric: Metric = Metric.COSINE
) -> FloatArray:
    """(n, k) float32: exact scores of items ``ids`` (n, k) for queries (n, dim); -inf where there
    is no such item, and from the second time an answer holds one."""
    ids = without_repeats(ids)
    wanted = np.unique(ids[ids != EMPTY_ID])
    vectors = np.zeros((len(wanted), corpus.dim), dtype=np.float32)
    found = np.zeros(len(wanted), dtype=np.bool_)
    for batch in corpus.batches():
        inside = np.isin(batch.item_ids, wanted)
        places = np.searchsorted(wanted, batch.item_ids[inside])
        vectors[places] = batch.vectors[inside]
        found[places] = True
    known = np.isin(ids, wanted[found])
    rows = np.where(known, np.searchsorted(wanted, ids), EMPTY_ID)
    return exact_scores(queries, vectors, rows, metric)


def load_bare(store: Store, manifest: GenerationManifest) -> list[MainIndex]:
    """The generation's indexes in this process: what is left when no socket is in the way."""
    folder = store.generation(manifest.generation)
    return [
        MainIndex.load(
            folder / entry.folder / INDEX_NAME,
            metric=manifest.metric,
            defaults=manifest.index.search_params,
        )
        for entry in manifest.shards
    ]
