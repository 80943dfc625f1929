"""What each choice was worth: effects of an additive model of the trials' recalls.

All trials of a search are trained to their bracket's first rung, so they are compared there: the
recall of a trial is the base's plus the effects of its changes, fitted by least squares with a
small ridge, without which choices that always came together would have no single answer. Pure
numpy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardline.training.search.choices import Changes

RIDGE = 0.1  # of one trial's weight: a choice tried once has 1/1.1 of its difference


@dataclass(frozen=True, slots=True)
class Worth:
    """A choice: how many trials made it, and recall that it added to theirs, or took away."""

    setting: str
    label: str
    trials: int
    effect: float


def worths(trials: Sequence[tuple[Changes, float]]) -> list[Worth]:
    """Effects, highest first, from (changes, recall at the first rung) of each trial.

    The base must be one of the trials: its recall is what effects are added to.
    """
    base = next(value for changes, value in trials if not changes)
    names = sorted({choice for changes, _ in trials for choice in changes.items()})
    if not names:
        return []
    made = np.array([[changes.get(s) == label for s, label in names] for changes, _ in trials])
    design = made.astype(np.float64)
    gains = np.array([value - base for _, value in trials])
    gram = design.T @ design + RIDGE * np.eye(len(names))
    effects = np.linalg.solve(gram, design.T @ gains)
    counts = made.sum(axis=0)
    found = [
        Worth(setting, label, int(count), float(effect))
        for (setting, label), count, effect in zip(names, counts, effects, strict=True)
    ]
    return sorted(found, key=lambda worth: (-worth.effect, worth.setting, worth.label))


def best_together(found: Sequence[Worth]) -> dict[str, str]:
    """Of every setting the choice with the highest effect, where that is above 0."""
    chosen: dict[str, str] = {}
    for worth in found:
        if worth.effect > 0:
            chosen.setdefault(worth.setting, worth.label)
    return chosen


def as_key(changes: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """Equal for the same changes in any order."""
    return frozenset(changes.items())
