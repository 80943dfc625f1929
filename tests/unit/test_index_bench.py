"""Data sets for comparing index kinds, the comparison itself, its plot."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardline.bench.index.datasets import (
    MNIST_BASE,
    MNIST_QUERIES,
    MNIST_TRUTH,
    IndexData,
    clustered_data,
    mnist_data,
    read_idx,
    read_ivecs,
    vectors_data,
)
from shardline.bench.index.index_bench import run, show
from shardline.bench.plots import frontier
from shardline.shards.core.errors import DataError, InvalidInput, NotFound
from shardline.shards.core.schema import Metric
from shardline.shards.index.spec import IndexKind

RNG = np.random.default_rng(2)


def write_idx(path: Path, images: np.ndarray, *, cut: int = 0, magic: int = 0x803) -> None:
    header = np.array([magic, *images.shape], dtype=">i4").tobytes()
    content = header + images.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content[: len(content) - cut]))


def mnist_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    base = RNG.integers(0, 256, (300, 4, 4))
    asked = RNG.integers(0, 256, (20, 4, 4))
    write_idx(folder / MNIST_BASE, base)
    write_idx(folder / MNIST_QUERIES, asked)
    distances = ((asked[:, None].astype(np.int64) - base) ** 2).sum(axis=(2, 3))
    truth = np.argsort(distances, axis=1, kind="stable")[:, :10]
    lines = np.concatenate([np.full((20, 1), 10), truth], axis=1).astype("<i4")
    (folder / MNIST_TRUTH).write_bytes(lines.tobytes())
    return base, truth


def test_mnist_files_are_read_and_agree_with_their_truth(tmp_path: Path) -> None:
    base, truth = mnist_folder(tmp_path)
    data = mnist_data(tmp_path, 15)
    np.testing.assert_array_equal(data.vectors, base.reshape(300, 16))
    assert data.queries.shape == (15, 16) and data.metric is Metric.L2
    np.testing.assert_array_equal(data.truth, truth[:15])
    report = run(
        data, kinds=(IndexKind.FLAT,), k=10, threads=1, progress=lambda stage, done, total: None
    )
    assert report["flat_against_truth"] == pytest.approx(1, abs=0.02), "ties aside"


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    with pytest.raises(NotFound):
        read_idx(path)
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match="gzip"):
        read_idx(path)
    write_idx(path, np.zeros((3, 2, 2)), magic=0x801)
    with pytest.raises(DataError, match="IDX"):
        read_idx(path)
    write_idx(path, np.zeros((3, 2, 2)), cut=1)
    with pytest.raises(DataError, match="cut short"):
        read_idx(path)
    path.write_bytes(np.array([2, 5, 6, 3, 7, 8], dtype="<i4").tobytes())
    with pytest.raises(DataError, match="ivecs"):
        read_ivecs(path)


def test_queries_of_foreign_vectors_are_held_out(tmp_path: Path) -> None:
    vectors = RNG.standard_normal((60, 4)).astype(np.float32)
    table = pa.table({"id": pa.array(range(60)), "vector": pa.array(vectors.tolist())})
    pq.write_table(table, tmp_path / "v.parquet", write_page_checksum=True)
    data = vectors_data(tmp_path / "v.parquet", metric=Metric.DOT, queries=20)
    assert data.vectors.shape == (40, 4) and data.queries.shape == (20, 4)
    together = {tuple(row) for row in np.concatenate([data.vectors, data.queries]).tolist()}
    assert together == {tuple(row) for row in vectors.tolist()}, "each row once, on one side"
    unit = vectors_data(tmp_path / "v.parquet", metric=Metric.COSINE, queries=20)
    np.testing.assert_allclose(np.linalg.norm(unit.vectors, axis=1), 1, rtol=1e-5)
    with pytest.raises(InvalidInput, match="too few"):
        vectors_data(tmp_path / "v.parquet", metric=Metric.DOT, queries=31)


def test_kinds_are_compared_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = clustered_data(3000, 16, 40)
    kinds = (IndexKind.IVF, IndexKind.HNSW, IndexKind.SQ8)
    report = run(data, kinds=kinds, k=20, threads=2, progress=lambda stage, done, total: None)
    by_kind = {kind["kind"]: kind for kind in report["kinds"]}
    assert list(by_kind) == ["flat", "ivf", "hnsw", "sq8"]
    assert by_kind["flat"]["recall"] == 1
    assert by_kind["flat"]["bytes_per_vector"] == 64
    points = {point["params"].get("nprobe"): point for point in by_kind["ivf"]["points"]}
    assert points[1]["recall"] < points[16]["recall"]
    assert len(by_kind["hnsw"]["points"]) > 2
    lines = show(report, tmp_path / "r.json", tmp_path / "r.png")
    assert "recall@20" in capsys.readouterr().out
    assert len(lines) == 2
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_copies_of_a_vector_are_all_right_answers() -> None:
    distinct = RNG.standard_normal((100, 8)).astype(np.float32)
    vectors = np.tile(distinct, (300, 1))
    data = IndexData(
        name="copies",
        vectors=vectors,
        queries=distinct[:20],
        metric=Metric.L2,
        truth=(np.arange(20)[:, None] + 100 * np.arange(150, 250)),
    )
    kinds = (IndexKind.IVF, IndexKind.IVFPQ)
    report = run(data, kinds=kinds, k=100, threads=1, progress=lambda stage, done, total: None)
    assert report["flat_against_truth"] == 1.0
    for kind in report["kinds"]:  # of 256 lists more than half are empty; one may be probed first
        points = [p for p in kind["points"] if p["params"].get("nprobe", 256) >= 16]
        assert [point["recall"] for point in points] == [1.0] * len(points), kind


def test_an_index_shorter_than_k_is_refused() -> None:
    data = clustered_data(50, 4, 5)
    with pytest.raises(InvalidInput, match=r"^-k: no answer is that long; expected <= 50"):
        run(data, kinds=(), k=100, threads=1, progress=lambda stage, done, total: None)


def test_the_frontier_is_what_nothing_beats_in_both() -> None:
    points = [(0.5, 100.0), (0.9, 50.0), (0.8, 40.0), (0.95, 50.0), (1.0, 1.0)]
    assert frontier(points) == [(0.5, 100.0), (0.95, 50.0), (1.0, 1.0)]
