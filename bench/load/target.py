"""What is loaded: a running endpoint and the generation it serves, checked before any figure.

The generation's files must be readable here (the store is shared by all hosts), because recall
needs the exact answer and every latency is shown beside the same index searched bare.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardline.bench.corpus import best_scores, clustered_name, clustered_queries, score_items
from shardline.bench.load.workload import Queries
from shardline.cluster.serving.endpoint import Address
from shardline.cluster.store import Store
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.errors import DataError, InvalidInput, NotFound, Unavailable
from shardline.shards.core.recall import recall_at_k
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray, Metric, normalise
from shardline.shards.storage.embedding_set import EmbeddingSet, open_embedding_set
from shardline.shards.storage.generation import (
    GenerationManifest,
    read_generation,
    verify_query_encoder,
)

NEARNESS = 0.3  # length of the noise added to an item's vector, as a share of the item's
ENCODE_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An endpoint, the store and the generation behind it. pid: its serving process on this
    machine, whose descendants are the cluster; None where it runs elsewhere. write_address: the
    same endpoint with a key that may write; None: ``address`` has the only key known."""

    address: Address
    pid: int | None
    store: Store
    manifest: GenerationManifest
    corpus: EmbeddingSet
    write_address: Address | None = None

    @property
    def url(self) -> str:
        return self.address.url

    @property
    def folder(self) -> Path:
        return self.store.generation(self.manifest.generation)

    def recall(
        self, queries: FloatArray, answers: Sequence[tuple[IdArray, IdArray]]
    ) -> float | None:
        """Of answers (rows of ``queries`` (n,), ids (n, k)) against the exact scores, all rows of
        the corpus scanned; None without any."""
        if not answers:
            return None
        ks = np.concatenate([np.full(len(rows), ids.shape[1]) for rows, ids in answers])
        ids = np.full((len(ks), ks.max()), EMPTY_ID)
        at = 0
        for rows, found in answers:
            ids[at : at + len(rows), : found.shape[1]] = found
            at += len(rows)
        asked = queries[np.concatenate([rows for rows, _ in answers])]
        metric = self.manifest.metric
        exact = best_scores(self.corpus, asked, int(ks.max()), metric=metric)
        exact[np.arange(exact.shape[1]) >= ks[:, None]] = -np.inf
        found_scores = score_items(self.corpus, asked, ids, metric=metric)
        return round(recall_at_k(found_scores, exact), 4)


def open_target(address: Address, pid: int | None, stores: Sequence[Store]) -> Target:
    """The endpoint with the first of ``stores`` that holds what it serves.

    Raises:
        Unavailable: nothing answers there. NotFound: no store holds its generation.
        DataError: as ``check_whole``.
    """
    with address.client() as client:
        status = client.status()
    for store in stores:
        target = _match(address, pid, store, status)
        if target is not None:
            check_whole(target.manifest.rows, target.corpus.rows, status)
            return target
    raise NotFound(
        f"{address.url} serves generation {status['generation']} of {status['model_version']}",
        expected=f"that generation and its vectors in {stores[0].root}",
        hint="name the store it serves with --store: recall and the bare index need its files",
    )


def _match(
    address: Address, pid: int | None, store: Store, status: dict[str, Any]
) -> Target | None:
    try:
        manifest = read_generation(store.generation(status["generation"]))
        if manifest.model_version != status["model_version"]:
            return None
        corpus = open_embedding_set(
            store.embeddings / manifest.model_version,
            verify=False,
            version=manifest.model_version,
        )
    except NotFound:
        return None
    return Target(address=address, pid=pid, store=store, manifest=manifest, corpus=corpus)


def check_whole(built_rows: int, corpus_rows: int, status: dict[str, Any]) -> None:
    """Refuses to measure an index that is empty, short, or not all there: it would be fast.

    Raises:
        DataError: the generation, its vectors and the endpoint do not have the same rows.
        Unavailable: a shard is not connected.
    """
    if not 0 < built_rows == corpus_rows == status["rows"]:
        raise DataError(
            "not the whole index",
            field="rows",
            expected=f"{corpus_rows} rows, as in the embedding set, and more than none",
            got=f"{built_rows} in the generation, {status['rows']} served",
            hint="recall is measured against the embedding set, so take a generation that was "
            "built of one, not from live rows; --rows makes one",
        )
    missing = [shard["shard"] for shard in status["shards"] if not shard["connected"]]
    if missing or not status["shards"]:
        raise Unavailable(
            "not the whole index",
            field="shards",
            expected="all of them connected",
            got=f"shards {missing} are not" if missing else "there are none",
        )


def check_answers(target: Target, queries: FloatArray, k: int) -> None:
    """Asks a few queries before the load: whole, k results each.

    Raises:
        InvalidInput: k is more than the rows there are.
        Unavailable: an answer is partial or short.
    """
    rows = target.manifest.rows
    if k > rows:
        raise InvalidInput(
            "no answer is that long", field="-k", expected=f"<= {rows}, the rows served", got=str(k)
        )
    with target.address.client() as client:
        answer = client.search(vectors=queries, k=k, timeout_ms=5000)
    coverage = answer.coverage
    if coverage.rows_answered < rows or (answer.ids == EMPTY_ID).any():
        raise Unavailable(
            "the index does not answer as a whole",
            expected=f"{k} results from {rows} rows",
            got=f"{coverage.rows_answered} rows, {int((answer.ids == EMPTY_ID).sum())} empty slots",
            hint="; ".join(map(str, coverage.degraded)) or None,
        )


def vector_queries(target: Target, count: int, rng: np.random.Generator) -> Queries:
    """Queries for an index without users: more of the same clusters for a corpus of ours, items'
    vectors moved a little for any other. None of them is indexed."""
    corpus = target.corpus
    if corpus.model_version == clustered_name(corpus.rows, corpus.dim):
        vectors = clustered_queries(corpus.rows, corpus.dim, count)
        return Queries(vectors=vectors, features=None, source="more vectors of the same clusters")
    chosen = np.sort(rng.integers(corpus.rows, size=count))
    parts, start = [], 0
    for batch in corpus.batches():
        stop = start + len(batch.item_ids)
        inside = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, stop)]
        parts.append(batch.vectors[inside - start])
        start = stop
    items = np.concatenate(parts)[rng.permutation(count)]
    return Queries(
        vectors=moved(items, rng, unit=target.manifest.metric is Metric.COSINE),
        features=None,
        source=f"items' vectors, moved by {NEARNESS:g} of their length",
    )


def moved(vectors: FloatArray, rng: np.random.Generator, *, unit: bool) -> FloatArray:
    """(n, dim) float32: each vector plus Gaussian noise of NEARNESS times its length."""
    noise = rng.standard_normal(vectors.shape, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    noise *= NEARNESS * lengths / np.sqrt(np.float32(vectors.shape[1]))
    result = (vectors + noise).astype(np.float32)
    return normalise(result) if unit else result


def user_queries(target: Target, data: Path, count: int, rng: np.random.Generator) -> Queries:
    """Users of a data set as the query tower takes them, and its output for each.

    Raises:
        NotFound: the generation has no query encoder, or the data set no such columns.
    """
    from shardline.training.data.tables import open_dataset
    from shardline.training.evaluation.user_queries import query_features, sample_users

    folder = verify_query_encoder(target.folder, target.manifest)
    encoder = QueryEncoder.load(folder)
    dataset = open_dataset(data)
    kinds = {feature["name"]: feature["kind"] for feature in encoder.features}
    users = sample_users(np.arange(dataset.rows["users"]), count, rng)
    features = query_features(dataset, kinds, rng.permutation(users), ("train", "val"))
    parts = [
        encoder.encode(features[at : at + ENCODE_ROWS])
        for at in range(0, len(features), ENCODE_ROWS)
    ]
    return Queries(
        vectors=np.concatenate(parts),
        features=tuple(features),
        source=f"{len(features)} users of {data.name} through the query tower",
    )
