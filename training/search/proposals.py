"""Which candidates a bracket tries: changes of one setting first, then of what has paid. Pure.

Every draw comes from the seed and the bracket's number: a search that goes on proposes what it
would have.
"""

from collections.abc import Sequence

import numpy as np

from shardline.training.search.choices import Changes, SearchSpace
from shardline.training.search.worth import Worth, as_key, best_together

TRIES = 50  # random candidates per free place before a space is taken to be used up


def first_candidates(space: SearchSpace, size: int, seed: int) -> list[dict[str, str]]:
    """The base, then one change each: a random value of every setting, before a second of any."""
    rng = np.random.default_rng([seed, 0])
    shuffled = {s: rng.permutation(labels).tolist() for s, labels in space.settings.items()}
    rounds = max(map(len, shuffled.values()), default=0)
    single = [
        {setting: labels[place]}
        for place in range(rounds)
        for setting, labels in shuffled.items()
        if place < len(labels)
    ]
    return [{}, *single][:size]


def next_candidates(
    space: SearchSpace,
    size: int,
    *,
    seed: int,
    bracket: int,
    tried: Sequence[Changes],
    incumbent: Changes,
    found: Sequence[Worth],
) -> list[dict[str, str]]:
    """Up to ``size`` that were not tried: what paid all together, what paid added to the incumbent
    one at a time, then the incumbent with one or two settings drawn anew.
    """
    seen = {as_key(changes) for changes in tried}
    out: list[dict[str, str]] = []

    def offer(changes: dict[str, str]) -> None:
        key = as_key(changes)
        if len(out) < size and key not in seen and space.config(changes) is not None:
            seen.add(key)
            out.append(changes)

    offer(best_together(found))
    offer({**best_together(found), **incumbent})
    for worth in found:
        # half of the places stay for values that no trial has had
        if worth.effect > 0 and worth.setting not in incumbent and len(out) < -(-size // 2):
            offer({**incumbent, worth.setting: worth.label})
    rng = np.random.default_rng([seed, bracket])
    settings = list(space.settings)
    for _ in range(TRIES * size if settings else 0):
        changes = dict(incumbent)
        for setting in rng.permutation(settings)[: rng.integers(1, 3)].tolist():
            labels = space.settings[setting]
            # one more value than labels: back to the base's own
            label = [*labels, None][rng.integers(len(labels) + 1)]
            changes.pop(setting, None)
            if label is not None:
                changes[setting] = label
        offer(changes)
    return out
