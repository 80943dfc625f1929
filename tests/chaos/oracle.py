"""What a right answer is: exact scores over exactly the rows of the shards that an answer names.

Pure numpy in float64, nothing shared with the engine. Two ways to be at fault: an answer that is
wrong (items, scores, order, titles, generation), and a coverage that does not say the truth (counts
and named shards do not fit together). Which shards answered is taken from the coverage, so a
coverage that hides a missing shard shows as a wrong answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardline.bench.journal import Version
from shardline.router.contract import Coverage, Degraded, Reason, ReasonCode

RTOL, ATOL = 1e-5, 2e-6  # float32 products of 64 dimensions against float64
TITLE = "title"  # the one attribute of the corpus: see ``title_of``


class QueryKind(StrEnum):
    VECTORS = "vectors"
    ITEM_IDS = "item_ids"
    FEATURES = "features"


class FindingKind(StrEnum):
    WRONG = "wrong answer"
    UNTRUTHFUL = "untruthful coverage"
    ERROR = "unexpected error"
    PARTIAL = "unexpected partial answer"
    SLOW = "held too long"
    NOT_WHOLE = "not whole again"
    LEAK = "leak"
    HOSTILE = "hostile client got the wrong answer"
    WRITES = "a write lost, returned or mistaken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that must not be; at_s on the run's clock. during: the fault at that time."""

    kind: FindingKind
    text: str
    at_s: float = 0.0
    during: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One query: a vector (dim,), an item's id or a user's, and whether titles are wanted."""

    kind: QueryKind
    value: Any
    k: int
    titled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An answer to one query, whatever the format it came in: live results only, best first."""

    ids: Sequence[int]
    scores: Sequence[float]
    generation: int
    model_version: str
    coverage: Coverage
    reasons: Sequence[Reason] = ()
    titles: Sequence[str | None] | None = None
    titles_missing: Sequence[Degraded] = ()


def title_of(item_id: int) -> str:
    """The title that the corpus gives an item."""
    return f"item {item_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """vectors (n, dim) float32 of unit length, ids (n,) ascending, users (u, dim) of unit length.

    rows: of each shard as it was built, in the order of the ids. owned: of each writer the items
    that it may write, as they were built; no question to ``Oracle.faults`` finds one of them.
    """

    vectors: NDArray[np.float32]
    ids: NDArray[np.int64]
    users: NDArray[np.float32]
    rows: tuple[int, ...]
    generation: int
    model_version: str
    owned: Sequence[Mapping[int, Version]] = ()


class Oracle:
    """Judges answers. Its methods only read, so threads may share it."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._vectors = corpus.vectors.astype(np.float64)
        self._shard_of_row = np.repeat(np.arange(len(corpus.rows)), corpus.rows)
        owned = {item: version for each in corpus.owned for item, version in each.items()}
        self._is_others = ~np.isin(corpus.ids, list(owned))
        self.asked_ids = corpus.ids[self._is_others]
        self._least, self._most = np.array(corpus.rows), np.array(corpus.rows)
        for item, version in owned.items():
            if version.is_deleted:
                self._most[self.shard_of(item)] += 1
            else:
                self._least[self.shard_of(item)] -= 1

    def faults(self, question: Question, said: Said) -> list[Finding]:
        """Everything that is wrong with an answer; none: it is right."""
        untruthful = [Finding(kind=FindingKind.UNTRUTHFUL, text=t) for t in self.coverage(said)]
        wrong = [Finding(kind=FindingKind.WRONG, text=t) for t in self._answer(question, said)]
        return untruthful + wrong

    def shard_of(self, item_id: int) -> int:
        """The shard that holds a known item, or one that lies between two of the same shard."""
        return int(self._shard_of_row[np.searchsorted(self.corpus.ids, item_id)])

    def answered(self, said: Said) -> list[int]:
        """The shards whose rows an answer says it saw."""
        missing = {each.shard for each in said.coverage.degraded}
        return [shard for shard in range(len(self.corpus.rows)) if shard not in missing]

    def coverage(self, said: Said) -> list[str]:
        """What is untrue of an answer's coverage."""
        coverage, rows = said.coverage, self.corpus.rows
        named = [each.shard for each in coverage.degraded]
        answered = self.answered(said)
        least, most = self._least, self._most
        expected = {
            "shards_asked": (len(rows), len(rows)),
            "rows_asked": (int(least.sum()), int(most.sum())),
            "shards_answered": (len(answered), len(answered)),
            "rows_answered": (int(least[answered].sum()), int(most[answered].sum())),
        }
        texts = [
            f"{name} is {getattr(coverage, name)}, with shards {sorted(named)} missing {value}"
            for name, value in expected.items()
            if not value[0] <= getattr(coverage, name) <= value[1]
        ]
        if len(set(named)) != len(named) or not set(named) <= set(range(len(rows))):
            texts.append(f"missing shards {named} of {len(rows)}")
        texts += [
            f"shard {d.shard} is missing without a code" for d in coverage.degraded if not d.code
        ]
        return texts

    def identity(self, said: Said) -> list[str]:
        """Whether an answer is of another generation or model."""
        live = self.corpus.generation, self.corpus.model_version
        if (said.generation, said.model_version) == live:
            return []
        return [f"generation {said.generation}, model {said.model_version}"]

    def _answer(self, question: Question, said: Said) -> list[str]:
        texts = self.identity(said)
        if len(said.ids) != len(said.scores):
            return [*texts, f"{len(said.ids)} ids, {len(said.scores)} scores"]
        is_partial = self._is_short_of_shards(question, said)
        if said.reasons and not is_partial:
            return texts + self._not_found(question, said)
        texts += self._results(question, said)
        if question.titled:
            texts += self._titles(said)
        return texts

    def _is_short_of_shards(self, question: Question, said: Said) -> bool:
        """Whether the reasons say, truly, that a missing shard is why there are few results."""
        codes = [each.code for each in said.reasons]
        is_short = 0 < len(said.ids) < question.k
        return codes == [ReasonCode.COVERAGE] and is_short and bool(said.coverage.degraded)

    def _not_found(self, question: Question, said: Said) -> list[str]:
        """An item is known, so the one reason not to find it is that its shard is missing."""
        if question.kind is not QueryKind.ITEM_IDS:
            return [f"reasons for {question.kind}: {said.reasons}"]
        (reason, *more) = said.reasons
        home = self.shard_of(question.value)
        texts = []
        if more or reason.query != 0 or reason.code != ReasonCode.NOT_FOUND_PARTIAL:
            texts.append(f"reasons {said.reasons} for a known item")
        if home in self.answered(said):
            texts.append(f"item {question.value} not found, though its shard {home} answered")
        if len(said.ids):
            texts.append(f"{len(said.ids)} results of an item that was not found")
        return texts

    def _results(self, question: Question, said: Said) -> list[str]:
        corpus = self.corpus
        allowed = self._is_others & np.isin(self._shard_of_row, self.answered(said))
        if question.kind is QueryKind.ITEM_IDS:
            allowed &= corpus.ids != question.value
        ids, scores = (
            np.asarray(said.ids, dtype=np.int64),
            np.asarray(said.scores, dtype=np.float64),
        )
        count = min(question.k, int(allowed.sum()))
        if len(ids) != count:
            return [f"{len(ids)} results, expected {count}"]
        texts = []
        if len(set(ids.tolist())) != count:
            texts.append("an id comes twice")
        keys = list(zip((-scores).tolist(), ids.tolist(), strict=True))
        if keys != sorted(keys):
            texts.append("not in the order of score, then id")
        rows = np.searchsorted(corpus.ids, ids).clip(max=len(corpus.ids) - 1)
        if not (corpus.ids[rows] == ids).all():
            return [*texts, f"unknown ids {ids[corpus.ids[rows] != ids][:5].tolist()}"]
        if not allowed[rows].all():
            strange = ids[~allowed[rows]][:5].tolist()
            texts.append(f"ids of shards that did not answer, or of writers: {strange}")
        exact = self._vectors @ self._query(question)
        if not np.allclose(scores, exact[rows], rtol=RTOL, atol=ATOL):
            texts.append("scores that are not those of the items")
        best = np.sort(np.partition(exact[allowed], -count)[-count:])[::-1] if count else exact[:0]
        if not np.allclose(scores, best, rtol=RTOL, atol=ATOL):
            at = int(np.flatnonzero(~np.isclose(scores, best, rtol=RTOL, atol=ATOL))[0])
            texts.append(f"not the best: result {at} scores {scores[at]}, expected {best[at]}")
        return texts

    def _query(self, question: Question) -> NDArray[np.float64]:
        if question.kind is QueryKind.ITEM_IDS:
            return self._vectors[np.searchsorted(self.corpus.ids, question.value)]
        if question.kind is QueryKind.FEATURES:
            return self.corpus.users[question.value].astype(np.float64)
        vector = np.asarray(question.value, dtype=np.float64)
        return vector / np.linalg.norm(vector)

    def _titles(self, said: Said) -> list[str]:
        if said.titles is None or len(said.titles) != len(said.ids):
            return [f"titles {said.titles}"]
        excused = {each.shard for each in said.titles_missing}
        return [
            f"item {item} has the title {title!r}"
            for item, title in zip(said.ids, said.titles, strict=True)
            if title != title_of(item) and not (title is None and self.shard_of(item) in excused)
        ]
