"""Random faults under load for CHAOS_SECONDS: no wrong answer, no untruth, nothing left behind, no
acknowledged write lost.

Prints its seed first; CHAOS_SEED repeats the faults, their order and numbers (not the moments at
which the machine does things). CHAOS_KINDS, names with commas, limits the kinds: to repeat one.
CHAOS_OUT names a folder for the table (durations.md), for chaos.json and for what serve printed.
A run of 120 s or more ends with the raylet or the GCS killed, then ``serve`` itself.
"""

import json
import os
import secrets
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from shardline.cluster.serving.ray_session import free_port, port_is_free
from shardline.cluster.store import Store
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.mains import compacted_seqs
from tests.chaos import memory
from tests.chaos.askers import Askers, Log, monotonic_from
from tests.chaos.corpus import SHARDS, make_store
from tests.chaos.damage import FILE_KINDS
from tests.chaos.durations import as_json, table
from tests.chaos.ends import END_KINDS
from tests.chaos.faults import PROCESS_KINDS
from tests.chaos.hostile import HOSTILE_KINDS
from tests.chaos.oracle import Finding, FindingKind, Oracle
from tests.chaos.pauses import Pauses
from tests.chaos.runner import NeverWhole, Runner
from tests.chaos.schedule import Step, steps
from tests.chaos.served import DidNotStart, Served, traces_of
from tests.chaos.windows import not_whole, placed, unexpected
from tests.chaos.writers import Writers, Written

SECONDS = float(os.environ.get("CHAOS_SECONDS", "45"))
SEED = int(os.environ.get("CHAOS_SEED", str(secrets.randbelow(1 << 31))))
CHOSEN = [name.strip() for name in os.environ.get("CHAOS_KINDS", "").split(",") if name.strip()]
ENDS_FROM_S = 120.0  # shorter runs have no time for starting serve twice more
ENDS_WITHIN_S = 20.0
SHOWN = 3  # findings of the same kind and fault that are printed

KINDS = {kind.name: kind for kind in (*PROCESS_KINDS, *FILE_KINDS, *HOSTILE_KINDS)}
ENDS = {kind.name: kind for kind in END_KINDS}


@pytest.mark.timeout(2 * SECONDS + 1200)
def test_no_fault_makes_an_answer_wrong(tmp_path: Path) -> None:
    out = Path(os.environ.get("CHAOS_OUT", tmp_path))
    out.mkdir(parents=True, exist_ok=True)
    assert set(CHOSEN) <= {*KINDS, *ENDS}, f"CHAOS_KINDS: there are {[*KINDS, *ENDS]}"
    print(f"\nCHAOS_SEED={SEED} CHAOS_SECONDS={SECONDS:g} CHAOS_KINDS={','.join(CHOSEN)}")
    corpus = make_store(tmp_path / "store")
    served = Served(Store(tmp_path / "store"), free_port(), out / "serve.log")
    started = served.start()
    print(f"serve was ready after {started:.1f} s at {served.address.url}")
    log, clock = Log(), monotonic_from(time.monotonic())
    pids = [served.pid]
    try:
        oracle = Oracle(corpus)
        with (
            Askers(served.address, oracle, log, clock, SEED) as askers,
            Writers(served.write_address, oracle, log, clock, SEED) as writers,
        ):
            runner = Runner(served, log, clock, askers.needed | writers.needed)
            with memory.Peaks(served, clock) as peaks, Pauses(clock) as pauses:
                carry_out(runner, peaks, pids)
    finally:
        found = end_in_order(served, pids)
    found += writers.written.findings()
    found += [placed(each, runner.windows) for each in log.findings]
    windows = [*runner.windows, *pauses.windows]
    found += [*unexpected(log.outcomes, windows), *not_whole(runner.windows)]
    print(f"\nthe machine held this process up {len(pauses.windows)} times")
    report(runner, writers.written, found, out, peaks.mib)
    assert not Counter(str(each.kind) for each in found)


def carry_out(runner: Runner, peaks: memory.Peaks, pids: list[int]) -> None:
    """All faults, in order; a cluster that does not come back ends the run, as a finding."""
    served, log = runner.served, runner.log
    try:
        runner.start()
        time.sleep(3)  # the caches have their size by now
        before, files_before = memory.memory(served), memory.open_files(served)
        names = [name for name in KINDS if not CHOSEN or name in CHOSEN]
        for step in steps(SEED, names) if names else ():
            if runner.clock() > SECONDS:
                break
            runner.do(step, KINDS)
        time.sleep(3)
        for finding in (
            *runner.left(),
            *memory.grown(before, peaks),
            *memory.left_open(files_before, memory.open_files(served)),
        ):
            log.report(finding)
        for step in last_steps():
            runner.do(step, ENDS)
            pids.append(served.pid)
    except (NeverWhole, DidNotStart) as error:
        log.report(Finding(kind=FindingKind.NOT_WHOLE, text=str(error), at_s=runner.clock()))


def last_steps() -> list[Step]:
    """Raylet or GCS, by the seed, then serve; or those that were chosen."""
    names = [name for name in ENDS if name in CHOSEN]
    if not CHOSEN and ENDS_FROM_S <= SECONDS:
        first, second, last = ENDS
        names = [(first, second)[SEED % 2], last]
    return [Step(names=(name,), seeds=(SEED,), pause_s=1.0) for name in names]


def end_in_order(served: Served, pids: Sequence[int]) -> list[Finding]:
    """SIGTERM: exit code 0 in time, and no process, folder or port is left of any ``serve``."""
    found = []
    if served.ended(0) is None:
        served.signal(signal.SIGTERM)
        began = time.monotonic()
        code = served.ended(90)
        took = time.monotonic() - began
        if code != 0 or took > ENDS_WITHIN_S:
            text = f"SIGTERM: exit code {code} after {took:.1f} s"
            found.append(Finding(kind=FindingKind.LEAK, text=text))
    found += [
        Finding(kind=FindingKind.LEAK, text=f"left at the end: {trace}")
        for pid in {*pids, served.pid}
        for trace in traces_of(pid)
    ]
    if not port_is_free(served.port):
        found.append(Finding(kind=FindingKind.LEAK, text=f"port {served.port} is not free"))
    served.down()  # whatever it was, it does not outlive the test
    return found


def report(
    runner: Runner,
    written: Written,
    found: Sequence[Finding],
    out: Path,
    peak_mib: dict[str, float],
) -> None:
    """Prints and writes what happened."""
    outcomes = [each for each in runner.log.outcomes if not each.is_write]
    rows = table(runner.lasted)
    counts = Counter(each.code for each in outcomes)
    kinds = Counter(str(each.kind) for each in found)
    full = sum(each.is_full for each in outcomes)
    print(f"{len(outcomes)} requests checked, {full} full answers; {dict(counts)}")
    compacted = compacted_writes(runner.served.store, SHARDS)
    print(f"writes: {written.figures()}; in the newest compaction of each shard: {compacted}")
    print(f"memory, MiB at most: { {role: round(used) for role, used in peak_mib.items()} }")
    print(f"findings: {dict(kinds) or 'none'}\n\n{rows}")
    print_grouped(found)
    (out / "durations.md").write_text(rows)
    content = {
        "seed": SEED,
        "seconds": SECONDS,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30)),
        "requests": len(outcomes),
        "full": full,
        "codes": dict(counts),
        "writes": {**written.figures(), "compacted": compacted},
        "peak_mib": {role: round(used) for role, used in peak_mib.items()},
        "faults": as_json(runner.lasted),
        "findings": [[each.kind, each.during, round(each.at_s, 1), each.text] for each in found],
    }
    (out / "chaos.json").write_text(json.dumps(content, indent=1))


def compacted_writes(store: Store, shards: int) -> list[int]:
    """Of each shard, how many writes its newest compaction has; 0 without any."""
    generation = store.generation(store.current())
    lives = (live_folder(generation, shard) for shard in range(shards))
    return [max(compacted_seqs(live), default=0) for live in lives]


def print_grouped(found: Sequence[Finding]) -> None:
    """Findings by kind and fault: how many, and the first few."""
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for each in sorted(found, key=lambda finding: finding.at_s):
        groups[each.kind, each.during].append(each)
    for (kind, during), same in sorted(groups.items()):
        print(f"{len(same)} times {kind}{f', during: {during}' if during else ''}")
        for each in same[:SHOWN]:
            print(f"  {each.at_s:7.1f} s  {each.text}")
