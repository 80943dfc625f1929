"""Events on their way to the disk: whole files, shared fsyncs, what is acknowledged stays."""

import asyncio
import os
import random
import subprocess
import sys
import threading
import zlib
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from shardline.router.contract import MAX_EVENTS
from shardline.router.experiments import event_files, event_log
from shardline.router.experiments.event_files import (
    FILE,
    SCHEMA,
    days_of,
    encode_table,
    merge_files,
    read_events,
    table_of,
    write_events,
)
from shardline.router.experiments.event_files import (
    event_files as files_of,
)
from shardline.router.experiments.event_log import MAX_WAITING, MAX_WAITING_BYTES, EventLog
from shardline.router.experiments.stored_event import Event
from shardline.shards.core.errors import (
    CorruptFile,
    DeadlineExceeded,
    NotFound,
    Overloaded,
    ReadOnly,
    StoreFull,
    Unavailable,
)
from shardline.shards.core.metrics import EVENTS, Recorder

ROOT = Path(__file__).parents[2]
AT = 1_772_368_200.25  # 2026-03-01T12:30:00.25Z
MIB = 1 << 20
ROUNDS = 3

FULL = Event(
    event="click",
    at=AT,
    key="ü-7",
    request_id="abc",
    event_id="e1",
    item_id=2**62,
    value=-1.5,
    arms={"probes": "few", "depth": "ten"},
    took_ms=1.25,
    k=10,
    queries=2,
    results=17,
)


def clicks(count: int, first: int = 0) -> list[Event]:
    return [Event(event="click", at=AT, key="u", event_id=f"e{first + n}") for n in range(count)]


def stored(folder: Path) -> list[str]:
    return [each for path in files_of(folder) for each in read_events(path)["event_id"].to_pylist()]


# Files


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    bare = Event(event="view", at=0.0, request_id="r")
    path = write_events(tmp_path / "events", "h-1", 7, [FULL, bare], AT)
    assert path.parent.name == "2026-03-01"
    assert path.name.startswith("h-1-000007-") and FILE.fullmatch(path.name)
    rows = read_events(path).to_pylist()
    assert rows[0] == {
        "event": "click",
        "at": datetime(2026, 3, 1, 12, 30, 0, 250_000, tzinfo=UTC),
        "key": "ü-7",
        "request_id": "abc",
        "event_id": "e1",
        "item_id": 2**62,
        "value": -1.5,
        "arms": [("probes", "few"), ("depth", "ten")],
        "took_ms": 1.25,
        "k": 10,
        "queries": 2,
        "results": 17,
    }
    assert rows[1] == {
        **dict.fromkeys(SCHEMA.names),
        "event": "view",
        "at": datetime(1970, 1, 1, tzinfo=UTC),
        "request_id": "r",
        "arms": [],
    }


def test_a_torn_or_altered_file_is_refused(tmp_path: Path) -> None:
    path = write_events(tmp_path, "h-1", 1, clicks(100), AT)
    whole = path.read_bytes()
    for place in random.Random(3).sample(range(len(whole)), 20):
        path.write_bytes(whole[:place])
        with pytest.raises(CorruptFile):
            read_events(path)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptFile):
            read_events(path)
    other = path.with_name(f"h-1-000002-{zlib.crc32(b'x'):08x}.arrow")
    other.write_bytes(b"x")
    with pytest.raises(CorruptFile, match="not an Arrow file"):
        read_events(other)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("a", pa.int64())])):
        pass
    content = sink.getvalue().to_pybytes()
    other = path.with_name(f"h-1-000003-{zlib.crc32(content):08x}.arrow")
    other.write_bytes(content)
    with pytest.raises(CorruptFile, match="other columns"):
        read_events(other)


def test_files_since_are_those_of_the_day_before_and_later(tmp_path: Path) -> None:
    days = [f"2026-03-0{n}" for n in range(1, 5)]
    for day in days:
        at = datetime.fromisoformat(f"{day}T12:00:00+00:00").timestamp()
        write_events(tmp_path, "h-1", 1, clicks(1), at)
    (tmp_path / "notes").mkdir()
    (tmp_path / "2026-13-40").mkdir()
    (tmp_path / days[0] / ".h-1-000002-00000000.arrow.x.tmp").write_bytes(b"half")
    assert [path.name for path in days_of(tmp_path)] == days
    since = datetime(2026, 3, 3, 8, tzinfo=UTC)
    assert [path.parent.name for path in files_of(tmp_path, since)] == days[1:]
    assert len(list(files_of(tmp_path))) == 4
    assert list(files_of(tmp_path / "none")) == []


def test_merged_files_hold_the_same_events_once(tmp_path: Path) -> None:
    parts = [write_events(tmp_path, "h-1", n, clicks(3, 3 * n), AT) for n in range(1, 8)]
    other = write_events(tmp_path, "h-2", 3, clicks(1, 100), AT)
    before = sorted(stored(tmp_path))
    kept = {path: path.read_bytes() for path in parts}
    merged = merge_files(parts[1:5])
    assert merged.name.startswith("h-1-000002_000005-")
    assert set(files_of(tmp_path)) == {parts[0], merged, *parts[5:], other}
    assert sorted(stored(tmp_path)) == before
    for gone in ([1], [1, 4], [1, 2, 3, 4]):  # a kill leaves some of the parts
        for place in gone:
            parts[place].write_bytes(kept[parts[place]])
        assert sorted(stored(tmp_path)) == before
        assert other in set(files_of(tmp_path)), "of another router"
        for place in gone:
            parts[place].unlink()
    kept[merged] = merged.read_bytes()
    again = merge_files([parts[0], merged, parts[5]])
    assert again.name.startswith("h-1-000001_000006-")
    merged.write_bytes(kept[merged])
    parts[2].write_bytes(kept[parts[2]])
    assert set(files_of(tmp_path)) == {again, parts[6], other}
    assert sorted(stored(tmp_path)) == before
    parts[5].write_bytes(b"damaged")
    with pytest.raises(CorruptFile):
        merge_files(parts[5:])
    assert parts[6].exists()


# The log


def counted(recorder: Recorder) -> dict[str, float]:
    return {labels[0]: n for (metric, labels), n in recorder._totals.items() if metric is EVENTS}


async def test_what_is_acknowledged_is_on_the_disk(tmp_path: Path) -> None:
    recorder = Recorder()
    log = EventLog(tmp_path / "events", MIB, recorder, gap_s=0.01, wall=lambda: AT)
    await log.add(clicks(3), 10, size=100)
    assert stored(tmp_path / "events") == ["e0", "e1", "e2"]
    log.note(Event(event="search", at=AT, key="u", event_id="own"))
    await log.close()
    assert stored(tmp_path / "events")[3:] == ["own"]
    assert counted(recorder) == {"stored": 4}
    with pytest.raises(Unavailable):
        await log.add(clicks(1), 10, size=100)


async def test_what_waits_shares_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, begun = threading.Event(), threading.Event()

    def held_up(*args: object) -> Path:
        begun.set()
        assert may_write.wait(10)
        return write_events(*args)

    monkeypatch.setattr(event_files, "write_events", held_up)
    log = EventLog(tmp_path, MIB, Recorder(), gap_s=0.0)
    first = asyncio.ensure_future(log.add(clicks(1), 10, size=100))
    await asyncio.to_thread(begun.wait, 10)
    others = [asyncio.ensure_future(log.add(clicks(1, n), 10, size=100)) for n in range(1, 50)]
    await asyncio.sleep(0)
    assert not first.done()
    may_write.set()
    await asyncio.gather(first, *others)
    assert len(list(files_of(tmp_path))) == 2
    assert sorted(stored(tmp_path)) == sorted(f"e{n}" for n in range(50))
    await log.close()


async def test_files_begin_a_gap_apart(tmp_path: Path) -> None:
    log = EventLog(tmp_path, MIB, Recorder(), gap_s=0.05)
    loop = asyncio.get_running_loop()
    began = loop.time()
    for number in range(4):
        await log.add(clicks(1, number), 10, size=100)
    assert loop.time() - began >= 3 * 0.05, "the first at once, the others a gap after it"
    await log.close()


async def test_own_events_wait_longer_unless_a_caller_waits(tmp_path: Path) -> None:
    log = EventLog(tmp_path, MIB, Recorder(), gap_s=0.05)
    await log.add(clicks(1), 10, size=100)
    for number in range(1, 4):
        log.note(clicks(1, number)[0])
        await asyncio.sleep(0.06)
    assert len(list(files_of(tmp_path))) == 1, "a second has not passed"
    await log.add(clicks(1, 4), 10, size=100)
    assert len(list(files_of(tmp_path))) == 2
    log.note(clicks(1, 5)[0])
    await log.close()
    assert stored(tmp_path) == [f"e{n}" for n in range(6)], "what waits is written at the end"


async def test_a_disk_that_fails_is_told_and_the_next_file_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    log = EventLog(tmp_path, MIB, recorder, gap_s=0.0)
    for number, kind in ((28, StoreFull), (5, ReadOnly)):

        def fail(*_: object, number: int = number) -> Path:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(event_files, "write_events", fail)
            with pytest.raises(kind):
                await log.add(clicks(1), 10, size=100)
    await log.add(clicks(1), 10, size=100)
    assert stored(tmp_path) == ["e0"]
    assert counted(recorder) == {"dropped": 2, "stored": 1}
    await log.close()


async def test_beyond_twice_the_room_nothing_is_stored(tmp_path: Path) -> None:
    log = EventLog(tmp_path, 1000, Recorder(), gap_s=0.0, wall=lambda: AT)
    await log.add(clicks(MAX_EVENTS), 10, size=100)  # a file may go over it
    assert sum(path.stat().st_size for path in files_of(tmp_path)) > 2000
    with pytest.raises(StoreFull) as caught:
        await log.add(clicks(1), 10, size=100)
    assert "shardline gc" in str(caught.value)
    assert len(list(files_of(tmp_path))) == 1
    await log.close()


async def test_room_that_gc_has_made_is_seen(tmp_path: Path) -> None:
    now = [AT]
    log = EventLog(tmp_path, 1000, Recorder(), gap_s=0.0, wall=lambda: now[0])
    await log.add(clicks(MAX_EVENTS), 10, size=100)
    (path,) = files_of(tmp_path)
    path.unlink()
    now[0] += 61
    await log.add(clicks(1), 10, size=100)
    await log.close()


async def test_too_many_that_wait_are_refused_and_own_ones_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, recorder = threading.Event(), Recorder()

    def held_up(*args: object) -> Path:
        assert may_write.wait(10)
        return write_events(*args)

    monkeypatch.setattr(event_files, "write_events", held_up)
    log = EventLog(tmp_path, MIB * 100, recorder, gap_s=0.0)
    whole = clicks(MAX_EVENTS)
    adds = [
        asyncio.ensure_future(log.add(whole, 30, size=100))
        for _ in range(MAX_WAITING // MAX_EVENTS)
    ]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await log.add(clicks(1), 10, size=100)
    log.note(clicks(1)[0])
    assert counted(recorder) == {"dropped": 1}
    may_write.set()
    await asyncio.gather(*adds)
    await log.close()


async def test_requests_that_wait_are_bounded_by_their_bytes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()

    def held_up(*args: object) -> Path:
        assert may_write.wait(10)
        return write_events(*args)

    monkeypatch.setattr(event_files, "write_events", held_up)
    log = EventLog(tmp_path, MIB, Recorder(), gap_s=0.0)
    half = MAX_WAITING_BYTES // 2
    under_way = asyncio.ensure_future(log.add(clicks(1), 30, size=half))
    await asyncio.sleep(0.05)
    waits = asyncio.ensure_future(log.add(clicks(1, 1), 30, size=half))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await log.add(clicks(1, 2), 10, size=1)
    may_write.set()
    await asyncio.gather(under_way, waits)
    await log.add(clicks(1, 3), 10, size=half)
    assert stored(tmp_path) == ["e0", "e1", "e3"]
    await log.close()


async def test_a_disk_that_stays_full_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Path:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(event_files, "write_events", fail)
    log = EventLog(tmp_path, MIB, Recorder(), gap_s=0.0)
    for _ in range(5):
        with pytest.raises(StoreFull):
            await log.add(clicks(1), 10, size=100)
    assert len([each for each in caplog.records if "not stored" in each.message]) == 1
    await log.close()


async def test_a_bug_in_merging_keeps_no_event_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> Path:
        raise TypeError("a bug")

    monkeypatch.setattr(event_log, "MERGED", 2)
    monkeypatch.setattr(event_files, "merge_files", fail)
    log = EventLog(tmp_path, MIB, Recorder(), gap_s=0.0)
    for number in range(6):
        await log.add(clicks(1, number), 10, size=100)
    assert stored(tmp_path) == [f"e{number}" for number in range(6)]
    await log.close()


async def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()

    def held_up(*args: object) -> Path:
        assert may_write.wait(10)
        return write_events(*args)

    monkeypatch.setattr(event_files, "write_events", held_up)
    log = EventLog(tmp_path, MIB, Recorder(), gap_s=0.0)
    with pytest.raises(DeadlineExceeded):
        await log.add(clicks(1), 0.01, size=100)
    may_write.set()
    await log.add(clicks(1, 1), 10, size=100)
    assert stored(tmp_path) == ["e0", "e1"]
    await log.close()


@pytest.mark.parametrize(("folder", "limit"), [(None, MIB), (Path("x"), 0)])
async def test_where_nothing_is_stored_callers_are_told(folder: Path | None, limit: int) -> None:
    log = EventLog(folder, limit, Recorder())
    log.note(FULL)
    with pytest.raises(NotFound):
        await log.add([FULL], 10, size=100)
    await log.close()


async def test_small_files_are_merged_and_merged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "MERGED", 3)
    log = EventLog(tmp_path, 100 * MIB, Recorder(), gap_s=0.0, wall=lambda: AT)
    for number in range(14):
        await log.add(clicks(1, number), 10, size=100)
    await log.close()
    spans = [path.name.split("-")[2] for path in files_of(tmp_path)]
    assert spans == ["000001_000009", "000010_000012", "000013", "000014"]
    assert sorted(stored(tmp_path)) == sorted(f"e{n}" for n in range(14))
    assert len([*days_of(tmp_path)[0].iterdir()]) == 4, "the parts are gone"


async def test_files_of_two_days_or_beside_a_large_one_are_not_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "MERGED", 3)
    monkeypatch.setattr(event_log, "SMALL_BYTES", 10_000)
    now = [AT]
    log = EventLog(tmp_path, 100 * MIB, Recorder(), gap_s=0.0, wall=lambda: now[0])
    for number in range(8):
        if number == 2:
            now[0] += 86_400
        count = MAX_EVENTS if number == 4 else 1
        await log.add(clicks(count, number * MAX_EVENTS), 10, size=100)
    await log.close()
    spans = [path.name.split("-")[2] for path in files_of(tmp_path)]
    assert spans == ["000001", "000002", "000003", "000004", "000005", "000006_000008"]
    assert len(stored(tmp_path)) == 7 + MAX_EVENTS


# A process that is killed

WRITER = """
import asyncio, sys
from pathlib import Path
from shardline.router.experiments import event_log
from shardline.router.experiments.event_log import EventLog
from shardline.router.experiments.stored_event import Event
from shardline.shards.core.metrics import Recorder

event_log.MERGED = 3

async def send(log, name):
    number = 0
    while True:
        ids = [f"{name}-{number}-{part}" for part in range(1 + number % 5)]
        events = [Event(event="click", at=1.0, key="u", event_id=each) for each in ids]
        await log.add(events, 30, size=100)
        print(*ids, flush=True)
        number += 1

async def main():
    log = EventLog(Path(sys.argv[1]), 1 << 30, Recorder(), gap_s=0.002)
    await asyncio.gather(*(send(log, f"{sys.argv[2]}{n}") for n in range(4)))

asyncio.run(main())
"""


def test_killed_routers_lose_nothing_that_they_acknowledged(tmp_path: Path) -> None:
    rng, acknowledged = random.Random(7), []
    for number in range(ROUNDS):
        command = [sys.executable, "-c", WRITER, str(tmp_path), f"r{number}-"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(rng.randint(1, 60))]
        process.kill()
        # a last line may be cut off; whole ones were acknowledged
        lines += [line for line in process.stdout if line.endswith("\n")]
        process.wait()
        process.stdout.close()
        assert all(lines)
        acknowledged += " ".join(lines).split()
    found = stored(tmp_path)
    assert set(acknowledged) <= set(found)
    assert len(found) == len(set(found)), "each was stored once"
    assert len(acknowledged) >= ROUNDS


def test_an_encoded_file_is_small() -> None:
    searches = [
        Event(
            event="search",
            at=AT + n,
            key=f"user-{n % 50}",
            request_id=f"{n:016x}",
            arms={"probes": "few"},
            took_ms=1.0 + n / 1000,
            k=100,
            queries=1,
            results=100,
        )
        for n in range(1000)
    ]
    assert len(encode_table(table_of(searches))) < 120 * len(searches)
