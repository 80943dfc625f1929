"""Where HTTP is served, as an address for HAProxy and as a URL for people."""

import socket
from typing import Any

import pytest

from shardline.cluster import http_address
from shardline.cluster.http_address import (
    host_and_port,
    is_loopback,
    literal_address,
    local_url,
    url_of,
)
from shardline.router.client.http1 import Server
from shardline.shards.core.errors import ConfigError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::", "2001:db8::7"])
def test_an_address_is_itself(host: str) -> None:
    assert literal_address(host) == host


def test_of_a_names_addresses_ipv4_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*_: object, **__: object) -> list[Any]:
        kinds = (socket.AF_INET6, ("::1", 0, 0, 0)), (socket.AF_INET, ("127.0.1.1", 0))
        return [(family, socket.SOCK_STREAM, 6, "", address) for family, address in kinds]

    monkeypatch.setattr(http_address.socket, "getaddrinfo", found)
    assert literal_address("here") == "127.0.1.1"


@pytest.mark.parametrize("host", ["nowhere.invalid", "1.2.3.4.5", "[::1]", "fe80::1%lo", "a" * 300])
def test_what_haproxy_cannot_listen_on_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.http_host"):
        literal_address(host)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("2001:db8::7", "http://[2001:db8::7]:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_the_url_reaches_it_from_this_machine(host: str, url: str) -> None:
    assert local_url(host, 8000) == url
    assert Server.of(url, None).port == 8000


def test_ipv6_stands_in_brackets_before_a_port() -> None:
    assert host_and_port("::", 1) == "[::]:1"
    assert host_and_port("0.0.0.0", 1) == "0.0.0.0:1"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://10.0.0.2:80"),
        ("::", "http://10.0.0.2:80"),
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
    ],
)
def test_who_listens_everywhere_is_asked_at_the_address_of_its_host(host: str, url: str) -> None:
    assert url_of(host, 80, "10.0.0.2") == url


@pytest.mark.parametrize(
    ("host", "is_one"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("node", False),
    ],
)
def test_loopback_addresses_are_told_from_others(host: str, is_one: bool) -> None:
    assert is_loopback(host) == is_one
