"""Tuning: what is tried, what it is measured with, what goes out when, what is written."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner

from shardline.bench.vectors import clustered, manifold
from shardline.cluster.cli import cli
from shardline.cluster.commands import tune as tune_command
from shardline.cluster.commands.tune import _held_out_of
from shardline.cluster.store import Store
from shardline.cluster.tuner import outcome as outcome_module
from shardline.cluster.tuner.configurations import (
    Configuration,
    configurations,
    nearest_divisor,
    within_bytes,
)
from shardline.cluster.tuner.corpus_sample import CorpusSample, HeldOut, draw, read_held_out
from shardline.cluster.tuner.halving import WIDTHS, Bounds, excess, halve, misses
from shardline.cluster.tuner.outcome import Outcome, Point, Rung, rungs_of
from shardline.cluster.tuner.timing import Latency, in_rounds, latency_of, paired_ratio
from shardline.cluster.tuner.trial import Trial, Trials, growth
from shardline.cluster.tuner.tuning_report import failure, front, section
from shardline.shards.core.errors import DataError, InvalidInput
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Metric
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexKind, IndexSpec
from shardline.shards.index.template import centroids_of, filled_copy, train_template
from shardline.training.export import export
from shardline.training.loop.run_rank import train_rank
from tests.engine import build_main, write_set
from tests.tiny import declared_run, tiny_config, tiny_dataset

ROWS, DIM = 9000, 16
LEAST_RUNG_ROWS = 2000  # in place of more, so that samples are small
QUICK = (IndexKind.FLAT, IndexKind.IVF, IndexKind.IVFPQ_FS)


@pytest.fixture(scope="module", autouse=True)
def small_rungs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome_module, "LEAST_RUNG_ROWS", LEAST_RUNG_ROWS)
        yield


def sample_of(rows: int = ROWS, *, shards: int = 1, **changes: object) -> CorpusSample:
    vectors = manifold(rows, DIM, 6, seed=1)
    fields = {
        "vectors": vectors,
        "ids": np.arange(rows) * 3,
        "rows": rows,
        "shards": shards,
        "metric": Metric.COSINE,
        "queries": manifold(40, DIM, 6, seed=1, stream=1),
        "query_source": "sample queries",
    }
    return CorpusSample(**fields | changes)


# --- configurations


@pytest.mark.parametrize(("rows", "dim"), [(1_000_000, 128), (60_000, 784), (2000, 12), (1500, 7)])
def test_every_configuration_can_be_built_and_has_its_own_name(rows: int, dim: int) -> None:
    found = configurations(rows=rows, dim=dim, metric=Metric.COSINE)
    assert len({each.name for each in found}) == len(found)
    assert {each.spec.kind for each in found} == {
        *("flat", "ivf", "hnsw", "pq", "ivfpq", "ivfpq-fs", "sq8")
    }
    for each in found:
        assert each.index == resolve(each.spec, rows=rows, dim=dim, metric=Metric.COSINE)
        assert each.index.device == "cpu"
        is_scaled = each.index.nlist not in (None, _own_lists(rows, dim))
        is_large = each.spec.rerank == "fp32" or each.spec.ef_construction == 200
        assert each.variations == is_scaled + is_large
    assert any(each.spec.pca for each in found) == (dim == 784)


def _own_lists(rows: int, dim: int) -> int | None:
    return resolve(IndexSpec(kind="ivf"), rows=rows, dim=dim, metric=Metric.COSINE).nlist


@pytest.mark.parametrize("dim", [1, 2, 7, 12, 64, 97, 100, 128, 784])
@pytest.mark.parametrize("share", [1 / 2, 1 / 4, 1 / 8])
def test_the_nearest_divisor_against_all_divisors(dim: int, share: float) -> None:
    chosen = nearest_divisor(dim, share)
    assert dim % chosen == 0
    far = {each: abs(np.log(each / max(dim * share, 1))) for each in range(1, dim + 1)}
    assert far[chosen] <= min(far[each] for each in far if dim % each == 0) + 1e-9


def test_bytes_are_those_of_the_built_index() -> None:
    vectors = manifold(2000, DIM, 6, seed=1)
    for each in configurations(rows=2000, dim=DIM, metric=Metric.COSINE):
        fields = each.spec.model_dump(exclude_none=True, exclude_defaults=True)
        main = build_main(vectors, **fields)
        if each.spec.kind is IndexKind.HNSW:  # its links are drawn at random
            assert main.bytes_per_vector == pytest.approx(each.bytes_per_vector, rel=0.05)
        else:
            assert main.bytes_per_vector == each.bytes_per_vector, each.name


def test_a_bound_on_bytes_needs_no_build_and_names_the_smallest() -> None:
    tried = configurations(rows=100_000, dim=128, metric=Metric.COSINE)
    assert within_bytes(tried, None) == tried
    fitting = within_bytes(tried, 120)
    assert fitting == [each for each in tried if each.bytes_per_vector <= 120]
    assert 0 < len(fitting) < len(tried)
    least = min(each.bytes_per_vector for each in tried)
    with pytest.raises(InvalidInput, match=rf"max-bytes-per-vector: .*expected >= {least:.0f}, "):
        within_bytes(tried, least - 1)


def test_kinds_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"--kind: no index of these kinds .*got pq"):
        configurations(rows=200, dim=8, metric=Metric.L2, kinds=[IndexKind.PQ])


# --- the sample


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


def table(path: Path, **columns: object) -> list[Path]:
    pq.write_table(pa.table(columns), path, write_page_checksum=True)
    return [path]


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
    corpus = open_newest(store)
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


def open_newest(store: Store):
    from shardline.shards.storage.embedding_set import open_embedding_set

    return open_embedding_set(store.newest_embeddings())


# --- times


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


# --- trials


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


# --- halving


class FakeTrials:
    """Configurations with known recall, times and seconds."""

    def __init__(self, truth: dict[str, tuple[float, float]], rungs: list[Rung]) -> None:
        self.truth, self.rungs = truth, rungs
        self.at_last: dict[str, tuple[float, float]] = {}  # what is otherwise over all rows
        self.ran: list[tuple[str, int]] = []
        self.now = 0.0

    def run(self, configuration: Configuration, rung: Rung, target: float) -> Trial:
        self.ran.append((configuration.name, rung.number))
        self.now += rung.rows / 1000
        recall, p50 = self.truth.get(configuration.name, (0.99, 50.0))
        if rung.is_last:
            recall, p50 = self.at_last.get(configuration.name, (recall, p50))
        point = Point(
            params=SearchParams(),
            recall=recall,
            error=0.0,
            overlap=recall,
            latency=Latency(p50_ms=p50, p99_ms=2 * p50),
        )
        outcome = Outcome(
            configuration=configuration,
            rows=rung.rows,
            is_last=rung.is_last,
            points=(point,),
            chosen=point,
            growth=1.0,
            build_seconds=1.0,
            seconds=rung.rows / 1000,
        )
        return Trial(outcome, None)  # type: ignore[arg-type]  # nothing is asked

    def compare(self, trials: Sequence[Trial]) -> list[Outcome]:
        return [trial.outcome for trial in trials]


TRIED = configurations(rows=160_000, dim=32, metric=Metric.COSINE)
NAMES = [each.name for each in TRIED]
RUNGS = [
    Rung(number=number, rows=rows, asked=100, counted=100, is_last=number == 2)
    for number, rows in enumerate((2500, 10_000, 40_000))
]


def halved(truth: dict[str, tuple[float, float]], bounds: Bounds, **options: object):
    fake = FakeTrials(truth, RUNGS)
    return halve(TRIED, fake, bounds, clock=lambda: fake.now, **options), fake


def by_rung(fake: FakeTrials) -> list[list[str]]:
    return [[name for name, number in fake.ran if number == rung.number] for rung in RUNGS]


def test_the_best_survives_and_few_are_built_over_all_rows() -> None:
    best = next(each for each in TRIED if each.spec.kind == "ivfpq" and not each.variations)
    found, fake = halved({best.name: (0.985, 0.1)}, Bounds(target_recall=0.98))
    assert found.chosen is not None and found.chosen.configuration is best
    assert found.chosen.rows == RUNGS[-1].rows
    first, second, last = by_rung(fake)
    own = [each.name for each in TRIED if not each.variations]
    assert first[: len(own)] == own and len(first) < len(TRIED)
    assert (second, last) == ([best.name], [best.name]), "all others are 500 times as slow"
    assert found.untried == 0 and not found.is_cut_short


def test_a_rung_ends_with_enough_or_with_one_that_is_estimated_far_above() -> None:
    plain = {"ivfpq-fs": "fp16", "ivfpq": "none", "pq": "none"}
    own = [e for e in TRIED if not e.variations and e.spec.rerank == plain.get(e.spec.kind)]
    truth = {each.name: (0.99, 1 + 0.1 * place) for place, each in enumerate(own)}
    found, fake = halved(truth, Bounds(target_recall=0.98))
    assert found.chosen is not None and found.chosen.configuration is own[0]
    _, second, last = by_rung(fake)
    assert second == [each.name for each in own[: WIDTHS[0][0]]]
    assert last == [each.name for each in own[:3]], "the fourth is 1.3 times as slow"


def test_an_estimate_that_was_too_good_costs_a_trial_and_not_the_result() -> None:
    """A graph, say, that is fast over few rows, and over all of them misses the target."""
    graph = next(each for each in TRIED if each.spec.kind == "hnsw")
    right = next(each for each in TRIED if each.spec.kind == "ivf" and not each.variations)
    graphs = [each.name for each in TRIED if each.spec.kind == "hnsw"]
    fake = FakeTrials(dict.fromkeys(graphs, (0.999, 0.01)) | {right.name: (0.99, 0.2)}, RUNGS)
    fake.at_last = dict.fromkeys(graphs, (0.9, 8.0))
    found = halve(TRIED, fake, Bounds(target_recall=0.98), clock=lambda: fake.now)
    assert found.chosen is not None and found.chosen.configuration is right
    assert by_rung(fake)[2] == [graph.name, right.name], "one graph is enough to know"


def test_variations_are_tried_where_the_kind_is_fast() -> None:
    best = next(each for each in TRIED if each.spec.kind == "ivf" and each.variations)
    own = next(each for each in TRIED if each.family == best.family and not each.variations)
    truth = {best.name: (0.99, 0.1), own.name: (0.99, 0.2)}
    others = [
        next(e.family for e in TRIED if e.spec.kind == kind) for kind in ("ivfpq-fs", "ivfpq")
    ]
    found, fake = halved(truth, Bounds(target_recall=0.98))
    assert found.chosen is not None and found.chosen.configuration is best
    varied = {name for name, _ in fake.ran} & {each.name for each in TRIED if each.variations}
    assert varied == {
        each.name for each in TRIED if each.variations == 1 and each.family in (own.family, *others)
    }


def test_what_misses_a_bound_at_any_depth_goes_out_first() -> None:
    fast, right, big, *_ = (each for each in TRIED if not each.variations)
    truth = {fast.name: (0.9, 0.01), right.name: (0.981, 1.0), big.name: (0.99, 3.0)}
    found, fake = halved(truth, Bounds(target_recall=0.98, max_p99_ms=2.5))
    assert found.chosen is not None and found.chosen.configuration is right
    assert (fast.name, 1) not in fake.ran and (big.name, 1) not in fake.ran


def test_what_nearly_reaches_the_target_over_few_rows_goes_on() -> None:
    """Rough training costs recall, and a standard error is not nothing."""
    near, far, *_ = (each for each in TRIED if each.spec.kind == "ivfpq" and not each.variations)
    truth = {near.name: (0.971, 0.1), far.name: (0.969, 0.1)}
    _, fake = halved(truth, Bounds(target_recall=0.98))
    assert (near.name, 1) in fake.ran and (far.name, 1) not in fake.ran


def test_larger_copies_go_on_only_if_they_gain_something() -> None:
    plain, copies = (
        next(e for e in TRIED if e.spec.kind == "ivfpq" and e.spec.rerank == rerank)
        for rerank in ("none", "fp16")
    )
    bounds = Bounds(target_recall=0.98)
    alike = {plain.name: (0.985, 1.0), copies.name: (0.999, 1.0)}
    faster = {plain.name: (0.985, 1.0), copies.name: (0.999, 0.8)}
    better = {plain.name: (0.975, 1.0), copies.name: (0.985, 1.0)}
    for truth, goes_on in ((alike, False), (faster, True), (better, True)):
        _, fake = halved(truth, bounds)
        assert ((copies.name, 1) in fake.ran) == goes_on


def test_of_equal_times_the_smaller_index_is_chosen() -> None:
    pair = [each for each in TRIED if (each.spec.kind, each.spec.m) == ("ivfpq", 16)]
    small, large = (
        next(each for each in pair if not each.variations and each.spec.rerank == rerank)
        for rerank in ("none", "fp16")
    )
    assert small.bytes_per_vector < large.bytes_per_vector
    truth = {small.name: (0.99, 1.01), large.name: (0.99, 1.0)}
    found, _ = halved(truth, Bounds(target_recall=0.98))
    assert found.chosen is not None and found.chosen.configuration is small


def test_when_nothing_meets_the_bounds_the_nearest_and_what_it_misses_are_named() -> None:
    near = next(each for each in TRIED if each.spec.kind == "hnsw")
    truth = dict.fromkeys(NAMES, (0.5, 1.0)) | {near.name: (0.96, 4.0)}
    bounds = Bounds(target_recall=0.98, max_p99_ms=5)
    found, _ = halved(truth, bounds)
    assert found.chosen is None
    assert found.nearest.configuration is near and found.nearest.is_last
    error = failure(found, bounds)
    assert "recall@100 >= 0.98, p99 <= 5 ms" in str(error)
    assert f"nearest is {near.name}" in str(error)
    assert "recall 0.960 is below 0.98 and p99 8.00 ms is above 5" in str(error)


def test_the_time_limit_begins_nothing_that_would_end_too_late() -> None:
    best = next(each for each in TRIED if not each.variations)
    truth = {best.name: (0.99, 0.1)}
    _, whole = halved(truth, Bounds(target_recall=0.98))
    first = len(by_rung(whole)[0]) * RUNGS[0].rows / 1000
    found, fake = halved(truth, Bounds(target_recall=0.98), time_limit_s=first + 15.0)
    assert found.is_cut_short and fake.now <= first + 15.0 < whole.now
    assert found.chosen is not None and found.chosen.rows == RUNGS[1].rows
    fake = FakeTrials(truth, RUNGS)
    fake.at_last = {best.name: (0.9, 0.1)}
    limit = first + 60.0  # for a single one over all rows
    found = halve(
        TRIED, fake, Bounds(target_recall=0.98), clock=lambda: fake.now, time_limit_s=limit
    )
    assert found.is_cut_short and by_rung(fake)[2] == [best.name]
    assert found.chosen is not None and found.chosen.rows == RUNGS[0].rows, "the best of the others"
    found, fake = halved(truth, Bounds(target_recall=0.98), time_limit_s=3.0)
    assert found.is_cut_short and found.untried > 0
    with pytest.raises(InvalidInput, match="--time-limit-s: too short for a single trial"):
        halve(
            TRIED,
            fake,
            Bounds(target_recall=0.98),
            clock=itertools.count(0, 9).__next__,
            time_limit_s=1,
        )


def test_excess_is_one_at_the_bounds() -> None:
    found, _ = halved({NAMES[0]: (0.98, 1.0)}, Bounds(target_recall=0.98))
    (outcome,) = (o for o in found.outcomes if o.configuration.name == NAMES[0])
    bounds = Bounds(
        target_recall=0.98,
        max_p99_ms=2.0,
        max_bytes_per_vector=outcome.configuration.bytes_per_vector,
    )
    assert excess(outcome, bounds) == pytest.approx(1)
    assert misses(outcome, bounds) == []
    assert excess(outcome, replace(bounds, max_p99_ms=1.0)) == pytest.approx(2)
    assert excess(outcome, replace(bounds, target_recall=0.99)) == pytest.approx(2)


# --- what is reported


def test_the_front_against_all_pairs() -> None:
    rng = np.random.default_rng(3)
    truth = {name: (float(rng.uniform(0.6, 1)), float(rng.uniform(0.1, 2))) for name in NAMES}
    found, _ = halved(truth, Bounds(target_recall=0.7))
    entries = [(o, o.chosen) for o in found.outcomes]

    def figures(entry: tuple[Outcome, Point]) -> tuple[float, float, float]:
        outcome, point = entry
        return -point.recall, point.latency.p50_ms, outcome.configuration.bytes_per_vector

    expected = {
        outcome.configuration.name
        for outcome, point in entries
        if not any(
            figures(other) != figures((outcome, point))
            and all(a <= b for a, b in zip(figures(other), figures((outcome, point)), strict=True))
            for other in entries
        )
    }
    shown = front(found.outcomes)
    assert {outcome.configuration.name for outcome, _ in shown} == expected
    recalls = [point.recall for _, point in shown]
    assert recalls == sorted(recalls, reverse=True)


def test_the_section_is_what_was_measured() -> None:
    found, _ = halved({NAMES[0]: (0.99, 0.1)}, Bounds(target_recall=0.98))
    assert found.chosen is not None
    bounds = Bounds(target_recall=0.98)
    text = section(found.chosen, bounds, by_interactions=False, gpu=False)
    spec = IndexSpec(**yaml.safe_load(text)["index"])
    own = found.chosen.configuration.spec
    assert spec == own.model_copy(update={"device": "auto", "target_recall": 0.98})
    text = section(found.chosen, bounds, by_interactions=True, gpu=True)
    fields = yaml.safe_load(text)["index"]
    assert (fields["target_recall"], fields["device"]) == (0.985, "cpu")


# --- the command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """The command, over a set of clustered vectors in a store."""
    monkeypatch.setattr(tune_command, "cores", lambda: 1)  # threads that wait for busy cores spin
    vectors = clustered(8200, DIM, 40, seed=1)
    write_set(tmp_path / "store" / "embeddings" / "m1", vectors)
    options = itertools.chain.from_iterable(("--kind", str(kind)) for kind in QUICK)
    common = ["--store", str(tmp_path / "store"), "tune", "--shards", "1", *options]

    def invoke(*arguments: str):
        return CliRunner().invoke(cli, [*common, *arguments])

    return invoke


def test_the_command_prints_the_front_and_writes_a_section_to_build_with(
    tmp_path: Path, run: Callable[..., object]
) -> None:
    files = {name: tmp_path / name for name in ("tune.yaml", "tune.json", "tune.png")}
    options = ["--out", "tune.yaml", "--json", "tune.json", "--plot", "tune.png"]
    arguments = [str(files.get(each, each)) for each in options]
    done = run("--embeddings", "m1", "--target-recall", "0.95", *arguments)
    assert done.exit_code == 0, done.output
    assert "Pareto front for 8,200 rows x 16, cosine, 1 shards" in done.output
    assert "* " in done.output
    report = json.loads(files["tune.json"].read_text())
    assert report["chosen"] in {each["name"] for each in report["configurations"]}
    assert report["setup"]["query_source"] == "item vectors held out"
    assert files["tune.png"].read_bytes().startswith(b"\x89PNG")
    written = files["tune.yaml"].read_text()
    assert written.splitlines()[0] == "# shardline tune: m1, recall@100 >= 0.95"
    assert written.partition("\n")[2] in done.output
    store = ["--store", str(tmp_path / "store"), "--set", "cluster.shards=1"]
    built = CliRunner().invoke(
        cli, ["-c", str(files["tune.yaml"]), *store, "build", "--in-process"]
    )
    assert built.exit_code == 0, built.output
    assert "chosen for a target of 0.95" in built.output
    chosen = next(each for each in report["configurations"] if each["name"] == report["chosen"])
    assert f"index: {chosen['factory']}" in built.output


def test_a_folder_and_interactions_are_taken(tmp_path: Path, run: Callable[..., object]) -> None:
    vectors = clustered(8200, DIM, 40, seed=1)
    asked = clustered(60, DIM, 40, seed=1, first_row=70_000)
    items = np.argsort(-(asked @ vectors.T), axis=1)[:, :50:4]
    paths = table(tmp_path / "held.parquet", vector=asked.tolist(), item_id=items.tolist())
    folder = str(tmp_path / "store" / "embeddings" / "m1")
    done = run(
        *("--embeddings", folder, "--interactions", str(paths[0])), *("--target-recall", "0.9")
    )
    assert done.exit_code == 0, done.output
    assert "recall@100 of held-out items by that of exact search" in done.output
    assert "60 users with held-out items" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--embeddings", "m9"], "no finished embedding set"),
        (["--max-bytes-per-vector", "3"], "no configuration is that small"),
        (["--max-p99-ms", "0.000001"], "no configuration meets the bounds"),
        (["--interactions", "a", "--data", "b"], "exclude each other"),
        (["--shards", "9"], "too few rows to tune for"),
        (["--data", "."], "no query encoder"),
        (["--kind", "auto"], "Invalid value"),
    ],
)
def test_what_the_command_refuses(
    run: Callable[..., object], options: list[str], message: str
) -> None:
    done = run(*options)
    assert done.exit_code != 0
    said = f"{done.output} {done.exception}"
    assert message in said
    assert ("Pareto front" in done.output) == ("meets the bounds" in message)
