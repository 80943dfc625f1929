"""Whether the HTTP address is one of this machine's, and its port one that can be listened on."""

import errno
import socket
from typing import Any

import psutil

from shardline.cluster.http_address import literal_address
from shardline.cluster.preflight.check import Check, failed, passed
from shardline.shards.core.errors import ConfigError, ShardlineError, Unavailable

HOST_KEY = "cluster.http_host"
FAMILIES = (socket.AF_INET, socket.AF_INET6)


def port_is_free(port: int, host: str = "") -> bool:
    """Whether a server could listen on this port of this address now; "": on those of IPv4.

    Raises:
        ConfigError: it is no address of this machine.
        Unavailable: this user may never listen on that port.
    """
    for family, address in _bindable(host, port):
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EPERM):
                    raise Unavailable(
                        f"this user may not listen on port {port}",
                        hint="those below 1024 are root's: `shardline serve --port 8000` takes "
                        "another",
                    ) from error
                if error.errno != errno.EADDRINUSE:
                    raise _not_ours(host, error.strerror or str(error)) from error
                return False
    return True


def check_http(host: str, port: int, own_url: str | None = None) -> Check:
    """own_url: where the store's own cluster answers now, if it is that which is asked about."""
    name = f"port {port}" if host == "127.0.0.1" else f"address {host}, port {port}"
    try:
        if own_url is not None:
            return passed(name, own_url)
        is_free = port_is_free(port, host)
        literal_address(host)  # HAProxy takes no address of a single link
    except ShardlineError as error:
        return failed(name, error)
    if not port:
        return passed(name, "any that is free")
    if is_free:
        return passed(name, "free")
    other = port + 1 if port < 65_535 else port - 1
    return failed(
        name,
        Unavailable(
            f"port {port} is taken by another program",
            hint="stop what listens there, or choose another with "
            f"`shardline serve --port {other}`",
        ),
    )


def own_addresses() -> list[str]:
    """The addresses of this machine's interfaces, IPv4 first, without the scope of link-local."""
    found = [
        (each.family, each.address.partition("%")[0])
        for addresses in psutil.net_if_addrs().values()
        for each in addresses
        if each.family in FAMILIES
    ]
    return [address for _, address in sorted(found)]


def _bindable(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """The socket addresses of a host. Raises ConfigError for what is no address at all."""
    if not host:
        return [(socket.AF_INET, ("", port))]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise _not_ours(host, str(error)) from error
    return [(family, address) for family, _, _, _, address in found]


def _not_ours(host: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{host!r} is no address of this machine ({reason})",
        field=HOST_KEY,
        expected=f"one of {', '.join([*own_addresses(), '0.0.0.0', '::'])}",
    )
