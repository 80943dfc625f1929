"""Templates and shard indexes: seeds, determinism, PCA under inner product, damage, recall."""

import logging
from pathlib import Path

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import clustered, manifold
from shardline.shards.core.errors import ConfigError, CorruptFile, InvalidInput
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Metric, normalise
from shardline.shards.index.layers import layers_of
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexSpec, ResolvedIndex
from shardline.shards.index.template import (
    build_shard_index,
    bytes_to_come,
    in_blocks,
    read_index,
    train_template,
    write_index,
)
from tests.reference import recall_by_ids

SMALL_KINDS = [
    {"kind": "flat"},
    {"kind": "ivf", "nlist": 8},
    {"kind": "hnsw", "hnsw_m": 8},
    {"kind": "pq", "m": 4, "nbits": 5},
    {"kind": "ivfpq", "nlist": 4, "m": 4, "nbits": 5},
    {"kind": "ivfpq-fs", "nlist": 4, "m": 8},
    {"kind": "sq8"},
    {"kind": "ivfpq-fs", "nlist": 4, "pca": 8},
    {"kind": "factory", "factory": "RR16,IVF4,PQ4x4,RFlat"},
]


def make(
    tmp_path: Path, vectors: np.ndarray, *, metric: Metric = Metric.COSINE, seed: int = 0, **fields
) -> tuple[ResolvedIndex, Path]:
    """A one-shard index file over all vectors, built with one thread."""
    rows, dim = vectors.shape
    resolved = resolve(IndexSpec(**fields), rows=rows, dim=dim, metric=metric)
    template = train_template(resolved, vectors, metric=metric, seed=seed, threads=1)
    write_index(template, tmp_path / "template.faiss")
    out = tmp_path / "index.faiss"
    build_shard_index(tmp_path / "template.faiss", in_blocks(vectors), out, threads=1)
    return resolved, out


@pytest.mark.parametrize("fields", SMALL_KINDS, ids=lambda f: "-".join(map(str, f.values())))
def test_same_seed_same_bytes(tmp_path: Path, fields: dict) -> None:
    vectors = manifold(1500, 16, 4, seed=1)
    _, first = make(tmp_path / "a", vectors, seed=7, **fields)
    _, second = make(tmp_path / "b", vectors, seed=7, **fields)
    assert first.read_bytes() == second.read_bytes()
    index = read_index(first)
    assert index.ntotal == 1500
    assert index.d == 16


@pytest.mark.parametrize("kind", ["ivf", "pq"])
def test_another_seed_trains_another_template(tmp_path: Path, kind: str) -> None:
    vectors = manifold(1500, 16, 4, seed=1)
    _, first = make(tmp_path / "a", vectors, seed=7, kind=kind)
    _, second = make(tmp_path / "b", vectors, seed=8, kind=kind)
    assert first.read_bytes() != second.read_bytes()


def test_ef_construction_reaches_the_graph(tmp_path: Path) -> None:
    vectors = manifold(300, 16, 4, seed=1)
    _, path = make(tmp_path, vectors, kind="hnsw", ef_construction=33)
    assert layers_of(read_index(path)).base.hnsw.efConstruction == 33


def test_template_is_empty_and_reports_progress() -> None:
    vectors = manifold(1500, 16, 4, seed=1)
    resolved = resolve(IndexSpec(kind="ivf"), rows=1500, dim=16, metric=Metric.DOT)
    seen: list[tuple[str, int, int]] = []
    template = train_template(
        resolved,
        vectors,
        metric=Metric.DOT,
        seed=0,
        threads=1,
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert template.ntotal == 0
    assert template.is_trained
    assert seen == [("train", 0, 1500), ("train", 1500, 1500)]


@pytest.mark.parametrize("metric", list(Metric))
def test_pca_keeps_the_order_of_off_centre_data(tmp_path: Path, metric: Metric) -> None:
    """A PCA that subtracts the mean would lose q.mean from each score, and the order with it."""
    rng = np.random.default_rng(3)
    basis = rng.standard_normal((8, 32), dtype=np.float32)
    vectors = rng.standard_normal((2000, 8), dtype=np.float32) @ basis
    vectors += 2 * rng.standard_normal(32, dtype=np.float32)
    vectors = normalise(vectors) if metric is Metric.COSINE else vectors
    queries = vectors[:50] + np.float32(0.01)
    resolved, path = make(tmp_path, vectors, metric=metric, kind="flat", pca=10, rerank="none")
    main = MainIndex.load(path, metric=metric, defaults=resolved.search_params)
    rows, scores = main.search(queries, 10, SearchParams())
    exact_index = faiss.index_factory(
        32, "Flat", faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
    )
    exact_index.add(vectors)
    expected, exact = exact_index.search(queries, 10)
    assert recall_by_ids(rows, exact) > 0.97
    if metric is not Metric.L2:  # the kept dimensions hold all of the data: scores survive too
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)


def test_values_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    vectors = manifold(1500, 16, 4, seed=1)
    make(tmp_path, vectors, metric=Metric.DOT, kind="ivfpq-fs", nlist=4)
    with pytest.raises(InvalidInput, match="too large for fp16 copies"):
        build_shard_index(
            tmp_path / "template.faiss",
            vectors * np.float32(1e6),
            tmp_path / "other.faiss",
            threads=1,
        )


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_template_is_named(tmp_path: Path, damage: bytes | None) -> None:
    vectors = manifold(300, 16, 4, seed=1)
    make(tmp_path, vectors, kind="ivf")
    template = tmp_path / "template.faiss"
    template.write_bytes(template.read_bytes()[:-40] if damage is None else damage)
    with pytest.raises(CorruptFile, match=r"template\.faiss"):
        build_shard_index(template, in_blocks(vectors), tmp_path / "other.faiss", threads=1)


def test_a_sample_too_small_to_train_is_a_config_error() -> None:
    resolved = resolve(IndexSpec(kind="pq"), rows=1000, dim=16, metric=Metric.DOT)
    with pytest.raises(ConfigError, match="cannot train PQ4x8"):
        train_template(resolved, manifold(100, 16, 4, seed=1), metric=Metric.DOT, seed=0, threads=1)


def test_few_training_rows_are_logged_not_printed(caplog, capfd) -> None:
    resolved = resolve(IndexSpec(kind="ivf", nlist=50), rows=500, dim=16, metric=Metric.DOT)
    with caplog.at_level(logging.WARNING, logger="shardline.shards.index.template"):
        train_template(resolved, manifold(500, 16, 4, seed=1), metric=Metric.DOT, seed=0, threads=1)
    assert "training 50 centroids on 500 rows; 1950 would be better" in caplog.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "vectors", "queries"),
    [
        (
            "manifold",
            lambda: manifold(30_000, 64, 10, seed=1),
            lambda: manifold(100, 64, 10, seed=1, stream=1),
        ),
        (
            "clustered",
            lambda: clustered(30_000, 64, 300, seed=1),
            lambda: clustered(100, 64, 300, seed=1, first_row=100_000),
        ),
    ],
    ids=["manifold", "clustered"],
)
@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
def test_default_recall(tmp_path: Path, name: str, vectors, queries, metric: Metric) -> None:
    """The kind that ``auto`` takes on CPU cores reaches recall@100 of .95 with its own defaults."""
    corpus, asked = vectors(), queries()
    resolved, path = make(tmp_path, corpus, metric=metric)
    assert resolved.kind == "ivfpq-fs"
    main = MainIndex.load(path, metric=metric, defaults=resolved.search_params)
    rows, _ = main.search(asked, 100, SearchParams())
    exact = faiss.IndexFlatL2(64)
    exact.add(corpus)
    assert recall_by_ids(rows, exact.search(asked, 100)[1]) >= 0.95


@pytest.mark.parametrize("fields", SMALL_KINDS, ids=lambda f: "-".join(map(str, f.values())))
def test_the_size_of_an_index_is_known_before_it_is_built(tmp_path: Path, fields: dict) -> None:
    vectors = manifold(1500, 16, 4, seed=1)
    resolved, path = make(tmp_path, vectors, **fields)
    index = MainIndex.load(path, metric=Metric.COSINE, defaults=SearchParams())
    expected = bytes_to_come(resolved, dim=16, metric=Metric.COSINE)
    assert expected == pytest.approx(index.bytes_per_vector, rel=0.05)
