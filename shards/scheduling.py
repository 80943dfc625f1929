"""Lets whoever runs on a core finish: a thread of ours that wakes up does not push it aside.

One query wakes every shard, and every reply wakes the router, which can do nothing until the last
one is in. Where there are fewer cores than processes each of these would interrupt a search, or the
router between two of its sends, and cost both of them their caches. Under Linux's policy for batch
work (SCHED_BATCH, see sched(7)) a thread that wakes up waits until a core is free or the one that
runs has used its slice, some milliseconds; its share of the cores stays the same
(docs/PERFORMANCE.md has what that is worth, and with the cores taken by others).
"""

import contextlib
import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

THREADS = Path("/proc/self/task")


def wait_for_cores() -> int:
    """Puts every thread of this process under SCHED_BATCH, and so whatever they start from then
    on; returns how many. 0 where the system has no such policy or does not allow it.
    """
    if sys.platform != "linux":
        return 0
    threads = 0
    try:
        for thread in sorted(int(entry.name) for entry in THREADS.iterdir()):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
                threads += 1
    except PermissionError as error:  # a sandbox may forbid the call
        logger.info("threads stay under the default scheduling policy: %s", error)
    return threads
