"""One configuration, built over a part of a sample and asked: recall, times, what it took to build.

Recall is counted over the best share of the answer (``corpus_sample``); times are those of single
queries on one thread, extrapolated to the rows of a shard where fewer are indexed. For that, a
quarter of the rows is indexed and asked as well: what a search does not share with one over fewer
rows grows in proportion to the rows, or with their logarithm for a graph.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardline.cluster.tuner.configurations import Configuration
from shardline.cluster.tuner.corpus_sample import CorpusSample
from shardline.cluster.tuner.outcome import STEP, Outcome, Point, Rung, rungs_of
from shardline.cluster.tuner.timing import (
    Latency,
    Search,
    Times,
    in_rounds,
    latency_of,
    paired_ratio,
)
from shardline.cluster.tuning import (
    FACTOR_GAIN,
    LEFT_TO_GAIN,
    Measured,
    choose,
    cost_us,
    ladder_of,
)
from shardline.shards.core.errors import DataError
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.recall import exact_scores, hits
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray
from shardline.shards.index.exact import exact_top_k
from shardline.shards.index.main_index import MainIndex, set_search_threads
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexKind, IndexSpec
from shardline.shards.index.template import centroids_of, filled_copy, in_blocks, train_template

LEAST_HITS = 50  # held-out items that exact search finds; fewer say less than overlap does
# Training of all rungs but the last, which trains as a build does. It loses a little recall, and
# is what most of the time would be spent on.
ROUGH_ROWS_PER_LIST = 16
ROUGH_ROWS = 4096  # of codes: 16 for each of 256 centroids
ROUGH_ITERATIONS = 4
ROUGH_QUERIES = 256  # asked before the last rung, if neighbours are what recall is measured on
SWEPT_QUERIES = 32  # timed with each parameter; the chosen ones are timed again in rounds
TIMED_QUERIES, LAST_TIMED_QUERIES = 128, 512  # the last ones say what p99 is
TIMED_MS = 400.0  # a round of slow searches has fewer queries
LEAST_TIMED = 8
ROUNDS, LAST_ROUNDS = 3, 7


@dataclass(frozen=True, slots=True)
class Trial:
    """An outcome, with the index that can be asked again."""

    outcome: Outcome
    main: MainIndex


class Trials:
    """Runs trials over one sample, and keeps what they share: exact answers, centroids, and of
    each rung the index that all others are timed beside.

    shares_centroids: False trains every index on its own, as separate builds do.
    """

    def __init__(
        self, sample: CorpusSample, *, threads: int, seed: int = 0, shares_centroids: bool = True
    ) -> None:
        self.sample, self.rungs = sample, rungs_of(sample)
        self._threads, self._seed = threads, seed
        self._shares_centroids = shares_centroids
        self._centroids: dict[tuple[int | None, int | None, bool], FloatArray | None] = {}
        self._exact: dict[int, tuple[IdArray, FloatArray]] = {}
        self._references: dict[int, _Reference] = {}
        self._pair_rows = _rows_of_items(sample)

    def run(self, configuration: Configuration, rung: Rung, target: float) -> Trial:
        """Builds it over the rows of the rung and asks it, until more depth has nothing to gain.

        Raises:
            DataError: exact search finds none of the held-out items.
        """
        started = time.perf_counter()
        template = self._template(configuration, rung)
        main = self._filled(template, configuration, rung.rows)
        built = time.perf_counter()
        points = self._sweep(main, configuration, rung, target)
        chosen = self._chosen(points, configuration, target)
        times, grown = self._timed(main, template, configuration, rung, chosen)
        beside = self._references[rung.number].per_latest
        precise = latency_of(times)
        rough = precise.p50_ms / max(chosen.latency.p50_ms, 1e-9)
        outcome = Outcome(
            configuration=configuration,
            rows=rung.rows,
            is_last=rung.is_last,
            points=tuple(points),
            chosen=chosen,
            growth=grown,
            build_seconds=built - started,
            seconds=time.perf_counter() - started,
        ).scaled(rough * grown * beside)
        outcome = outcome.with_chosen(replace(chosen, latency=precise.scaled(grown * beside)))
        return Trial(outcome, main)

    def compare(self, trials: Sequence[Trial]) -> list[Outcome]:
        """The outcomes of some trials with the latencies of their chosen points measured anew, all
        in the same rounds."""
        asked = self.rungs[-1].asked
        searches = [_search(trial.main, asked, trial.outcome.chosen.params) for trial in trials]
        slowest = max(trial.outcome.chosen.latency.p50_ms for trial in trials)
        queries = self._timed_queries(slowest, LAST_TIMED_QUERIES)
        times = self._rounds(searches, queries, LAST_ROUNDS)
        base = latency_of(times[0]).p50_ms
        outcomes = []
        for trial, own in zip(trials, times, strict=True):
            before, after = trial.outcome, latency_of(own)
            p50 = paired_ratio(own, times[0]) * base * before.growth
            scaled = before.scaled(p50 / before.chosen.latency.p50_ms)
            latency = Latency(p50_ms=p50, p99_ms=p50 * after.p99_ms / after.p50_ms)
            outcomes.append(scaled.with_chosen(replace(scaled.chosen, latency=latency)))
        return outcomes

    def _template(self, configuration: Configuration, rung: Rung) -> Any:
        index, sample = configuration.index, self.sample
        rows, iterations = max(index.train_rows, 1), None
        if not rung.is_last:
            rows, iterations = min(rows, ROUGH_ROWS), ROUGH_ITERATIONS
            if configuration.spec.pca is not None:  # lists and codes are trained behind it
                rows = max(rows, ROUGH_ROWS_PER_LIST * (index.nlist or 0))
        key = (index.nlist, configuration.spec.pca, rung.is_last)
        if index.nlist is not None and not rung.is_last and key[1] is None:
            self._train_lists(index.nlist, key)
        template = train_template(
            index,
            sample.vectors[:rows],
            metric=sample.metric,
            seed=self._seed,
            threads=self._threads,
            centroids=self._centroids.get(key),
            iterations=iterations,
        )
        if self._shares_centroids and key not in self._centroids:
            self._centroids[key] = centroids_of(template)
        return template

    def _train_lists(self, nlist: int, key: tuple[int | None, int | None, bool]) -> None:
        """Centroids of as many lists, for all rungs but the last."""
        if key in self._centroids:
            return
        sample = self.sample
        spec = IndexSpec(kind=IndexKind.IVF, nlist=nlist)
        index = resolve(spec, rows=sample.rows, dim=sample.dim, metric=sample.metric)
        template = train_template(
            index,
            sample.vectors[: min(index.train_rows, ROUGH_ROWS_PER_LIST * nlist)],
            metric=sample.metric,
            seed=self._seed,
            threads=self._threads,
            iterations=ROUGH_ITERATIONS,
        )
        self._centroids[key] = centroids_of(template)

    def _filled(self, template: Any, configuration: Configuration, rows: int) -> MainIndex:
        blocks = in_blocks(self.sample.vectors[:rows])
        layers = filled_copy(template, blocks, threads=self._threads)
        defaults = configuration.index.search_params
        return MainIndex(layers.whole, metric=self.sample.metric, defaults=defaults)

    def _sweep(
        self, main: MainIndex, configuration: Configuration, rung: Rung, target: float
    ) -> list[Point]:
        """A point for each of the parameters that a build would ask with; before the last rung
        only up to the cheapest that reaches the target."""
        ladder = ladder_of(configuration.spec, configuration.index)
        enough = 1 - LEFT_TO_GAIN * (1 - target)
        points: list[Point] = []
        cheapest = math.inf
        for depth in ladder.depths:
            recall = -1.0
            for params in ladder.rung(depth):
                cost = cost_us(params, configuration.index, self.sample.shard_rows)
                if cost >= cheapest:
                    break
                points.append(self._point(main, params, rung))
                before, recall = recall, points[-1].recall
                if recall >= target and not rung.is_last:
                    cheapest = min(cheapest, cost)
                if recall - before < FACTOR_GAIN * (1 - target):
                    break
            if recall >= enough:
                break
        return points

    def _point(self, main: MainIndex, params: SearchParams, rung: Rung) -> Point:
        sample = self.sample
        set_search_threads(self._threads)
        queries = self._queries(rung)
        found = main.search(queries, rung.asked, params).ids[:, : rung.counted]
        own = exact_scores(queries, sample.vectors, found, sample.metric)
        exact_ids, exact = self._exact_of(rung)
        shares = np.minimum(hits(own, exact).sum(axis=1), exact.shape[1]) / exact.shape[1]
        overlap = float(shares.mean())
        recall, error = overlap, float(shares.std() / math.sqrt(len(shares)))
        if sample.held_out is not None:
            wanted = self._hits(exact_ids, rung)
            if wanted >= LEAST_HITS or rung.is_last:
                recall = min(self._hits(found, rung) / wanted, 1.0)
                error = math.sqrt(recall * (1 - recall) / wanted)
        times = self._rounds([_search(main, rung.asked, params)], sample.queries[:SWEPT_QUERIES], 1)
        return Point(
            params=params, recall=recall, error=error, overlap=overlap, latency=latency_of(times[0])
        )

    def _chosen(
        self, points: Sequence[Point], configuration: Configuration, target: float
    ) -> Point:
        """By the rule of every build."""
        rows = self.sample.shard_rows
        cost = {p.params: cost_us(p.params, configuration.index, rows) for p in points}
        measured = [Measured(p.params, p.recall, p.latency.p50_ms) for p in points]
        params = choose(measured, target=target, cost=cost).params
        return next(point for point in points if point.params == params)

    def _timed(
        self,
        main: MainIndex,
        template: Any,
        configuration: Configuration,
        rung: Rung,
        chosen: Point,
    ) -> tuple[Times, float]:
        """Times (rounds, queries) of the chosen point, and by what they grow to a whole shard."""
        is_whole = rung.rows >= 0.95 * self.sample.shard_rows
        searches = [_search(main, rung.asked, chosen.params)]
        reference = self._references.get(rung.number)
        if reference is not None:
            searches.append(reference.search)
        if not is_whole:
            quarter = self._filled(template, configuration, rung.rows // STEP)
            fewer = max(1, round(rung.asked / STEP))
            searches.append(_search(quarter, fewer, chosen.params))
        queries = self._timed_queries(chosen.latency.p50_ms)
        times = self._rounds(searches, queries, LAST_ROUNDS if rung.is_last else ROUNDS)
        if reference is None:
            self._references[rung.number] = _Reference(searches[0], times[0])
        else:
            reference.add(times[1])
        if is_whole:
            return times[0], 1.0
        ratio = paired_ratio(times[-1], times[0])
        is_graph = configuration.spec.kind is IndexKind.HNSW
        return times[0], growth(ratio, self.sample.shard_rows / rung.rows, is_graph=is_graph)

    def _timed_queries(self, milliseconds: float, most: int = TIMED_QUERIES) -> FloatArray:
        """As many as a round has time for, if one takes so long."""
        count = int(min(most, max(LEAST_TIMED, TIMED_MS / max(milliseconds, 1e-3))))
        return self.sample.queries[:count]

    def _rounds(self, searches: Sequence[Search], queries: FloatArray, rounds: int) -> list[Times]:
        set_search_threads(1)
        return in_rounds(searches, queries, rounds)

    def _queries(self, rung: Rung) -> FloatArray:
        is_rough = self.sample.held_out is None and not rung.is_last
        return self.sample.queries[:ROUGH_QUERIES] if is_rough else self.sample.queries

    def _exact_of(self, rung: Rung) -> tuple[IdArray, FloatArray]:
        """Rows and scores of the exact answers, both (n, counted)."""
        if rung.number not in self._exact:
            sample = self.sample
            set_search_threads(self._threads)
            vectors = sample.vectors[: rung.rows]
            self._exact[rung.number] = exact_top_k(
                self._queries(rung), vectors, rung.counted, sample.metric
            )
            exact_rows = self._exact[rung.number][0]
            is_measured = sample.held_out is not None and rung.is_last
            if is_measured and not self._hits(exact_rows, rung):
                raise DataError(
                    "exact search finds none of the held-out items",
                    field="held-out interactions",
                    expected="items of the embedding set, and queries of the same model",
                    got=f"{len(self._pair_rows):,} interactions",
                )
        return self._exact[rung.number]

    def _hits(self, found: IdArray, rung: Rung) -> int:
        """How many held-out items of the rung's rows answers (n, k) hold."""
        assert self.sample.held_out is not None
        inside = (self._pair_rows != EMPTY_ID) & (self._pair_rows < rung.rows)
        owners, rows = self.sample.held_out.owners[inside], self._pair_rows[inside]
        return int((found[owners] == rows[:, None]).any(axis=1).sum())


class _Reference:
    """The index that all others of a rung are timed beside."""

    def __init__(self, search: Search, times: Times) -> None:
        self.search = search
        self._first = self._latest = float(np.median(times))

    def add(self, times: Times) -> None:
        self._latest = float(np.median(times))

    @property
    def per_latest(self) -> float:
        """What takes times just measured to what they were when the reference was first timed."""
        return self._first / self._latest


def _search(main: MainIndex, k: int, params: SearchParams) -> Search:
    return lambda query: main.search(query, k, params)


def growth(quarter: float, ratio: float, *, is_graph: bool) -> float:
    """By what the time of a search grows when the rows grow by ``ratio``.

    quarter: the time over a quarter of the rows, as a share of that over all of them.
    """
    lost = 1 - min(quarter, 1.0)
    if is_graph:
        return 1 + lost * math.log(ratio) / math.log(STEP)
    return 1 + lost * (ratio - 1) / (1 - 1 / STEP)


def _rows_of_items(sample: CorpusSample) -> NDArray[np.int64]:
    """(p,) the row of the sample that each held-out item is; -1 for those not in it."""
    if sample.held_out is None:
        return np.empty(0, np.int64)
    order = np.argsort(sample.ids)
    items = sample.held_out.items
    places = np.minimum(np.searchsorted(sample.ids, items, sorter=order), len(order) - 1)
    rows = order[places]
    return np.where(sample.ids[rows] == items, rows, EMPTY_ID)
