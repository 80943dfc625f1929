"""What is asked, and how answers are compared with the exact ones; which index is refused."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from shardline.bench.corpus import best_scores, clustered_set, score_items
from shardline.bench.load.http_bytes import EMPTY, address_of, message_of, read_head, results_of
from shardline.bench.load.runner import search_bare
from shardline.bench.load.scenarios import Ask, Step
from shardline.bench.load.target import Target, check_whole, moved
from shardline.bench.load.workload import (
    Queries,
    Workload,
    answers_of,
    draw_order,
    make_workload,
    sample,
)
from shardline.cluster.store import Store
from shardline.router.contract import Coverage
from shardline.router.http.codec import decode_query, encode_answer
from shardline.router.http.media import Media
from shardline.router.query import ResolvedQuery, SearchAnswer
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import DataError, InvalidInput, Unavailable
from shardline.shards.core.recall import exact_scores, recall_at_k
from shardline.shards.core.schema import FloatArray, IdArray, Metric, Ranked
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexKind, IndexSpec
from shardline.shards.index.template import train_template
from tests.engine import write_set
from tests.reference import score

RNG = np.random.default_rng(5)
VECTORS = RNG.standard_normal((50, 8)).astype(np.float32)
FEATURES = tuple({"age": age} for age in range(50))
STEP = Step(label="x", rate=10.0, seconds=1.0, batch=1, ks=((5, 1.0),))


def workload(
    step: Step, requests: int = 20, vectors: FloatArray = VECTORS, first_query: int = 0
) -> Workload:
    return make_workload(
        step,
        Queries(vectors=vectors, features=FEATURES, source="test"),
        requests=requests,
        first_counted=4,
        first_query=first_query,
        address=("localhost", 80),
        headers=(("Authorization", "Bearer x"),),
        rng=np.random.default_rng(1),
    )


def query_in(message: bytes) -> ResolvedQuery:
    head, _, body = message.partition(b"\r\n\r\n")
    assert b"Authorization: Bearer x" in head
    assert f"Content-Length: {len(body)}".encode() in head
    return decode_query(body, Media.MSGPACK, RouterConfig())


def test_every_single_query_is_new_while_there_are_enough() -> None:
    made = workload(STEP)
    for number, message in enumerate(made.order):
        query = query_in(made.messages[message])
        np.testing.assert_array_equal(query.values, VECTORS[number : number + 1])
        assert query.k == 5
    later = workload(STEP, requests=10, first_query=45)
    asked = [query_in(later.messages[message]).values for message in later.order]
    np.testing.assert_array_equal(np.concatenate(asked), np.roll(VECTORS, 5, axis=0)[:10])


def test_the_floor_asks_for_nothing() -> None:
    made = workload(replace(STEP, ask=Ask.EMPTY, batch=8))
    assert made.messages == (message_of(EMPTY, ("localhost", 80)),)
    assert len(made.order) == 20 and not made.order.any() and not made.kept.any()


def test_a_batch_holds_the_rows_it_says() -> None:
    made = workload(replace(STEP, batch=8))
    for message, rows in zip(made.messages, made.rows, strict=True):
        np.testing.assert_array_equal(query_in(message).values, VECTORS[rows])
    assert len({bytes(message) for message in made.messages}) == 20


def test_features_are_asked_as_features() -> None:
    made = workload(replace(STEP, ask=Ask.FEATURES))
    assert query_in(made.messages[7]).values == [{"age": 7}]


def test_ks_are_mixed_in_their_shares() -> None:
    vectors = np.ones((4000, 2), dtype=np.float32)
    made = workload(replace(STEP, ks=((1, 0.6), (10, 0.4))), requests=4000, vectors=vectors)
    assert np.mean(np.array(made.ks) == 1) == pytest.approx(0.6, abs=0.03)


def test_zipf_repeats_after_the_law() -> None:
    order = draw_order(200_000, 100, 1.0, np.random.default_rng(0))
    counts = np.bincount(order, minlength=100)
    harmonic = (1 / np.arange(1, 101)).sum()
    assert counts[0] / 200_000 == pytest.approx(1 / harmonic, rel=0.03)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.1)
    np.testing.assert_array_equal(draw_order(5, 3, None, RNG), [0, 1, 2, 0, 1])


def test_the_sample_is_spread_and_leaves_the_warm_up_out() -> None:
    kept = np.flatnonzero(sample(100, 20, 5, 1.0))
    np.testing.assert_array_equal(kept, [20, 39, 59, 79, 99])
    assert sample(10, 8, 5, 1.0).sum() == 2
    assert not sample(10, 10, 5, 1.0).any()
    closed = np.flatnonzero(sample(10**6, 0, 5, None))
    assert len(closed) == 5 and closed[-1] < 10, "how many a closed loop sends is not known"


def answer(ids: IdArray) -> bytes:
    coverage = Coverage(
        shards_asked=1, shards_answered=1, rows_asked=1, rows_answered=1, degraded=()
    )
    return encode_answer(
        SearchAnswer(
            ranked=Ranked(ids, np.zeros(ids.shape, dtype=np.float32)),
            generation=1,
            model_version="m",
            coverage=coverage,
            took_ms=0.0,
            search_ms=0.0,
            reasons=(),
            request_id="",
        ),
        Media.MSGPACK,
    )


def test_answers_are_read_as_the_router_writes_them() -> None:
    ids = np.array([[3, -1], [7, 9]])
    found, scores = results_of(answer(ids))
    np.testing.assert_array_equal(found, ids)
    assert scores.dtype == np.float32 and scores.shape == (2, 2)


def corpus_target(tmp_path: Any, metric: Metric) -> tuple[Target, FloatArray]:
    corpus = clustered_set(Store(tmp_path), 300, 8, lambda *_: None)
    vectors = np.concatenate([batch.vectors for batch in corpus.batches()])
    manifest: Any = SimpleNamespace(metric=metric)
    address: Any = None
    store = Store(tmp_path)
    return Target(address=address, pid=None, store=store, manifest=manifest, corpus=corpus), vectors


@pytest.mark.parametrize("metric", list(Metric))
def test_recall_is_of_the_answers_that_were_kept(tmp_path: Any, metric: Metric) -> None:
    target, vectors = corpus_target(tmp_path, metric)
    made = workload(replace(STEP, batch=2, ks=((3, 1.0),)), requests=6)
    distances = ((VECTORS[:, None] - vectors) ** 2).sum(axis=2)
    slow = distances if metric is Metric.L2 else -(VECTORS @ vectors.T)
    exact = np.argsort(slow, axis=1, kind="stable")
    numbers = np.flatnonzero(made.kept)[:2].tolist()
    bodies = {}
    for number, wrong in zip(numbers, (0, 1), strict=True):
        ids = exact[made.rows[made.order[number]], :3].copy()
        ids[:wrong] = exact[made.rows[made.order[number]][:wrong], -3:]  # the farthest ones
        bodies[number] = answer(ids)
    assert target.recall(VECTORS, answers_of(bodies, made)) == 0.75
    assert target.recall(VECTORS, []) is None


def test_recall_over_answers_of_different_lengths(tmp_path: Any) -> None:
    target, vectors = corpus_target(tmp_path, Metric.COSINE)
    best = np.argsort(-(VECTORS[:2] @ vectors.T), axis=1, kind="stable")
    short, long = best[:1, :1], best[1:, :4].copy()
    long[0, 3] = -1
    rows = np.array([0]), np.array([1])
    assert target.recall(VECTORS, [(rows[0], short), (rows[1], long)]) == 0.8


def test_exact_scores_for_every_metric(tmp_path: Any) -> None:
    corpus = clustered_set(Store(tmp_path), 300, 8, lambda *_: None)
    vectors = np.concatenate([batch.vectors for batch in corpus.batches()])
    queries = VECTORS[:6]
    ids = np.array([[0, 299, -1, 10**9]] * 6)  # the last is no item
    for metric in Metric:
        slow = np.array([[score(q, v, metric) for v in vectors] for q in queries])
        found = best_scores(corpus, queries, 10, metric=metric)
        np.testing.assert_allclose(found, -np.sort(-slow)[:, :10], rtol=1e-5)
        own = score_items(corpus, queries, ids, metric=metric)
        np.testing.assert_allclose(own[:, :2], slow[:, [0, 299]], rtol=1e-4, atol=1e-6)
        assert np.isneginf(own[:, 2:]).all()


def test_near_rows_of_long_vectors_have_right_distances(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of 1e6 and distances of 1: computed from norms and a product, no digit is right."""
    monkeypatch.setattr(faiss.cvar, "distance_compute_blas_threshold", 1)
    rows = (1000 + VECTORS).astype(np.float32)
    corpus = write_set(tmp_path / "set", rows, metric=Metric.L2)
    queries = rows[:10] + np.float32(0.25)
    found = best_scores(corpus, queries, 5, metric=Metric.L2)
    slow = -np.square(rows[None].astype(np.float64) - queries[:, None]).sum(axis=2)
    kept = score_items(corpus, queries, np.argsort(-slow, axis=1)[:, :5], metric=Metric.L2)
    assert recall_at_k(kept, found) == 1.0
    assert recall_at_k(kept[:, :4], found) == pytest.approx(0.8)


def test_an_item_answered_twice_is_scored_once(tmp_path: Any) -> None:
    corpus = write_set(tmp_path / "set", VECTORS, metric=Metric.DOT)
    found = score_items(corpus, VECTORS[:1], np.array([[4, 7, 4, 4, -1]]), metric=Metric.DOT)
    assert np.isfinite(found).tolist() == [[True, True, False, False, False]]


def test_a_result_that_ties_with_the_last_exact_one_is_a_hit() -> None:
    vectors = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)  # ten copies of each
    queries = np.array([[3.0, 2.0, 1.0]], dtype=np.float32)
    exact = exact_scores(queries, vectors, np.array([[0, 1, 2, 3]]), Metric.DOT)
    for rows, recall in (
        ([6, 7, 8, 9], 1.0),  # other copies of the same vector
        ([6, 7, 8, 10], 0.75),
        ([6, -1, -1, -1], 0.25),
        ([10, 11, 20, 21], 0.0),
    ):
        found = exact_scores(queries, vectors, np.array([rows]), Metric.DOT)
        assert recall_at_k(found, exact) == recall
    fewer = np.array([[3.0, 2.0, -np.inf]], dtype=np.float32)  # an index of two rows
    assert recall_at_k(fewer, fewer) == 1.0
    assert recall_at_k(np.float32([[1.0, 1.0, 1.0]]), fewer) == 0.0
    assert recall_at_k(np.float32([[3.0, 2.0 - 1e-6, 9.0]]), fewer) == 1.0, "at most all"


def test_the_bare_index_is_searched_in_the_batches_asked_for() -> None:
    flat = resolve(IndexSpec(kind=IndexKind.FLAT), rows=50, dim=8, metric=Metric.DOT)
    raw = train_template(flat, VECTORS[:1], metric=Metric.DOT, seed=0, threads=1)
    raw.add(VECTORS)
    index = MainIndex(raw, metric=Metric.DOT, defaults=flat.search_params)
    found = search_bare([index, index], VECTORS[:3], batch=8, k=2, threads=1, seconds=0.01)
    assert found["calls"] >= 5 and found["p99_ms"] >= found["p50_ms"] > 0
    assert found["qps"] == pytest.approx(8e3 / found["p50_ms"], rel=3)


def status(rows: int, *connected: bool) -> dict[str, Any]:
    shards = [{"shard": n, "connected": each} for n, each in enumerate(connected)]
    return {"rows": rows, "shards": shards}


def test_a_whole_index_passes() -> None:
    check_whole(10, 10, status(10, True, True))


@pytest.mark.parametrize(
    ("built", "corpus", "served"), [(0, 0, 0), (10, 11, 10), (10, 10, 9), (9, 10, 9)]
)
def test_an_empty_or_short_index_is_refused(built: int, corpus: int, served: int) -> None:
    with pytest.raises(DataError, match="not the whole index"):
        check_whole(built, corpus, status(served, True))


def test_an_index_with_a_shard_missing_is_refused() -> None:
    with pytest.raises(Unavailable, match=r"shards \[1\] are not"):
        check_whole(10, 10, status(10, True, False))
    with pytest.raises(Unavailable, match="there are none"):
        check_whole(10, 10, status(10))


def test_moved_queries_are_near_their_item_and_not_on_it() -> None:
    found = moved(VECTORS, np.random.default_rng(0), unit=True)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    cosines = (found * unit).sum(axis=1)
    assert (cosines > 0.8).all() and (cosines < 0.9999).all()


def test_heads_of_answers() -> None:
    head = read_head(
        b"HTTP/1.1 429 Too Many\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
    )
    assert head is not None
    assert (head.status, head.total - head.start, head.closes) == (429, 5, True)
    assert read_head(b"HTTP/1.1 200 OK\r\nContent-Le") is None
    with pytest.raises(ValueError, match="Content-Length"):
        read_head(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    with pytest.raises(ValueError, match="not an HTTP answer"):
        read_head(b"+OK redis\r\n\r\n")


@pytest.mark.parametrize("url", ["https://localhost", "localhost:8000", "http://"])
def test_only_plain_http_addresses(url: str) -> None:
    with pytest.raises(InvalidInput, match="not an address"):
        address_of(url)
    assert address_of("http://localhost:81") == ("localhost", 81)
