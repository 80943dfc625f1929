"""Waiting until a cluster's own routers answer with all of its shards.

Another cluster may answer at the same address: HAProxy outlives the Ray that started it. So each
answer is compared with the identity of the cluster that is waited for.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardline.cluster.serving.endpoint import Address
from shardline.shards.core.errors import ShardlineError, Unavailable

POLL_S = 0.05
CHECK_S = 1.0  # how often Serve is asked whether it has given up
# Once one router answers the cluster works; a host that cannot start its own delays no one longer.
OTHERS_S = 60.0
# Of another cluster's answers: its router may be ending just now.
FOREIGN_S = 15.0

Status = dict[str, Any]


class AnotherCluster(Unavailable):
    """What answers there belongs to another cluster."""


@dataclass(slots=True, kw_only=True)
class Ready:
    """Statuses of the routers that answer, by URL, and why others do not."""

    statuses: dict[str, Status] = field(default_factory=dict)
    reasons: dict[str, ShardlineError] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """What the first router warns of, and which routers are missing."""
        first = next(iter(self.statuses.values()))
        told = [f"{each['about']}: {each['text']}" for each in first["warnings"]]
        return told + [f"{url} does not answer: {why}" for url, why in self.reasons.items()]


def wait_for_routers(
    find_urls: Callable[[], Sequence[str]],
    ask: Callable[[str], Status],
    *,
    cluster_id: str,
    wanted: int,
    timeout_s: float,
    check_started: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Ready:
    """Returns once ``wanted`` routers are connected to every shard, or OTHERS_S after the first.

    find_urls: of the routers known so far; ask: the status of the router at a URL, raises
    ShardlineError; check_started: raises when none can be expected any more.

    Raises:
        Unavailable: none was ready in time.
        AnotherCluster: another one has answered for FOREIGN_S.
    """
    ready, began, first_at, checked_at = Ready(), clock(), None, clock()
    foreign_since: dict[str, float] = {}
    while True:
        for url in find_urls():
            if url not in ready.statuses:
                _ask_one(url, ask, cluster_id, ready)
            if isinstance(ready.reasons.get(url), AnotherCluster):
                foreign_since.setdefault(url, clock())
            else:
                foreign_since.pop(url, None)
        now = clock()
        if len(ready.statuses) >= wanted:
            return ready
        if ready.statuses:
            first_at = first_at or now
            if now - first_at > OTHERS_S:
                return ready
        elif now - began > timeout_s:
            raise _not_ready(ready, timeout_s)
        elif any(now - since > FOREIGN_S for since in foreign_since.values()):
            raise next(why for why in ready.reasons.values() if isinstance(why, AnotherCluster))
        if now - checked_at > CHECK_S:
            checked_at = now
            check_started()
        sleep(POLL_S)


def wait_for_hosts(
    count: Callable[[], int],
    wanted: int,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """How many hosts have a router, by ``count``: once there are ``wanted``, or after OTHERS_S."""
    began = clock()
    while (found := count()) < wanted and clock() - began < OTHERS_S:
        sleep(POLL_S)
    return found


def status_of(url: str, key: str | None) -> Status:
    """The status of the router at a URL, for ``wait_for_routers``.

    Over a connection of its own: a HAProxy that another one has followed on a reload ends once its
    connections are closed, and would keep one that is used again for a second more.

    Raises:
        ShardlineError: it does not answer, or refuses.
    """
    with Address(url, key).client() as client:
        return client.status()


def _ask_one(url: str, ask: Callable[[str], Status], cluster_id: str, ready: Ready) -> None:
    try:
        status = ask(url)
        _check(url, status, cluster_id)
    except ShardlineError as error:
        ready.reasons[url] = error
    else:
        ready.statuses[url] = status
        ready.reasons.pop(url, None)


def _check(url: str, status: Status, cluster_id: str) -> None:
    """Raises Unavailable: it is another cluster's, or not connected to all shards yet."""
    found = status.get("cluster_id")
    if found != cluster_id:
        raise AnotherCluster(
            f"another cluster answers at {url}",
            expected=f"cluster {cluster_id}",
            got=f"cluster {found}" if found else "one of an earlier version of Shardline",
            hint="its HAProxy has outlived it: end that process, or serve on another port",
        )
    missing = [shard["shard"] for shard in status["shards"] if not shard["connected"]]
    if missing:
        raise Unavailable(f"shards {missing} are not connected")


def _not_ready(ready: Ready, timeout_s: float) -> Unavailable:
    reasons = [f"{url}: {why}" for url, why in ready.reasons.items()]
    return Unavailable(
        "no router became ready",
        expected=f"within {timeout_s:g} s",
        got="; ".join(reasons) or "no router has been heard of",
        hint=f"allow more with --set cluster.start_timeout_s={2 * timeout_s:g}",
    )
