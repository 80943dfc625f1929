"""Whether a process may open as many files as HAProxy needs, and how many connections that gives.

Ray raises the soft limit to the hard one before it starts anything, and HAProxy its own, so the
hard limit alone counts.
"""

import resource

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.preflight.check import Check, failed, passed, warned
from shardline.router.serve.connections import (
    connections_within,
    fewest_connections,
    files_for,
    wanted_connections,
)
from shardline.shards.core.errors import Unavailable

NAME = "open files"
# Of the GCS and the raylet, the largest of Ray's own: 60 to 130 with four shards and a router.
FEWEST_FILES = 512
UNLIMITED = 1 << 30


def hard_limit() -> int:
    """The most open files that a process started from here may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return UNLIMITED if hard == resource.RLIM_INFINITY else hard


def requests_in_flight(config: ShardlineConfig) -> int:
    """What HAProxy lets through at once: the requests of all router replicas together."""
    return config.router.max_in_flight * config.cluster.routers_per_host


def haproxy_connections(in_flight: int, limit: int) -> int:
    """Connections that HAProxy is to hold at once, under a limit of so many open files."""
    return connections_within(limit, wanted_connections(in_flight))


def check_open_files(in_flight: int | None, limit: int) -> Check:
    """in_flight: requests that routers work on at once; None: nothing is served over HTTP."""
    if limit < FEWEST_FILES:
        return failed(NAME, _too_few("Ray", limit, FEWEST_FILES))
    if in_flight is None:
        return passed(NAME, f"up to {limit:,}")
    wanted, fewest = wanted_connections(in_flight), fewest_connections(in_flight)
    found = haproxy_connections(in_flight, limit)
    if found < fewest:
        purpose = f"HAProxy, for {in_flight:,} requests at once and as many that it refuses,"
        error = _too_few(purpose, limit, max(files_for(fewest), FEWEST_FILES))
        error.hint = f"{error.hint}; or lower router.max_in_flight"
        return failed(NAME, error)
    if found < wanted:
        return warned(
            NAME,
            f"{limit:,} open files are enough for {found:,} HTTP connections instead of "
            f"{wanted:,}: `ulimit -n {files_for(wanted)}` before the start allows all",
        )
    return passed(NAME, f"up to {limit:,}, enough for {found:,} HTTP connections")


def _too_few(who: str, limit: int, needed: int) -> Unavailable:
    return Unavailable(
        "a process may open too few files here",
        expected=f"at least {needed:,} for {who.rstrip(',')}",
        got=f"{limit:,}",
        hint=f"raise the limit with `ulimit -n {needed}`, for good in "
        "/etc/security/limits.conf or LimitNOFILE= of the service",
    )
