"""What an answer must have of written items: every one, in a version that it may have then. Pure.

Written items lie in dimensions of their own, where all coordinates are >= 0 and those of the rest
of the corpus 0. So a query in there finds them before all others, and no query elsewhere finds any.
"""

from dataclasses import dataclass

import numpy as np

from shardline.bench.journal import Moment, Version, Versions
from shardline.shards.core.schema import FloatArray
from tests.chaos.oracle import ATOL, RTOL, Corpus, Finding, FindingKind, Oracle, Said

WRITTEN_DIM = 16  # the last of the dimensions
SPARE = 5  # results beyond the written items: of the rest of the corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A query by a vector (dim,) that ``item`` had; moment: what was acknowledged before."""

    item: int
    vector: FloatArray
    moment: Moment

    def k_for(self, corpus: Corpus) -> int:
        """Room for all written items, and some others."""
        return sum(map(len, corpus.owned)) + SPARE


def written_faults(
    oracle: Oracle, versions: Versions, asked: Asked, said: Said, at_s: float
) -> list[Finding]:
    """Everything that is wrong with an answer that asked for all that was acknowledged."""
    texts = [*oracle.identity(said), *_order(said)]
    if len(said.ids) == len(said.scores):
        texts += _items(oracle, versions, asked, said)
    untruthful = [
        Finding(kind=FindingKind.UNTRUTHFUL, text=text, at_s=at_s) for text in oracle.coverage(said)
    ]
    wrong = [Finding(kind=FindingKind.WRITES, text=f"reader: {t}", at_s=at_s) for t in texts]
    return untruthful + wrong


def _order(said: Said) -> list[str]:
    if len(said.ids) != len(said.scores):
        return [f"{len(said.ids)} ids, {len(said.scores)} scores"]
    texts = []
    if len(set(said.ids)) != len(said.ids):
        texts.append("an id comes twice")
    keys = [(-score, item) for score, item in zip(said.scores, said.ids, strict=True)]
    if keys != sorted(keys):
        texts.append("not in the order of score, then id")
    return texts


def _items(oracle: Oracle, versions: Versions, asked: Asked, said: Said) -> list[str]:
    answered = set(oracle.answered(said))
    titles = said.titles if said.titles is not None else [None] * len(said.ids)
    excused = {each.shard for each in said.titles_missing}
    found = dict(zip(said.ids, zip(said.scores, titles, strict=True), strict=True))
    texts = []
    for item in asked.moment:
        shard = oracle.shard_of(item)
        allowed = versions.since(item, asked.moment)
        if item not in found:
            if shard in answered and not any(version.is_deleted for version in allowed):
                texts.append(f"item {item} is acknowledged as {_named(allowed)} and not found")
            continue
        score, title = found.pop(item)
        if shard not in answered:
            texts.append(f"item {item} of shard {shard}, which did not answer")
        if all(version.is_deleted for version in allowed):
            texts.append(f"item {item} is deleted by {_named(allowed)}, and found as {title!r}")
        elif not _fits(asked, allowed, score, title, is_excused=shard in excused):
            texts.append(
                f"item {item} must be as of {_named(allowed)}, and is {title!r} with {score}"
            )
    strangers = [item for item, (score, _) in found.items() if abs(score) > ATOL]
    if strangers:
        texts.append(f"items {strangers[:5]} that have no place near written ones")
    return texts


def _fits(
    asked: Asked, allowed: list[Version], score: float, title: str | None, *, is_excused: bool
) -> bool:
    """The score is of one of the versions; the title, which is fetched after the search, of the
    same or a later one, and None where that is a delete."""
    for place, version in enumerate(allowed):
        if version.vector is not None and _is_score(asked, version.vector, score):
            later = {each.title for each in allowed[place:]}
            return title in later or (title is None and is_excused)
    return False


def _is_score(asked: Asked, vector: FloatArray, score: float) -> bool:
    exact = float(asked.vector.astype(np.float64) @ vector.astype(np.float64))
    return bool(np.isclose(score, exact, rtol=RTOL, atol=ATOL))


def _named(versions: list[Version]) -> str:
    return " or ".join(version.write for version in versions)
