"""What the processes of Ray and Serve find in their environment, as a table: variable, value, why.

Every process of Ray inherits it from the one that starts Ray, and reads it when it is imported: a
runtime_env comes too late. ``SERVING`` holds on every cluster. ``PRIVATE`` comes on top for a Ray
of our own on this machine, where several may run side by side; ``LAUNCHED`` on every host of a
cluster of several, and ``HEAD`` on its head: the launcher files in deploy set the same. Serve's
other patches are ``router.serve.front`` and ``router.serve.haproxy_start``.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardline.router.router_config import RouterConfig
from shardline.router.serve.front import HOOK
from shardline.router.serve.haproxy import Limits
from shardline.router.serve.haproxy_start import BINARY, launcher

# in a value: what ``private_environment`` fills in, because each session has its own
SESSION = "{session}"
HOME = "{home}"  # in the tables of launched clusters: the user's home folder on each host
PORT = "{port}"
CONNECTIONS = "{connections}"


@dataclass(frozen=True, slots=True)
class Variable:
    """test: what fails when another version of Ray does not know or need the variable any more."""

    name: str
    value: str
    why: str
    test: str = "test_environment.py::test_the_ray_installed_reads_every_variable"


SERVING = (
    Variable("RAY_USAGE_STATS_ENABLED", "0", "nothing is reported to anybody"),
    Variable("RAY_worker_niceness", "0", "15 would let shards wait behind everything else"),
    Variable("RAY_SERVE_ENABLE_HA_PROXY", "1", "the Python proxy answers 134 requests per second"),
    # of the metrics HAProxy sends a line per request to a Python process
    Variable("RAY_SERVE_HAPROXY_METRICS_ENABLED", "0", "they compete with the shards"),
    Variable("RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S", "30", "a client that reads nothing leaves"),
    # 64 queries of 128 dimensions are 32 KiB: above 16 KiB their body would be counted and
    # forwarded as one that is still arriving. A connection under way has two of these at most.
    Variable("RAY_SERVE_HAPROXY_TUNE_BUFSIZE", "40960", "usual bodies are kept whole"),
    # three failed checks: a killed manager is replaced after 3 s, and not after 30
    Variable("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1", "HAProxy's manager is missed sooner"),
    # three checks of a second: a router that stopped is left alone after 5 s, and not after 15;
    # one that works for two seconds without a pause is not
    Variable("RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER", "1s", "a stopped router is left alone"),
    Variable("RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL", "3", "a busy router is not left alone"),
    Variable("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1", "30 s lengthen every stop"),
    # after the loss of a head routers were seen to answer the new controller later than after 30 s,
    # and all of them, which served well, were stopped at once
    Variable("RAY_SERVE_SLOW_STARTUP_WARNING_S", "600", "a new Serve controller keeps routers"),
    Variable("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0", "one loop halves the latency"),
    Variable("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0", "one loop halves the latency"),
    Variable(
        HOOK,
        "shardline.router.serve.front:middleware",
        "requests reach our app before Serve's own layer around it",
        "test_front.py::test_this_ray_reads_the_hook",
    ),
)
PRIVATE = (
    Variable(
        BINARY,
        f"{SESSION}/haproxy",
        "starts HAProxy with a corrected configuration",
        "test_haproxy.py::test_what_ray_writes_is_corrected",
    ),
    Variable("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", f"{SESSION}/haproxy.cfg", "one per session"),
    # HAProxy takes socket paths of 97 bytes, of which Ray's node id needs 58
    Variable("RAY_SERVE_HAPROXY_SOCKET_PATH", f"{SESSION}/a", "one per session"),
    Variable("RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH", f"{SESSION}/m", "one per session"),
    Variable("RAY_SERVE_HAPROXY_SERVER_STATE_BASE", SESSION, "one per session"),
    Variable("RAY_SERVE_HAPROXY_SERVER_STATE_FILE", f"{SESSION}/server-state", "one per session"),
    Variable("RAY_SERVE_HAPROXY_METRICS_PORT", PORT, "9101 is for one session only"),
    Variable("RAY_SERVE_HAPROXY_STATS_PORT", PORT, "8404 is for one session only"),
    Variable("RAY_SERVE_HAPROXY_NBTHREAD", "1", "forwards far more than one router can answer"),
    Variable("RAY_SERVE_HAPROXY_MAXCONN", CONNECTIONS, "4096 need more open files than some have"),
    Variable("RAY_SERVE_LOG_TO_STDERR", "0", "the terminal is the command's"),
    Variable("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60", "busy laptops need over 5 s to start"),
)
LAUNCHED = (
    Variable("RAY_AUTH_MODE", "token", "else whoever reaches Ray's ports runs code on the hosts"),
    Variable(
        BINARY,
        f"{HOME}/shardline/deploy/ray/haproxy.sh",
        "starts HAProxy with a corrected configuration",
        "test_haproxy.py::test_what_ray_writes_is_corrected",
    ),
    # three failed checks of two seconds, a second apart: a host that is silent counts as dead after
    # 9 to 12 s, and not after 63; one that is busy for six seconds does not
    Variable("RAY_health_check_period_ms", "1000", "a silent host is replaced after 12 s"),
    Variable("RAY_health_check_timeout_ms", "2000", "a silent host is replaced after 12 s"),
    Variable("RAY_health_check_failure_threshold", "3", "a busy host is not replaced"),
    # after that time without the head every other host's Ray ends, and its shards with it
    Variable("RAY_gcs_rpc_server_reconnect_timeout_s", "600", "hosts serve on without the head"),
)
HEAD = (
    Variable("RAY_gcs_storage", "rocksdb", "a head that starts again knows what runs where"),
    Variable("RAY_gcs_storage_path", f"{HOME}/shardline-gcs", "a head that starts again knows"),
    Variable("RAY_enable_autoscaler_v2", "0", "with v2 `ray up` brings up one worker of two"),
)


def serving_environment() -> dict[str, str]:
    """What every process of a serving cluster needs, by name."""
    return {variable.name: variable.value for variable in SERVING}


def launched_environment(home: str, *, head: bool) -> dict[str, str]:
    """What Ray needs on a host of a launched cluster; home: the user's folder there."""
    own = (*LAUNCHED, *HEAD) if head else LAUNCHED
    return serving_environment() | {v.name: v.value.replace(HOME, home) for v in own}


def private_environment(session: Path, ports: Iterator[int], connections: int) -> dict[str, str]:
    """That, and what keeps a private Ray's HAProxy within its ``session`` folder, on free ports,
    and within so many connections at once."""
    own = {
        variable.name: str(next(ports))
        if variable.value == PORT
        else variable.value.replace(SESSION, str(session)).replace(CONNECTIONS, str(connections))
        for variable in PRIVATE
    }
    return serving_environment() | own


def limits_of(config: RouterConfig, *, insecure: bool, address: str | None = None) -> Limits:
    """What HAProxy needs of the configuration."""
    return Limits(
        max_in_flight=config.max_in_flight,
        retry_after_s=config.retry_after_s,
        max_timeout_ms=config.max_timeout_ms,
        body_timeout_ms=config.body_timeout_ms,
        insecure=insecure,
        address=address,
    )


def write_launcher(config: RouterConfig, *, insecure: bool, address: str) -> None:
    """Makes the program that a private Ray starts as HAProxy, to listen at this address; before
    Serve starts."""
    path = Path(os.environ[BINARY])
    limits = limits_of(config, insecure=insecure, address=address)
    path.write_text(launcher(sys.executable, limits.to_json()))
    path.chmod(0o700)
