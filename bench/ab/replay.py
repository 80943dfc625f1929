"""One query set through two arms of settings, each query in both: the differences within queries.

Both arms of a query are asked one right after the other, in random order, over one connection: what
changes on the machine meanwhile meets both alike. No load is made; `bench load` does that.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardline.bench.ab import intervals
from shardline.bench.ab.intervals import Estimate, Numbers
from shardline.router.client.answers import SearchAnswer
from shardline.router.client.calls import SearchFields
from shardline.router.query import QueryKind
from shardline.shards.core.errors import InvalidInput, ShardlineError
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.recall import count_matches
from shardline.shards.core.schema import EMPTY_ID, Ranked

WARM_UP = 10  # queries that are asked first, and not counted
EXACT_TIMEOUT_MS = 10_000.0
# what an exact search must have in common with the answers that it judges
JUDGED_BY = ("k", "filter", "exclude", "exclude_history", "exclude_lists")
KINDS = tuple(kind.value for kind in QueryKind)


Ask = Callable[..., SearchAnswer]  # Client.search


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFigures:
    """Of one arm. short: results that are missing to k, per query."""

    p50_ms: Estimate
    p99_ms: Estimate
    recall: Estimate
    short: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Differences are b less a, within queries. queries: those that both arms answered; failures:
    what the others failed with, by code. judged: queries whose exact answer was asked, too."""

    queries: int
    judged: int
    a: SideFigures
    b: SideFigures
    median_difference_ms: Estimate
    mean_difference_ms: Estimate
    overlap: Estimate
    recall_difference: Estimate
    failures: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Of one query: each arm's milliseconds, results missing, and recall (NaN: not judged)."""

    took_ms: tuple[float, float]
    short: tuple[int, int]
    overlap: float
    recall: tuple[float, float]


def side_of(text: str, option: str) -> dict[str, Any]:
    """The settings of an arm, from JSON, as ``Client.search`` takes them.

    Raises:
        InvalidInput: no map of fields of a search, or one with what is asked.
    """
    try:
        given = json.loads(text)
    except ValueError as error:
        raise InvalidInput("not JSON", field=option, got=text[:60]) from error
    if not isinstance(given, dict):
        raise InvalidInput(
            "not settings", field=option, expected='a map, as {"params": {"nprobe": 4}}'
        )
    known = [name.rstrip("_") for name in SearchFields.__annotations__ if name not in KINDS]
    for name in given:
        if name not in known:
            raise InvalidInput(
                "not a setting of a search",
                field=f"{option}: {name}",
                expected=f"one of {', '.join(known)}",
            )
    fields = {f"{name}_" if name == "return" else name: each for name, each in given.items()}
    if "params" in fields:
        fields["params"] = _params(fields["params"], option)
    return fields


def compare(
    ask: Ask,
    queries: Sequence[Mapping[str, Any]],
    sides: tuple[dict[str, Any], dict[str, Any]],
    *,
    judged: int,
    rng: np.random.Generator,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """queries: fields of a search each, one query in every one. judged: how many of them are asked
    exactly, too.

    Raises:
        InvalidInput: the server does not take an arm's settings. ShardlineError: no query was
            answered by both arms; the last failure.
    """
    for query in queries[:WARM_UP]:
        for side in sides:
            ask(**{**query, **side})
    samples: list[_Sample] = []
    failures: Counter[str] = Counter()
    last: ShardlineError | None = None
    order = rng.permutation(len(queries))
    for done, place in enumerate(order):
        try:
            samples.append(
                _sample(ask, queries[place], sides, is_judged=done < judged, rng=rng, clock=clock)
            )
        except InvalidInput:
            raise
        except ShardlineError as error:
            failures[error.code] += 1
            last = error
        progress("queries", done + 1, len(queries))
    if not samples:
        assert last is not None  # there is one query at least
        raise last
    return _comparison(samples, dict(failures), rng)


def _sample(
    ask: Ask,
    query: Mapping[str, Any],
    sides: tuple[dict[str, Any], dict[str, Any]],
    *,
    is_judged: bool,
    rng: np.random.Generator,
    clock: Callable[[], float],
) -> _Sample:
    answers: dict[int, SearchAnswer] = {}
    took: dict[int, float] = {}
    for side in rng.permutation(2).tolist():
        began = clock()
        answers[side] = ask(**{**query, **sides[side]})
        took[side] = (clock() - began) * 1000
    found = [row[row != EMPTY_ID] for row in (answers[0].ids[0], answers[1].ids[0])]
    longer = max(map(len, found))
    recall = (np.nan, np.nan)
    if is_judged:
        recall = _recalls(ask, query, sides, (answers[0], answers[1]))
    return _Sample(
        took_ms=(took[0], took[1]),
        short=(answers[0].ids.shape[1] - len(found[0]), answers[1].ids.shape[1] - len(found[1])),
        overlap=len(np.intersect1d(*found)) / longer if longer else 1.0,
        recall=recall,
    )


def _recalls(
    ask: Ask,
    query: Mapping[str, Any],
    sides: tuple[dict[str, Any], dict[str, Any]],
    answers: tuple[SearchAnswer, SearchAnswer],
) -> tuple[float, float]:
    """Of both answers against the exact one, which is asked once where it is the same for both."""
    wanted = [{name: side[name] for name in JUDGED_BY if name in side} for side in sides]

    def exactly(fields: dict[str, Any]) -> SearchAnswer:
        return ask(**{**query, **fields, "exact": True, "timeout_ms": EXACT_TIMEOUT_MS})

    first = exactly(wanted[0])
    second = first if wanted[1] == wanted[0] else exactly(wanted[1])
    return _recall(answers[0], first), _recall(answers[1], second)


def _recall(answer: SearchAnswer, exact: SearchAnswer) -> float:
    hits, wanted = count_matches(Ranked(answer.ids, answer.scores), Ranked(exact.ids, exact.scores))
    return hits / wanted if wanted else np.nan


def _comparison(
    samples: list[_Sample], failures: dict[str, int], rng: np.random.Generator
) -> Comparison:
    took = np.array([each.took_ms for each in samples])
    recalls = np.array([each.recall for each in samples])
    recalls = recalls[~np.isnan(recalls).any(axis=1)]
    short = np.array([each.short for each in samples], np.float64)
    a, b = (_figures(took[:, side], recalls[:, side], short[:, side]) for side in (0, 1))
    differences = took[:, 1] - took[:, 0]
    return Comparison(
        queries=len(samples),
        judged=len(recalls),
        a=a,
        b=b,
        median_difference_ms=intervals.resampled_median(differences, rng),
        mean_difference_ms=intervals.resampled_mean(differences, rng),
        overlap=intervals.resampled_mean(np.array([each.overlap for each in samples]), rng),
        recall_difference=intervals.resampled_mean(recalls[:, 1] - recalls[:, 0], rng),
        failures=failures,
    )


def _figures(took_ms: Numbers, recalls: Numbers, short: Numbers) -> SideFigures:
    return SideFigures(
        p50_ms=intervals.quantile(took_ms, 0.5),
        p99_ms=intervals.quantile(took_ms, 0.99),
        recall=intervals.mean(recalls),
        short=float(short.mean()),
    )


def _params(given: Any, option: str) -> SearchParams:
    names = SearchParams.__slots__
    if not isinstance(given, dict) or not set(given) <= set(names):
        raise InvalidInput(
            "not search parameters",
            field=f"{option}: params",
            expected=f"a map with {', '.join(names)}",
            got=str(given)[:60],
        )
    return SearchParams(**given)
