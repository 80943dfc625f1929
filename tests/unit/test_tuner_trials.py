"""What configurations are measured with: samples, held-out items, times, trials."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from shardline.bench.vectors import manifold
from shardline.cluster.commands.tune import _held_out_of
from shardline.cluster.store import Store
from shardline.cluster.tuner import outcome as outcome_module
from shardline.cluster.tuner.configurations import (
    Configuration,
    configurations,
)
from shardline.cluster.tuner.corpus_sample import CorpusSample, HeldOut, draw, read_held_out
from shardline.cluster.tuner.outcome import rungs_of
from shardline.cluster.tuner.timing import in_rounds, latency_of, paired_ratio
from shardline.cluster.tuner.trial import Trials, growth
from shardline.shards.core.errors import DataError, InvalidInput
from shardline.shards.core.schema import Metric
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexSpec
from shardline.shards.index.template import centroids_of, filled_copy, train_template
from shardline.shards.storage.embedding_set import open_embedding_set
from shardline.training.export import export
from shardline.training.loop.run_rank import train_rank
from tests.engine import build_main, write_set
from tests.tiny import declared_run, tiny_config, tiny_dataset
from tests.tuner_samples import DIM, LEAST_RUNG_ROWS, ROWS, sample_of, table


@pytest.fixture(scope="module", autouse=True)
def small_rungs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome_module, "LEAST_RUNG_ROWS", LEAST_RUNG_ROWS)
        yield


def test_a_sample_is_rows_of_the_corpus_and_its_queries_are_held_out(tmp_path: Path) -> None:
    vectors = manifold(4000, DIM, 6, seed=2)
    ids = np.random.default_rng(0).permutation(50_000)[:4000].astype(np.int64)
    corpus = write_set(tmp_path / "set", vectors, ids, rows_per_file=1500)
    sample = draw(corpus, shards=2)
    assert (len(sample.vectors), sample.shard_rows) == (2000, 2000)
    assert sample.query_source == "item vectors held out" and len(sample.queries) == 400
    row_of = {int(item): row for row, item in enumerate(ids)}
    np.testing.assert_allclose(
        sample.vectors, vectors[[row_of[int(item)] for item in sample.ids]], rtol=1e-6
    )
    known = {tuple(row) for row in sample.vectors.tolist()}
    assert not any(tuple(row) in known for row in sample.queries.tolist())
    again, other = draw(corpus, shards=2), draw(corpus, shards=2, seed=1)
    np.testing.assert_array_equal(sample.ids, again.ids)
    assert (sample.ids != other.ids).any()
    assert len(draw(corpus, shards=1, most_rows=1200).vectors) == 1200


def test_queries_of_the_set_or_of_users_are_taken_where_there_are_some(tmp_path: Path) -> None:
    vectors = manifold(1100, DIM, 6, seed=2)
    corpus = write_set(tmp_path / "set", vectors, queries=manifold(30, DIM, 6, seed=2, stream=1))
    sample = draw(corpus, shards=1)
    assert (len(sample.vectors), len(sample.queries)) == (1100, 30)
    held_out = HeldOut(queries=vectors[:3], owners=np.array([0, 2]), items=np.array([5, 6]))
    sample = draw(corpus, shards=1, held_out=held_out)
    np.testing.assert_array_equal(sample.queries, vectors[:3])
    with pytest.raises(InvalidInput, match="too few rows to tune for; expected >= 2,000"):
        draw(corpus, shards=2)


def test_held_out_interactions_are_read(tmp_path: Path) -> None:
    vectors = [[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]
    one = read_held_out(
        table(tmp_path / "a.parquet", emb=vectors, item_id=[7, 8, 7]), dim=2, metric=Metric.COSINE
    )
    np.testing.assert_allclose(one.queries[0], [0.6, 0.8], rtol=1e-6)
    assert (one.owners.tolist(), one.items.tolist()) == ([0, 1, 2], [7, 8, 7])
    many = read_held_out(
        table(tmp_path / "b.parquet", vector=vectors, item_id=[[7, 8], [], [9]]),
        dim=2,
        metric=Metric.DOT,
    )
    assert (many.owners.tolist(), many.items.tolist()) == ([0, 0, 2], [7, 8, 9])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"emb": [[1.0, 2.0]]}, "expected the columns item_id and one of"),
        ({"user_id": [1], "item_id": [1]}, "give --data and --split instead"),
        ({"emb": [[1.0, 2.0, 3.0]], "item_id": [1]}, "vectors of 2 numbers"),
        ({"emb": [[0.0, 0.0]], "item_id": [1]}, "zero"),
        ({"emb": [[1.0, 2.0]], "item_id": ["a"]}, "expected integers, or lists of integers"),
        ({"emb": [[1.0, 2.0]], "item_id": pa.array([None], pa.int64())}, "1 nulls"),
        ({"emb": [[1.0, 2.0]], "item_id": [[1, None]]}, "a null in a list"),
        ({"emb": [[1.0, 2.0]], "item_id": pa.array([[]], pa.list_(pa.int64()))}, "no held-out"),
    ],
)
def test_held_out_interactions_that_cannot_be_used(
    tmp_path: Path, columns: dict, message: str
) -> None:
    paths = table(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=message):
        read_held_out(paths, dim=2, metric=Metric.COSINE)


def test_users_of_a_data_set_are_encoded_with_what_they_took(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    run = declared_run(tmp_path / "run", tiny_config(epochs=1), dataset)
    train_rank(run, torch.device("cpu"))
    store = Store(tmp_path / "store")
    export(tmp_path / "run", dataset.path, store.root, created_at="2026-01-01T00:00:00Z")
    corpus = open_embedding_set(store.newest_embeddings())
    held_out = _held_out_of(corpus, dataset.path, "test")
    taken = dataset.positives("test")
    users = np.flatnonzero(taken.lengths)
    assert held_out.queries.shape == (len(users), corpus.dim)
    expected = [
        (place, int(dataset.item_ids[item]))
        for place, user in enumerate(users)
        for item in taken.items[taken.indptr[user] : taken.indptr[user + 1]]
    ]
    assert list(zip(held_out.owners.tolist(), held_out.items.tolist(), strict=True)) == expected
    bare = write_set(tmp_path / "bare", manifold(1000, DIM, 6, seed=1))
    with pytest.raises(InvalidInput, match="no query encoder"):
        _held_out_of(bare, dataset.path, "test")


def test_alternating_rounds_and_ratios() -> None:
    asked: list[str] = []
    searches = [lambda query, name=name: asked.append(name) for name in "ab"]
    times = in_rounds(searches, np.zeros((2, 3), np.float32), 2)
    assert asked == [*"aabb", *"bbaa"]
    assert [each.shape for each in times] == [(2, 2), (2, 2)]
    slow = np.array([[1.0, 2.0, 9.0], [10.0, 20.0, 30.0], [1.0, 2.0, 3.0]])  # a busy second round
    assert latency_of(slow).p50_ms == 2.0
    assert paired_ratio(2 * slow, slow) == 2.0


@pytest.mark.parametrize("ratio", [1.0, 4.0, 16.0])
def test_times_grow_with_the_rows_or_with_their_logarithm(ratio: float) -> None:
    fixed, per_row, rows = 0.05, 2e-6, 10_000

    def straight(rows: float) -> float:
        return fixed + per_row * rows

    def log(rows: float) -> float:
        return fixed + 0.01 * np.log(rows)

    for time_of, is_graph in ((straight, False), (log, True)):
        quarter = time_of(rows / 4) / time_of(rows)
        expected = time_of(rows * ratio) / time_of(rows)
        assert growth(quarter, ratio, is_graph=is_graph) == pytest.approx(expected)
    assert growth(1.2, ratio, is_graph=False) == 1.0, "noise makes nothing faster with more rows"


def test_rungs_end_with_the_whole_sample() -> None:
    rungs = rungs_of(sample_of(40_000))
    assert [rung.rows for rung in rungs] == [2500, 10_000, 40_000]
    assert [rung.counted for rung in rungs] == [6, 25, 100]
    assert [rung.is_last for rung in rungs] == [False, False, True]
    assert [rung.rows for rung in rungs_of(sample_of())] == [2250, 9000]
    (only,) = rungs_of(sample_of(3000))
    assert only.is_last
    part = replace(sample_of(10_000, shards=4), rows=40_000)
    assert [(rung.counted, rung.asked) for rung in rungs_of(part)] == [(6, 24), (25, 100)]


@pytest.fixture(scope="module")
def trials() -> Trials:
    return Trials(sample_of(), threads=1)


def named(trials: Trials, name: str) -> Configuration:
    sample = trials.sample
    every = configurations(rows=sample.rows, dim=DIM, metric=sample.metric)
    return next(each for each in every if each.name.startswith(name))


@pytest.mark.parametrize("name", ["flat", "ivf ", "ivfpq-fs", "hnsw", "sq8"])
def test_recall_against_ids_of_a_plain_scan(trials: Trials, name: str) -> None:
    sample, rung = trials.sample, trials.rungs[-1]
    trial = trials.run(named(trials, name), rung, 0.9)
    truth = np.argsort(-(sample.queries @ sample.vectors.T), axis=1)[:, :100]
    for point in trial.outcome.points:
        found = trial.main.search(sample.queries, 100, point.params).ids
        common = [len({*a} & {*b}) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]
        assert point.overlap == pytest.approx(sum(common) / truth.size, abs=2e-3)
        assert point.recall == point.overlap
        assert 0 < point.latency.p50_ms <= point.latency.p99_ms
    assert trial.outcome.chosen in trial.outcome.points
    assert trial.outcome.chosen.recall >= 0.9
    assert trial.outcome.growth == 1.0


def test_recall_over_part_of_the_rows_estimates_that_over_all(trials: Trials) -> None:
    """The same codes and lists, and the best quarter of the results."""
    configuration = named(trials, "ivfpq-fs")
    first, last = (trials.run(configuration, rung, 0.9999).outcome for rung in trials.rungs)
    by_params = {point.params: point for point in last.points}
    compared = [(p, by_params[p.params]) for p in first.points if p.params in by_params]
    assert len(compared) >= 4
    for part, whole in compared:
        assert part.recall == pytest.approx(whole.recall, abs=4 * (part.error + whole.error) + 0.02)


def test_centroids_are_shared_and_change_nothing() -> None:
    vectors = manifold(2000, DIM, 6, seed=1)
    spec = IndexSpec(kind="ivfpq-fs", nlist=16)
    resolved = resolve(spec, rows=2000, dim=DIM, metric=Metric.COSINE)
    options = {"metric": Metric.COSINE, "seed": 0, "threads": 1}
    alone = train_template(resolved, vectors, **options)
    ivf = resolve(IndexSpec(kind="ivf", nlist=16), rows=2000, dim=DIM, metric=Metric.COSINE)
    centroids = centroids_of(train_template(ivf, vectors, **options))
    assert centroids is not None and centroids.shape == (16, DIM)
    shared = train_template(resolved, vectors, centroids=centroids, **options)
    np.testing.assert_array_equal(centroids_of(shared), centroids_of(alone))
    found = [filled_copy(each, [vectors], threads=1).whole for each in (alone, shared)]
    for one, other in zip(*(index.search(vectors[:20], 10) for index in found), strict=True):
        np.testing.assert_array_equal(one, other)
    assert alone.ntotal == 0, "the template stays as it is"
    assert centroids_of(build_main(vectors, kind="flat").layers.whole) is None


def held_out_sample(rows: int = ROWS) -> CorpusSample:
    """Each query took some of its exact neighbours and one item far away; one is not indexed."""
    sample = sample_of(rows)
    order = np.argsort(-(sample.queries @ sample.vectors.T), axis=1)
    taken = np.concatenate([order[:, :60:5], order[:, -1:]], axis=1)
    owners = np.repeat(np.arange(len(taken)), taken.shape[1])
    items = np.append(sample.ids[taken.ravel()], [1])
    owners = np.append(owners, [0])
    held_out = HeldOut(queries=sample.queries, owners=owners, items=items)
    return replace(sample, held_out=held_out)


def test_recall_of_held_out_items_is_relative_to_exact_search() -> None:
    trials = Trials(held_out_sample(), threads=1)
    sample, rung = trials.sample, trials.rungs[-1]
    exact = trials.run(named(trials, "flat"), rung, 0.9).outcome.chosen
    assert exact.recall == 1.0
    trial = trials.run(named(trials, "ivfpq-fs"), rung, 0.9)
    assert sample.held_out is not None
    for point in trial.outcome.points:
        found = sample.ids[trial.main.search(sample.queries, 100, point.params).ids]
        pairs = zip(sample.held_out.owners, sample.held_out.items, strict=True)
        hits = sum(item in found[owner] for owner, item in pairs)
        assert point.recall == pytest.approx(hits / (40 * 12))
    assert trial.outcome.points[0].recall != trial.outcome.points[0].overlap


def test_held_out_items_that_exact_search_does_not_find_are_no_measure() -> None:
    sample = sample_of(3000)
    worst = np.argmin(sample.queries @ sample.vectors.T, axis=1)
    held_out = HeldOut(queries=sample.queries, owners=np.arange(40), items=sample.ids[worst])
    trials = Trials(replace(sample, held_out=held_out), threads=1)
    with pytest.raises(DataError, match="exact search finds none of the held-out items"):
        trials.run(named(trials, "flat"), trials.rungs[-1], 0.9)


def test_compared_in_the_same_rounds(trials: Trials) -> None:
    rung = trials.rungs[-1]
    ran = [trials.run(named(trials, name), rung, 0.9) for name in ("ivf ", "flat")]
    again = trials.compare(ran)
    for trial, outcome in zip(ran, again, strict=True):
        assert outcome.configuration == trial.outcome.configuration
        assert outcome.chosen.params == trial.outcome.chosen.params
        assert outcome.chosen in outcome.points
        assert 0 < outcome.chosen.latency.p50_ms <= outcome.chosen.latency.p99_ms
