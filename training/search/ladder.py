"""Successive halving as arithmetic: rungs, who goes on, and what a bracket costs. Pure.

A bracket is a set of trials. All of them are trained to the first rung, some epochs; the best third
goes on from there to the next rung, and so on; the last rung is a trial's own last epoch. The base
goes on in any case, so that what is chosen is compared with it at every rung. Jamieson & Talwalkar
2016 (arXiv 1502.07943), section 3; several brackets as in Hyperband, Li et al. 2018 (arXiv
1603.06560), section 3.
"""

from collections.abc import Mapping

ETA = 3  # one of so many goes on, and is trained so many times as long
MAX_RUNGS = 3  # more would rank trials by a first epoch out of 27
FEWEST_TRIALS = 6  # of a first bracket, before its last rung is left out for want of time
FEWEST_LATER_TRIALS = 3
MOST_TRIALS = 15


def rungs(epochs: int, least: int = 1) -> tuple[int, ...]:
    """Epochs of the rungs of trials with so many epochs, ascending: 12 gives (1, 4, 12).

    least: no trial is judged by fewer epochs, unless it has no more.
    """
    fractions = (ETA**power for power in range(MAX_RUNGS))
    return tuple(sorted({min(epochs, max(least, round(epochs / part))) for part in fractions}))


def bracket_epochs(size: int, ladder: tuple[int, ...], kept: int = 0) -> int:
    """Epochs that a bracket of ``size`` trials trains in all, at most.

    kept: trials that go on in any case.
    """
    total, before, going = 0, 0, size
    for epochs in ladder:
        total += min(size, going + kept) * (epochs - before)
        going, before = promoted(min(size, going + kept)), epochs
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

    affordable: epochs. The first bracket, whose base is kept, takes half of them where that holds
    FEWEST_TRIALS, so that a second one can combine what the first has found. Where not even all
    hold so many trials, the last of three rungs is left out, then trials.
    """
    fewest, kept = (FEWEST_TRIALS, 1) if first else (FEWEST_LATER_TRIALS, 0)
    short = ladder[:-1] if len(ladder) == MAX_RUNGS else ladder
    options = [(1.0, ladder), (1.0, short)]
    for share, taken in [(0.5, ladder), *options] if first else options:
        size = _largest(share * affordable, taken, kept)
        if size >= fewest:
            return size, taken
    size = _largest(affordable, short, kept)
    return (size, short) if size >= 2 else None


def _largest(affordable: float, ladder: tuple[int, ...], kept: int) -> int:
    """The most trials, up to MOST_TRIALS, whose bracket costs no more than ``affordable``."""
    sizes = range(1, MOST_TRIALS + 1)
    return max((n for n in sizes if bracket_epochs(n, ladder, kept) <= affordable), default=0)
