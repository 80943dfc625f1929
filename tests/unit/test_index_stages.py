"""Each stage against a ranking by the reconstructed codes, or by the vectors themselves."""

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import manifold
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Metric
from shardline.shards.index.layers import layers_of
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexSpec
from shardline.shards.index.stages import Stage, stages_of, without_graph, without_rerank
from shardline.shards.index.template import train_template

ROWS, DIM, K = 2000, 32, 20
ALL = SearchParams()
SCANNED = {
    "flat": {"kind": "flat"},
    "ivf": {"kind": "ivf", "nlist": 40, "nprobe": 2},
    "pq": {"kind": "pq", "m": 8},
    "ivfpq": {"kind": "ivfpq", "nlist": 40, "nprobe": 2, "m": 8},
    "sq8": {"kind": "sq8"},
    "hnsw": {"kind": "hnsw", "hnsw_m": 8, "ef_search": 20},
    "pca-hnsw": {"kind": "factory", "factory": "PCA16,HNSW8,SQ8"},
    "pca-ivf": {"kind": "ivf", "nlist": 40, "nprobe": 2, "pca": 16, "rerank": "none"},
    "hnsw-refined": {"kind": "factory", "factory": "PCA16,HNSW8,SQ8,RFlat"},
    "ivfpq-refined": {
        "kind": "ivfpq", "nlist": 40, "nprobe": 2, "m": 8, "rerank": "fp32", "rerank_factor": 3,
    },
    "ivfpq-fs": {"kind": "ivfpq-fs", "nlist": 40, "nprobe": 2, "m": 16, "rerank_factor": 3},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return manifold(ROWS, DIM, 8, seed=1)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return manifold(25, DIM, 8, seed=1, stream=1)


def built(name: str, vectors: np.ndarray, metric: Metric) -> tuple[faiss.Index, SearchParams]:
    resolved = resolve(IndexSpec(**SCANNED[name]), rows=ROWS, dim=DIM, metric=metric)
    index = train_template(resolved, vectors, metric=metric, seed=0, threads=1)
    index.add(vectors)
    return index, resolved.search_params


def by_codes(index: faiss.Index, queries: np.ndarray, metric: Metric) -> np.ndarray:
    """(n, ROWS) scores of the vectors as the codes below the re-ranking have them."""
    bare = without_graph(without_rerank(index))
    layers = layers_of(bare)
    if layers.is_ivf:
        layers.base.make_direct_map()
    stored = layers.base.reconstruct_n(0, ROWS)
    if layers.transform is not None:
        chain = layers.transform.chain
        for place in range(chain.size()):
            queries = faiss.downcast_VectorTransform(chain.at(place)).apply(queries)
    if metric is Metric.L2:
        return -((queries[:, None] - stored[None]) ** 2).sum(axis=2)
    return queries @ stored.T


def share(found: np.ndarray, scores: np.ndarray) -> float:
    best = np.argsort(-scores, axis=1)[:, : found.shape[1]]
    hits = [np.intersect1d(*pair).size for pair in zip(found, best, strict=True)]
    return sum(hits) / found.size


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
@pytest.mark.parametrize("name", SCANNED)
def test_what_each_stage_searches(
    name: str, metric: Metric, vectors: np.ndarray, queries: np.ndarray
) -> None:
    index, params = built(name, vectors, metric)
    stages = stages_of(index, metric, params)
    has_rerank = "refined" in name or name == "ivfpq-fs"
    wanted = [Stage.CODES, *[Stage.RERANKED] * has_rerank, Stage.CONFIGURED]
    assert list(stages) == wanted
    found = {at: main.search(queries, K, ALL).ids for at, main in stages.items()}
    # fast-scan tables are rounded to 8 bits, so near ties may change places
    assert share(found[Stage.CODES], by_codes(index, queries, metric)) >= (
        0.9 if name == "ivfpq-fs" else 0.99
    )
    exact = queries @ vectors.T if metric is Metric.COSINE else by_l2(queries, vectors)
    agreement = [share(found[at], exact) for at in wanted]
    if name in ("flat", "ivf", "hnsw"):
        assert agreement[0] == 1.0  # nothing is quantised
    if has_rerank:
        assert agreement[1] > agreement[0]
    if "nlist" in SCANNED[name]:
        assert agreement[-1] < agreement[-2]  # two of forty lists
    if name in ("flat", "pq", "sq8"):
        assert np.array_equal(found[Stage.CONFIGURED], found[Stage.CODES])


def by_l2(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return -((queries[:, None] - vectors[None]) ** 2).sum(axis=2)


def test_every_list_is_probed_beyond_what_a_query_may_ask(vectors: np.ndarray) -> None:
    """A query's nprobe ends at 2048; the exhaustive stage knows no such limit."""
    rng = np.random.default_rng(0)
    many = rng.standard_normal((2600, 4)).astype(np.float32)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(4), 4, 2500, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = 1
    index.cp.min_points_per_centroid = 1
    index.train(many)
    index.add(many)
    stages = stages_of(index, Metric.DOT, SearchParams(nprobe=1))
    rows, _ = stages[Stage.CODES].search(many[:5], 10, ALL)
    assert share(rows, many[:5] @ many.T) == 1.0


def test_an_index_without_layers_is_left_as_it_is(vectors: np.ndarray) -> None:
    index, _ = built("flat", vectors, Metric.COSINE)
    assert without_graph(index) is index
    assert without_rerank(index) is index
