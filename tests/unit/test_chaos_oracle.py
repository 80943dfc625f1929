"""The judge of the chaos test takes right answers, and tells every kind of wrong one."""

from dataclasses import replace

import numpy as np
import pytest

from shardline.router.contract import Coverage, Degraded, Reason
from shardline.shards.core.schema import Metric
from tests.chaos.oracle import Corpus, FindingKind, Oracle, QueryKind, Question, Said, title_of
from tests.reference import brute_force

K = 8
ROWS = (30, 31, 29, 30)
RNG = np.random.default_rng(2)


def units(count: int) -> np.ndarray:
    drawn = RNG.standard_normal((count, 16))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


CORPUS = Corpus(
    vectors=units(sum(ROWS)),
    ids=np.arange(sum(ROWS), dtype=np.int64) * 3,
    users=units(5),
    rows=ROWS,
    generation=4,
    model_version="m1",
)
ORACLE = Oracle(CORPUS)
QUERY = RNG.standard_normal(16).astype(np.float32)
ITEM = 150  # row 50, so of shard 1
QUESTIONS = [
    Question(kind=QueryKind.VECTORS, value=QUERY, k=K),
    Question(kind=QueryKind.ITEM_IDS, value=ITEM, k=K),
    Question(kind=QueryKind.FEATURES, value=3, k=K),
]


def rows_of(shards: tuple[int, ...]) -> np.ndarray:
    starts = np.cumsum((0, *ROWS))
    return np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])


def coverage(missing: tuple[int, ...]) -> Coverage:
    answered = [shard for shard in range(len(ROWS)) if shard not in missing]
    return Coverage(
        shards_asked=len(ROWS),
        shards_answered=len(answered),
        rows_asked=sum(ROWS),
        rows_answered=sum(ROWS[shard] for shard in answered),
        degraded=tuple(Degraded(shard=s, code="unavailable", text="away") for s in missing),
    )


def right(question: Question, missing: tuple[int, ...] = ()) -> Said:
    """By the slow reference of all tests, over the rows of the shards that are there."""
    query = {
        QueryKind.VECTORS: lambda: QUERY / np.linalg.norm(QUERY),
        QueryKind.ITEM_IDS: lambda: CORPUS.vectors[np.searchsorted(CORPUS.ids, ITEM)],
        QueryKind.FEATURES: lambda: CORPUS.users[3],
    }[question.kind]()
    rows = rows_of(tuple(s for s in range(len(ROWS)) if s not in missing))
    own = [ITEM] if question.kind is QueryKind.ITEM_IDS else []
    ids, scores = brute_force(
        query[None], CORPUS.vectors[rows], CORPUS.ids[rows], question.k, Metric.DOT, own
    )
    live = ids[0] >= 0
    found = ids[0][live].tolist()
    return Said(
        ids=found,
        scores=scores[0][live].tolist(),
        generation=4,
        model_version="m1",
        coverage=coverage(missing),
        titles=[title_of(item) for item in found],
    )


def kinds(question: Question, said: Said) -> set[FindingKind]:
    return {each.kind for each in ORACLE.faults(question, said)}


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.kind)
@pytest.mark.parametrize("missing", [(), (2,), (0, 3)], ids=str)
def test_right_answers_are_right(question: Question, missing: tuple[int, ...]) -> None:
    titled = replace(question, titled=True)
    assert ORACLE.faults(titled, right(question, missing)) == []


def test_right_with_fewer_rows_than_k() -> None:
    question = replace(QUESTIONS[0], k=50)
    said = right(question, (0, 1, 2))
    assert len(said.ids) == ROWS[3]
    assert ORACLE.faults(question, said) == []


def swapped(said: Said) -> Said:
    ids = [said.ids[1], said.ids[0], *said.ids[2:]]
    return replace(said, ids=ids)


def one_less(said: Said) -> Said:
    return replace(said, ids=said.ids[:-1], scores=said.scores[:-1])


def without_the_best(said: Said) -> Said:
    """As if the best item were missing and the next one had moved up; the last is made up."""
    last = int(next(item for item in CORPUS.ids if item not in said.ids))
    exact = float(
        CORPUS.vectors[np.searchsorted(CORPUS.ids, last)].astype(np.float64)
        @ (QUERY / np.linalg.norm(QUERY))
    )
    return replace(said, ids=[*said.ids[1:], last], scores=[*said.scores[1:], exact])


@pytest.mark.parametrize(
    "change",
    [
        lambda said: replace(said, generation=5),
        lambda said: replace(said, model_version="m2"),
        lambda said: replace(said, scores=[s * 1.001 for s in said.scores]),
        lambda said: replace(said, scores=said.scores[:-1]),
        lambda said: replace(said, ids=[*said.ids[:-1], said.ids[0]]),
        lambda said: replace(said, ids=[*said.ids[:-1], 1]),  # no item has this id
        lambda said: replace(said, ids=said.ids[::-1], scores=said.scores[::-1]),
        lambda said: replace(said, ids=[], scores=[]),
        lambda said: replace(said, reasons=(Reason(query=0, code="not_found", text=""),)),
        swapped,
        one_less,
        without_the_best,
        # the answer of another user, of the whole corpus
        lambda said: right(QUESTIONS[2]),
        # rows of a shard that the coverage says is missing, and the other way round
        lambda said: replace(said, coverage=coverage((0,))),
        lambda said: replace(right(QUESTIONS[0], (0,)), coverage=coverage(())),
    ],
)
def test_wrong_answers_are_found(change) -> None:
    said = right(QUESTIONS[0])
    assert {each for each in right(QUESTIONS[0]).ids if each < 90}, "shard 0 is among the results"
    assert kinds(QUESTIONS[0], change(said)) == {FindingKind.WRONG}


@pytest.mark.parametrize(
    "change",
    [
        {"shards_answered": 4},
        {"rows_answered": sum(ROWS)},
        {"rows_answered": sum(ROWS) - 30},
        {"rows_asked": sum(ROWS) - ROWS[2]},
        {"shards_asked": 3},
        {"degraded": (Degraded(shard=2, code="", text="away"),)},
        {"degraded": coverage((2,)).degraded * 2},
        {"degraded": (*coverage((2,)).degraded, Degraded(shard=9, code="x", text=""))},
    ],
)
def test_untruthful_coverage_is_found(change: dict[str, object]) -> None:
    said = right(QUESTIONS[0], (2,))
    told = replace(said, coverage=replace(said.coverage, **change))
    assert kinds(QUESTIONS[0], told) == {FindingKind.UNTRUTHFUL}


def not_found(code: str, missing: tuple[int, ...], query: int = 0) -> Said:
    return Said(
        ids=[],
        scores=[],
        generation=4,
        model_version="m1",
        coverage=coverage(missing),
        reasons=(Reason(query=query, code=code, text=""),),
    )


def test_few_results_are_right_where_a_shard_is_missing() -> None:
    missing = (0, 1, 3)
    question = replace(QUESTIONS[0], k=500)
    said = right(question, missing)
    assert 0 < len(said.ids) < question.k
    told = replace(said, reasons=(Reason(query=0, code="coverage", text=""),))
    assert kinds(question, told) == set()
    whole = replace(right(question), reasons=told.reasons)
    assert kinds(question, whole) == {FindingKind.WRONG}
    enough = replace(right(QUESTIONS[0], missing), reasons=told.reasons)
    assert kinds(QUESTIONS[0], enough) == {FindingKind.WRONG}


def test_an_item_is_not_found_only_while_its_shard_is_away() -> None:
    question = QUESTIONS[1]
    assert kinds(question, not_found("not_found_partial", (1,))) == set()
    assert kinds(question, not_found("not_found_partial", (1, 2))) == set()
    for said in (
        not_found("not_found", (1,)),  # it exists
        not_found("not_found_partial", (2,)),  # its shard has answered
        not_found("not_found_partial", (1,), query=1),
        replace(not_found("not_found_partial", (1,)), ids=[3], scores=[0.1]),
    ):
        assert kinds(question, said) == {FindingKind.WRONG}
    assert kinds(question, replace(right(question), ids=[ITEM, *right(question).ids[1:]])) == {
        FindingKind.WRONG
    }


def test_titles_are_those_of_the_items_or_excused() -> None:
    question = replace(QUESTIONS[0], titled=True)
    said = right(question)
    titles = list(said.titles or ())
    home = ORACLE.shard_of(said.ids[0])
    without = replace(said, titles=[None, *titles[1:]])
    away = (Degraded(shard=home, code="unavailable", text=""),)
    assert kinds(question, replace(without, titles_missing=away)) == set()
    for wrong in (without, replace(said, titles=titles[::-1]), replace(said, titles=titles[1:])):
        assert kinds(question, wrong) == {FindingKind.WRONG}
    assert kinds(question, replace(said, titles=["x", *titles[1:]], titles_missing=away)) == {
        FindingKind.WRONG
    }
