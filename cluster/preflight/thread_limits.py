"""Whether this user may start as many processes and threads as a cluster has.

The limits are those of the user (`ulimit -u`; root has none) and of the control groups around this
process, which containers and services set.
"""

import os
import resource
from pathlib import Path

import psutil

from shardline.cluster.preflight.check import Check, failed, passed, warned
from shardline.cluster.preflight.control_groups import lines, own_groups
from shardline.shards.core.errors import Unavailable

NAME = "processes"
# Measured on two cores: Ray, Serve, HAProxy's manager and the serving process have 300 threads
# together, a shard or a router 30. More cores bring a few more threads to each.
RAY_THREADS = 300
THREADS_EACH = 30
# Ray's own daemons alone have more
FEWEST_THREADS = 150


def check_processes(room: int | None, actors: int) -> Check:
    """room: threads that may be started yet, None for any number; actors: shards and routers."""
    if room is None:
        return passed(NAME, "as many as needed")
    needed = RAY_THREADS + THREADS_EACH * actors
    hint = "raise it: `ulimit -u`, `--pids-limit` of a container, TasksMax= of a service"
    if room < FEWEST_THREADS:
        error = Unavailable(
            "too few processes and threads may be started here",
            expected=f"about {needed:,} for Ray and {actors} shards and routers",
            got=f"{room:,}",
            hint=hint,
        )
        return failed(NAME, error)
    if room < needed:
        return warned(
            NAME, f"{room:,} threads may be started yet, about {needed:,} are needed; {hint}"
        )
    return passed(NAME, f"{room:,} threads may be started yet, about {needed:,} are needed")


def room_for_threads(root: Path = Path("/")) -> int | None:
    """The smallest of all limits less what counts against it; None: nothing limits them."""
    rooms = [_room(folder) for folder in own_groups(root, "pids")]
    rooms.append(_room_of_user())
    return min((room for room in rooms if room is not None), default=None)


def _room(folder: Path) -> int | None:
    most, current = lines(folder / "pids.max"), lines(folder / "pids.current")
    if not most or not current or not most[0].isdigit():
        return None
    return int(most[0]) - int(current[0])


def _room_of_user() -> int | None:
    most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if most == resource.RLIM_INFINITY or os.geteuid() == 0:
        return None
    taken = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == os.getuid():
            taken += process.info["num_threads"] or 1
    return int(most) - taken
