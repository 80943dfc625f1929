"""The log on the real disk, written by real processes that are killed, or stopped and go on."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shardline.shards.live.log import Log
from shardline.shards.live.log_tail import LogTail
from tests.live_writes import as_bytes, records, seqs

# appends until it is fenced; says each seq that is acknowledged, then how it ended
WRITER = """
import sys
from pathlib import Path
from shardline.shards.core.errors import NotPrimary
from shardline.shards.live.log import Log
from tests.live_writes import records
folder, epoch = Path(sys.argv[1]), int(sys.argv[2])
log, _ = Log.open(folder, epoch, after_seq=0, segment_bytes=20_000)
try:
    while True:
        log.append(records(log.seq + 1, log.seq + 1 + log.seq % 3, epoch=epoch))
        print(log.seq, flush=True)
except NotPrimary:
    print("fenced", flush=True)
"""
ROOT = Path(__file__).parents[2]
ROUNDS = 3


@contextmanager
def a_writer(folder: Path, epoch: int) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    command = [sys.executable, "-c", WRITER, str(folder), str(epoch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        yield process, process.stdout
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def said_until(output: IO[str], lines: int) -> list[int]:
    return [int(output.readline()) for _ in range(lines)]


def test_killed_writers_lose_nothing_that_they_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(5)
    tail, followed = LogTail(tmp_path, 0), []
    for epoch in range(1, 2 * ROUNDS, 2):
        with a_writer(tmp_path, epoch) as (process, output):
            acknowledged = said_until(output, rng.randint(1, 40))
            followed += tail.read_new()
            os.kill(process.pid, signal.SIGKILL)
            acknowledged += [int(line) for line in output]
        log, found = Log.open(tmp_path, epoch + 1, after_seq=0)
        log.close()
        assert seqs(found) == list(range(1, log.seq + 1))
        assert acknowledged[-1] <= log.seq <= acknowledged[-1] + 3
        followed += tail.read_new()
        assert as_bytes(followed) == as_bytes(found)


def test_a_stopped_writer_that_goes_on_acknowledges_nothing_more(tmp_path: Path) -> None:
    rng = random.Random(6)
    for epoch in range(1, 2 * ROUNDS, 2):
        with a_writer(tmp_path, epoch) as (process, output):
            said_until(output, rng.randint(1, 40))
            os.kill(process.pid, signal.SIGSTOP)
            log, found = Log.open(tmp_path, epoch + 1, after_seq=0)
            new = records(log.seq + 1, log.seq + 2, epoch=epoch + 1)
            log.append(new)
            os.kill(process.pid, signal.SIGCONT)
            *rest, last = output.read().split()
        assert last == "fenced"
        assert all(int(seq) <= len(found) for seq in rest)
        log.append(records(log.seq + 1, log.seq + 1, epoch=epoch + 1))
        log.close()
        assert as_bytes(LogTail(tmp_path, len(found)).read_new())[:2] == as_bytes(new)
