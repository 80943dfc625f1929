"""The search-time parameters of a generation: the cheapest that reach the recall asked for.

Each shard answers sample queries with a ladder of parameters (``sweep``). ``measured`` merges the
answers as a router does and takes the recall of the merged answer, and ``choose`` picks by a cost
formula. Measured times are reported but not picked by: they differ from run to run, and the same
build of the same data must choose the same parameters.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardline.router.merge import merge_top_k
from shardline.shards.core.messages import MAX_NPROBE, SearchParams
from shardline.shards.core.recall import exact_scores, hits, recall_at_k
from shardline.shards.core.schema import EMPTY_ID, FloatArray, Metric, Ranked
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.spec import MEASURED_K, IndexKind, IndexSpec, ResolvedIndex

# An hnsw search keeps k candidates at least, so smaller queues would all be measured as one.
EF_SEARCHES = (128, 256, 512, 1024, 2048)
RERANK_FACTORS = (1, 2, 4, 8)
# Microseconds of one thread of the 2.4 GHz machine of docs/PERFORMANCE.md, at 128 dimensions. Only
# their ratios matter, between one more list and more candidates to re-rank.
PROBE_US = 0.4  # a list: its table of partial scores
ROW_US = 0.02  # a row of a list
FASTSCAN_ROW_US = 0.002
CANDIDATE_US = 0.11  # a candidate re-ranked, or a step in a graph
# A shard stops going deeper when it misses no more than the first share of what the target allows:
# what it still misses then, its codes lose, and more lists do not bring back. It stops raising the
# factor when that gains less than the second: all good candidates of those lists are re-ranked.
LEFT_TO_GAIN, FACTOR_GAIN = 0.25, 0.05
SHARE_SLACK = 10  # results a small shard may have beyond its share


@dataclass(frozen=True, slots=True)
class Ladder:
    """Parameters to measure: each depth (nprobe, or ef_search of a graph) with each factor.

    None where the index has no such parameter. default: what would be taken without measuring.
    """

    depths: tuple[int | None, ...]
    factors: tuple[int | None, ...]
    is_graph: bool
    default: SearchParams

    def rung(self, depth: int | None) -> Iterator[SearchParams]:
        """The parameters of one depth, factors ascending."""
        for factor in self.factors:
            yield SearchParams(
                nprobe=None if self.is_graph else depth,
                ef_search=depth if self.is_graph else None,
                rerank_factor=factor,
            )


@dataclass(frozen=True, slots=True)
class Answered:
    """A shard's answers to the sample queries with one set of parameters.

    scores: as the index ranks (n, k); exact: the exact scores of the same rows; both -inf in empty
    slots. ms: median of single queries on one thread.
    """

    scores: FloatArray
    exact: FloatArray
    ms: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What parameters give: recall of the merged answer, milliseconds per query over all shards."""

    params: SearchParams
    recall: float
    ms: float


Answers = Mapping[SearchParams, Answered]


def ladder_of(spec: IndexSpec, index: ResolvedIndex) -> Ladder:
    """What is left open by the spec, in ascending order; what it fixes is measured as it is."""
    depths: tuple[int | None, ...] = (None,)
    if index.nlist is not None:
        most = min(index.nlist, MAX_NPROBE)
        powers = [1 << bit for bit in range(most.bit_length()) if 1 << bit < most]
        depths = (spec.nprobe,) if spec.nprobe is not None else (*powers, most)
    elif index.ef_search is not None:
        depths = (spec.ef_search,) if spec.ef_search is not None else EF_SEARCHES
    factors: tuple[int | None, ...] = (None,)
    if index.rerank_factor is not None:
        factors = (spec.rerank_factor,) if spec.rerank_factor is not None else RERANK_FACTORS
    return Ladder(depths, factors, index.ef_search is not None, index.search_params)


def sweep(
    main: MainIndex,
    vectors: FloatArray,
    queries: FloatArray,
    ladder: Ladder,
    *,
    exact: FloatArray,
    share: float,
    target: float,
    metric: Metric,
) -> dict[SearchParams, Answered]:
    """Asks one shard each query with each parameter, until going deeper has nothing to gain.

    vectors (m, dim): the rows of ``main``, a ``share`` of all; exact (n, k): the best scores among
    them, best first. Which of them are among the best k of all is not known without the other
    shards. To stop by, twice the shard's share of k is taken for them: too few where ids are sorted
    by topic, and then it stops early, with ``ladder.default`` still to choose.
    """
    enough = 1 - LEFT_TO_GAIN * (1 - target)
    likely = exact[:, : math.ceil(2 * share * MEASURED_K) + SHARE_SLACK]
    answers: dict[SearchParams, Answered] = {}

    def ask(params: SearchParams) -> Answered:
        found, times = [], []
        for query in queries:
            started = time.perf_counter()
            found.append(main.search(query[None], MEASURED_K, params))
            times.append(time.perf_counter() - started)
        rows = np.concatenate([ranked.ids for ranked in found])
        return Answered(
            np.concatenate([ranked.scores for ranked in found]),
            exact_scores(queries, vectors, rows, metric),
            float(np.median(times)) * 1000,
        )

    for depth in ladder.depths:
        recall = -1.0
        for params in ladder.rung(depth):
            answers[params] = ask(params)
            before, recall = recall, recall_at_k(answers[params].exact, likely)
            if recall - before < FACTOR_GAIN * (1 - target):
                break
        if recall >= enough:
            break
    if ladder.default not in answers:
        answers[ladder.default] = ask(ladder.default)
    return answers


def measured(shards: Sequence[Answers], exact: FloatArray) -> list[Measured]:
    """Every set of parameters that some shard was asked with; exact (n, k): the best of all shards.

    A shard that had stopped below some parameters is taken with the highest it was asked with.
    """
    k = exact.shape[1]
    found = []
    for params in dict.fromkeys(params for answers in shards for params in answers):
        parts = [_answer_at(answers, params) for answers in shards]
        # merged by the scores of the index, and of each result only whether it is a hit is kept.
        # In place of its id: equal scores are cut by id, so that a tie counts as a miss
        wins = [np.where(np.isneginf(p.exact), EMPTY_ID, hits(p.exact, exact)) for p in parts]
        ranked = [Ranked(won, part.scores) for won, part in zip(wins, parts, strict=True)]
        merged = merge_top_k(ranked, k)
        recall = float((merged.ids == 1).sum() / max(int(np.isfinite(exact).sum()), 1))
        found.append(Measured(params, recall, sum(part.ms for part in parts)))
    return found


def choose(
    points: Sequence[Measured], *, target: float, cost: Mapping[SearchParams, float]
) -> Measured:
    """The cheapest point that reaches the target; where none does, the one of highest recall."""

    def order(point: Measured) -> tuple[float, int, int, int]:
        params = point.params
        knobs = (params.nprobe or 0, params.ef_search or 0, params.rerank_factor or 0)
        return (cost[params], *knobs)

    good = [point for point in points if point.recall >= target]
    if good:
        return min(good, key=order)
    best = max(point.recall for point in points)
    return min((point for point in points if point.recall == best), key=order)


def cost_us(params: SearchParams, index: ResolvedIndex, rows: float) -> float:
    """What a query costs a shard of so many rows beyond what is the same for all parameters."""
    row_us = FASTSCAN_ROW_US if index.kind is IndexKind.IVFPQ_FS else ROW_US
    list_us = PROBE_US + row_us * rows / (index.nlist or 1)
    candidates = MEASURED_K * (params.rerank_factor or 0) + (params.ef_search or 0)
    return (params.nprobe or 0) * list_us + CANDIDATE_US * candidates


def advice(spec: IndexSpec, index: ResolvedIndex) -> str:
    """What may help an index that does not reach its target."""
    fixed = [
        f"index.{name}"
        for name in ("nprobe", "ef_search", "rerank_factor")
        if getattr(spec, name) is not None
    ]
    if fixed:
        return f"leave out {' and '.join(fixed)}, and the build chooses"
    if index.rerank_factor is None and index.kind not in (IndexKind.IVF, IndexKind.HNSW):
        return "set index.rerank to fp16: the codes lose it"
    return "take index.kind ivf, which is exact, or fewer lists (index.nlist), or lower the target"


def _answer_at(answers: Answers, params: SearchParams) -> Answered:
    below = [asked for asked in answers if all(np.less_equal(_height(asked), _height(params)))]
    return answers[max(below, key=_height)]


def _height(params: SearchParams) -> tuple[int, int]:
    """(depth, factor), of which recall rises with either."""
    return params.nprobe or params.ef_search or 0, params.rerank_factor or 0
