"""Which errors and partial answers a fault may cause, and for how long. Pure; no clock is read.

Every outcome of an honest request is judged against the windows of the faults: from a fault's
beginning until the cluster was whole again. Outside of them no error and no partial answer may be.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shardline.router.written import WriteKind
from tests.chaos.oracle import Finding, FindingKind, QueryKind

OK = "ok"
# codes of our own, for what never became an answer of the API
CONNECTION = "connection"  # refused, reset, or ended before the answer was complete
TIMED_OUT = "timed_out"  # no answer within the client's own time
FOREIGN = "not problem+json"  # an error page that is not of this API
UNTIMED = "no Retry-After"  # where one belongs
OVERLOADED = "overloaded"
UNAVAILABLE = "unavailable"
DEADLINE = "deadline_exceeded"
GONE = frozenset({UNAVAILABLE, CONNECTION})

ANSWER_WITHIN_S = 5.0  # a request asks for 2 s; the rest is a busy machine
NO_FAULT = "no fault"
GRACE_S = 0.3  # an outcome that was under way when the cluster counted as whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a fault may cost callers.

    errors: codes that requests may fail with, if they began within errors_for_s of its end.
    kinds: of queries that may fail. partial: whether rows may be missing; partial_for: if only for
    these codes. writes: codes that writes may fail with until the cluster is whole. whole_within_s
    is counted from the fault's end, too; a kill ends as it begins. answer_within_s: no request
    takes longer.
    """

    whole_within_s: float
    errors: frozenset[str] = frozenset()
    errors_for_s: float = math.inf
    kinds: frozenset[QueryKind] = frozenset(QueryKind)
    partial: bool = False
    partial_for: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()
    answer_within_s: float = ANSWER_WITHIN_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One fault that was done: began, its cause gone, whole again; inf: never. Seconds."""

    name: str
    allowance: Allowance
    began_s: float
    undone_s: float
    whole_s: float = math.inf

    def overlaps(self, outcome: "Outcome") -> bool:
        return outcome.ended_s >= self.began_s and outcome.began_s <= self.whole_s + GRACE_S

    def permits(self, outcome: "Outcome") -> bool:
        """Whether this fault explains an error or a partial answer."""
        if not self.overlaps(outcome):
            return False
        if outcome.code == OK:
            excused = bool(outcome.reasons) and outcome.reasons <= self.allowance.partial_for
            return self.allowance.partial or excused
        if outcome.is_write:
            return outcome.code in self.allowance.writes
        return (
            outcome.code in self.allowance.errors
            and outcome.kind in self.allowance.kinds
            and outcome.began_s <= self.undone_s + self.allowance.errors_for_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request. code: OK, an error's code, or one of those above.

    missing: shards named as missing by an answer, reasons: their codes. repeats: its client tries
    again by itself, so that the time it took says little.
    """

    asker: str
    kind: QueryKind | WriteKind
    began_s: float
    ended_s: float
    code: str = OK
    missing: tuple[int, ...] = ()
    reasons: frozenset[str] = frozenset()
    text: str = ""
    repeats: bool = False

    @property
    def is_write(self) -> bool:
        return isinstance(self.kind, WriteKind)

    @property
    def is_full(self) -> bool:
        return self.code == OK and not self.missing


def unexpected(outcomes: Iterable[Outcome], windows: Sequence[Window]) -> list[Finding]:
    """The outcomes that no fault explains."""
    found = []
    for outcome in outcomes:
        took_s = outcome.ended_s - outcome.began_s
        patience = max(
            (w.allowance.answer_within_s for w in windows if w.overlaps(outcome)),
            default=ANSWER_WITHIN_S,
        )
        if took_s > patience and not outcome.repeats:
            text = f"{_named(outcome)} took {took_s:.1f} s, allowed {patience:.1f}"
            found.append(_finding(FindingKind.SLOW, outcome, windows, text))
        if outcome.is_full or any(window.permits(outcome) for window in windows):
            continue
        kind = FindingKind.PARTIAL if outcome.code == OK else FindingKind.ERROR
        found.append(_finding(kind, outcome, windows, _named(outcome)))
    return found


def not_whole(windows: Iterable[Window]) -> list[Finding]:
    """The faults that lasted longer than they may."""
    return [
        Finding(
            kind=FindingKind.NOT_WHOLE,
            text=f"{w.name}: whole after {w.whole_s - w.undone_s:.1f} s, "
            f"allowed {w.allowance.whole_within_s:g}",
            at_s=w.began_s,
            during=w.name,
        )
        for w in windows
        if w.whole_s - w.undone_s > w.allowance.whole_within_s
    ]


def placed(finding: Finding, windows: Iterable[Window]) -> Finding:
    """With the faults of its time, where it does not name one."""
    during = [w.name for w in windows if w.began_s <= finding.at_s <= w.whole_s]
    return finding if finding.during else replace(finding, during=" and ".join(during))


def _named(outcome: Outcome) -> str:
    what = f"without shards {outcome.missing}" if outcome.code == OK else outcome.code
    return f"{outcome.asker} {outcome.kind}: {what} {outcome.text}".rstrip()


def _finding(kind: FindingKind, outcome: Outcome, windows: Sequence[Window], text: str) -> Finding:
    during = [w for w in windows if w.overlaps(outcome)]
    when = [
        f"{outcome.began_s - w.began_s:.1f} s after it began, "
        f"{outcome.began_s - w.undone_s:+.1f} s from its end"
        for w in during
    ] or [_since(outcome, windows)]
    return Finding(
        kind=kind,
        text=f"{text} ({'; '.join(when)})",
        at_s=outcome.began_s,
        during=" and ".join(w.name for w in during) or NO_FAULT,
    )


def _since(outcome: Outcome, windows: Sequence[Window]) -> str:
    before = [w for w in windows if w.began_s <= outcome.began_s]
    if not before:
        return "before any fault"
    last = max(before, key=lambda w: w.began_s)
    return f"{outcome.began_s - last.whole_s:.1f} s after {last.name} was over"
