"""Successive halving as arithmetic: rungs, who goes on, and what a bracket costs. Pure.

A bracket is a set of trials. All of them are trained to the first rung, some epochs; the best third
goes on from there to the next rung, and so on; the last rung is a trial's own last epoch. Jamieson
& Talwalkar 2016 (arXiv 1502.07943), section 3; several brackets as in Hyperband, Li et al. 2018
(arXiv 1603.06560), section 3.
"""

from collections.abc import Mapping

ETA = 3  # one of so many goes on, and is trained so many times as long
MAX_RUNGS = 3  # more would rank trials by a first epoch out of 27
FEWEST_TRIALS = 6  # of a first bracket, before its last rungs are left out for want of time
FEWEST_LATER_TRIALS = 3
MOST_TRIALS = 15


def rungs(epochs: int) -> tuple[int, ...]:
    """Epochs of the rungs of trials with so many epochs, ascending: 12 gives (1, 4, 12)."""
    fractions = (ETA**power for power in reversed(range(MAX_RUNGS)))
    return tuple(sorted({max(1, round(epochs / fraction)) for fraction in fractions}))


def bracket_epochs(size: int, ladder: tuple[int, ...]) -> int:
    """Epochs that a bracket of ``size`` trials trains in all."""
    total, before = 0, 0
    for epochs in ladder:
        total += size * (epochs - before)
        size, before = promoted(size), epochs
    return total


def promoted(size: int) -> int:
    """How many of ``size`` trials go on."""
    return -(-size // ETA)


def survivors(values: Mapping[int, float]) -> list[int]:
    """The numbers of the trials that go on, ascending: the best; of equal ones the lower number."""
    best = sorted(values, key=lambda number: (-values[number], number))
    return sorted(best[: promoted(len(values))])


def plan(
    affordable: float, ladder: tuple[int, ...], *, first: bool
) -> tuple[int, tuple[int, ...]] | None:
    """(size, rungs) of the next bracket, None where there is time for none.

    affordable: epochs. The first bracket takes half of them where that holds FEWEST_TRIALS, so that
    a second one can combine what the first has found. Where not even all hold so many trials up to
    the last rung, the last rungs are left out, then the trials.
    """
    fewest = FEWEST_TRIALS if first else FEWEST_LATER_TRIALS
    for share in (0.5, 1.0) if first else (1.0,):
        size = _largest(share * affordable, ladder)
        if size >= fewest:
            return size, ladder
    for top in range(len(ladder) - 1, 0, -1):
        size = _largest(affordable, ladder[:top])
        if size >= fewest:
            return size, ladder[:top]
    size = _largest(affordable, ladder[:1])
    return (size, ladder[:1]) if size >= 2 else None


def _largest(affordable: float, ladder: tuple[int, ...]) -> int:
    sizes = [n for n in range(1, MOST_TRIALS + 1) if bracket_epochs(n, ladder) <= affordable]
    return sizes[-1] if sizes else 0
