"""Which faults, in which order, with which numbers: all from one seed. Pure.

Rounds: each round has every kind once, in random order, so that a long run has each several times.
From the second round on some faults come two at once.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TWO_AT_ONCE = 0.2  # share of steps
PAUSE_S = (0.5, 2.0)  # of quiet before a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What to do next: names of one fault or of two at once, a seed for each, quiet before."""

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    pause_s: float


def steps(seed: int, names: Sequence[str]) -> Iterator[Step]:
    """Without end; the same for the same seed and names.

    Raises:
        ValueError: there are no names.
    """
    if not names:
        raise ValueError("no kinds of fault")
    rng = random.Random(seed)
    is_first = True
    while True:
        order = rng.sample(list(names), len(names))
        while order:
            is_double = not is_first and len(order) > 1 and rng.random() < TWO_AT_ONCE
            chosen = [order.pop() for _ in range(1 + is_double)]
            yield Step(
                names=tuple(chosen),
                seeds=tuple(rng.randrange(1 << 32) for _ in chosen),
                pause_s=rng.uniform(*PAUSE_S),
            )
        is_first = False
