"""Runs the parts, most valuable first, each in a process of its own, within a budget of time.

A process of its own, because an assertion of faiss aborts the process, a CUDA error spoils it for
whatever comes after, and a part that is late can be ended. The parent never touches CUDA, which
does not survive a fork.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardline.bench.gpu import card_checks, search_parts
from shardline.bench.gpu.card import open_card
from shardline.bench.gpu.floors import Rates
from shardline.bench.gpu.part_findings import STOPPED, Findings, Work
from shardline.bench.gpu.part_outcome import Outcome, Status, load, save
from shardline.bench.gpu.shard_part import shard
from shardline.bench.gpu.sizes import FULL, TINY, Sizes
from shardline.bench.gpu.training_step import training_step
from shardline.shards.core.errors import ConfigError, InvalidInput, ShardlineError

MACHINE = "machine"
FAISS_WHEELS = ("faiss-gpu", "faiss-gpu-cuvs", "faiss-cpu")
LAST_LINE = 300  # characters of what a process said at its end


@dataclass(frozen=True, slots=True)
class Part:
    """``seconds``: what it is expected to take on a large card; not begun with less left."""

    name: str
    seconds: float
    measure: Callable[[Work, Findings], None] | None


# the machine's own rates first, because every floor is made of them; then by what it would cost
# not to know it, not by what it takes
PARTS = (
    Part(MACHINE, 15, None),
    Part("correctness", 25, card_checks.correctness),
    Part("limits", 15, card_checks.limits),
    Part("shard", 30, shard),
    Part("flat-10m", 15, partial(search_parts.flat, number=0)),
    Part("flat-100m", 40, partial(search_parts.flat, number=1)),
    Part("ivfpq-100m", 100, search_parts.pq_with_copies),
    Part("training-step", 15, training_step),
    Part("kinds-1m", 40, search_parts.kinds),
    Part("ivfpq-1b", 240, search_parts.billion),
)
NAMES = tuple(part.name for part in PARTS)


def chosen_parts(names: Sequence[str]) -> tuple[Part, ...]:
    """The parts of these names in the order of PARTS, the machine's always among them.

    Raises:
        InvalidInput: an unknown name.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise InvalidInput(
            "no such part", field="--parts", expected=", ".join(NAMES), got=", ".join(unknown)
        )
    return tuple(part for part in PARTS if part.name in names or part.name == MACHINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Seconds for all parts, by a clock that starts with the first."""

    seconds: float
    started: float
    clock: Callable[[], float] = time.monotonic

    def left(self) -> float:
        return self.seconds - (self.clock() - self.started)

    def refusal(self, part: Part, *, tiny: bool) -> str | None:
        """Why the part is not begun; None if there is time for it."""
        needed = min(part.seconds, 1.0) if tiny else part.seconds
        left = self.left()
        if needed <= left:
            return None
        return f"expected to take {needed:.0f} s; {max(left, 0):.0f} s of the budget are left"


def faiss_wheel(*, fake: bool) -> str:
    """The one faiss wheel that is installed, with its version.

    Raises:
        ConfigError: none, several (they overwrite each other's files), or not one for a card.
    """
    found = [f"{name} {number}" for name in FAISS_WHEELS if (number := _version(name))]
    wrong = len(found) != 1 or (not fake and found[0].startswith("faiss-cpu"))
    if wrong:
        raise ConfigError(
            "not the faiss that this needs",
            expected="exactly one of faiss-gpu, faiss-gpu-cuvs" + (", faiss-cpu" if fake else ""),
            got=", ".join(found) or "none",
            hint="install by constraints-gpu.txt into a fresh environment",
        )
    return found[0]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run(
    out: Path,
    parts: Sequence[Part],
    *,
    minutes: float,
    fake: bool,
    fresh: bool,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[Outcome]]:
    """(set-up, outcomes in the order of ``parts``); what an earlier run completed is taken over.

    Raises:
        ConfigError: not the faiss that this needs.
        DataError: ``out`` holds results of another set-up, or damaged ones.
    """
    sizes = TINY if fake else FULL
    setup: dict[str, Any] = {
        "fake": fake,
        "sizes": sizes.name,
        "torch": torch.__version__,
        "faiss": faiss_wheel(fake=fake),
        "numpy": np.__version__,
    }
    if fake:  # no CUDA that a fork would spoil, so not in every part anew
        import_module("faiss")
    folder = out / "parts"
    if fresh:
        _remove(folder)
    for part in parts:
        load(folder, part.name, setup)
    budget = Budget(seconds=60 * minutes, started=time.monotonic())
    outcomes: list[Outcome] = []
    rates: Rates | None = None
    for part in parts:
        earlier = load(folder, part.name, setup)
        if part.name != MACHINE and earlier is not None and earlier.is_complete:
            outcome = replace(earlier, reason="taken over from an earlier run")
        elif part.name != MACHINE and rates is None:
            outcome = _not_run(part, f"needs the part {MACHINE}")
        elif (reason := budget.refusal(part, tiny=fake)) is not None:
            outcome = earlier or _not_run(part, "")
            outcome = replace(outcome, reason=reason)
        else:
            outcome = _in_process(folder, part, sizes, setup, rates, budget)
            save(folder, outcome, setup)
        if part.name == MACHINE and outcome.is_complete:
            rates = Rates(**outcome.notes["rates"])
            setup["card"] = outcome.notes["card"]
        outcomes.append(outcome)
        say(f"{part.name:<14} {outcome.status} {outcome.seconds:.1f} s {outcome.reason}".rstrip())
    return setup, outcomes


def _not_run(part: Part, reason: str) -> Outcome:
    return Outcome(part=part.name, status=Status.NOT_RUN, reason=reason)


def _remove(folder: Path) -> None:
    """The results of an earlier run, and nothing else that lies there."""
    for name in NAMES:
        for suffix in ("json", "log"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def _in_process(
    folder: Path,
    part: Part,
    sizes: Sizes,
    setup: Mapping[str, Any],
    rates: Rates | None,
    budget: Budget,
) -> Outcome:
    """Runs a part in a child; ends it when the budget is over."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part.name}.json").unlink(missing_ok=True)
    started = time.monotonic()
    child = multiprocessing.get_context("fork").Process(
        target=_measure, args=(folder, part, sizes, setup, rates, budget)
    )
    child.start()
    child.join(budget.left())
    late = child.is_alive()
    if late:
        child.kill()
        child.join()
    found = load(folder, part.name, setup) or _not_run(part, STOPPED)
    if late:
        reason = "stopped when the budget was over; what it had found is kept"
        found = replace(found, status=Status.NOT_RUN, reason=reason)
    elif child.exitcode != 0:
        found = replace(found, status=Status.FAILED, reason=_end(child.exitcode, folder, part))
    return replace(found, seconds=round(time.monotonic() - started, 2))


def _end(code: int | None, folder: Path, part: Part) -> str:
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return f"its process ended by {how}: {_last_line(folder / f'{part.name}.log')}"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:LAST_LINE] for line in reversed(lines) if line), "it said nothing")


def _measure(
    folder: Path,
    part: Part,
    sizes: Sizes,
    setup: Mapping[str, Any],
    rates: Rates | None,
    budget: Budget,
) -> None:
    """The child: what it writes to stderr goes to PART.log, what it finds to PART.json."""
    log = (folder / f"{part.name}.log").open("w", buffering=1)  # as long as the process
    os.dup2(log.fileno(), 2)  # of faiss and CUDA
    sys.stderr = log  # of Python
    findings = Findings(part=part.name, keep=partial(_keep, folder, setup))
    try:
        with open_card(fake=setup["fake"]) as card:
            if part.measure is None or rates is None:
                findings.notes["card"] = card.name
                card_checks.machine(card, sizes, findings)
            else:
                work = Work(card=card, sizes=sizes, rates=rates, seconds_left=budget.left)
                part.measure(work, findings)
    except ShardlineError as error:
        save(folder, findings.outcome(Status.NOT_RUN, str(error)), setup)
    else:
        save(folder, findings.outcome(Status.RAN, ""), setup)


def _keep(folder: Path, setup: Mapping[str, Any], outcome: Outcome) -> None:
    save(folder, outcome, setup)


def passed(outcomes: Iterable[Outcome]) -> bool:
    """Whether nothing failed and no check found something else than expected."""
    return all(outcome.passed for outcome in outcomes)
