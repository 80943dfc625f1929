"""The chaos test's judge of written items takes what may be found, and tells what may not."""

from dataclasses import replace

import numpy as np
import pytest

from shardline.bench.journal import ABSENT, Version, Versions, Write, vectors_of
from shardline.router.contract import Coverage, Degraded
from shardline.shards.core.schema import FloatArray
from tests.chaos.corpus import in_space
from tests.chaos.oracle import Corpus, FindingKind, Oracle, Said
from tests.chaos.written import WRITTEN_DIM, Asked, written_faults

ROWS = (10, 10)
BUILT, NEW, GONE = 4, 5, 15  # of shards 0, 0 and 1
IDS = np.delete(np.arange(21, dtype=np.int64), NEW)


def write(number: int, item: int, *, is_upsert: bool = True) -> Write:
    return Write(writer=0, number=number, items=[item], is_upsert=is_upsert, floor={})


def vectors(made: Write) -> FloatArray:
    return in_space(vectors_of(3, made, WRITTEN_DIM))


BEFORE = {
    BUILT: Version("the build", vectors(write(90, BUILT))[0], f"item {BUILT}"),
    NEW: ABSENT,
    GONE: Version("the build", vectors(write(91, GONE))[0], f"item {GONE}"),
}
ORACLE = Oracle(
    Corpus(
        vectors=np.zeros((20, 64), np.float32),
        ids=IDS,
        users=np.zeros((1, 64), np.float32),
        rows=ROWS,
        generation=2,
        model_version="m1",
        owned=(BEFORE,),
    )
)


class State:
    """BUILT was replaced, NEW was added, GONE was deleted: all acknowledged."""

    def __init__(self) -> None:
        self.versions = Versions(BEFORE)
        self.done = [write(1, BUILT), write(2, NEW), write(3, GONE, is_upsert=False)]
        for each in self.done:
            self.send(each)
            self.versions.acknowledge(each)
        self.asked = Asked(
            item=BUILT, vector=vectors(self.done[0])[0], moment=self.versions.moment()
        )

    def send(self, made: Write) -> None:
        self.versions.send(made, vectors(made), made.title)

    def said(self, *writes: Write, missing: tuple[int, ...] = ()) -> Said:
        """An answer with the items as those writes made them."""
        scores = [float(self.asked.vector @ vectors(each)[0]) for each in writes]
        order = np.argsort(scores)[::-1]
        answered = [shard for shard in (0, 1) if shard not in missing]
        coverage = Coverage(
            shards_asked=2,
            shards_answered=len(answered),
            rows_asked=20,
            rows_answered=sum((11, 9)[shard] for shard in answered),
            degraded=tuple(Degraded(shard=s, code="unavailable", text="") for s in missing),
        )
        return Said(
            ids=[*(writes[at].items[0] for at in order), 0],
            scores=[*(scores[at] for at in order), 0.0],
            titles=[*(writes[at].title(writes[at].items[0]) for at in order), "item 0"],
            generation=2,
            model_version="m1",
            coverage=coverage,
        )

    def faults(self, said: Said) -> list[FindingKind]:
        return [
            each.kind for each in written_faults(ORACLE, self.versions, self.asked, said, at_s=1.0)
        ]


def test_what_is_acknowledged_is_right() -> None:
    state = State()
    assert state.faults(state.said(*state.done[:2])) == []
    assert state.faults(state.said(*state.done[:2], missing=(1,))) == []
    assert state.faults(state.said(missing=(0,))) == []


@pytest.mark.parametrize("later", [write(4, BUILT), write(4, BUILT, is_upsert=False)])
def test_a_write_under_way_may_be_found_or_not(later: Write) -> None:
    state = State()
    state.send(later)
    assert state.faults(state.said(*state.done[:2])) == []
    after = [later] if later.is_upsert else []
    assert state.faults(state.said(state.done[1], *after)) == []
    state.versions.acknowledge(later)
    assert state.faults(state.said(*state.done[:2])) == [], "the reader began before"
    state.asked = replace(state.asked, moment=state.versions.moment())
    assert state.faults(state.said(*state.done[:2])) == [FindingKind.WRITES]


def test_the_title_may_be_of_a_later_version_than_the_score_and_not_of_an_earlier_one() -> None:
    state = State()
    built, new, _ = state.done
    state.send(write(4, BUILT))
    state.send(write(5, BUILT, is_upsert=False))
    said = state.said(built, new)
    at = list(said.ids).index(BUILT)

    def titled(said: Said, title: str | None) -> list[FindingKind]:
        titles = list(said.titles or ())
        titles[list(said.ids).index(BUILT)] = title
        return state.faults(replace(said, titles=titles))

    for title in (built.title(BUILT), write(4, BUILT).title(BUILT), None):
        assert titled(said, title) == []
    later = state.said(write(4, BUILT), new)
    assert titled(later, built.title(BUILT)) == [FindingKind.WRITES]
    assert titled(said, write(90, BUILT).title(BUILT)) == [FindingKind.WRITES]
    shuffled = [*said.scores[:at], said.scores[at] - 0.01, *said.scores[at + 1 :]]
    assert FindingKind.WRITES in state.faults(replace(said, scores=shuffled))


def test_what_is_lost_or_comes_back_is_told() -> None:
    state = State()
    built, new, gone = state.done
    assert state.faults(state.said(new)) == [FindingKind.WRITES]
    assert state.faults(state.said(built, new, gone)) == [FindingKind.WRITES]
    old = write(90, BUILT)
    assert state.faults(state.said(old, new)) == [FindingKind.WRITES], "an older version"
    assert state.faults(state.said(built, new, missing=(0,))) == [FindingKind.WRITES] * 2


def test_other_faults_of_an_answer_are_told() -> None:
    state = State()
    right = state.said(*state.done[:2])
    other = replace(right, generation=3)
    assert state.faults(other) == [FindingKind.WRITES]
    twice = replace(right, ids=[right.ids[0], right.ids[0], *right.ids[2:]])
    assert FindingKind.WRITES in state.faults(twice)
    turned = replace(right, scores=right.scores[::-1])
    assert FindingKind.WRITES in state.faults(turned)
    fewer = replace(right.coverage, rows_answered=15)
    assert state.faults(replace(right, coverage=fewer)) == [FindingKind.UNTRUTHFUL]
    stranger = replace(right, scores=[*right.scores[:-1], 0.01])
    assert state.faults(stranger) == [FindingKind.WRITES]
    swapped = [right.titles[1], right.titles[0], *right.titles[2:]] if right.titles else None
    assert state.faults(replace(right, titles=swapped)) == [FindingKind.WRITES] * 2
