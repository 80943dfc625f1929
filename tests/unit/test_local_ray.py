"""What the processes of a private Ray inherit, without starting one."""

import os
import socket

import pytest

from shardline.cluster.serving import ray_session as launch
from shardline.cluster.serving.serving_keys import CLIENT_VARIABLE, SERVER_VARIABLE
from shardline.shards.core.errors import Unavailable

SECRETS = {SERVER_VARIABLE: "search:" + "s" * 40, CLIENT_VARIABLE: "c" * 40}


@pytest.mark.parametrize("fails", [False, True])
def test_no_api_key_is_inherited_and_each_is_back_afterwards(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    inherited: dict[str, str] = {}

    def start(*_args: object, **_options: object) -> None:
        inherited.update(os.environ)
        if fails:
            raise Unavailable("Ray did not start")

    monkeypatch.setattr(launch, "_init_local", start)
    try:
        with launch.local_ray(num_cpus=1):
            assert {name: os.environ[name] for name in SECRETS} == SECRETS, "serving reads them"
    except Unavailable:
        assert fails
    assert inherited["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert not SECRETS.keys() & inherited.keys()
    assert not set(SECRETS.values()) & set(inherited.values())
    assert {name: os.environ[name] for name in SECRETS} == SECRETS


def test_without_keys_none_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "_init_local", lambda *_args, **_options: None)
    with launch.local_ray(num_cpus=1):
        pass
    assert not SECRETS.keys() & os.environ.keys()


def test_ports_are_free_and_none_that_the_system_gives_away() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        first_given = min(taken.getsockname()[1], 30_000)
    for _ in range(20):
        port = launch.free_port()
        assert 20_000 <= port < first_given
        with socket.create_server(("127.0.0.1", port)):
            assert not launch.port_is_free(port)


def test_without_a_free_port_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "port_is_free", lambda port: False)
    with pytest.raises(Unavailable, match="no free port"):
        launch.free_port()
