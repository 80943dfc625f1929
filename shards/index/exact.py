"""The exact answer over vectors in memory, by brute force: what recall is measured against."""

import faiss

from shardline.shards.core.recall import exact_scores
from shardline.shards.core.schema import FloatArray, Metric, Ranked
from shardline.shards.index.layers import faiss_metric


def exact_top_k(queries: FloatArray, vectors: FloatArray, k: int, metric: Metric) -> Ranked:
    """The rows of vectors (m, d) that score best, (n, min(k, m)), for queries (n, d).

    Scores are higher-is-better and those of ``exact_scores``, so that the two compare. The vectors
    are not copied. As many threads as ``set_search_threads`` was told in this thread.
    """
    width = min(k, len(vectors))
    _, rows = faiss.knn(queries, vectors, width, metric=faiss_metric(metric))
    return Ranked(rows, exact_scores(queries, vectors, rows, metric))
