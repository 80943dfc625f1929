"""Kills the processes of a shard while it is written, and checks what they hold.

    python -m shardline.bench.crash [--kills 500] [--seed S] [--replicas 2] [--points write.,lead.]

Replicas are processes with a real generation on disk and real sockets, without Ray; this process
decides who leads, and its threads are the clients, with a journal of what was acknowledged. SIGKILL
at every named point of the log, the change of the primary, the change-over and the compaction, at
any moment, and torn in the middle of a write; SIGSTOP with a successor, then SIGCONT; two
successors at once; a disk that is full or fails. A page that was written survives SIGKILL: what is
not fsynced is tested with a disk that forgets it, in tests/unit/test_live_log_crash.py.
"""

import argparse
import json
import os
import secrets
import sys
import tempfile
from pathlib import Path

from shardline.bench.crash.points import POINTS
from shardline.bench.crash.run import Options, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--seconds", type=float, help="at most")
    parser.add_argument("--points", default="", help="beginnings of names, comma-separated")
    parser.add_argument("--store", type=Path, help="empty folder, kept; default: temporary")
    args = parser.parse_args()
    wanted = tuple(args.points.split(","))
    points = tuple(point for point in POINTS if point.startswith(wanted))
    options = Options(
        kills=args.kills,
        seed=args.seed,
        replicas=args.replicas,
        writers=args.writers,
        points=points,
        seconds=args.seconds,
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    say(f"seed {options.seed}, {len(points)} points, {options.replicas} replicas")
    if args.store is not None:
        report = run(args.store, options, say)
    else:
        with tempfile.TemporaryDirectory(prefix="shardline-crash-") as folder:
            report = run(Path(folder), options, say)
    print(json.dumps(report, indent=2))  # noqa: T201
    sys.exit(1 if report["violations"] else 0)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
