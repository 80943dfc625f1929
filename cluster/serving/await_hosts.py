"""Waits until the hosts of a cluster have joined Ray: for starts that no person watches.

Under KubeRay, and after ``ray up``, workers join some time after the head, on which Serve may
already be asked to deploy. Serve does not try a deployment again that failed for want of hosts, and
the number of routers is fixed by the hosts that are there.
"""

import time
from collections.abc import Callable, Sequence

from shardline.cluster.control.hosts import Host
from shardline.cluster.serving.survey import Wanted, check_fits
from shardline.shards.core.errors import Unavailable

SETTLED_S = 10.0  # without a wanted number: no host has come or gone for so long
POLL_S = 0.5


class Arrivals:
    """Whether all hosts have joined, by what is seen of them at which time; reads no clock.

    count: hosts with CPUs that are expected; None: as soon as there is room for every replica, and
    no host has come or gone for SETTLED_S.
    """

    def __init__(self, wanted: Wanted, count: int | None) -> None:
        self._wanted = wanted
        self._count = count
        self._seen: frozenset[str] | None = None
        self._since_s = 0.0

    def are_all(self, hosts: Sequence[Host], now_s: float) -> bool:
        """hosts: those that live at ``now_s``, in seconds of any clock that only rises."""
        if self._count is not None:
            return with_cpus(hosts) >= self._count
        seen = frozenset(host.node_id for host in hosts)
        if seen != self._seen:
            self._seen, self._since_s = seen, now_s
        is_settled = now_s - self._since_s >= SETTLED_S
        return is_settled and check_fits(hosts, self._wanted).error is None


def wait_for_hosts(
    look: Callable[[], Sequence[Host]],
    wanted: Wanted,
    *,
    count: int | None,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> str | None:
    """Returns once all hosts have joined, or with a warning if some are missing after ``timeout_s``
    and the others have room for every replica.

    look: the living hosts; count: as of ``Arrivals``.

    Raises:
        Unavailable: there is no such room after ``timeout_s``; says what is missing.
    """
    arrivals = Arrivals(wanted, count)
    deadline = clock() + timeout_s
    while not arrivals.are_all(hosts := look(), now := clock()):
        if now >= deadline:
            return _judge_late(hosts, wanted, count, timeout_s)
        sleep(POLL_S)
    return None


def with_cpus(hosts: Sequence[Host]) -> int:
    """Those that can hold a shard; a head may be started without CPUs."""
    return sum(host.cpus > 0 for host in hosts)


def _judge_late(
    hosts: Sequence[Host], wanted: Wanted, count: int | None, timeout_s: float
) -> str | None:
    error = check_fits(hosts, wanted).error
    if error is not None:
        raise Unavailable(
            "hosts with room for the shards have not joined Ray",
            expected=f"within {timeout_s:g} s",
            got=error.got,
            hint="start more hosts, lower cluster.replicas or cluster.cpus_per_shard, or allow "
            "more with cluster.start_timeout_s",
        )
    if count is None:
        return f"hosts still came and went after {timeout_s:g} s: starts on the {len(hosts)} there"
    return (
        f"{with_cpus(hosts)} of {count} hosts have joined Ray within {timeout_s:g} s: starts on "
        "those, with fewer routers; deploy again once the others are there"
    )
