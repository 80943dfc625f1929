"""Where HTTP is served, and by which URL it is reached.

On a private Ray only HAProxy listens at ``cluster.http_host``. What is behind it, Serve's replicas
and its fallback proxy, stays on the loopback interface, where HAProxy asks for it.
"""

import ipaddress
import socket

from shardline.shards.core.errors import ConfigError

LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")  # "::" is IPv4 as well


def literal_address(host: str) -> str:
    """The address itself for an address or a name; of several the first, IPv4 before IPv6.

    Raises:
        ConfigError: there is none, or none that HAProxy can listen on.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"{host!r} is no address of this machine ({error})", field="cluster.http_host"
        ) from error
    address = min(found, key=lambda each: each[0] != socket.AF_INET)[4]
    if len(address) == 4 and address[3]:
        raise ConfigError(
            f"{host!r} belongs to one link only, which HAProxy cannot be told",
            field="cluster.http_host",
            hint="choose another address of that interface, or `::`",
        )
    return str(address[0])


def local_url(host: str, port: int) -> str:
    """The URL by which this machine reaches what listens at ``host``."""
    return url_of(host, port, LOOPBACK)


def url_of(host: str, port: int, address: str) -> str:
    """The URL of what listens at ``host``, on a machine that is reached at ``address``."""
    return f"http://{host_and_port(address if host in EVERYWHERE else host, port)}"


def is_loopback(host: str) -> bool:
    """Whether an address, or the name of one, is reached by processes of its own machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_and_port(host: str, port: int) -> str:
    """As in a URL, where an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
