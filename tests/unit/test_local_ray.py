"""What the processes of a private Ray inherit, without starting one."""

import os
import socket
from types import SimpleNamespace

import pytest
from ray._private import services
from ray.exceptions import GetTimeoutError, RaySystemError, WorkerCrashedError

from shardline.cluster import build
from shardline.cluster.serving import ray_session as launch
from shardline.cluster.serving.serving_keys import CLIENT_VARIABLE, SERVER_VARIABLE
from shardline.shards.core.errors import Unavailable, last_line
from tests.fake_actor import raised_in_a_method, raised_in_the_constructor

SECRETS = {SERVER_VARIABLE: "search:" + "s" * 40, CLIENT_VARIABLE: "c" * 40}
PROXIES = {
    "http_proxy": "http://p",
    "HTTPS_PROXY": "[::",
    "All_Proxy": "socks5://p",
    "no_proxy": "",
}


@pytest.mark.parametrize("fails", [False, True])
def test_no_api_key_nor_proxy_is_inherited_and_each_is_back_afterwards(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    given = SECRETS | PROXIES
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    inherited: dict[str, str] = {}

    def start(*_args: object, **_options: object) -> None:
        inherited.update(os.environ)
        if fails:
            raise Unavailable("Ray did not start")

    monkeypatch.setattr(launch, "_init_local", start)
    try:
        with launch.local_ray(num_cpus=1):
            assert {name: os.environ[name] for name in given} == given, "serving reads them"
    except Unavailable:
        assert fails
    assert inherited["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert not given.keys() & inherited.keys()
    assert not set(SECRETS.values()) & set(inherited.values())
    assert {name: os.environ[name] for name in given} == given


def test_without_keys_none_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "_init_local", lambda *_args, **_options: None)
    with launch.local_ray(num_cpus=1):
        pass
    assert not SECRETS.keys() & os.environ.keys()


@pytest.mark.parametrize("by_variable", [False, True])
def test_an_address_where_nobody_listens_is_refused_before_ray_is_asked(
    monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    monkeypatch.setattr(launch.ray, "init", lambda *_args, **_options: pytest.fail("Ray asked"))
    dead = f"127.0.0.1:{launch.free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", dead if by_variable else "")
    address, named = ("auto", "(RAY_ADDRESS)") if by_variable else (dead, "no answer from")
    with (
        pytest.raises(Unavailable, match="no Ray cluster at") as caught,
        launch.attached_ray(address),
    ):
        pass
    assert "Connection refused" in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("address", ["auto", "nonsense", "host.invalid:6379"])
def test_what_is_no_address_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)  # of other Rays on this machine
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _folder: None)
    monkeypatch.setattr(launch.ray, "init", lambda *_args, **_options: pytest.fail("Ray asked"))
    with pytest.raises(Unavailable) as caught, launch.attached_ray(address):
        pass
    assert str(caught.value).startswith(f"no Ray cluster at {address!r}")
    assert "--address" not in str(caught.value), "an option of Ray's own commands"


def test_a_private_ray_does_not_follow_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    for name in launch.OTHER_RAYS:
        monkeypatch.setenv(name, "127.0.0.1:1")
    monkeypatch.setattr(launch.ray, "init", lambda *given, **_options: asked.extend(given))
    monkeypatch.setattr(launch, "_leave_note", lambda _session: None)
    with launch.local_ray(num_cpus=1):
        assert asked == ["local"]
        assert not set(launch.OTHER_RAYS) & os.environ.keys(), "Ray's processes would inherit them"
    assert {os.environ[name] for name in launch.OTHER_RAYS} == {"127.0.0.1:1"}


@pytest.mark.parametrize(("limit", "connections"), [(20_000, "4096"), (4096, "1587")])
def test_haproxy_is_told_what_the_open_files_allow(
    monkeypatch: pytest.MonkeyPatch, limit: int, connections: str
) -> None:
    told: list[str] = []
    monkeypatch.setattr(launch, "hard_limit", lambda: limit)
    monkeypatch.setattr(launch, "_leave_note", lambda _session: None)
    monkeypatch.setattr(
        launch.ray, "init", lambda *_, **__: told.append(os.environ["RAY_SERVE_HAPROXY_MAXCONN"])
    )
    with launch.local_ray(num_cpus=1):
        pass
    assert told == [connections]


def test_what_ray_says_at_its_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: object, **__: object) -> None:
        raise RuntimeError(
            "\x1b[36mTraceback (most recent call last):\n  File x\nOSError: full\n ^^\n"
        )

    monkeypatch.setattr(launch.ray, "init", init)
    with pytest.raises(Unavailable) as caught, launch.local_ray(num_cpus=1):
        pass
    assert str(caught.value) == "Ray did not start; got OSError: full"


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


TRACEBACK = """\x1b[36mray::build_shard()\x1b[39m (pid=1, ip=127.0.0.1)
  File "/a/b.py", line 3, in build_shard
    raise OSError("x")
          ^^^^^^^^^^^^
OSError: [Errno 5] Input/output error

"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(TRACEBACK), "OSError: [Errno 5] Input/output error"),
        (raised_in_a_method(Unavailable("busy")), "busy"),
        (
            raised_in_the_constructor(Unavailable("busy")),
            "busy",
        ),
        (WorkerCrashedError(), "The worker died unexpectedly"),
        (GetTimeoutError("slow"), "slow"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n ^^^ \n"), "ValueError"),
        (RuntimeError("a" * 10_000), "a" * 500),
    ],
)
def test_of_a_rays_error_the_last_line_that_says_something_is_told(
    error: Exception, line: str
) -> None:
    found = last_line(error)
    assert found.startswith(line)
    assert "\n" not in found
    assert "\x1b" not in found
    assert len(found) <= 500


@pytest.mark.parametrize(
    "raised", [RaySystemError("a\nno"), AssertionError("a\nno"), KeyError("no")]
)
def test_whatever_joining_a_ray_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    def init(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(launch.ray, "init", init)
    monkeypatch.setattr(launch, "check_answers", lambda address: "127.0.0.1:1")
    monkeypatch.setattr(launch, "check_token", lambda head: None)
    with pytest.raises(Unavailable) as caught, launch.attached_ray("127.0.0.1:1"):
        pass
    assert "\n" not in str(caught.value)
    assert "no" in str(caught.value)


def test_a_shards_build_that_the_system_ended_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that the system kills for want of memory raises nothing of ours."""

    def crashed(reference: object) -> None:
        raise WorkerCrashedError

    class Task:
        def options(self, **_: object) -> "Task":
            return self

        def remote(self, job: object) -> object:
            return job

    job = SimpleNamespace(threads=1)
    monkeypatch.setattr(build.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1}}])
    monkeypatch.setattr(build.ray, "remote", lambda **_: lambda function: Task())
    monkeypatch.setattr(build.ray, "wait", lambda waiting, **_: (waiting[:1], waiting[1:]))
    monkeypatch.setattr(build.ray, "get", crashed)
    with pytest.raises(Unavailable, match="ended early; got The worker died") as caught:
        list(build.run_on_ray([job]))
    assert "--in-process" in str(caught.value)
