"""The chaos test's judge of errors, its schedule from a seed, and its table of durations."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from shardline.router.written import WriteKind
from tests.chaos.damage import FILE_KINDS, HURTS, flipped
from tests.chaos.durations import as_json, lasted, table
from tests.chaos.ends import END_KINDS
from tests.chaos.faults import PROCESS_KINDS
from tests.chaos.hostile import HOSTILE_KINDS
from tests.chaos.oracle import Finding, FindingKind, QueryKind
from tests.chaos.pauses import pause
from tests.chaos.schedule import PAUSE_S, steps
from tests.chaos.windows import (
    CONNECTION,
    DEADLINE,
    FOREIGN,
    GRACE_S,
    UNAVAILABLE,
    Allowance,
    Outcome,
    Window,
    not_whole,
    placed,
    unexpected,
)

# a router is killed at 10 s and the cluster whole at 14 s; requests of users may fail for 2 s
WINDOW = Window(
    name="router killed",
    allowance=Allowance(
        whole_within_s=10,
        errors=frozenset({UNAVAILABLE}),
        errors_for_s=2,
        kinds=frozenset({QueryKind.FEATURES}),
        partial=True,
        writes=frozenset({"not_primary"}),
    ),
    began_s=10,
    undone_s=10,
    whole_s=14,
)
FULL = Outcome(asker="a", kind=QueryKind.FEATURES, began_s=11, ended_s=11.1)
FAILED = replace(FULL, code=UNAVAILABLE)
PARTIAL = replace(FULL, missing=(2,))
REFUSED = replace(FULL, kind=WriteKind.DELETE, code="not_primary")


def moved(outcome: Outcome, to_s: float) -> Outcome:
    return replace(outcome, began_s=to_s, ended_s=to_s + 0.1)


@pytest.mark.parametrize(
    "outcome",
    [
        *(FULL, moved(FULL, 50), FAILED, PARTIAL, moved(FAILED, 9.95), moved(PARTIAL, 14.2)),
        *(REFUSED, moved(REFUSED, 14.2)),
    ],
)
def test_what_a_fault_explains(outcome: Outcome) -> None:
    assert unexpected([outcome], [WINDOW]) == []


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (moved(FAILED, 9), FindingKind.ERROR),  # before the fault
        (moved(FAILED, 12.1), FindingKind.ERROR),  # later than errors may come
        (moved(PARTIAL, 14.1 + GRACE_S), FindingKind.PARTIAL),  # the cluster is whole
        (replace(FAILED, kind=QueryKind.VECTORS), FindingKind.ERROR),  # not these queries
        (replace(FAILED, code="internal"), FindingKind.ERROR),
        (replace(FAILED, code=FOREIGN), FindingKind.ERROR),
        (replace(FAILED, code=CONNECTION), FindingKind.ERROR),
        (replace(FULL, ended_s=16.5), FindingKind.SLOW),
        (moved(REFUSED, 15), FindingKind.ERROR),
        (replace(REFUSED, code=UNAVAILABLE), FindingKind.ERROR),  # a code for searches
    ],
)
def test_what_no_fault_explains(outcome: Outcome, kind: FindingKind) -> None:
    (found,) = unexpected([FULL, outcome, PARTIAL], [WINDOW])
    assert found.kind is kind
    assert found.at_s == outcome.began_s


def test_a_client_that_repeats_may_take_long() -> None:
    assert unexpected([replace(FULL, ended_s=16.5, repeats=True)], [WINDOW]) == []


def test_partial_answers_need_a_fault_that_takes_rows() -> None:
    whole = replace(WINDOW, allowance=replace(WINDOW.allowance, partial=False))
    assert [each.kind for each in unexpected([PARTIAL], [whole])] == [FindingKind.PARTIAL]
    assert unexpected([PARTIAL], [whole, WINDOW]) == [], "of two faults at once either explains it"
    (found,) = unexpected([moved(PARTIAL, 20)], [whole])
    assert "6.0 s after router killed was over" in found.text
    assert found.during == "no fault"


def test_findings_are_placed_by_their_time() -> None:
    finding = Finding(kind=FindingKind.WRONG, text="x", at_s=12)
    assert placed(finding, [WINDOW]).during == "router killed"
    assert placed(replace(finding, at_s=15), [WINDOW]).during == ""
    assert placed(replace(finding, during="y"), [WINDOW]).during == "y"


def test_a_machine_that_stood_still_excuses_missed_deadlines_alone() -> None:
    stood = [pause(20, 21)]
    late = replace(moved(PARTIAL, 20.5), reasons=frozenset({DEADLINE}))
    assert unexpected([late, replace(FAILED, code=DEADLINE, began_s=19, ended_s=22)], stood) == []
    lost = replace(late, reasons=frozenset({DEADLINE, UNAVAILABLE}))
    for outcome in (lost, moved(FAILED, 20.5), replace(late, began_s=24, ended_s=24)):
        assert len(unexpected([outcome], stood)) == 1


def test_a_fault_that_lasts_too_long() -> None:
    assert not_whole([WINDOW]) == []
    for whole_s in (20.1, math.inf):
        (found,) = not_whole([replace(WINDOW, whole_s=whole_s)])
        assert found.kind is FindingKind.NOT_WHOLE
    held = replace(WINDOW, undone_s=18, whole_s=27)
    assert not_whole([held]) == [], "counted from when the cause was gone"


def test_schedules_are_their_seed() -> None:
    names = [f"fault {number}" for number in range(9)]
    first, same = (list(itertools.islice(steps(5, names), 60)) for _ in range(2))
    assert first == same
    assert first != list(itertools.islice(steps(6, names), 60))
    assert sorted(step.names[0] for step in first[:9]) == names, "each once before any again"
    assert all(len(step.names) == 1 for step in first[:9])
    assert {len(step.names) for step in first} == {1, 2}
    assert all(len(set(step.names)) == len(step.seeds) for step in first)
    assert all(PAUSE_S[0] <= step.pause_s <= PAUSE_S[1] for step in first)
    with pytest.raises(ValueError, match="no kinds"):
        next(steps(5, []))


def test_kinds_have_names_of_their_own() -> None:
    names = [k.name for k in (*PROCESS_KINDS, *FILE_KINDS, *HOSTILE_KINDS, *END_KINDS)]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "," in name], "CHAOS_KINDS has commas between names"


@pytest.mark.parametrize("hurt", HURTS)
def test_damage_damages(hurt) -> None:
    rng = random.Random(1)
    for size in (1, 2, 500):
        content = rng.randbytes(size)
        assert all(hurt(content, rng) != content for _ in range(50 if size > 1 else 1))
    one = flipped(b"\x00" * 100, rng)
    assert len(one) == 100
    assert sum(byte.bit_count() for byte in one) == 1


def test_durations() -> None:
    held = replace(WINDOW, undone_s=12, whole_s=14)
    outcomes = [FULL, moved(FAILED, 11.4), moved(FAILED, 10.5), moved(PARTIAL, 12.9), FULL]
    outcomes.append(moved(REFUSED, 12))
    one = lasted(held, [*outcomes, moved(FAILED, 60)])
    assert (one.held_s, one.whole_s, one.errors, one.partial, one.refused) == (2, 2, 2, 1, 1)
    assert one.refused_s == pytest.approx(2.1)
    assert one.errors_s == pytest.approx(1.5)
    assert one.partial_s == pytest.approx(3.0)
    quiet = lasted(replace(held, name="a quiet one", undone_s=10, whole_s=10), [FULL])
    long = replace(one, whole_s=9.0)
    assert table([one, quiet, long]).splitlines() == [
        "| fault | times | held for | requests without an answer | partial answers "
        "| writes without an acknowledgement | whole after |",
        "|---|---|---|---|---|---|---|",
        "| a quiet one | 1 | none | none | none | none | none |",
        "| router killed | 2 | 2.0 s (2.0) | 1.5 s (1.5) | 3.0 s (3.0) | 2.1 s (2.1) "
        "| 5.5 s (9.0) |",
    ]
    assert as_json([one])[0]["name"] == "router killed"
    never = replace(one, whole_s=math.inf)
    assert table([never]).splitlines()[-1].endswith("| never |")
    assert as_json([never])[0]["whole_s"] is None
