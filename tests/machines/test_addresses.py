"""`cluster.http_host` may be any address of this machine, and only HAProxy listens there."""

import json
import socket
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.machines.conftest import serving

REPLICAS = range(30_000, 31_000)  # ports of Serve's replicas
LOOPBACK = ("127.0.0.1", "::1")


def own_address(family: socket.AddressFamily) -> str | None:
    """An address of a network interface that other machines can reach."""
    found = [each for addresses in psutil.net_if_addrs().values() for each in addresses]
    reachable = [
        each.address
        for each in found
        if each.family == family and not each.address.startswith(("127.", "::1", "fe80"))
    ]
    return reachable[0] if reachable else None


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 2).close()
    except OSError:
        return False
    return True


def own(family: socket.AddressFamily) -> str:
    address = own_address(family)
    if address is None:
        pytest.skip(f"this machine has no address of {family.name} but loopback")
    return address


@pytest.mark.parametrize("kind", ["own IPv4", "own IPv6", "127.0.0.2", "::1", "::", "0.0.0.0"])
def test_serve_at_every_address(store: Path, kind: str) -> None:
    families = {"own IPv4": socket.AF_INET, "own IPv6": socket.AF_INET6}
    host = own(families[kind]) if kind in families else kind
    wide = {"::": ("127.0.0.1", "::1"), "0.0.0.0": ("127.0.0.1",)}
    shown = "127.0.0.1" if host in wide else f"[{host}]" if ":" in host else host
    with serving(store, "--set", f"cluster.http_host={host}") as served:
        url = f"http://{shown}:{served.port}"
        assert f"serving generation 1 at {url}  " in served.text
        assert json.loads((store / "serving.json").read_text())["url"] == url
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            assert answer.status == 200
        reached = {each for each in LOOPBACK if answers(each, served.port)}
        assert reached == set(wide.get(host, {host} & set(LOOPBACK)))
        for address in map(own_address, (socket.AF_INET, socket.AF_INET6)):
            is_wide = host == "::" or (host == "0.0.0.0" and ":" not in (address or ":"))
            assert address is None or answers(address, served.port) == (is_wide or address == host)
        family = psutil.Process(served.pid).children(recursive=True)
        listening = [
            connection.laddr
            for process in family
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        replicas = [address for address in listening if address.port in REPLICAS]
        assert replicas
        assert {address.ip for address in replicas} <= set(LOOPBACK)
