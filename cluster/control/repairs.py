"""Which repair an index needs, from what routers and shards have found. Pure.

compaction_fails  a shard cannot make, or cannot use, a newer main index
compact         too many rows of a shard are outside its main index: searches slow down
retrain_index   recall has fallen, or inverted lists have become uneven: the template was
                trained on other vectors than those of today
retrain_model   most items came after the model was trained
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum

from shardline.cluster.control.quality_config import QualityConfig
from shardline.shards.core.messages import Absence, Quality, ShardHealth

NAMED = 4  # shards that a text names


class Repair(StrEnum):
    """What is to be done; the code of an ``Absence``."""

    COMPACTION_FAILS = "compaction_fails"
    COMPACT = "compact"
    RETRAIN_INDEX = "retrain_index"
    RETRAIN_MODEL = "retrain_model"


TO_DO = {
    Repair.COMPACTION_FAILS: "searches and writes go on, and it is tried again: see to the store, "
    "which `shardline doctor` verifies",
    Repair.COMPACT: "compaction does not keep up: `status` and the shard's log say whether it "
    "fails; else write more slowly, or give the host more cores",
    Repair.RETRAIN_INDEX: "train the index on today's items: `shardline build --from-live`, then "
    "`shardline publish`",
    Repair.RETRAIN_MODEL: "train the model on today's items: `shardline train`, `export`, `build`, "
    "then `shardline publish`",
}


def repairs_due(
    config: QualityConfig, quality: Quality | None, shards: Mapping[int, ShardHealth]
) -> tuple[Absence, ...]:
    """What is due, most urgent first, each with the figure, its bound and what to do.

    quality: of the live generation, over all routers. shards: by number, those that are known.
    """
    due: list[Absence] = []
    failing = {number: each.trouble for number, each in shards.items() if each.trouble is not None}
    if failing:
        texts = [f"shard {number}: {failing[number]}" for number in sorted(failing)[:NAMED]]
        due.append(_due(Repair.COMPACTION_FAILS, "; ".join(texts)))
    changed = {
        number: health.changed / max(1, health.rows)
        for number, health in shards.items()
        if health.changed > config.max_changed_share * max(1, health.rows)
    }
    if changed:
        figure = f"{max(changed.values()):.0%} of the rows of {_named(changed)} have changed since"
        bound = f"{config.max_changed_share:.0%}"
        due.append(_due(Repair.COMPACT, f"{figure} the last compaction, bound {bound}"))
    reasons = [*_low_recall(config, quality), *_uneven(config, shards)]
    if reasons:
        due.append(_due(Repair.RETRAIN_INDEX, "; ".join(reasons)))
    rows = sum(health.rows for health in shards.values())
    unseen = sum(health.unseen for health in shards.values())
    if unseen > config.max_unseen_share * rows:
        figure = f"{unseen / max(1, rows):.0%} of the items came after the generation was built"
        due.append(_due(Repair.RETRAIN_MODEL, f"{figure}, bound {config.max_unseen_share:.0%}"))
    return tuple(due)


def together(of_routers: Iterable[Quality]) -> Quality | None:
    """What routers have found of one generation, as one figure; None: nothing."""
    found = list(of_routers)
    queries = sum(each.queries for each in found)
    if not queries:
        return None
    return Quality(
        generation=found[0].generation,
        recall=sum(each.recall * each.queries for each in found) / queries,
        queries=queries,
        k=max(found, key=lambda each: each.queries).k,
        since=min(each.since for each in found),
    )


def _low_recall(config: QualityConfig, quality: Quality | None) -> Iterable[str]:
    if quality is None or quality.queries < config.min_queries:
        return
    if quality.recall < config.min_recall:
        figure = f"recall@{quality.k} of {quality.queries} served queries is {quality.recall:.3f}"
        yield f"{figure}, bound {config.min_recall:g}"


def _uneven(config: QualityConfig, shards: Mapping[int, ShardHealth]) -> Iterable[str]:
    uneven = {
        number: health.imbalance
        for number, health in shards.items()
        if health.imbalance is not None and health.imbalance > config.max_imbalance
    }
    if uneven:
        figure = f"the inverted lists of {_named(uneven)} are uneven: {max(uneven.values()):.1f}"
        yield f"{figure} times the work of even ones, bound {config.max_imbalance:g}"


def _named(shards: Iterable[int]) -> str:
    numbers = sorted(shards)
    names = ", ".join(map(str, numbers[:NAMED]))
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"shard {names}" if len(numbers) == 1 else f"shards {names}{more}"


def _due(repair: Repair, figure: str) -> Absence:
    return Absence(repair, f"{figure}; {TO_DO[repair]}")
