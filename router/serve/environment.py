"""What the processes of Ray and Serve find in their environment, as a table: variable, value, why.

Every process of Ray inherits it from the one that starts Ray, and reads it when it is imported: a
runtime_env comes too late. ``SERVING`` holds on every cluster, and the launcher files in deploy/ray
set the same; ``PRIVATE`` comes on top for a Ray of our own on this machine, where several may run
side by side. Serve's other patches are ``router.serve.front`` and ``router.serve.haproxy``.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardline.router.router_config import RouterConfig
from shardline.router.serve.front import HOOK
from shardline.router.serve.haproxy import BINARY, launcher

# in a value: what ``private_environment`` fills in, because each session has its own
SESSION = "{session}"
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
        "test_haproxy.py::test_the_template_of_the_ray_installed_is_corrected",
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
    Variable("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1", "30 s lengthen every stop"),
    Variable("RAY_SERVE_LOG_TO_STDERR", "0", "the terminal is the command's"),
    Variable("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60", "busy laptops need over 5 s to start"),
)


def serving_environment() -> dict[str, str]:
    """What every process of a serving cluster needs, by name."""
    return {variable.name: variable.value for variable in SERVING}


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


def write_launcher(config: RouterConfig, address: str) -> None:
    """Makes the program that a private Ray starts as HAProxy, to listen at this address; before
    Serve starts."""
    limits = {"max_in_flight": config.max_in_flight, "retry_after_s": config.retry_after_s}
    path = Path(os.environ[BINARY])
    path.write_text(launcher(sys.executable, **limits, address=address))
    path.chmod(0o700)
